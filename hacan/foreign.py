"""Names and sizes of weights that others wrote: original ConvNeXt files, BERT files of any age (METHOD section 1)."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hacan.errors import UserError

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
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in CONVNEXT_NAMES:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


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
        key = key.removeprefix(f"{prefix}.")
        key = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", key)
        renamed[re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", key)] = value
    return renamed


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
