"""What the fine similarity of one picture and one caption looked at: a word-by-region map per stream.

Maps and scores are the alignment's own (`FineAlignment.attention`), so that a map shows what was scored.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hacan.alignment import RevisedAlignment
from hacan.alignment.base import AttentionMap, FineAlignment
from hacan.types import EncodedImages, EncodedTexts

EVEN_SHARE = "times the even share"
RESIDUAL = "cosine with the residual, signed"


class StreamAttention(NamedTuple):
    """One stream of one pair."""

    values: Tensor  # [W, R] float32; NaN in the rows of tokens that take no part
    unit: str  # of the values
    score: float  # what this stream adds to the fine similarity


@torch.no_grad()
def pair_attention(alignment: FineAlignment, images: EncodedImages, texts: EncodedTexts) -> dict[str, StreamAttention]:
    """The maps of a single pair, by stream; R are the regions of the stream's image level, row by row of its grid.

    Hybrid: the attention weights, as a multiple of what even attention would give (1 everywhere: no preference). t2i: a
    word's weights over the regions; i2t: each region's weight for the word; both: as t2i. Revised: LRG, a word's
    softmax weights over the regions in the same unit; KSF, the signed residual cosine z (METHOD sections 2 and 3).
    """
    if len(images.high) != 1 or len(texts.high) != 1:
        raise ValueError(f"{len(images.high)} images and {len(texts.high)} texts were given, expected one of each")
    places = texts.mask[0].cpu().nonzero().flatten()
    found = {}
    for stream, seen in alignment.attention(images, texts).items():
        weights = seen.weights.float().cpu()
        values, unit = _in_units(alignment, stream, seen._replace(weights=weights[seen.words]))
        full = torch.full((texts.mask.shape[1], weights.shape[1]), torch.nan)
        full[places[seen.words]] = values
        found[stream] = StreamAttention(full, unit, float(alignment(images, texts, streams=(stream,))))
    return found


def _in_units(alignment: FineAlignment, stream: str, seen: AttentionMap) -> tuple[Tensor, str]:
    words, regions = seen.weights.shape
    if not isinstance(alignment, RevisedAlignment):
        sources = regions if alignment.directions[-1] == "t2i" else words
        return seen.weights * sources, EVEN_SHARE
    if stream == "ksf":
        return seen.weights, RESIDUAL
    return seen.weights.softmax(1) * regions, EVEN_SHARE
