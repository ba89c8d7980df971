"""Coarse-to-fine ranking (METHOD section 6): coarse scores of all pairs, a shortlist of K, fine scores of those.

One order is used everywhere: higher scores first; among equal scores wrong items before correct ones, so that ties
count against the model, also at the border of the shortlist; among equal items of one kind the earlier one first.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from hacan.retrieval.metrics import check_scores, ranks_of_first_match
from hacan.types import RetrievalResult

# Block sizes. Blocks start at multiples of these for every number of processes, because a matrix product can round
# differently when its shape differs.
COARSE_IMAGES = 256
TEXTS = 4096
FINE_IMAGES = 16


class Shortlists(NamedTuple):
    """The K best items of every query by the coarse score, best first; N images and M texts."""

    texts: Tensor  # [N, K] int64, texts of each image
    texts_coarse: Tensor  # [N, K] float32, their coarse scores
    images: Tensor  # [M, K] int64, images of each text
    images_coarse: Tensor  # [M, K] float32


def rank_shortlists(coarse: Tensor, fine: Tensor, image_of_text: Tensor, *, top_k: int) -> RetrievalResult:
    """Return the ranks of coarse-to-fine retrieval from full score matrices, in both directions.

    coarse, fine [N, M] image by text, image_of_text [M]. Ranks are float64 from 0, inf if no correct item is in the
    shortlist. With K of at least the gallery size they equal those of brute force on `fine`.
    """
    image_of_text, coarse, fine = image_of_text.cpu(), _on_cpu(coarse), _on_cpu(fine)
    _check_gallery(coarse.shape, image_of_text, top_k)
    if fine.shape != coarse.shape:
        raise ValueError(f"fine is {tuple(fine.shape)} and coarse {tuple(coarse.shape)}; pass scores of the same pairs")
    check_scores("coarse", coarse)
    check_scores("fine", fine)
    lists = shortlists(lambda rows: coarse[rows], image_of_text, images=len(coarse), top_k=top_k, progress=False)
    return rank_by_fine(lists, fine.gather(1, lists.texts), fine.T.gather(1, lists.images), image_of_text)


def shortlists(
    coarse: Callable[[slice], Tensor], image_of_text: Tensor, *, images: int, top_k: int, progress: bool = True
) -> Shortlists:
    """Return the K best texts of every image and the K best images of every text, by the coarse score.

    coarse(rows) returns the scores [n, M] of a slice of the images; it is called once per block, and the [N, M] matrix
    is never stored. image_of_text [M].
    """
    texts = len(image_of_text)
    _check_gallery((images, texts), image_of_text, top_k)
    k_texts, k_images = min(top_k, texts), min(top_k, images)
    of_images: list[tuple[Tensor, Tensor]] = []
    # The best images so far of every text, in parts of TEXTS texts. Blocks come in the order of the images, so the
    # position in [best so far, block] keeps the order of equal items.
    of_texts = [
        (torch.empty(len(part), 0, dtype=torch.int64), torch.empty(len(part), 0)) for part in image_of_text.split(TEXTS)
    ]
    bar = tqdm(total=images, desc="coarse", unit="image", delay=2, disable=not progress)
    for rows in _blocks(images, COARSE_IMAGES):
        scores = coarse(rows)
        if scores.shape != (rows.stop - rows.start, texts):
            raise ValueError(
                f"coarse gave {tuple(scores.shape)} for images {rows.start}:{rows.stop}; expected "
                f"{(rows.stop - rows.start, texts)}, one row per image and one column per text"
            )
        check_scores("coarse", scores)
        scores = _on_cpu(scores)
        block = torch.arange(rows.start, rows.stop)
        top = best_places(scores, block[:, None] == image_of_text[None, :], k_texts)
        of_images.append((top, scores.gather(1, top)))
        for part, (columns, owners) in enumerate(zip(scores.T.split(TEXTS), image_of_text.split(TEXTS), strict=True)):
            candidates = torch.cat([of_texts[part][0], block.expand(len(owners), -1)], 1)
            values = torch.cat([of_texts[part][1], columns], 1)
            top = best_places(values, candidates == owners[:, None], min(k_images, candidates.shape[1]))
            of_texts[part] = candidates.gather(1, top), values.gather(1, top)
        bar.update(len(block))
    bar.close()
    return Shortlists(*map(torch.cat, zip(*of_images, strict=True)), *map(torch.cat, zip(*of_texts, strict=True)))


def coarse_ranks(
    coarse: Callable[[slice], Tensor], image_of_text: Tensor, *, images: int, progress: bool = True
) -> tuple[Tensor, Tensor]:
    """Return the ranks by the coarse score alone over the whole gallery: [N] and [M], float64 from 0.

    Every block of images is requested twice, because a text can be ranked only when the score of its own image is
    known; pass `CachedScores` if scores are expensive.
    """
    texts = torch.arange(len(image_of_text))
    ranks_i2t: list[Tensor] = []
    own: Tensor | None = None
    bar = tqdm(total=2 * images, desc="coarse ranks", unit="image", delay=2, disable=not progress)
    for rows in _blocks(images, COARSE_IMAGES):
        scores = _on_cpu(coarse(rows))
        block = torch.arange(rows.start, rows.stop)
        ranks_i2t.append(ranks_of_first_match(scores, query_images=block, item_images=image_of_text))
        own = scores.new_empty(len(texts)) if own is None else own
        mine = texts[(image_of_text >= rows.start) & (image_of_text < rows.stop)]
        own[mine] = scores[image_of_text[mine] - rows.start, mine]
        bar.update(len(block))
    assert own is not None
    ranks_t2i = torch.zeros(len(texts), dtype=torch.float64)
    for rows in _blocks(images, COARSE_IMAGES):
        wrong = torch.arange(rows.start, rows.stop)[:, None] != image_of_text
        ranks_t2i += ((_on_cpu(coarse(rows)) >= own) & wrong).sum(0)
        bar.update(len(wrong))
    bar.close()
    return torch.cat(ranks_i2t), ranks_t2i


def rank_by_fine(lists: Shortlists, fine_texts: Tensor, fine_images: Tensor, image_of_text: Tensor) -> RetrievalResult:
    """Return the ranks within the shortlists by the fine scores of their entries, [N, K] and [M, K]."""
    check_scores("fine", fine_texts)
    check_scores("fine", fine_images)
    owners = torch.arange(len(lists.texts))[:, None]
    ranks_i2t, top_i2t = _rerank(lists.texts, fine_texts, image_of_text[lists.texts] == owners)
    ranks_t2i, top_t2i = _rerank(lists.images, fine_images, lists.images == image_of_text[:, None])
    return RetrievalResult(ranks_i2t, ranks_t2i, top_i2t, top_t2i)


def best_places(scores: Tensor, correct: Tensor, k: int) -> Tensor:
    """Return the positions [Q, k] of the k best items of every row, best first: scores and correct [Q, G]."""
    if k >= scores.shape[1]:
        return _ordered(scores, correct)[:, :k]
    top = scores.topk(k, sorted=True)
    # topk chooses arbitrarily among ties at the border; rows with such ties are ordered completely.
    crowded = (scores >= top.values[:, -1:]).sum(1) > k
    places = top.indices.sort(1).values
    places = places.gather(1, _ordered(scores.gather(1, places), correct.gather(1, places)))
    if bool(crowded.any()):
        places[crowded] = _ordered(scores[crowded], correct[crowded])[:, :k]
    return places


def _ordered(scores: Tensor, correct: Tensor) -> Tensor:
    """Return all positions of every row in order, by two stable sorts with the second key first."""
    by_kind = correct.to(torch.uint8).sort(dim=1, stable=True).indices
    by_score = scores.gather(1, by_kind).sort(dim=1, descending=True, stable=True).indices
    return by_kind.gather(1, by_score)


def _rerank(items: Tensor, fine: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rank of the first correct item of every row, and the items in the order of their fine scores."""
    order = _ordered(_on_cpu(fine), correct)
    hit = correct.gather(1, order)
    ranks = hit.to(torch.uint8).argmax(1).double().masked_fill(~hit.any(1), torch.inf)
    return ranks, items.gather(1, order)


def retrieve(
    coarse: Callable[[slice], Tensor],
    score_pairs: Callable[[Tensor], Tensor],
    image_of_text: Tensor,
    *,
    images: int,
    top_k: int,
    add_coarse: bool = False,
    progress: bool = True,
) -> RetrievalResult:
    """Return the ranks of both stages from score functions; every listed pair is scored once.

    coarse(rows) -> [n, M] scores a slice of the images and all texts; score_pairs(pairs [P, 2]) -> [P] scores listed
    pairs (image, text), sorted by image. add_coarse: fine = coarse + score_pairs, as in the first release.
    """
    lists = shortlists(coarse, image_of_text, images=images, top_k=top_k, progress=progress)
    pairs = listed_pairs(lists)
    scores = merge_shards(pairs, [fine_shard(score_pairs, pairs, progress=progress)])
    return rank_pairs(lists, pairs, scores, image_of_text, add_coarse=add_coarse)


def fine_shard(
    score_pairs: Callable[[Tensor], Tensor], pairs: Tensor, *, rank: int = 0, world_size: int = 1, progress: bool = True
) -> Tensor:
    """Return the scores of the pairs of process `rank` of `world_size`, in the order of `pairs`.

    `merge_shards` combines the shards of all processes to exactly the scores of a single process.
    """
    parts = []
    for rows in _shard_blocks(pairs, rank, world_size, progress=progress):
        scores = score_pairs(pairs[rows])
        count = rows.stop - rows.start
        if scores.shape != (count,):
            raise ValueError(f"score_pairs gave {tuple(scores.shape)} for {count} pairs; expected one score each")
        check_scores("fine", scores[None])
        parts.append(_on_cpu(scores))
    return torch.cat(parts) if parts else torch.empty(0)


def rank_pairs(
    lists: Shortlists, pairs: Tensor, scores: Tensor, image_of_text: Tensor, *, add_coarse: bool = False
) -> RetrievalResult:
    """Return the ranks within the shortlists from the merged scores [P] of `pairs`; add_coarse: see `retrieve`."""
    keys = pairs[:, 0] * len(image_of_text) + pairs[:, 1]
    of_images, of_texts = _keys_of_lists(lists)
    fine_texts = scores[torch.searchsorted(keys, of_images)]
    fine_images = scores[torch.searchsorted(keys, of_texts)]
    if add_coarse:
        fine_texts, fine_images = fine_texts + lists.texts_coarse, fine_images + lists.images_coarse
    return rank_by_fine(lists, fine_texts, fine_images, image_of_text)


def listed_pairs(lists: Shortlists) -> Tensor:
    """Return every (image, text) pair of the shortlists once, sorted by image, then text: [P, 2] int64."""
    keys = torch.cat([part.flatten() for part in _keys_of_lists(lists)]).unique()
    return torch.stack([keys // len(lists.images), keys % len(lists.images)], 1)


def _keys_of_lists(lists: Shortlists) -> tuple[Tensor, Tensor]:
    """Return image * M + text of every entry of the shortlists, [N, K] and [M, K]."""
    images, texts = len(lists.texts), len(lists.images)
    return torch.arange(images)[:, None] * texts + lists.texts, lists.images * texts + torch.arange(texts)[:, None]


def merge_shards(pairs: Tensor, shards: list[Tensor]) -> Tensor:
    """Return the scores [P] of all pairs from the shards of all processes, by rank."""
    scores = torch.full((len(pairs),), torch.nan, dtype=torch.cat(shards).dtype)
    for rank, shard in enumerate(shards):
        blocks = list(_shard_blocks(pairs, rank, len(shards), progress=False))
        places = torch.cat([torch.arange(rows.start, rows.stop) for rows in blocks]) if blocks else pairs[:0, 0]
        if len(places) != len(shard):
            raise ValueError(
                f"shard {rank} of {len(shards)} holds {len(shard)} scores for {len(places)} pairs; pass the shards of "
                "all processes, by rank, made from the same pairs"
            )
        scores[places] = shard.to(scores.dtype)
    return scores


def _shard_blocks(pairs: Tensor, rank: int, world_size: int, *, progress: bool) -> Iterator[slice]:
    """Yield the slices of `pairs` for one process: every world_size-th block of FINE_IMAGES images, if not empty."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank} of world_size {world_size}; pass 0 <= rank < world_size")
    block_of_pair = pairs[:, 0] // FINE_IMAGES
    blocks = int(block_of_pair[-1]) + 1 if len(pairs) else 0
    bounds = torch.searchsorted(block_of_pair, torch.arange(blocks + 1)).tolist()
    mine = [slice(bounds[block], bounds[block + 1]) for block in range(rank, blocks, world_size)]
    total = sum(rows.stop - rows.start for rows in mine)
    bar = tqdm(total=total, desc="fine", unit="pair", unit_scale=True, delay=2, disable=not progress)
    for rows in mine:
        if rows.stop > rows.start:
            yield rows
            bar.update(rows.stop - rows.start)
    bar.close()


def _on_cpu(scores: Tensor) -> Tensor:
    """Return scores on the CPU, where they are ranked, in at least float32."""
    scores = scores.cpu()
    return scores if scores.dtype in (torch.float32, torch.float64) else scores.float()


def _blocks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _check_gallery(shape: tuple[int, ...], image_of_text: Tensor, top_k: int) -> None:
    if len(shape) != 2 or shape[1] != len(image_of_text):
        raise ValueError(
            f"image_of_text has {len(image_of_text)} entries but scores are {tuple(shape)}; pass one image index per "
            "caption, and scores [image, text]"
        )
    if 0 in shape:
        raise ValueError(f"the gallery has {shape[0]} images and {shape[1]} texts; pass at least one of each")
    if int(image_of_text.min()) < 0 or int(image_of_text.max()) >= shape[0]:
        raise ValueError(
            f"image_of_text holds {int(image_of_text.min())} to {int(image_of_text.max())} for {shape[0]} images; pass "
            "indices of rows"
        )
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; pass at least 1")
