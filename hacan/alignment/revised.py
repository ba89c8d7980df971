"""The revised form of the fine similarity: cosines c(., .) of words and regions (METHOD section 3).

[CLS] and [SEP] take no part. The gates of the Local Relationship Guidance are positive numbers, and a cosine ignores
positive scale: they cancel exactly (up to the floor of the norms), so they are not computed.
"""

import torch
from torch import Tensor

from hacan.alignment.base import FineAlignment
from hacan.alignment.segments import Segments
from hacan.alignment.sides import Block, Regions, Tokens, inverse_norms, residuals


class RevisedAlignment(FineAlignment):
    """KSF(V_h, T_h) + LRG(V_m, T_h) + LRG(V_h, T_m) on cosines; only KSF has a direction (METHOD section 3)."""

    drop_ends = True

    def derive_regions(self, features: Tensor, *, filtered: bool) -> Regions:
        """Regions of unit length, and for t2i their residuals of unit length, [N, R, d] both."""
        rest = None
        if filtered and "t2i" in self.directions:
            rest, scale = residuals(features, features.mean(1, keepdim=True))
            rest = rest * scale[..., None]
        return Regions(features * inverse_norms(features)[..., None], residuals=rest)

    def derive_tokens(self, features: Tensor, segments: Segments, *, filtered: bool) -> Tokens:
        """Norms of the tokens [T], and for i2t of their residuals [T]."""
        rest = None
        if filtered and "i2t" in self.directions:
            rest = residuals(features, segments.spread(segments.mean(features)))[1]
        return Tokens(features, inverse_norms(features), inverse_residual_norms=rest)

    def score_stream(self, stream: str, block: Block) -> Tensor:
        """Scores of one stream, [m, N]."""
        if stream == "ksf":
            return key_semantic_filter(block, directions=self.directions)
        return local_relationship_guidance(block)

    def attention_stream(self, stream: str, block: Block) -> Tensor:
        """Cosines [T, R] of one pair, of KSF z."""
        if stream == "ksf":
            return _filtered_cosines(block, self.directions[-1], _agreement(block)).squeeze(1)
        return _cosines(block).squeeze(1)


def local_relationship_guidance(block: Block) -> Tensor:
    """LRG: the mean over words of sum_v softmax_v(p) p, p = c(v, t), [m, N] (METHOD section 3).

    Release: gates on words and regions; here: none, because they cancel. |p| <= 1, so exp needs no shift.
    """
    p = _cosines(block)
    weights = torch.exp(p, out=block.scratch("weights", *p.shape))
    total = torch.mul(weights, p, out=block.scratch.over(p)).sum(2)
    return block.segments.mean(total / weights.sum(2))


def key_semantic_filter(block: Block, *, directions: tuple[str, ...]) -> Tensor:
    """KSF: the mean over q of max_s z, z = c(q, s - mean(S)) sign(delta), [m, N] (METHOD section 3)."""
    sign = _agreement(block)
    scores = []
    for direction in directions:
        z = _filtered_cosines(block, direction, sign)
        scores.append(
            block.segments.max(z, scratch=block.scratch).mean(2)
            if direction == "i2t"
            else block.segments.mean(z.amax(2))
        )
    return scores[0] if len(scores) == 1 else (scores[0] + scores[1]) / 2


def _cosines(block: Block) -> Tensor:
    dots = block.product()
    return torch.mul(dots, block.tokens.inverse_norms[:, None, None], out=block.scratch.over(dots))


@torch.no_grad()
def _agreement(block: Block) -> Tensor:
    """The sign of delta = ((r - mean_s r) + (r - mean_q r)) / 2, r = c(q, s); 0 where |delta| <= 1e-8.

    It is the same in both directions, and no gradient flows through it.
    """
    scratch, segments = block.scratch, block.segments
    r = _cosines(block)
    means = segments.spread(segments.mean(r), out=scratch("work", *r.shape)).add_(r.mean(2, keepdim=True))
    delta = r.sub_(means, alpha=0.5)
    sign = scratch("sign", *r.shape)
    positive = torch.gt(delta, 1e-8, out=torch.empty_like(delta) if sign is None else sign)
    return positive.sub_(torch.lt(delta, -1e-8, out=means))


def _filtered_cosines(block: Block, direction: str, sign: Tensor) -> Tensor:
    """Z [T, N, R]. The product is taken with the residual sources themselves: no difference of large numbers."""
    scratch = block.scratch
    if direction == "i2t":
        tokens, segments = block.tokens.features, block.segments
        means = segments.spread(segments.mean(tokens), out=scratch("rest", *tokens.shape))
        dots = block.product(tokens=torch.sub(tokens, means, out=scratch.over(means)))
        scale = block.tokens.inverse_residual_norms
    else:
        dots = block.product(regions=block.regions.residuals)
        scale = block.tokens.inverse_norms
    z = torch.mul(dots, sign, out=scratch.over(dots))
    return torch.mul(z, scale[:, None, None], out=scratch.over(z))
