"""Select example queries of both directions: the best, the worst and random ones, with their rankings."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hacan.types import RetrievalResult

KINDS = ("best", "worst", "random")


class Item(NamedTuple):
    """An item of the gallery in the ranking of a query."""

    index: int  # type: ignore[assignment]  # hides tuple.index; of the text (i2t) or the image (t2i) in the split
    place: int | None  # in the ranking, from 1; None: not in the shortlist
    correct: bool


class Query(NamedTuple):
    """A query with the first items of its ranking."""

    direction: str  # i2t or t2i
    kind: str  # best, worst or random
    index: int  # type: ignore[assignment]  # hides tuple.index; of the image (i2t) or the text (t2i) in the split
    rank: float  # of the best correct item, from 1; inf: missed, no correct item in the shortlist
    items: list[Item]  # best first
    best_correct: Item  # also if it is not among `items`


def choose_queries(ranks: Tensor, asked: Tensor, *, kind: str, count: int, seed: int) -> list[int]:
    """Return at most `count` queries by their ranks [Q] from 0: best, worst or random ones.

    asked [Q] bool: the queries that have a correct item. Queries of equal rank are in an order drawn with `seed`.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
    generator = torch.Generator().manual_seed(seed + KINDS.index(kind))
    order = torch.randperm(len(ranks), generator=generator)
    order = order[asked[order]]
    if kind != "random":
        order = order[ranks[order].argsort(stable=True, descending=kind == "worst")]
    return order[:count].tolist()


def select_queries(
    results: Sequence[RetrievalResult],
    image_of_text: Tensor,
    *,
    images: int,
    count: int = 4,
    shown: int = 5,
    seed: int = 0,
) -> list[Query]:
    """Return `count` queries of each kind and direction, each with its first `shown` items.

    results: one per fold, numbered within the fold, as in an `Evaluation`; folds are equal.
    The indices of the returned queries count over the whole split.
    """
    if images % len(results):
        raise ValueError(f"{images} images do not divide into {len(results)} folds; pass the results of equal folds")
    size = images // len(results)
    texts = [(image_of_text // size == fold).nonzero().flatten() for fold in range(len(results))]
    asked_images = torch.bincount(image_of_text, minlength=images) > 0
    ranks_i2t = torch.cat([result.ranks_i2t for result in results])
    of_texts = torch.cat(texts)
    ranks_t2i = torch.cat([result.ranks_t2i for result in results])
    queries = []
    for kind in KINDS:
        for row in choose_queries(ranks_i2t, asked_images, kind=kind, count=count, seed=seed):
            fold = row // size
            listed = texts[fold][_listed(results[fold].top_i2t[row - fold * size])]
            correct = image_of_text == row
            queries.append(_query("i2t", kind, row, ranks_i2t[row], listed, correct, shown))
        everyone = torch.ones(len(ranks_t2i), dtype=torch.bool)
        for place in choose_queries(ranks_t2i, everyone, kind=kind, count=count, seed=seed):
            text = int(of_texts[place])
            fold = int(image_of_text[text]) // size
            within = int((texts[fold] == text).nonzero())
            listed = _listed(results[fold].top_t2i[within]) + fold * size
            correct = torch.arange(images) == image_of_text[text]
            queries.append(_query("t2i", kind, text, ranks_t2i[place], listed, correct, shown))
    return sorted(queries, key=lambda query: query.direction)  # stable: the kinds keep their order


def _listed(shortlist: Tensor) -> Tensor:
    return shortlist[shortlist >= 0]


def _query(direction: str, kind: str, index: int, rank: Tensor, listed: Tensor, correct: Tensor, shown: int) -> Query:
    items = [Item(item, place, bool(correct[item])) for place, item in enumerate(listed.tolist(), start=1)]
    found = [item for item in items if item.correct]
    best = found[0] if found else Item(int(correct.nonzero()[0]), None, True)
    rank_from_1 = math.inf if math.isinf(float(rank)) else float(rank) + 1
    return Query(direction, kind, index, rank_from_1, items[:shown], best)
