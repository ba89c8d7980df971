"""What is evaluated and how, and what comes out: metrics, audit, intervals, receipt, files (METHOD section 6)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hacan.errors import UserError
from hacan.retrieval.curve import Curve
from hacan.retrieval.ensemble import Member
from hacan.retrieval.features import ImageBatches, TextBatches, content_hash
from hacan.retrieval.metrics import mean_of_metrics, release_ranks, retrieval_metrics
from hacan.retrieval.provenance import MISS_RULE, TIE_RULE, StageMeter, versions, write_json
from hacan.retrieval.significance import recall_intervals
from hacan.types import Gallery, RetrievalMetrics, RetrievalResult

FOLDS = 5


class Split(NamedTuple):
    """What is evaluated. Images and captions are numbered in the order of the split."""

    dataset: str
    name: str  # train, val or test
    ids: Sequence[Any]  # N ids of the images, for the receipt's hash
    captions: Sequence[str]  # M
    image_of_text: Tensor  # [M] int64
    image_batches: ImageBatches
    text_batches: TextBatches
    batch_size: int
    images_hash: str = ""  # over the pictures' contents and their transform; needed where features are kept
    coco_ids: tuple[Sequence[int], Sequence[int]] | None = None  # of images and captions: also ECCV Caption and CxC


class Protocol(NamedTuple):
    """How it is evaluated (METHOD section 6)."""

    top_k: int = 50
    coarse: str = "global"
    fold5: bool = False


class Evaluation(NamedTuple):
    """Results of an evaluation. Lists hold one entry per fold: one, or five."""

    receipt: dict[str, Any]
    coarse: RetrievalMetrics  # coarse scores alone, over the whole gallery
    hierarchical: RetrievalMetrics
    release_rule: RetrievalMetrics  # audit: what the first release's rule, a miss is rank 0, would print
    intervals: dict[str, dict[str, tuple[float, float]]]  # 95%, by stage and metric; empty without bootstrap
    coarse_ranks: list[tuple[Tensor, Tensor]]  # (i2t, t2i) of the queries that have an answer
    ranks: list[tuple[Tensor, Tensor]]
    results: list[RetrievalResult]  # ranks and shortlists of all queries, numbered within the fold
    curve: Curve | None = None  # the mean over folds
    extended: dict[str, dict[str, float]] | None = None  # COCO: ECCV Caption and CxC, by metric and direction

    @property
    def inflation(self) -> RetrievalMetrics:
        """How much the first release's rule adds to each metric."""
        return RetrievalMetrics(
            *(_difference(theirs, honest) for theirs, honest in zip(self.release_rule, self.hierarchical, strict=True))
        )

    def to_json(self) -> dict[str, Any]:
        """The content of metrics.json."""
        return {
            "receipt": self.receipt,
            "coarse": self.coarse._asdict(),
            "hierarchical": self.hierarchical._asdict(),
            "intervals_95": self.intervals,
            "release_rule": {
                "about": "audit only: the first release counts a query whose shortlist misses as rank 0, a hit",
                "metrics": self.release_rule._asdict(),
                "inflation": self.inflation._asdict(),
            },
            **({} if self.curve is None else {"curve": {"suggested_k": self.curve.suggested_k}}),
            **({} if self.extended is None else {"extended": self.extended}),
        }

    def save(self, folder: Path) -> None:
        """Write metrics.json, and ranks.npz (the ranks of every query, for comparisons); curve.csv and curve.png."""
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {}
        for stage, folds in (("coarse", self.coarse_ranks), ("hierarchical", self.ranks)):
            for fold, (i2t, t2i) in enumerate(folds):
                arrays[f"{stage}_i2t_{fold}"], arrays[f"{stage}_t2i_{fold}"] = i2t.numpy(), t2i.numpy()
        temporary = folder / ".ranks.npz"
        np.savez_compressed(temporary, **arrays)
        temporary.replace(folder / "ranks.npz")
        write_json(folder / "metrics.json", self.to_json())
        if self.curve is not None:
            self.curve.save(folder)


def summarise(
    results: list[RetrievalResult],
    all_coarse: list[tuple[Tensor, Tensor]],
    members: Sequence[Member],
    split: Split,
    protocol: Protocol,
    galleries: Sequence[Gallery],
    *,
    bootstrap: int,
    seed: int,
    meter: StageMeter,
) -> Evaluation:
    """Metrics, audit, intervals and receipt of the ranks of all folds."""
    ranks, coarse = [], []
    folds = folds_of(len(split.ids), split.image_of_text, protocol)
    for rows, result, (coarse_i2t, coarse_t2i) in zip(folds, results, all_coarse, strict=True):
        captions = torch.bincount(split.image_of_text, minlength=len(split.ids))[rows]
        asked = captions > 0  # an image without captions stays in the gallery, but as a query it has no answer
        ranks.append((result.ranks_i2t[asked], result.ranks_t2i))
        coarse.append((coarse_i2t[asked], coarse_t2i))
    intervals = {}
    if bootstrap:
        intervals = {
            "coarse": recall_intervals(coarse, resamples=bootstrap, seed=seed),
            "hierarchical": recall_intervals(ranks, resamples=bootstrap, seed=seed),
        }
    receipt = {
        "dataset": split.dataset,
        "split": split.name,
        "protocol": f"mean of {len(ranks)} folds, each ranked on its own" if protocol.fold5 else "whole split",
        "images": len(split.ids),
        "texts": len(split.captions),
        "queries_i2t": sum(len(fold[0]) for fold in ranks),
        "queries_t2i": sum(len(fold[1]) for fold in ranks),
        "ids_hash": content_hash([list(split.ids), list(split.captions), split.image_of_text.tolist()]),
        "top_k": protocol.top_k,
        "coarse": protocol.coarse,
        "tie_rule": TIE_RULE,
        "miss_rule": MISS_RULE,
        "alignment": _together([member.alignment for member in members]),
        "direction": _together([member.direction for member in members]),
        "precision": _together([member.precision for member in members]),
        "features": _together([str(gallery.images.high.dtype).removeprefix("torch.") for gallery in galleries]),
        "ensemble": len(members) > 1,
        "members": [
            {
                "checkpoint": member.name,
                "hash": member.checkpoint_hash,
                "alignment": member.alignment,
                "direction": member.direction,
                **member.settings,
            }
            for member in members
        ],
        "bootstrap": bootstrap,
        "seed": seed,
        "device": str(members[0].device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "stages": meter.stages,
    }
    return Evaluation(
        receipt=receipt,
        coarse=mean_of_metrics([retrieval_metrics(*fold) for fold in coarse]),
        hierarchical=mean_of_metrics([retrieval_metrics(*fold) for fold in ranks]),
        release_rule=mean_of_metrics([retrieval_metrics(*map(release_ranks, fold)) for fold in ranks]),
        intervals=intervals,
        coarse_ranks=coarse,
        ranks=ranks,
        results=results,
    )


def folds_of(images: int, image_of_text: Tensor, protocol: Protocol) -> list[slice]:
    """The images of each fold: all of them, or five runs of equal length (COCO 1K: 1,000 images each)."""
    if not protocol.fold5:
        return [slice(0, images)]
    if images % FOLDS:
        raise UserError(
            f"fold5=True cuts a split into {FOLDS} folds of equal size, but this one has {images} images; evaluate it "
            "with fold5=False"
        )
    size = images // FOLDS
    folds = [slice(start, start + size) for start in range(0, images, size)]
    counts = torch.bincount(image_of_text // size, minlength=FOLDS)
    if int(counts.min()) == 0:
        raise UserError(f"fold5=True: fold {int(counts.argmin()) + 1} of {FOLDS} has no caption; use fold5=False")
    return folds


def _together(values: list[str]) -> str:
    return " + ".join(dict.fromkeys(values))


def _difference(theirs: float, honest: float) -> float:
    return 0.0 if theirs == honest else theirs - honest
