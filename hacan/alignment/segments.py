"""Reductions over the tokens of each caption when the captions stand one after the other, without padding."""

import torch
from torch import Tensor

from hacan.alignment.scratch import Scratch


class Segments:
    """m captions, in any order, whose T tokens are the rows of a matrix; every caption has at least one token.

    Sums need no order. What needs captions of one length side by side (maxima, Gram matrices) sees them as `runs`: of
    exactly that length where the captions come sorted, and otherwise, since their rows are gathered anyway, of lengths
    rounded up (`run_lengths`), so that runs are few; a caption's last token then stands in for those it lacks.
    """

    def __init__(self, lengths: Tensor, device: torch.device | str) -> None:
        """`lengths` [m] int64, on the CPU."""
        ends = lengths.cumsum(0)
        self.rows = int(lengths.sum())
        self.bounds = torch.cat([ends.new_zeros(1), ends]).to(device)  # [m + 1] caption c is rows bounds[c : c + 2]
        self._starts = self.bounds[:-1]
        self._every = torch.arange(self.rows, device=device)
        self._owner = torch.repeat_interleave(lengths).to(device)
        self._lengths = lengths.to(device)
        self._sorted_rows = self._back = None
        self.by_length = torch.arange(len(lengths))  # captions in the order of the runs
        if bool((lengths.diff() < 0).any()):
            self.by_length = torch.argsort(lengths, stable=True)
            self._back = torch.argsort(self.by_length).to(device)
            last = ends[self.by_length] - 1
            lengths = lengths[self.by_length]
            starts, lengths = last + 1 - lengths, run_lengths(lengths)
            rows = torch.minimum(ranges(starts, lengths), torch.repeat_interleave(last, lengths))
            self._sorted_rows = rows.to(device)
        values, counts = lengths.unique_consecutive(return_counts=True)
        self.runs = list(zip(values.tolist(), counts.tolist(), strict=True))  # (length, captions)

    def sum(self, values: Tensor) -> Tensor:
        """[T, ...] -> [m, ...], the sum over each caption's tokens."""
        return _Sum.apply(values.flatten(1), self).view(-1, *values.shape[1:])

    def mean(self, values: Tensor) -> Tensor:
        """[T, ...] -> [m, ...], the mean over each caption's tokens."""
        total = self.sum(values)
        return total / self._lengths.view(-1, *[1] * (total.ndim - 1))

    def spread(self, values: Tensor, *, out: Tensor | None = None) -> Tensor:
        """[m, ...] -> [T, ...], each caption's value at all of its tokens."""
        if out is not None:
            return torch.index_select(values, 0, self._owner, out=out)
        return _Spread.apply(values.flatten(1), self).view(-1, *values.shape[1:])

    def max(self, values: Tensor, *, scratch: Scratch) -> Tensor:
        """[T, ...] -> [m, ...], the maximum over each caption's tokens."""
        return self.join([part.amax(1) for part in self.split(self.sorted(values, scratch=scratch))])

    def sorted(self, values: Tensor, *, scratch: Scratch) -> Tensor:
        """[T, ...] -> [T' >= T, ...], the captions in the order of the runs; as it is where that is their order."""
        if self._sorted_rows is None:
            return values
        out = scratch("sorted", len(self._sorted_rows), *values.shape[1:])
        return torch.index_select(values, 0, self._sorted_rows, out=out)

    def split(self, values: Tensor) -> list[Tensor]:
        """Sorted [T, ...] -> views [count, length, ...] for each run."""
        parts = values.split([length * count for length, count in self.runs])
        return [
            part.view(count, length, *values.shape[1:]) for part, (length, count) in zip(parts, self.runs, strict=True)
        ]

    def join(self, parts: list[Tensor]) -> Tensor:
        """Results [count, ...] of each run -> [m, ...] in the order of the captions."""
        values = parts[0] if len(parts) == 1 else torch.cat(parts)
        return values if self._back is None else values.index_select(0, self._back)


class _Sum(torch.autograd.Function):
    """Segment sum: an embedding bag of consecutive rows, the fastest in torch; its own gradient would be a scatter."""

    @staticmethod
    def forward(ctx, values: Tensor, segments: Segments) -> Tensor:  # noqa: ANN001
        ctx.segments = segments
        return torch.embedding_bag(values, segments._every, segments._starts, False, 0)[0]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ANN001
        return _Spread.apply(gradient, ctx.segments), None


class _Spread(torch.autograd.Function):
    """The transpose of the segment sum."""

    @staticmethod
    def forward(ctx, values: Tensor, segments: Segments) -> Tensor:  # noqa: ANN001
        ctx.segments = segments
        return values.index_select(0, segments._owner)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ANN001
        return _Sum.apply(gradient.contiguous(), ctx.segments), None


def run_lengths(lengths: Tensor | int) -> Tensor | int:
    """Lengths rounded up to multiples of 4: few runs, for a tenth more rows (captions have 8 to 20 tokens)."""
    return (lengths + 3) // 4 * 4


def ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """The ranges starts[k] : starts[k] + lengths[k], one after the other."""
    ends = lengths.cumsum(0)
    return torch.repeat_interleave(starts - ends + lengths, lengths) + torch.arange(int(lengths.sum()))
