"""The revised form of the fine similarity: cosines c(., .) of regions and words (METHOD section 3)."""

from typing import ClassVar

import torch
from torch import Tensor

from hacan.alignment.base import DIRECTIONS, FineAlignment, all_dots, inverse_norm, masked_mean, register
from hacan.alignment.scoring import STREAMS


@register("revised")
class RevisedAlignment(FineAlignment):
    """Guidance and filter on cosines; [CLS] and [SEP] are excluded if a caption has more than 2 tokens.

    LRG(V, T) = mean over words t of sum_v softmax_v(p) p,  p = c(v, t)
    KSF(Q, S) = mean over q of max over s of z,  z = c(q, s - mean(S)) * sign(delta), 0 where |delta| <= 1e-8,
                delta = ((r - mean_s r) + (r - mean_q r)) / 2,  r = c(q, s)

    `direction` is KSF's: "i2t" (regions are the queries), "t2i" (words are), or "both", the mean of the two. Public
    code: LRG gates words and regions by sigmoids; here: no gates, because they are positive scalars, which a cosine
    ignores. They cancel exactly, up to the 1e-8 floor of the norms.
    """

    attention_units: ClassVar = dict.fromkeys(STREAMS, "times the uniform weight") | {"ksf": "signed residual cosine"}

    def __init__(self, *, direction: str, score_memory: float = 256) -> None:
        super().__init__(score_memory=score_memory)
        if direction not in DIRECTIONS:
            raise ValueError(f"direction={direction!r}: expected one of {', '.join(DIRECTIONS)}")
        self.direction = direction

    def local_relationship_guidance(self, regions: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """LRG(V, T), [*, N, M]."""
        p = cosines(regions, tokens)  # [*, N, R, M, L]
        return masked_mean((p.softmax(-3) * p).sum(-3), words_only(mask).unsqueeze(-3), -1)

    def key_semantic_filter(self, regions: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """KSF(Q, S), [*, N, M]."""
        words = words_only(mask)
        scores = []
        if self.direction != "t2i":  # regions are the queries: z is [*, M, L, N, R]
            z = filtered_cosines(tokens, regions, words, None)
            z = z.masked_fill(~words[..., None, None], -torch.inf)
            scores.append(z.amax(-3).mean(-1).mT)
        if self.direction != "i2t":  # words are the queries: z is [*, N, R, M, L]
            z = filtered_cosines(regions, tokens, None, words)
            scores.append(masked_mean(z.amax(-3), words.unsqueeze(-3), -1))
        return scores[0] if len(scores) == 1 else (scores[0] + scores[1]) / 2

    def attention(self, regions: Tensor, tokens: Tensor, mask: Tensor, stream: str) -> Tensor:
        """LRG: softmax_v(p) times the number of regions; KSF: z ("both": as "t2i"); [*, N, M, L, R]."""
        words = words_only(mask)
        if stream != "ksf":
            found = cosines(regions, tokens).softmax(-3).movedim(-3, -1) * regions.shape[-2]
        elif self.direction == "i2t":
            found = filtered_cosines(tokens, regions, words, None).movedim(-2, -4)
        else:
            found = filtered_cosines(regions, tokens, None, words).movedim(-3, -1)
        return found.masked_fill(~words[..., None, :, :, None], torch.nan)


def words_only(mask: Tensor) -> Tensor:
    """Return the mask [*, L] without the first and last real token, [CLS] and [SEP], if there are more than 2."""
    place, count = mask.cumsum(-1), mask.sum(-1, keepdim=True)
    return mask & ((count <= 2) | ((place > 1) & (place < count)))


def cosines(sources: Tensor, queries: Tensor) -> Tensor:
    """Return c(q, s) of sources [*, B, s, d] and queries [*, A, q, d]: [*, B, s, A, q]."""
    unit = sources * inverse_norm(sources)[..., None]
    return all_dots(unit, queries) * inverse_norm(queries)[..., None, None, :, :]


def filtered_cosines(sources: Tensor, queries: Tensor, source_mask: Tensor | None, query_mask: Tensor | None) -> Tensor:
    """Return z of METHOD section 3 for sources [*, B, s, d] and queries [*, A, q, d]: [*, B, s, A, q].

    The sign has no gradient. A residual within rounding of the mean (32 epsilon of ||s||) counts as zero: equal
    sources, including a single one, have no residual direction.
    """
    source_mask = None if source_mask is None else source_mask[..., None]
    query_mask = None if query_mask is None else query_mask[..., None, None, :, :]
    rest = sources - masked_mean(sources, source_mask, -2, keepdim=True)
    with torch.no_grad():
        r = cosines(sources, queries)
        mean_s = masked_mean(r, None if source_mask is None else source_mask[..., None], -3, keepdim=True)
        delta = r - (mean_s + masked_mean(r, query_mask, -1, keepdim=True)) / 2
        sign = delta.sign() * (delta.abs() > 1e-8)
        rounding = 32 * torch.finfo(sources.dtype).eps * torch.linalg.vector_norm(sources, dim=-1)
        has_direction = torch.linalg.vector_norm(rest, dim=-1) > rounding
    unit = rest * (inverse_norm(rest) * has_direction)[..., None]
    return all_dots(unit, queries) * (sign * inverse_norm(queries)[..., None, None, :, :])
