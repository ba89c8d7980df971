"""Names and sizes of weights that others wrote: original ConvNeXt files, BERT files of any age, the public release."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hacan.alignment import FORMS, hyperparameters_of
from hacan.errors import UserError
from hacan.settings import ModelSettings

# The original ConvNeXt naming -> timm's, applied in this order.
CONVNEXT_NAMES = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv(\d)\.", r".mlp.fc\1."),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def names_of_convnext(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in the original ConvNeXt naming as timm names it; any other comes back as it is."""
    if "downsample_layers.0.0.weight" not in state:
        return dict(state)
    return {name_of_convnext(key): value for key, value in state.items()}


def name_of_convnext(key: str) -> str:
    """One name of the original ConvNeXt naming as timm has it: `stages.2.26.gamma` is `stages.2.blocks.26.gamma`."""
    for pattern, replacement in CONVNEXT_NAMES:
        key = re.sub(pattern, replacement, key)
    return key


def convnext_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Depths and widths of a ConvNeXt from its tensors in timm's naming, as timm's arguments."""
    depths, dims = [], []
    while (block := f"stages.{len(depths)}.blocks.0.conv_dw.weight") in state:
        pattern = re.compile(rf"stages\.{len(depths)}\.blocks\.(\d+)\.")
        depths.append(1 + max(int(match[1]) for key in state if (match := pattern.match(key))))
        dims.append(state[block].shape[0])
    return {"depths": depths, "dims": dims}


def names_of_bert(state: Mapping[str, Tensor], *, prefix: str) -> dict[str, Tensor]:
    """A BERT state dict as transformers names it now: without `prefix.`, LayerNorm gamma/beta as weight/bias."""
    inside = any(key.startswith(f"{prefix}.") for key in state)
    renamed = {}
    for key, value in state.items():
        if inside and not key.startswith(f"{prefix}."):
            continue  # heads of pretraining beside the encoder
        renamed[name_of_bert(key.removeprefix(f"{prefix}."))] = value
    return renamed


def name_of_bert(key: str) -> str:
    """One name of a BERT without the names that its first, TensorFlow, files gave to LayerNorm."""
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", key))


def bert_sizes(state: Mapping[str, Tensor], *, source: str | Path) -> dict[str, Any]:
    """The sizes of a BERT from its tensors, as fields of its config; heads are 64 wide, as in every published BERT."""
    layers = {int(match[1]) for key in state if (match := re.match(r"encoder\.layer\.(\d+)\.", key))}
    tables = {name: state.get(f"embeddings.{name}_embeddings.weight") for name in ("word", "position", "token_type")}
    if not layers or any(table is None for table in tables.values()):
        raise UserError(
            f"{source} has no config.json beside it, and its keys are not those of a BERT "
            f"(embeddings.word_embeddings.weight, encoder.layer.0...): they are {', '.join(list(state)[:3])}, ..."
        )
    width = tables["word"].shape[1]
    return {
        "model_type": "bert",
        "vocab_size": tables["word"].shape[0],
        "hidden_size": width,
        "num_hidden_layers": 1 + max(layers),
        "num_attention_heads": max(1, width // 64),
        "intermediate_size": state["encoder.layer.0.intermediate.dense.weight"].shape[0],
        "max_position_embeddings": tables["position"].shape[0],
        "type_vocab_size": tables["token_type"].shape[0],
    }


# The public release's modules -> ours. Its BERT and its ConvNeXt are renamed tensor by tensor.
RELEASE_NAMES = {
    "cross_modal_text_transform": "project_text_high",
    "cross_modal_text_transform_2": "project_text_mid",
    "fc3": "project_image_high",
    "fc2": "project_image_mid",
    **{f"txt_enc.v_fc{n}": f"aggregate_text.fc{n}" for n in (1, 2, 3)},
    **{f"img_enc.v_fc{n}": f"aggregate_image.fc{n}" for n in (1, 2, 3)},
}
# What its tensors do not tell (METHOD sections 1, 2, 5: its Flickr30K preset).
RELEASE_DEFAULTS = {
    "activation": "leaky_relu",
    "alignment": "hybrid",
    "direction": "t2i",
    "lambda_softmax": 9.0,
    "focal_type": "prob",
}
RELEASE_TEXT, RELEASE_IMAGE = "text_transformer.", "convnexts."


def is_release(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the names of the public release."""
    return all(any(key.startswith(prefix) for key in state) for prefix in (RELEASE_TEXT, RELEASE_IMAGE))


def name_of_release(key: str) -> str | None:
    """One name of the public release as ours, or None for what has no use: the ImageNet head, `fc1` and more."""
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
    """Settings of a public release's model: sizes from its tensors (in our names), the rest as `given`.

    Where no settings are given, those of the config `written` into the checkpoint, and else the release's defaults.
    """
    prefix = "image_encoder.backbone."
    sizes = convnext_sizes({key.removeprefix(prefix): value for key, value in state.items()})
    rest = dict(RELEASE_DEFAULTS)
    scoring = {"alignment", *(key for form in FORMS.values() for key in hyperparameters_of(form))}
    for field in dataclasses.fields(ModelSettings):
        if given is not None and field.name in rest.keys() | scoring:
            rest[field.name] = getattr(given, field.name)
        elif field.name in rest and type(written.get(field.name)) is type(rest[field.name]):
            allowed = FORMS if field.name == "alignment" else field.metadata["choices"]
            if not allowed or written[field.name] in allowed:
                rest[field.name] = written[field.name]
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
