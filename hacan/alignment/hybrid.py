"""The hybrid form of the fine similarity: attention over raw dot products (METHOD section 2)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hacan.alignment.base import DIRECTIONS, FineAlignment, all_dots, inverse_norm, masked_mean, register
from hacan.alignment.scoring import STREAMS

FOCAL_TYPES = ("prob", "equal")
KSF_KINDS = ("focal", "plain")


@register("hybrid")
class HybridAlignment(FineAlignment):
    """Cross attention of queries Q to sources S, and the cosine of each query with its attended vector.

        a_sq = LeakyReLU_0.1(s . q)
        b_sq = a_sq / (||a_s.|| + 1e-8)            the norm is over the queries
        w_qs = softmax over s of lambda * b_sq     lambda = `lambda_softmax`
        u_q  = sum_s w_qs s
        score(Q, S) = mean over q of cos(q, u_q)

    LRG is this score. KSF is the same with focal weights, by `focal_type`; with `ksf="plain"` (an ablation) it is the
    same as LRG. `direction`: "i2t" (regions are the queries), "t2i" (tokens are), or "both", the mean of the two.
    """

    attention_units = dict.fromkeys(STREAMS, "times the uniform weight")

    def __init__(
        self,
        *,
        direction: str,
        lambda_softmax: float,
        focal_type: str,
        ksf: str = "focal",
        score_memory: float = 256,
    ) -> None:
        super().__init__(score_memory=score_memory)
        if direction not in DIRECTIONS:
            raise ValueError(f"direction={direction!r}: expected one of {', '.join(DIRECTIONS)}")
        if focal_type not in FOCAL_TYPES:
            raise ValueError(f"focal_type={focal_type!r}: expected one of {', '.join(FOCAL_TYPES)}")
        if ksf not in KSF_KINDS:
            raise ValueError(f"ksf={ksf!r}: expected one of {', '.join(KSF_KINDS)}")
        if not lambda_softmax > 0:
            raise ValueError(f"lambda_softmax={lambda_softmax!r}: expected a number above 0")
        self.direction, self.lambda_softmax, self.focal_type = direction, lambda_softmax, focal_type
        self.ksf = ksf

    def key_semantic_filter(self, regions: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """KSF(V_h, T_h) = score(Q, S) with focal weights, [*, N, M]."""
        return self._both_ways(regions, tokens, mask, self.ksf == "focal")

    def local_relationship_guidance(self, regions: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """LRG(V_h, T_m) and LRG(V_m, T_h) = score(Q, S), [*, N, M]."""
        return self._both_ways(regions, tokens, mask, False)

    def _both_ways(self, regions: Tensor, tokens: Tensor, mask: Tensor, focal: bool) -> Tensor:
        scores = []
        if self.direction != "t2i":
            dots = all_dots(tokens, regions)  # [*, M, L, N, R]
            scores.append(self.score(dots, regions, tokens, None, mask, focal).mT)
        if self.direction != "i2t":
            dots = all_dots(regions, tokens) if not scores else dots.movedim((-2, -1), (-4, -3)).contiguous()
            scores.append(self.score(dots, tokens, regions, mask, None, focal))
        return scores[0] if len(scores) == 1 else (scores[0] + scores[1]) / 2

    def score(
        self, dots: Tensor, queries: Tensor, sources: Tensor, q_mask: Tensor | None, s_mask: Tensor | None, focal: bool
    ) -> Tensor:
        """Scores [*, B, A] of queries [*, A, q, d] and sources [*, B, s, d] from the dot products [*, B, s, A, q].

        The vectors u are never formed: q . u_q = sum_s w_qs (s . q), and ||u_q||^2 = w_q G w_q^T with G = S S^T.
        """
        w = self.weights(dots, s_mask, focal)
        gram = sources @ sources.mT  # [*, B, s, s]
        along = (w * dots).sum(-3)  # q . u_q, [*, B, A, q]
        squares = (w * (gram @ w.flatten(-2)).view_as(w)).sum(-3)  # ||u_q||^2
        cosines = along * squares.clamp_min(1e-16).rsqrt() * inverse_norm(queries).unsqueeze(-3)
        return masked_mean(cosines, None if q_mask is None else q_mask.unsqueeze(-3), -1)

    def weights(self, dots: Tensor, s_mask: Tensor | None, focal: bool) -> Tensor:
        """Return the attention weights w of dot products [*, B, s, A, q]; they sum to 1 over s."""
        a = F.leaky_relu(dots, 0.1)
        b = a / (torch.linalg.vector_norm(a, dim=-1, keepdim=True) + 1e-8)
        padding = dots.new_zeros(())
        if s_mask is not None:
            padding = dots.new_zeros(s_mask.shape).masked_fill(~s_mask, -torch.inf)[..., None, None]
        w = torch.add(padding, b, alpha=self.lambda_softmax).softmax(-3)
        return self.focal_weights(w, s_mask) if focal else w

    def focal_weights(self, w: Tensor, s_mask: Tensor | None) -> Tensor:
        """Return the weights of the kept sources, divided by their sum; the others are 0.

        "prob": source s is kept where sum_s' (w_s - w_s') sqrt(w_s') > 0, which is w_s > sum_s' w^1.5 / sum_s' w^0.5.
        "equal": where w_s > 1 / n_s. The test has no gradient. Public code: uniform weights pass no test, and 0 / 0
        turns training to NaN; here: the largest weight always passes, and all that equal it, so uniform weights do.
        """
        with torch.no_grad():
            eps = torch.finfo(w.dtype).eps
            if self.focal_type == "prob":
                roots = w.sqrt()
                bar = (w * roots).sum(-3, keepdim=True) / roots.sum(-3, keepdim=True)
            else:
                bar = masked_mean(w, None if s_mask is None else s_mask[..., None, None], -3, keepdim=True)
            kept = w > torch.minimum(bar * (1 - 8 * eps), w.amax(-3, keepdim=True) * (1 - eps))
        w = w * kept
        return w / w.sum(-3, keepdim=True)

    def attention(self, regions: Tensor, tokens: Tensor, mask: Tensor, stream: str) -> Tensor:
        """Return the weights times the number of sources (1: uniform), [*, N, M, L, R]; "both": as "t2i"."""
        focal = stream == "ksf" and self.ksf == "focal"
        if self.direction == "i2t":  # sources are the tokens
            w = self.weights(all_dots(tokens, regions), mask, focal)  # [*, M, L, N, R]
            w = w.movedim(-2, -4) * mask.sum(-1)[..., None, :, None, None]
        else:
            w = self.weights(all_dots(regions, tokens), None, focal)  # [*, N, R, M, L]
            w = w.movedim(-3, -1) * regions.shape[-2]
        return w.masked_fill(~mask[..., None, :, :, None], torch.nan)
