"""How the rows of a block of dot products [T, N, R] belong to images: a full rectangle, or a list for each image."""

import torch
from torch import Tensor


class Rectangle:
    """All of N images meet all of m captions: scores [m, N]."""

    def product(self, tokens: Tensor, regions: Tensor) -> Tensor:
        """[T, d] x [N, R, d] -> dot products [T, N, R]."""
        return (tokens @ regions.flatten(0, 1).T).view(-1, *regions.shape[:2])

    def quadratic(self, weights: Tensor, grams: Tensor) -> Tensor:
        """W G w^T over regions: [T, N, R] and [N, R, R] -> [T, N, 1]."""
        by_image = weights.transpose(0, 1)
        return (by_image * torch.bmm(by_image, grams)).sum(2).T.unsqueeze(2)

    def at_pairs(self, values: Tensor) -> Tensor:
        """[N, R], a value for each region -> what meets [m, N, R]."""
        return values


class Listing:
    """Each of G images meets captions of its own, image after image: N is 1, scores [m, 1]."""

    def __init__(self, rows: list[int], images: Tensor) -> None:
        """`rows`: tokens of each image's captions, [G]; `images` [m]: the image of each caption, 0 to G - 1."""
        self._rows = rows
        self._images = images

    def product(self, tokens: Tensor, regions: Tensor) -> Tensor:
        """[T, d] x [G, R, d] -> dot products [T, 1, R], each token with the regions of its own image."""
        return self._by_image(tokens, regions.mT).unsqueeze(1)

    def quadratic(self, weights: Tensor, grams: Tensor) -> Tensor:
        """W G w^T over regions: [T, 1, R] and [G, R, R] -> [T, 1, 1]."""
        weights = weights.squeeze(1)
        return (weights * self._by_image(weights, grams)).sum(1)[:, None, None]

    def at_pairs(self, values: Tensor) -> Tensor:
        """[G, R], a value for each region -> [m, 1, R]."""
        return values.index_select(0, self._images).unsqueeze(1)

    def _by_image(self, rows: Tensor, matrices: Tensor) -> Tensor:
        """[T, k] x [G, k, R] -> [T, R]."""
        parts = rows.split(self._rows)
        if len(parts) == 1:
            return rows @ matrices[0]
        if torch.is_grad_enabled():
            return torch.cat([part @ matrix for part, matrix in zip(parts, matrices, strict=True)])
        result = rows.new_empty(len(rows), matrices.shape[2])
        for part, matrix, place in zip(parts, matrices, result.split(self._rows), strict=True):
            torch.mm(part, matrix, out=place)
        return result
