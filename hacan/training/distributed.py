"""Hard negatives across processes: gathers that pass gradients (METHOD sections 4 and 5 describe one process).

With P processes of B pairs each, a process scores its own images against all P*B texts. The rows are gathered, and
every process computes the loss of the whole [P*B, P*B] matrix. The backward pass of a gather sums the gradients of all
processes and DDP averages them, so that each parameter gets the gradient of one process with P*B pairs.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hacan.types import EncodedTexts


class _Gather(torch.autograd.Function):
    """Forward: [B, ...] of each process -> [P*B, ...] by rank. Backward: own rows of the summed gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        """Gather the same number of rows from every process."""
        ctx.count = len(rows)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Sum the gradients of all processes and return those of this process's rows."""
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        start = dist.get_rank() * ctx.count
        return gradient[start : start + ctx.count]


def gather_counts(count: int, device: torch.device) -> tuple[int, ...]:
    """Return the number of rows of every process, by rank; they differ where unreadable images were skipped."""
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    counts[dist.get_rank()] = count
    dist.all_reduce(counts)
    return tuple(counts.tolist())


def gather_rows(rows: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Return the rows [B, ...] of all processes, by rank; gradients flow back to the process that owns a row."""
    widest = max(counts)
    padded = F.pad(rows, [0, 0] * (rows.ndim - 1) + [0, widest - len(rows)])
    parts = _Gather.apply(padded).split(widest)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def gather_texts(texts: EncodedTexts, counts: tuple[int, ...]) -> EncodedTexts:
    """Return the texts of all processes, padded to the longest text."""
    width = torch.tensor(texts.mask.shape[1], device=texts.mask.device)
    dist.all_reduce(width, op=dist.ReduceOp.MAX)
    missing = int(width) - texts.mask.shape[1]
    return EncodedTexts(
        high=gather_rows(F.pad(texts.high, [0, 0, 0, missing]), counts),
        mid=gather_rows(F.pad(texts.mid, [0, 0, 0, missing]), counts),
        mask=gather_rows(F.pad(texts.mask, [0, missing]).to(torch.uint8), counts).bool(),
        pooled=gather_rows(texts.pooled, counts),
    )
