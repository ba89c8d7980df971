"""Scores that are computed once by blocks of images, then read from memory or from a temporary file."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from hacan.retrieval.feature_cache import map_npy
from hacan.retrieval.stage_meter import MIB

MEMORY_LIMIT = 64 * MIB


class CachedScores:
    """Scores [N, M] of `scores(rows) -> [n, M]`, each row computed on its first use."""

    def __init__(
        self, scores: Callable[[slice], Tensor], *, images: int, texts: int, memory_limit: int = MEMORY_LIMIT
    ) -> None:
        self._scores, self._known = scores, torch.zeros(images, dtype=torch.bool)
        if 4 * images * texts <= memory_limit:
            self._cache = torch.empty(images, texts)
        else:
            with tempfile.TemporaryDirectory(prefix="hacan-scores-") as folder:  # the mapping outlives the name
                self._cache = map_npy(Path(folder, "scores.npy"), (images, texts), torch.float32)

    def __call__(self, rows: slice) -> Tensor:
        """Return the scores [n, M] of a slice of the images."""
        if not bool(self._known[rows].all()):
            self._cache[rows] = self._scores(rows).float().cpu()
            self._known[rows] = True
        return self._cache[rows]
