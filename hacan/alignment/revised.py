"""The revised form of the fine similarity: cosines c(., .) of words and regions (METHOD section 3).

[CLS] and [SEP] take no part. The gates of the Local Relationship Guidance are positive numbers, and a cosine ignores
positive scale: they cancel exactly (up to the floor of the norms), so they are not computed.
"""

import torch
import torch.nn.functional as F
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


def local_relationship_guidance(block: Block) -> Tensor:
    """LRG: the mean over words of sum_v softmax_v(p) p, p = c(v, t), [m, N] (METHOD section 3).

    Release: gates on words and regions; here: none, because they cancel. |p| <= 1, so exp needs no shift.
    """
    p = block.product() * block.tokens.inverse_norms[:, None, None]
    weights = p.exp()
    return block.segments.mean((weights * p).sum(2) / weights.sum(2))


def key_semantic_filter(block: Block, *, directions: tuple[str, ...]) -> Tensor:
    """KSF: the mean over q of max_s z, z = c(q, s - mean(S)) sign(delta), [m, N] (METHOD section 3).

    delta = ((r - mean_s r) + (r - mean_q r)) / 2 with r = c(q, s), the same in both directions; z is zero where
    |delta| <= 1e-8. The product is taken with the residual sources themselves: no difference of large numbers.
    """
    tokens, segments = block.tokens, block.segments
    with torch.no_grad():
        r = block.product() * tokens.inverse_norms[:, None, None]
        delta = r - (segments.spread(segments.mean(r)) + r.mean(2, keepdim=True)) / 2
        sign = F.hardshrink(delta, 1e-8).sign()
    scores = []
    if "i2t" in directions:
        rest = tokens.features - segments.spread(segments.mean(tokens.features))
        z = block.product(tokens=rest) * (sign * tokens.inverse_residual_norms[:, None, None])
        scores.append(segments.max(z).mean(2))
    if "t2i" in directions:
        z = block.product(regions=block.regions.residuals) * sign
        scores.append(segments.mean(z.amax(2) * tokens.inverse_norms[:, None]))  # a positive scale leaves max in place
    return scores[0] if len(scores) == 1 else (scores[0] + scores[1]) / 2
