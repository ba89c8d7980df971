"""What a model is beside its weights: for the receipt, and for the hash that kept features are found by.

Two models of equal weights may still differ: in the levels that they read, in an activation, in lambda.
"""

from typing import Any

from hacan.models.hacan import HACAN
from hacan.retrieval.features import content_hash


def form_of(model: HACAN) -> str:
    """Hash of what turns pictures and tokens into features, weights aside: modules, levels, the text's config.

    Alignment takes no part in that: two models that differ in it alone share their features.
    """
    modules = {name: repr(module) for name, module in model.named_children() if module is not model.alignment}
    text = {k: v for k, v in model.text_encoder.backbone.config.to_dict().items() if not k.startswith("_")}
    text.pop("transformers_version", None)  # versions have their own place
    return content_hash([modules, model.image_encoder.levels, model.text_encoder.levels, repr(sorted(text.items()))])


def settings_of(model: HACAN) -> dict[str, Any]:
    """The architecture and the alignment's hyper-parameters as plain values."""
    return {
        "image_encoder": model.image_encoder.name,
        "image_levels": list(model.image_encoder.levels),
        "text_encoder": model.text_encoder.name,
        "text_levels": list(model.text_encoder.levels),
        "embed_dim": model.project_image_high.out_features,
        "activation": repr(model.aggregate_image.activation),
        **model.alignment.hyperparameters,
    }
