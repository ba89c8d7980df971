"""The revised form of the fine similarity: cosines, without gates, since they cancel (METHOD section 3)."""

import torch
from torch import Tensor

from hacan.alignment.base import FineAlignment


class RevisedAlignment(FineAlignment):
    """KSF(V_h, T_h) + LRG(V_m, T_h) + LRG(V_h, T_m) on cosines (METHOD section 3)."""

    def score_block(self, stream: str, regions: Tensor, tokens: Tensor) -> Tensor:
        """Regions [N, R, d] x tokens [m, L, d] -> scores [N, m] of one stream."""
        if tokens.shape[1] > 2:
            tokens = tokens[:, 1:-1]
        if stream != "ksf":
            p = torch.einsum("cld,nrd->clnr", _unit(tokens), _unit(regions))
            return (torch.softmax(p, 3) * p).sum(3).mean(1).T
        r = torch.einsum("cld,nrd->clnr", _unit(tokens), _unit(regions))
        delta = r - (r.mean(1, keepdim=True) + r.mean(3, keepdim=True)) / 2
        sign = delta.sign() * (delta.abs() > 1e-8)
        scores = []
        if self.direction in ("i2t", "both"):
            z = torch.einsum("cld,nrd->clnr", _unit(_residual(tokens)), _unit(regions)) * sign
            scores.append(z.amax(1).mean(2))
        if self.direction in ("t2i", "both"):
            z = torch.einsum("cld,nrd->clnr", _unit(tokens), _unit(_residual(regions))) * sign
            scores.append(z.amax(3).mean(1))
        return (sum(scores) / len(scores)).T


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True).clamp_min(1e-16))


def _residual(x: Tensor) -> Tensor:
    shifted = x - x[..., :1, :]
    return shifted - shifted.mean(-2, keepdim=True)
