"""The hybrid form of the fine similarity: attention over raw dot products (METHOD section 2)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hacan.alignment.base import FineAlignment

FOCAL_TYPES = ("prob", "equal")


class HybridAlignment(FineAlignment):
    """KSF(V_h, T_h) + LRG(V_h, T_m) + LRG(V_m, T_h) with attention of inverse temperature lambda (METHOD section 2)."""

    def __init__(self, *, direction: str, temperature: float, focal_type: str, score_memory: int = 256) -> None:
        super().__init__(direction=direction, score_memory=score_memory)
        if focal_type not in FOCAL_TYPES:
            raise ValueError(f"focal_type={focal_type!r}: expected one of {', '.join(FOCAL_TYPES)}")
        self.temperature = temperature
        self.focal_type = focal_type

    def score_block(self, stream: str, regions: Tensor, tokens: Tensor) -> Tensor:
        """Regions [N, R, d] x tokens [m, L, d] -> scores [N, m] of one stream."""
        count, places, _ = regions.shape
        captions, length, _ = tokens.shape
        dots = (tokens.flatten(0, 1) @ regions.flatten(0, 1).T).view(captions, length, count, places)
        focal = self.focal_type if stream == "ksf" else None
        scores = []
        if self.direction in ("i2t", "both"):
            grams = tokens @ tokens.mT
            attended = lambda w: (grams @ w.flatten(2)).view_as(w)  # noqa: E731
            norms = regions.square().sum(-1)
            scores.append(_attend(dots, attended, norms, 1, 3, self.temperature, focal).mean(2))
        if self.direction in ("t2i", "both"):
            grams = regions @ regions.mT
            attended = lambda w: torch.einsum("clnr,nrs->clns", w, grams)  # noqa: E731
            norms = tokens.square().sum(-1)[:, :, None]
            scores.append(_attend(dots, attended, norms, 3, 1, self.temperature, focal).mean(1))
        return (sum(scores) / len(scores)).T


def _attend(dots, attended, query_norms, source, query, temperature, focal):  # noqa: ANN001, ANN202
    a = F.leaky_relu(dots, 0.1)
    b = a / ((a.square().sum(query, keepdim=True) + 1e-30).sqrt() + 1e-8)
    w = torch.softmax(temperature * b, source)
    if focal is not None:
        with torch.no_grad():
            bar = (w**1.5).sum(source, keepdim=True) / w.sqrt().sum(source, keepdim=True)
            if focal == "equal":
                bar = torch.full_like(bar, 1 / w.shape[source])
            keep = w > bar * (1 - 32 * torch.finfo(w.dtype).eps)
        w = w * keep
        w = w / w.sum(source, keepdim=True)
    num = (w * dots).sum(source)
    den = (w * attended(w)).sum(source).clamp_min(1e-16)
    return num * torch.rsqrt(den * query_norms.clamp_min(1e-16))
