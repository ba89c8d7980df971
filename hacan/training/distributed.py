"""Batches of several processes as one: gathers with gradients, so that negatives are global.

With P processes of B pairs each, every process scores its own images against all P*B texts, the rows are gathered, and
every process takes the loss of the whole [P*B, P*B] matrix. A gather's backward pass sums the gradients of all
processes; DDP then averages them, so that each parameter gets the gradient of one process with P*B pairs (METHOD 4 and
5 know one process only).
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hacan.types import EncodedTexts


class _Gather(torch.autograd.Function):
    """[B, ...] of each process -> [P*B, ...] by rank; backward: the sum of all processes' gradients, own rows."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        """Gather equal numbers of rows."""
        ctx.count = len(rows)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        """Sum over the processes, and this process's rows of it."""
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        start = dist.get_rank() * ctx.count
        return gradient[start : start + ctx.count]


class Gatherer(NamedTuple):
    """How many rows each process brings, agreed once a batch: they differ where unreadable pictures were skipped."""

    counts: tuple[int, ...]

    @classmethod
    def agree(cls, count: int, device: torch.device) -> "Gatherer":
        """Tell every process how many rows each has."""
        counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
        counts[dist.get_rank()] = count
        dist.all_reduce(counts)
        return cls(tuple(counts.tolist()))

    def rows(self, rows: Tensor) -> Tensor:
        """[B, ...] -> the rows of all processes; gradients flow back to the process that brought them."""
        widest = max(self.counts)
        padded = F.pad(rows, [0, 0] * (rows.ndim - 1) + [0, widest - len(rows)])
        parts = _Gather.apply(padded).split(widest)
        return torch.cat([part[:count] for part, count in zip(parts, self.counts, strict=True)])

    def texts(self, texts: EncodedTexts) -> EncodedTexts:
        """The captions of all processes, padded to the widest of them."""
        width = torch.tensor(texts.mask.shape[1], device=texts.mask.device)
        dist.all_reduce(width, op=dist.ReduceOp.MAX)
        missing = int(width) - texts.mask.shape[1]
        return EncodedTexts(
            high=self.rows(F.pad(texts.high, [0, 0, 0, missing])),
            mid=self.rows(F.pad(texts.mid, [0, 0, 0, missing])),
            mask=self.rows(F.pad(texts.mask, [0, missing]).to(torch.uint8)).bool(),
            pooled=self.rows(texts.pooled),
        )
