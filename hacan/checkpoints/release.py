"""Checkpoints of the public release: their names, sizes and settings in ours (METHOD sections 1, 2 and 5)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hacan.alignment import FORMS, hyperparameters_of
from hacan.models.image_encoder import convnext_sizes, name_of_convnext
from hacan.models.text_encoder import name_of_bert
from hacan.settings import ModelSettings

# Modules of the public release -> ours. BERT and ConvNeXt are renamed tensor by tensor.
RELEASE_NAMES = {
    "cross_modal_text_transform": "project_text_high",
    "cross_modal_text_transform_2": "project_text_mid",
    "fc3": "project_image_high",
    "fc2": "project_image_mid",
    **{f"txt_enc.v_fc{n}": f"aggregate_text.fc{n}" for n in (1, 2, 3)},
    **{f"img_enc.v_fc{n}": f"aggregate_image.fc{n}" for n in (1, 2, 3)},
}
# Settings that the tensors do not determine (METHOD sections 1, 2, 5: the Flickr30K preset).
RELEASE_DEFAULTS = {
    "activation": "leaky_relu",
    "alignment": "hybrid",
    "direction": "t2i",
    "lambda_softmax": 9.0,
    "focal_type": "prob",
}
RELEASE_TEXT, RELEASE_IMAGE = "text_transformer.", "convnexts."


def is_release(state: Mapping[str, Tensor]) -> bool:
    """Return whether the names are those of the public release."""
    return all(any(key.startswith(prefix) for key in state) for prefix in (RELEASE_TEXT, RELEASE_IMAGE))


def public_form(written: Mapping[str, Any]) -> str | None:
    """Return the alignment of the public code that stored the config `written`; None if there is no config.

    The revised code has the keys inference_topk and global_loss_weight, which the first release does not have, and no
    key `alignment`.
    """
    if not written:
        return None
    if "alignment" in written:
        return str(written["alignment"])
    return "revised" if {"inference_topk", "global_loss_weight"} <= written.keys() else "hybrid"


def name_of_release(key: str) -> str | None:
    """Return our name of a tensor of the public release, or None if it is not used (ImageNet head, `fc1`, ...)."""
    if key.startswith(RELEASE_TEXT):
        name = name_of_bert(key.removeprefix(RELEASE_TEXT))
        return None if name.endswith("position_ids") else f"text_encoder.backbone.{name}"
    if key.startswith(RELEASE_IMAGE):
        name = name_of_convnext(key.removeprefix(RELEASE_IMAGE))
        if name.startswith("head.norm."):
            return f"image_encoder.final_norm.{name.removeprefix('head.norm.')}"
        return None if name.startswith("head.") else f"image_encoder.backbone.{name}"
    module, _, leaf = key.rpartition(".")
    return f"{RELEASE_NAMES[module]}.{leaf}" if module in RELEASE_NAMES else None


def release_settings(
    state: Mapping[str, Tensor], *, given: ModelSettings | None, written: Mapping[str, Any]
) -> ModelSettings:
    """Return the settings of a public release's model: sizes from its tensors (in our names), the rest from `given`.

    If `given` is None, the rest comes from the config `written` in the checkpoint, or is the release's default. A
    checkpoint of the revised code has the revised alignment, unless `given` names another form than the default.
    """
    prefix = "image_encoder.backbone."
    sizes = convnext_sizes({key.removeprefix(prefix): value for key, value in state.items()})
    rest: dict[str, Any] = dict(RELEASE_DEFAULTS)
    scoring = {"alignment", *(key for form in FORMS.values() for key in hyperparameters_of(form))}
    for field in dataclasses.fields(ModelSettings):
        if given is not None and field.name in rest.keys() | scoring:
            rest[field.name] = getattr(given, field.name)
        elif field.name in rest and type(written.get(field.name)) is type(rest[field.name]):
            allowed = FORMS if field.name == "alignment" else field.metadata["choices"]
            if not allowed or written[field.name] in allowed:
                rest[field.name] = written[field.name]
    if public_form(written) == "revised" and rest["alignment"] == RELEASE_DEFAULTS["alignment"]:
        rest["alignment"] = "revised"
    width = state.get("project_image_high.weight")
    return ModelSettings(
        image_encoder="convnext_base",
        image_weights="random",
        image_encoder_args=sizes,
        image_levels=(-2, -1),
        text_encoder="bert",
        text_weights="random",
        text_encoder_args={},
        text_levels=(-3, -1),
        embed_dim=768 if width is None else width.shape[0],
        **rest,
    )
