"""Retrieval metrics as pure functions of scores and ranks (METHOD section 6).

Ranks count from 0; `inf` is a miss: no correct item is among the ranked ones. A tie with a wrong item counts against
the model. An item is correct for a query if both belong to the same image, as given by `query_images` and
`item_images`. With `image_of_text` [M] and N images:

    image to text: query_images = arange(N), item_images = image_of_text
    text to image: query_images = image_of_text, item_images = arange(N)

>>> scores = torch.tensor([[0.9, 0.1, 0.8], [0.3, 0.7, 0.7]])  # two images, three texts
>>> image_of_text = torch.tensor([0, 0, 1])
>>> ranks_of_first_match(scores, query_images=torch.arange(2), item_images=image_of_text)  # text 1 ties with text 2
tensor([0., 1.], dtype=torch.float64)
>>> ranks_of_first_match(scores.T, query_images=image_of_text, item_images=torch.arange(2))
tensor([0., 1., 1.], dtype=torch.float64)
>>> recall_at(torch.tensor([0.0, 1.0, float("inf"), 7.0]), 5)
50.0
"""

import math

import torch
from torch import Tensor

from hacan.types import RetrievalMetrics

RECALLS = (1, 5, 10)


def ranks_of_first_match(scores: Tensor, *, query_images: Tensor, item_images: Tensor) -> Tensor:
    """Return the rank of the best correct item of every query over the whole gallery.

    scores [Q, G], query_images [Q], item_images [G]; [Q] float64 from 0, inf if the gallery has no correct item.

        rank(q) = number of wrong items g with score(q, g) >= max over correct items of score(q, .)
    """
    check_scores("scores", scores)
    if scores.shape != (len(query_images), len(item_images)):
        raise ValueError(
            f"scores are {tuple(scores.shape)} for {len(query_images)} query_images and {len(item_images)} "
            "item_images; pass one row per query and one column per item"
        )
    correct = query_images[:, None] == item_images[None, :]
    best = scores.masked_fill(~correct, -torch.inf).amax(1) if scores.shape[1] else scores.new_zeros(len(scores))
    ranks = ((scores >= best[:, None]) & ~correct).sum(1).double()
    return ranks.masked_fill(~correct.any(1), torch.inf)


def recall_at(ranks: Tensor, k: int) -> float:
    """Return recall at K in percent: the share of queries [Q] with a rank below K."""
    _check_ranks(ranks)
    return 100.0 * int((ranks < k).sum()) / len(ranks)


def rsum(ranks_i2t: Tensor, ranks_t2i: Tensor) -> float:
    """Rsum (0 to 600): the sum of R@1, R@5 and R@10 in percent, in both directions."""
    return sum(recall_at(ranks, k) for ranks in (ranks_i2t, ranks_t2i) for k in RECALLS)


def median_rank(ranks: Tensor) -> float:
    """Median rank counted from 1, as papers print it: floor(median) + 1; inf when at least half of the queries miss.

    A miss is worse than any rank, so the median is exact even though the rank of a miss is unknown.
    """
    _check_ranks(ranks)
    ordered = ranks.double().sort().values
    low, high = ordered[(len(ordered) - 1) // 2].item(), ordered[len(ordered) // 2].item()
    return math.inf if math.isinf(high) else math.floor((low + high) / 2) + 1.0


def mean_rank(ranks: Tensor) -> float:
    """Mean rank counted from 1, over the queries that have one; inf where none has. Read it beside `missed`."""
    _check_ranks(ranks)
    found = ranks[torch.isfinite(ranks)]
    return found.double().mean().item() + 1.0 if len(found) else math.inf


def missed(ranks: Tensor) -> float:
    """Return the percentage of queries without a correct item in the shortlist."""
    _check_ranks(ranks)
    return 100.0 * int(torch.isinf(ranks).sum()) / len(ranks)


def release_ranks(ranks: Tensor) -> Tensor:
    """Return the ranks by the first public release's rule, in which a miss is rank 0, a hit. For the audit only.

    With this rule a random scorer reaches an Rsum of about 573 on 1,000 images at K = 50 (METHOD section 6).
    """
    return torch.where(torch.isinf(ranks), torch.zeros_like(ranks), ranks)


def retrieval_metrics(ranks_i2t: Tensor, ranks_t2i: Tensor) -> RetrievalMetrics:
    """Return all metrics of one ranking from the ranks of both directions ([N] and [M], from 0, inf for a miss)."""
    both = (ranks_i2t, ranks_t2i)
    recalls = [recall_at(ranks, k) for ranks in both for k in RECALLS]
    others = [kind(ranks) for kind in (median_rank, mean_rank, missed) for ranks in both]
    return RetrievalMetrics._make([*recalls, rsum(ranks_i2t, ranks_t2i), *others])


def mean_of_metrics(folds: list[RetrievalMetrics]) -> RetrievalMetrics:
    """Return the mean over folds of every metric (COCO 1K: five folds, each ranked on its own)."""
    if not folds:
        raise ValueError("folds is empty; pass the metrics of at least one fold")
    return RetrievalMetrics(*(sum(values) / len(folds) for values in zip(*folds, strict=True)))


def check_scores(name: str, scores: Tensor) -> None:
    """Raise `ValueError` for NaN, which would come first in descending order."""
    if scores.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(scores.shape)}; pass a score matrix [queries, items]")
    bad = int(torch.isnan(scores).sum())
    if bad:
        row, column = torch.isnan(scores).nonzero()[0].tolist()
        raise ValueError(
            f"{name} holds {bad} NaN of {scores.numel()}, the first at [{row}, {column}]; a NaN has no rank: check the "
            "model and the features"
        )


def _check_ranks(ranks: Tensor) -> None:
    if ranks.ndim != 1 or not len(ranks):
        raise ValueError(f"ranks have shape {tuple(ranks.shape)}; pass the ranks [Q] of at least one query")
    if bool((torch.isnan(ranks) | (ranks < 0)).any()):
        raise ValueError("ranks hold NaN or negative values; pass ranks counted from 0, inf for a miss")
