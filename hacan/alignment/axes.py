"""The two axes of a block of dot products [T, N, R], tokens of m captions and regions of N images, with equal verbs.

A kernel written for (queries, sources) serves both directions. Reduced tensors are [m, N, R] over tokens and [T, N, 1]
over regions; `spread` brings them back to where they meet [T, N, R].
"""

import torch
from torch import Tensor

from hacan.alignment.sides import Block


class RegionAxis:
    """Reductions over the regions of each image."""

    def __init__(self, block: Block) -> None:
        self._block = block
        self.longest = block.regions.features.shape[1]  # sources of an item, at most

    def sum(self, values: Tensor) -> Tensor:
        """[..., R] -> [..., 1]."""
        return values.sum(2, keepdim=True)

    def mean(self, values: Tensor) -> Tensor:
        """[..., R] -> [..., 1]."""
        return values.mean(2, keepdim=True)

    def max(self, values: Tensor) -> Tensor:
        """[..., R] -> [..., 1]."""
        return values.amax(2, keepdim=True)

    def norm(self, values: Tensor) -> Tensor:
        """[..., R] -> [..., 1]; torch takes 0 for its gradient at 0."""
        return torch.linalg.vector_norm(values, dim=2, keepdim=True)

    def spread(self, values: Tensor) -> Tensor:
        """[..., 1] as it is: it broadcasts."""
        return values

    def quadratic(self, weights: Tensor) -> Tensor:
        """Of weights w [T, N, R], w G w^T: [T, N, 1], one Gram matrix G for each image."""
        scratch = self._block.scratch
        half = self._block.layout.times(weights, self._block.regions.grams, scratch=scratch)
        return torch.mul(half, weights, out=scratch.over(half)).sum(2, keepdim=True)

    def inverse_norms(self) -> Tensor:
        """1 / ||v|| of each region, to meet [m, N, R]."""
        return self._block.layout.at_pairs(self._block.regions.inverse_norms)


class TokenAxis:
    """Reductions over the tokens of each caption."""

    def __init__(self, block: Block) -> None:
        self._block = block
        self.sum = block.segments.sum
        self.mean = block.segments.mean
        self.longest = block.segments.runs[-1][0]

    def max(self, values: Tensor) -> Tensor:
        """[T, ...] -> [m, ...]."""
        return self._block.segments.max(values, scratch=self._block.scratch)

    def norm(self, values: Tensor) -> Tensor:
        """[T, ...] -> [m, ...], with a floor inside the root, so that its gradient at 0 is finite."""
        return (self.sum(torch.mul(values, values, out=self._block.scratch("work", *values.shape))) + 1e-30).sqrt()

    def spread(self, values: Tensor) -> Tensor:
        """[m, N, R] -> [T, N, R]."""
        segments = self._block.segments
        return segments.spread(values, out=self._block.scratch("work", segments.rows, *values.shape[1:]))

    def quadratic(self, weights: Tensor) -> Tensor:
        """Of weights w [T, N, R], w G w^T: [m, N, R], one Gram matrix G for each caption."""
        segments, scratch = self._block.segments, self._block.scratch
        values = segments.sorted(weights.flatten(1), scratch=scratch)
        work = scratch("work", *values.shape)
        places = [None] * len(segments.runs) if work is None else segments.split(work)
        squares = []
        for gram, part, place in zip(self._block.tokens.grams, segments.split(values), places, strict=True):
            half = torch.bmm(gram, part, out=place)
            squares.append(torch.mul(half, part, out=scratch.over(half)).sum(1))
        return segments.join(squares).view(-1, *weights.shape[1:])

    def inverse_norms(self) -> Tensor:
        """1 / ||t|| of each token, to meet [T, N, 1]."""
        return self._block.tokens.inverse_norms[:, None, None]
