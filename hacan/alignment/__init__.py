"""The fine alignment: EncodedImages x EncodedTexts -> scores [image, text] (METHOD sections 2 and 3)."""

import torch
from torch import nn

from hacan.alignment.base import AttentionMap
from hacan.alignment.hybrid import HybridAlignment
from hacan.alignment.packing import pack_texts
from hacan.alignment.revised import RevisedAlignment
from hacan.alignment.sides import STREAMS

__all__ = ["STREAMS", "AttentionMap", "HybridAlignment", "RevisedAlignment", "build_alignment", "pack_texts"]

ALIGNMENTS = ("hybrid", "revised")


def build_alignment(
    name: str,
    *,
    direction: str,
    temperature: float,
    focal_type: str,
    score_memory: int = 256,
    product_dtype: torch.dtype | None = None,
) -> nn.Module:
    """The alignment called `name`; the revised form reads neither temperature nor focal type."""
    shared = {"direction": direction, "score_memory": score_memory, "product_dtype": product_dtype}
    if name == "hybrid":
        return HybridAlignment(temperature=temperature, focal_type=focal_type, **shared)
    if name == "revised":
        return RevisedAlignment(**shared)
    raise ValueError(f"unknown alignment {name!r}: expected one of {', '.join(ALIGNMENTS)}")
