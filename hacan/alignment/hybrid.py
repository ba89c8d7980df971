"""The hybrid form of the fine similarity: attention over raw dot products (METHOD section 2).

For queries q and sources s, lambda the inverse temperature:

    a_sq = LeakyReLU_0.1(s . q),  b_sq = a_sq / (||a_s.|| + 1e-8),  w_qs = softmax_s(lambda b_sq),  u_q = sum_s w_qs s
    score(Q, S) = mean over q of cos(q, u_q)

The attended vectors u are never formed: q . u = sum_s w (q . s), and ||u||^2 = w G w^T with G = S S^T once per item. A
cosine does not depend on the length of u, so the weights are never divided by their sum.

On a CPU, in float32 and without gradients, attention.c does the same where there is a C compiler: what changes here
must change there, and the tests hold both against the twin.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hacan.alignment import fused
from hacan.alignment.axes import RegionAxis, TokenAxis
from hacan.alignment.base import FineAlignment
from hacan.alignment.scratch import Scratch
from hacan.alignment.segments import Segments
from hacan.alignment.sides import Block, Regions, Tokens, inverse_norms

FOCAL_TYPES = ("prob", "equal")
STEEP = 20.0  # |lambda b| stays below it: exp needs no shift in float32, with features up to 1e6


class HybridAlignment(FineAlignment):
    """KSF(V_h, T_h) + LRG(V_h, T_m) + LRG(V_m, T_h) with attention of inverse temperature lambda (METHOD section 2)."""

    def __init__(
        self,
        *,
        direction: str,
        temperature: float,
        focal_type: str,
        score_memory: int = 256,
        product_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(direction=direction, score_memory=score_memory, product_dtype=product_dtype)
        if focal_type not in FOCAL_TYPES:
            raise ValueError(f"focal_type={focal_type!r}: expected one of {', '.join(FOCAL_TYPES)}")
        if not temperature > 0:
            raise ValueError(f"temperature={temperature!r}: expected an inverse temperature above 0")
        self.temperature = temperature
        self.focal_type = focal_type

    def derive_regions(self, features: Tensor, *, filtered: bool) -> Regions:
        """Norms of the regions [N, R], and for t2i their Gram matrices [N, R, R]."""
        if "t2i" not in self.directions:
            return Regions(features, inverse_norms(features))
        grams = features @ features.mT
        return Regions(features, _inverse_norms(grams), grams)

    def derive_tokens(self, features: Tensor, segments: Segments, *, filtered: bool) -> Tokens:
        """Norms of the tokens [T], and for i2t the captions' Gram matrices, run by run."""
        if "i2t" not in self.directions:
            return Tokens(features, inverse_norms(features))
        grams = tuple(part @ part.mT for part in segments.split(features))
        return Tokens(features, torch.cat([_inverse_norms(part).flatten() for part in grams]), grams)

    def score_stream(self, stream: str, block: Block) -> Tensor:
        """Scores of one stream, [m, N]."""
        arguments = {"directions": self.directions, "temperature": self.temperature}
        if stream == "ksf":
            return key_semantic_filter(block, focal_type=self.focal_type, **arguments)
        return local_relationship_guidance(block, **arguments)

    def attention_stream(self, stream: str, block: Block) -> Tensor:
        """Attention weights [T, R] of one pair, of KSF the focal ones; they sum to 1 over the sources."""
        queries, sources = _axes(block, self.directions[-1])
        focal_type = self.focal_type if stream == "ksf" else None
        weights = _weights(
            _leaky(block.product(), block.scratch), queries, sources, self.temperature, focal_type, block.scratch
        )
        return (weights / sources.spread(sources.sum(weights))).squeeze(1)


def local_relationship_guidance(block: Block, *, directions: tuple[str, ...], temperature: float) -> Tensor:
    """LRG: score(Q, S) with soft attention, [m, N], the mean over `directions` (METHOD section 2)."""
    return _attention_score(block, directions, temperature, None)


def key_semantic_filter(block: Block, *, directions: tuple[str, ...], temperature: float, focal_type: str) -> Tensor:
    """KSF: the same with focal weights, [m, N] (METHOD section 2).

    Source s is kept for query q when w_qs > sum_s' w^1.5 / sum_s' w^0.5 ("prob", which is the quadratic test written
    out) or w_qs > 1 / n_s ("equal"), or within 8 rounding errors of that bar; where that keeps nothing, the largest
    weights are kept. Uniform weights therefore keep everything, whatever rounding makes of them: with a single query
    every source has b = 1 or -1.
    """
    return _attention_score(block, directions, temperature, focal_type)


def _attention_score(block: Block, directions: tuple[str, ...], temperature: float, focal_type: str | None) -> Tensor:
    library = fused.library_for(block)
    if library is not None:
        return fused.attention_score(library, block, directions, temperature, focal_type)
    dots = block.product()
    raw = _leaky(dots, block.scratch)
    scores = []
    for direction in directions:
        queries, sources = _axes(block, direction)
        weights = _weights(raw, queries, sources, temperature, focal_type, block.scratch)
        squares = _squares(weights, sources, temperature, block.scratch)
        along = sources.sum(torch.mul(weights, dots, out=block.scratch("work", *dots.shape)))
        scores.append(queries.mean(along * squares.rsqrt() * queries.inverse_norms()).squeeze(2))
    return scores[0] if len(scores) == 1 else (scores[0] + scores[1]) / 2


def _inverse_norms(grams: Tensor) -> Tensor:
    """Of Gram matrices [N, n, n] of sources, 1 / max(||s||, 1e-8): [N, n], without another pass over the sources."""
    return grams.diagonal(dim1=1, dim2=2).clamp_min(1e-16).rsqrt()


def _squares(weights: Tensor, sources: RegionAxis | TokenAxis, temperature: float, scratch: Scratch) -> Tensor:
    """Of u = sum_s e_s s, ||u||^2 with ||u|| / sum_s e_s at least 1e-8."""
    squares = sources.quadratic(weights)
    if scratch.readable:
        most = sources.longest * (math.exp(temperature) if temperature <= STEEP else 1.0)  # of sum_s e_s
        if squares.amin() > (1e-8 * most) ** 2:
            return squares  # no sum is needed to see that all are above their floor
    return torch.maximum(squares, (1e-8 * sources.sum(weights)).square())


def _leaky(dots: Tensor, scratch: Scratch) -> Tensor:
    out = scratch("raw", *dots.shape)
    return F.leaky_relu(dots, 0.1) if out is None else torch.ops.aten.leaky_relu.out(dots, 0.1, out=out)


def _axes(block: Block, direction: str) -> tuple[RegionAxis | TokenAxis, RegionAxis | TokenAxis]:
    """Queries and sources."""
    regions, tokens = RegionAxis(block), TokenAxis(block)
    return (regions, tokens) if direction == "i2t" else (tokens, regions)


def _weights(
    raw: Tensor,
    queries: RegionAxis | TokenAxis,
    sources: RegionAxis | TokenAxis,
    temperature: float,
    focal_type: str | None,
    scratch: Scratch,
) -> Tensor:
    """The attention of a = `raw` [T, N, R], not divided by its sum over sources."""
    norms = queries.norm(raw) + 1e-8
    out = scratch("weights", *raw.shape)
    if focal_type is None:
        weights = torch.mul(raw, queries.spread(temperature / norms), out=out)
    else:  # divided, so that a / |a| is 1 exactly with a single query
        weights = torch.div(raw, queries.spread(norms), out=out).mul_(temperature)
    if temperature > STEEP:
        weights = weights.sub_(sources.spread(sources.max(weights.detach())))
    weights = weights.exp_()
    if focal_type is None:
        return weights
    return torch.mul(weights, _kept(weights, sources, focal_type, scratch), out=scratch.over(weights))


@torch.no_grad()
def _kept(weights: Tensor, sources: RegionAxis | TokenAxis, focal_type: str, scratch: Scratch) -> Tensor:
    """1 where a source is kept for a query, else 0; weights may have any scale."""
    if focal_type == "prob":
        roots = torch.sqrt(weights, out=scratch("work", *weights.shape))
        total = sources.sum(roots)
        bar = sources.sum(torch.mul(roots, weights, out=scratch.over(roots))) / total
    else:
        bar = sources.mean(weights)
    eps = torch.finfo(weights.dtype).eps
    bar = sources.spread(torch.minimum(bar * (1 - 8 * eps), sources.max(weights) * (1 - eps)))
    kept = scratch("work", *weights.shape)
    return torch.gt(weights, bar, out=torch.empty_like(weights) if kept is None else kept)
