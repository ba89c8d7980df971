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
        self._regions = block.regions
        self._layout = block.layout

    def sum(self, values: Tensor) -> Tensor:
        """[..., R] -> [..., 1]."""
        return values.sum(2, keepdim=True)

    def norm(self, values: Tensor) -> Tensor:
        """[..., R] -> [..., 1]; torch takes 0 for its gradient at 0."""
        return torch.linalg.vector_norm(values, dim=2, keepdim=True)

    def mean(self, values: Tensor) -> Tensor:
        """[..., R] -> [..., 1]."""
        return values.mean(2, keepdim=True)

    def max(self, values: Tensor) -> Tensor:
        """[..., R] -> [..., 1]."""
        return values.amax(2, keepdim=True)

    def spread(self, values: Tensor) -> Tensor:
        """[..., 1] as it is: it broadcasts."""
        return values

    def quadratic(self, weights: Tensor) -> Tensor:
        """Of weights w [T, N, R], w G w^T: [T, N, 1], one Gram matrix G for each image."""
        return self._layout.quadratic(weights, self._regions.grams)

    def inverse_norms(self) -> Tensor:
        """1 / ||v|| of each region, to meet [m, N, R]."""
        return self._layout.at_pairs(self._regions.inverse_norms)


class TokenAxis:
    """Reductions over the tokens of each caption."""

    def __init__(self, block: Block) -> None:
        self._tokens = block.tokens
        self._segments = block.segments
        self.sum = block.segments.sum
        self.mean = block.segments.mean
        self.max = block.segments.max
        self.spread = block.segments.spread

    def norm(self, values: Tensor) -> Tensor:
        """[T, ...] -> [m, ...], with a floor inside the root, so that its gradient at 0 is finite."""
        return (self.sum(values * values) + 1e-30).sqrt()

    def quadratic(self, weights: Tensor) -> Tensor:
        """Of weights w [T, N, R], w G w^T: [m, N, R], one Gram matrix G for each caption."""
        parts = self._segments.split(weights.flatten(1))
        squares = [(part * (gram @ part)).sum(1) for part, gram in zip(parts, self._tokens.grams, strict=True)]
        return self._segments.join(squares).view(-1, *weights.shape[1:])

    def inverse_norms(self) -> Tensor:
        """1 / ||t|| of each token, to meet [T, N, 1]."""
        return self._tokens.inverse_norms[:, None, None]
