"""How the rows of a block of dot products [T, N, R] belong to images: a full rectangle, or a list for each image."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hacan.alignment.scratch import Scratch


class Rectangle:
    """All of N images meet all of m captions: scores [m, N]."""

    def product(self, tokens: Tensor, regions: Tensor, *, scratch: Scratch) -> Tensor:
        """[T, d] x [N, R, d] -> dot products [T, N, R]."""
        columns = regions.flatten(0, 1)
        dots = torch.mm(tokens, columns.T, out=scratch("dots", len(tokens), len(columns), dtype=tokens.dtype))
        return dots.view(-1, *regions.shape[:2])

    def times(self, weights: Tensor, grams: Tensor, *, scratch: Scratch) -> Tensor:
        """Of weights w [T, N, R] and Gram matrices G [N, R, R] of the regions, w G: [T, N, R]."""
        weights = weights.transpose(0, 1)
        return torch.bmm(weights, grams, out=scratch("work", *weights.shape)).transpose(0, 1)

    def at_pairs(self, values: Tensor) -> Tensor:
        """[N, R], a value for each region -> what meets [m, N, R]."""
        return values


class Listing:
    """Each of G images meets captions of its own, image after image: N is 1, scores [m, 1]."""

    def __init__(self, rows: Sequence[int], images: Tensor) -> None:
        """`rows`: tokens of each image's captions, [G]; `images` [m]: the image of each caption, 0 to G - 1."""
        self._rows = rows
        self._images = images

    def product(self, tokens: Tensor, regions: Tensor, *, scratch: Scratch) -> Tensor:
        """[T, d] x [G, R, d] -> dot products [T, 1, R], each token with the regions of its own image."""
        out = scratch("dots", len(tokens), regions.shape[1], dtype=regions.dtype)
        return self._by_image(tokens, regions.mT, out).unsqueeze(1)

    def times(self, weights: Tensor, grams: Tensor, *, scratch: Scratch) -> Tensor:
        """Of weights w [T, 1, R] and Gram matrices G [G, R, R] of the regions, w G: [T, 1, R]."""
        weights = weights.squeeze(1)
        return self._by_image(weights, grams, scratch("work", *weights.shape)).unsqueeze(1)

    def at_pairs(self, values: Tensor) -> Tensor:
        """[G, R], a value for each region -> what meets [m, 1, R]."""
        return values.index_select(0, self._images).unsqueeze(1)

    def _by_image(self, rows: Tensor, matrices: Tensor, out: Tensor | None) -> Tensor:
        """[T, k] x [G, k, R] -> [T, R]."""
        places = [None] * len(self._rows) if out is None else out.split(self._rows)
        parts = [
            torch.mm(part, matrix, out=place)
            for part, matrix, place in zip(rows.split(self._rows), matrices, places, strict=True)
        ]
        return torch.cat(parts) if out is None else out
