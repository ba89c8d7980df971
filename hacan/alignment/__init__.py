"""The fine alignment: EncodedImages x EncodedTexts -> scores [image, text] (METHOD sections 2 and 3)."""

from torch import nn

from hacan.alignment.base import AttentionMap
from hacan.alignment.hybrid import HybridAlignment
from hacan.alignment.packing import pack_texts
from hacan.alignment.revised import RevisedAlignment
from hacan.alignment.sides import STREAMS

__all__ = ["STREAMS", "AttentionMap", "HybridAlignment", "RevisedAlignment", "build_alignment", "pack_texts"]

ALIGNMENTS = ("hybrid", "revised")


def build_alignment(
    name: str, *, direction: str, temperature: float, focal_type: str, score_memory: int = 256
) -> nn.Module:
    """The alignment called `name`; the revised form reads neither temperature nor focal type."""
    if name == "hybrid":
        return HybridAlignment(
            direction=direction, temperature=temperature, focal_type=focal_type, score_memory=score_memory
        )
    if name == "revised":
        return RevisedAlignment(direction=direction, score_memory=score_memory)
    raise ValueError(f"unknown alignment {name!r}: expected one of {', '.join(ALIGNMENTS)}")
