"""Uncertainty of recalls: bootstrap intervals over queries, and a paired test between two rankings of the same queries.

Recalls at 1, 5 and 10 depend on a query only through the bin its rank falls in. Drawing n queries with replacement and
counting bins is one multinomial draw, so that a resample costs four numbers, not n, and nothing is approximated. In the
paired test the same holds for the query-wise differences.
"""

import numpy as np
import torch
from torch import Tensor

from hacan.retrieval.metrics import RECALLS

NAMES = ("r1_i2t", "r5_i2t", "r10_i2t", "r1_t2i", "r5_t2i", "r10_t2i", "rsum")


def recall_intervals(
    folds: list[tuple[Tensor, Tensor]], *, resamples: int, seed: int, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap intervals of the six recalls and Rsum: {name: (low, high)} in percent.

    folds: (ranks_i2t, ranks_t2i) of each fold (one, or five for COCO 1K). Queries are drawn with replacement within
    their fold and direction; a recall is the mean over folds.
    """
    generator = np.random.default_rng(seed)
    drawn = np.zeros((resamples, 2 * len(RECALLS)))
    for fold in folds:
        columns = [_resampled_recalls(ranks, resamples, generator) for ranks in fold]
        drawn += np.concatenate(columns, 1) / len(folds)
    drawn = np.concatenate([drawn, drawn.sum(1, keepdims=True)], 1)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return {name: (float(low[index]), float(high[index])) for index, name in enumerate(NAMES)}


def paired_test(
    ours: list[tuple[Tensor, Tensor]], theirs: list[tuple[Tensor, Tensor]], *, resamples: int = 10_000, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Paired comparison of two rankings of the same queries, for the six recalls and Rsum.

    ours, theirs: (ranks_i2t, ranks_t2i) of each fold, query by query the same. {name: {difference, low, high, p}}:
    difference ours - theirs in percent, its bootstrap 95% interval over queries, and the two-sided p value of the
    sign-flip test: under the null hypothesis each query's two outcomes could as well be swapped.

        p = (1 + number of flipped |differences| >= the observed one) / (1 + resamples)
    """
    generator = np.random.default_rng(seed)
    observed = np.zeros(7)
    flipped, drawn = np.zeros((resamples, 7)), np.zeros((resamples, 7))
    for our_fold, their_fold in zip(ours, theirs, strict=True):
        for direction, (a, b) in enumerate(zip(our_fold, their_fold, strict=True)):
            if a.shape != b.shape:
                raise ValueError(f"ours ranks {len(a)} queries and theirs {len(b)}; pass ranks of the same queries")
            hits = np.stack([(a < k).numpy().astype(int) - (b < k).numpy().astype(int) for k in RECALLS], 1)
            scale = 100.0 / len(hits) / len(ours)
            columns = [*range(3 * direction, 3 * direction + 3), 6]
            kinds, counts = np.unique(hits, axis=0, return_counts=True)
            kinds = np.concatenate([kinds, kinds.sum(1, keepdims=True)], 1)
            observed[columns] += scale * (counts @ kinds)
            signs = 2 * generator.binomial(counts, 0.5, size=(resamples, len(counts))) - counts
            flipped[:, columns] += scale * (signs @ kinds)
            draws = generator.multinomial(len(hits), counts / len(hits), size=resamples)
            drawn[:, columns] += scale * (draws @ kinds)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    extreme = (np.abs(flipped) >= np.abs(observed) - 1e-9).sum(0)
    return {
        name: {
            "difference": float(observed[index]),
            "low": float(low[index]),
            "high": float(high[index]),
            "p": float((1 + extreme[index]) / (1 + resamples)),
        }
        for index, name in enumerate(NAMES)
    }


def _resampled_recalls(ranks: Tensor, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """R@1, R@5, R@10 in percent of resampled queries, [resamples, 3]."""
    bins = torch.bucketize(ranks, torch.tensor(RECALLS, dtype=ranks.dtype), right=True)
    counts = torch.bincount(bins, minlength=len(RECALLS) + 1).numpy()
    draws = generator.multinomial(len(ranks), counts / len(ranks), size=resamples)
    return 100.0 * draws[:, : len(RECALLS)].cumsum(1) / len(ranks)
