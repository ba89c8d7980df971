"""The evaluator behind every number: validation during training, Flickr 1K, COCO 5K and COCO 1K in five folds.

encode (feature_cache) -> coarse scores and shortlists -> fine scores of the listed pairs -> ranks -> metrics
(METHOD section 6).
"""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from hacan.errors import UserError
from hacan.retrieval.cached_scores import CachedScores
from hacan.retrieval.curve import mean_curve, trade_off
from hacan.retrieval.eccv_cxc import eccv_cxc_metrics
from hacan.retrieval.ensemble import GalleryScores, Scorer
from hacan.retrieval.feature_cache import FeatureStorage, encode_gallery, prune
from hacan.retrieval.ranking import coarse_ranks, fine_shard, listed_pairs, merge_shards, rank_pairs, shortlists
from hacan.retrieval.results import Evaluation, Protocol, summarise
from hacan.retrieval.stage_meter import StageMeter
from hacan.types import EncodedImages, Gallery, PackedTexts, Processes, RetrievalResult, Split

FOLDS = 5


def evaluate(
    scorers: Sequence[Scorer],
    split: Split,
    protocol: Protocol,
    *,
    storage: FeatureStorage,
    disk: int | None = None,
    processes: Processes | None = None,
    progress: bool = True,
) -> Evaluation:
    """Encode a split with every scorer, rank it coarse to fine in both directions, and compute the metrics.

    storage: where features are kept (its memory is shared by the scorers); disk: MiB that older cache entries may
    occupy, None for no limit.
    """
    if not scorers:
        raise ValueError("scorers is empty; pass at least one model")
    folds = folds_of(split, protocol)  # refuses a split that cannot be cut, before anything is encoded
    processes = processes or Processes()
    meter, began = StageMeter(scorers[0].device), time.time()
    share = FeatureStorage(folder=storage.folder, memory=storage.memory // len(scorers))
    galleries = [
        encode_gallery(scorer, split, storage=share, meter=meter, processes=processes, progress=progress)
        for scorer in scorers
    ]
    if storage.folder is not None and disk is not None and processes.rank == 0:
        prune(storage.folder, budget=disk, began=began)
    results, all_coarse, curves = [], [], []
    for rows in folds:
        parts = [select_images(gallery, rows) for gallery in galleries]
        scores = GalleryScores(scorers, parts, coarse_kind=protocol.coarse)
        result, coarse = rank_gallery(scores, protocol.top_k, meter=meter, processes=processes, progress=progress)
        results.append(result)
        all_coarse.append(coarse)
        if protocol.curve:
            curves.append(trade_off(scores, meter=meter, progress=progress))
    evaluation = summarise(results, all_coarse, folds, scorers, split, protocol, galleries, meter=meter)
    if split.coco_ids is not None and not protocol.fold5:
        evaluation = evaluation._replace(extended=eccv_cxc_metrics(results[0], *split.coco_ids))
    return evaluation._replace(curve=mean_curve(curves)) if curves else evaluation


def rank_gallery(
    scores: GalleryScores, top_k: int, *, meter: StageMeter, processes: Processes, progress: bool
) -> tuple[RetrievalResult, tuple[Tensor, Tensor]]:
    """Return the hierarchical ranks of a gallery, and the (i2t, t2i) ranks of its coarse scores alone."""
    image_of_text, images = scores.image_of_text, scores.images
    cached = CachedScores(scores.coarse, images=images, texts=len(image_of_text))
    with meter.stage("coarse"):
        lists = shortlists(cached, image_of_text, images=images, top_k=top_k, progress=progress)
        coarse = coarse_ranks(cached, image_of_text, images=images, progress=progress)
    with meter.stage("fine"):
        pairs = listed_pairs(lists)
        shard = fine_shard(scores.pairs, pairs, rank=processes.rank, world_size=processes.world_size, progress=progress)
        fine = merge_shards(pairs, processes.gather(shard))
    with meter.stage("rank"):
        return rank_pairs(lists, pairs, fine, image_of_text, add_coarse=scores.adds_coarse), coarse


def folds_of(split: Split, protocol: Protocol) -> list[slice]:
    """Return the images of each fold: all of them, or with `fold5` five consecutive parts of equal size (COCO 1K)."""
    images = len(split.ids)
    if not protocol.fold5:
        return [slice(0, images)]
    if images % FOLDS:
        raise UserError(
            f"fold5=True cuts a split into {FOLDS} folds of equal size, but this one has {images} images; evaluate it "
            "with fold5=False"
        )
    size = images // FOLDS
    counts = torch.bincount(split.image_of_text // size, minlength=FOLDS)
    if int(counts.min()) == 0:
        raise UserError(f"fold5=True: fold {int(counts.argmin()) + 1} of {FOLDS} has no caption; use fold5=False")
    return [slice(start, start + size) for start in range(0, images, size)]


def select_images(gallery: Gallery, rows: slice) -> Gallery:
    """Return the part of a gallery with some consecutive images and all of their captions, renumbered from 0."""
    images, texts, image_of_text = gallery
    if rows.start == 0 and rows.stop == len(images.high):
        return gallery
    chosen = ((image_of_text >= rows.start) & (image_of_text < rows.stop)).nonzero().flatten()
    lengths = texts.offsets[chosen + 1] - texts.offsets[chosen]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    if len(chosen) and int(chosen[-1] - chosen[0]) == len(chosen) - 1:  # consecutive captions: a view, no copy
        tokens: slice | Tensor = slice(int(texts.offsets[chosen[0]]), int(texts.offsets[chosen[-1] + 1]))
    else:
        tokens = torch.arange(int(offsets[-1])) + (texts.offsets[chosen] - offsets[:-1]).repeat_interleave(lengths)
    return Gallery(
        images=EncodedImages(*(values[rows] for values in images)),
        texts=PackedTexts(texts.high[tokens], texts.mid[tokens], offsets, texts.pooled[chosen]),
        image_of_text=image_of_text[chosen] - rows.start,
    )
