"""What the fine similarity of one picture and one caption looked at: a word-by-region map per stream.

The direct form of METHOD sections 2 and 3, one pair at a time: attended vectors and weights are formed, not derived.
Its scores are those of `hacan.alignment`, which the tests compare, so that a map shows what was scored.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hacan.alignment import HybridAlignment, RevisedAlignment
from hacan.types import EncodedImages, EncodedTexts

STREAM_LEVELS = {"ksf": ("high", "high"), "lrg_high": ("high", "mid"), "lrg_mid": ("mid", "high")}  # image, text
EVEN_SHARE = "times the even share"
RESIDUAL = "cosine with the residual, signed"


class StreamAttention(NamedTuple):
    """One stream of one pair."""

    values: Tensor  # [W, R] float32; NaN in the rows of tokens that take no part
    unit: str  # of the values
    score: float  # what this stream adds to the fine similarity


@torch.no_grad()
def pair_attention(alignment: nn.Module, images: EncodedImages, texts: EncodedTexts) -> dict[str, StreamAttention]:
    """The maps of a single pair, by stream; R are the regions of the stream's image level, row by row of its grid.

    Hybrid: the attention weights, as a multiple of what even attention would give (1 everywhere: no preference).
    t2i: a word's weights over the regions; i2t: each region's weight for the word. Both: the mean of the two, as in the
    score. Revised: LRG, a word's softmax weights over the regions in the same unit; KSF, the signed residual cosine z.
    """
    if len(images.high) != 1 or len(texts.high) != 1:
        raise ValueError(f"{len(images.high)} images and {len(texts.high)} texts were given, expected one of each")
    kept = texts.mask[0].nonzero().flatten()
    if isinstance(alignment, RevisedAlignment) and len(kept) > 2:
        kept = kept[1:-1]  # [CLS] and [SEP]
    found = {}
    for stream, (of_image, of_text) in STREAM_LEVELS.items():
        regions = getattr(images, of_image)[0].float()
        tokens = getattr(texts, of_text)[0, kept].float()
        values, unit, score = _of_stream(alignment, stream, regions, tokens)
        full = values.new_full((texts.mask.shape[1], len(regions)), torch.nan)
        full[kept] = values
        found[stream] = StreamAttention(full.cpu(), unit, float(score))
    return found


def _of_stream(alignment: nn.Module, stream: str, regions: Tensor, tokens: Tensor) -> tuple[Tensor, str, Tensor]:
    directions = ("i2t", "t2i") if alignment.direction == "both" else (alignment.direction,)
    maps, scores = [], []
    if isinstance(alignment, RevisedAlignment) and stream != "ksf":
        cosines = _cosines(tokens, regions)
        weights = cosines.softmax(1)
        return weights * len(regions), EVEN_SHARE, (weights * cosines).sum(1).mean()
    for direction in directions:
        queries, sources = (regions, tokens) if direction == "i2t" else (tokens, regions)
        if isinstance(alignment, RevisedAlignment):
            values = signed_residual_cosines(queries, sources)
            score = values.amax(1).mean()
        elif isinstance(alignment, HybridAlignment):
            focal_type = alignment.focal_type if stream == "ksf" else None
            weights = attention_weights(queries, sources, temperature=alignment.temperature, focal_type=focal_type)
            values = weights * len(sources)
            score = F.cosine_similarity(queries, weights @ sources, dim=1).mean()
        else:
            raise ValueError(f"alignment is {type(alignment).__name__}, expected HybridAlignment or RevisedAlignment")
        maps.append(values.T if direction == "i2t" else values)
        scores.append(score)
    unit = RESIDUAL if isinstance(alignment, RevisedAlignment) else EVEN_SHARE
    return torch.stack(maps).mean(0), unit, torch.stack(scores).mean()


def attention_weights(queries: Tensor, sources: Tensor, *, temperature: float, focal_type: str | None) -> Tensor:
    """Weights w [n_q, n_s] of METHOD section 2, each row of sum 1; `focal_type`: the Key Semantic Filter."""
    raw = F.leaky_relu(queries @ sources.T, 0.1)
    weights = (temperature * raw / (raw.norm(dim=0, keepdim=True) + 1e-8)).softmax(1)
    if focal_type is None:
        return weights
    if focal_type == "prob":
        bar = weights.pow(1.5).sum(1, keepdim=True) / weights.sqrt().sum(1, keepdim=True)
    else:
        bar = torch.full_like(weights[:, :1], 1 / len(sources))
    # The largest weight reaches its bar when all are equal: lowered by rounding, so that everything is kept then.
    weights = weights * (weights > bar * (1 - 32 * torch.finfo(weights.dtype).eps))
    return weights / weights.sum(1, keepdim=True)


def signed_residual_cosines(queries: Tensor, sources: Tensor) -> Tensor:
    """Matrix z [n_q, n_s] of METHOD section 3: c(q, s - mean(S)) sign(delta), zero where |delta| <= 1e-8."""
    r = _cosines(queries, sources)
    delta = r - (r.mean(1, keepdim=True) + r.mean(0, keepdim=True)) / 2
    residuals = sources - sources.mean(0)
    # Sources that are all equal leave a residual of rounding only, which has no direction.
    real = residuals.norm(dim=1) > 32 * torch.finfo(sources.dtype).eps * sources.norm(dim=1)
    return _cosines(queries, residuals) * real * F.hardshrink(delta, 1e-8).sign()


def _cosines(left: Tensor, right: Tensor) -> Tensor:
    return F.normalize(left, dim=1, eps=1e-8) @ F.normalize(right, dim=1, eps=1e-8).T
