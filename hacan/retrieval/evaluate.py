"""The one evaluator behind every number: validation during training, Flickr 1K, COCO 5K and COCO 1K five-fold.

It takes models as callables (`Member`) and a split as iterators (`Split`); METHOD section 6 is its protocol.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hacan.errors import UserError
from hacan.retrieval.bootstrap import recall_intervals
from hacan.retrieval.curve import Curve, mean_curve, trade_off
from hacan.retrieval.extended import extended_metrics
from hacan.retrieval.features import ImageBatches, TextBatches, content_hash, encode_gallery, select_images
from hacan.retrieval.hierarchical import (
    HierarchicalRetriever,
    coarse_ranks,
    listed_pairs,
    merge_shards,
)
from hacan.retrieval.members import LRG_STREAMS, Member, MemberScores
from hacan.retrieval.metrics import mean_of_metrics, release_ranks, retrieval_metrics
from hacan.retrieval.receipt import MISS_RULE, TIE_RULE, StageMeter, versions, write_json
from hacan.retrieval.store import SpooledScores
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


class Processes(NamedTuple):
    """The place of this process among those that evaluate together; alone by default."""

    rank: int = 0
    world_size: int = 1
    barrier: Callable[[], None] = lambda: None
    gather: Callable[[Tensor], list[Tensor]] = lambda shard: [shard]  # the shards of all, in the order of ranks


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


def evaluate(
    members: Sequence[Member],
    split: Split,
    protocol: Protocol,
    *,
    feature_memory: int,
    folder: Path | None = None,
    bootstrap: int = 0,
    seed: int = 0,
    curve: bool = False,
    processes: Processes | None = None,
    progress: bool = True,
) -> Evaluation:
    """Encode the split with every member, rank it coarse to fine in both directions, and count honestly.

    folder: where features are kept, for an evaluation that is interrupted; None: nowhere. feature_memory: MiB of
    features held in memory, all members together. bootstrap: resamples behind the 95% intervals, 0 for none.
    curve: also score all pairs, for the trade-off over K (with several processes each of them does).
    """
    if not members:
        raise ValueError("members is empty; pass at least one model")
    processes = processes or Processes()
    meter = StageMeter(members[0].device)
    galleries = encode_members(
        members, split, meter, feature_memory=feature_memory, folder=folder, processes=processes, progress=progress
    )
    results, all_coarse, curves = [], [], []
    for rows in folds_of(len(split.ids), split.image_of_text, protocol):
        gallery_parts = [select_images(gallery, rows) for gallery in galleries]
        scores = EnsembleScores([MemberScores(*pair) for pair in zip(members, gallery_parts, strict=True)])
        result, coarse = rank_gallery(
            scores,
            gallery_parts[0].image_of_text,
            protocol,
            images=rows.stop - rows.start,
            meter=meter,
            processes=processes,
            progress=progress,
        )
        results.append(result)
        all_coarse.append(coarse)
        if curve:
            curves.append(
                trade_off(
                    scores.coarse(protocol.coarse),
                    scores.all_fine_of(protocol.coarse),
                    scores.pairs(protocol.coarse),
                    gallery_parts[0].image_of_text,
                    images=rows.stop - rows.start,
                    add_coarse=protocol.coarse == "release",
                    meter=meter,
                    progress=progress,
                )
            )
    evaluation = summarise(
        results, all_coarse, members, split, protocol, galleries, bootstrap=bootstrap, seed=seed, meter=meter
    )
    if split.coco_ids is not None and not protocol.fold5:
        evaluation = evaluation._replace(extended=extended_metrics(results[0], *split.coco_ids))
    return evaluation._replace(curve=mean_curve(curves)) if curves else evaluation


def encode_members(
    members: Sequence[Member],
    split: Split,
    meter: StageMeter,
    *,
    feature_memory: int,
    folder: Path | None,
    processes: Processes,
    progress: bool,
) -> list[Gallery]:
    """The split encoded by every member."""
    galleries = []
    for member in members:
        galleries.append(
            encode_gallery(
                member.encode_images,
                member.encode_texts,
                split.image_batches,
                split.text_batches,
                image_of_text=split.image_of_text,
                images=len(split.ids),
                batch_size=split.batch_size,
                feature_memory=feature_memory // len(members),
                folder=folder,
                key={
                    "checkpoint": member.checkpoint_hash,
                    "images": split.images_hash,
                    "precision": member.precision,
                    "device": member.device.type,
                    "versions": versions(),
                    "code": code_hash(),
                },
                rank=processes.rank,
                world_size=processes.world_size,
                barrier=processes.barrier,
                stage=meter.stage,
                progress=progress,
            )
        )
    return galleries


class EnsembleScores:
    """The mean of the members' scores, fine and coarse (METHOD section 5)."""

    def __init__(self, members: Sequence[MemberScores]) -> None:
        self._members = members

    def coarse(self, kind: str) -> Callable[[slice], Tensor]:
        """From rows to coarse scores [n, M] of kind `global` or `release`."""
        if kind not in ("global", "release"):
            raise ValueError(f"coarse is {kind!r}; choose global or release")
        parts = [m.global_similarity if kind == "global" else m.release_coarse for m in self._members]
        return lambda rows: _mean([part(rows) for part in parts])

    def pairs(self, kind: str) -> Callable[[Tensor], Tensor]:
        """From pairs [P, 2] to fine scores [P]; of kind `release` without KSF, which its coarse score has counted."""
        if kind == "release":
            return lambda pairs: _mean([m.pairs(pairs, LRG_STREAMS) for m in self._members])
        return lambda pairs: _mean([m.pairs(pairs) for m in self._members])

    def all_fine_of(self, kind: str) -> Callable[[slice], Tensor]:
        """From rows to complete fine scores [n, M]; of kind `release` with its coarse score in place of KSF."""
        if kind == "release":
            return lambda rows: _mean([m.release_coarse(rows) + m.all_fine(rows, LRG_STREAMS) for m in self._members])
        return lambda rows: _mean([member.all_fine(rows) for member in self._members])


def rank_gallery(
    scores: EnsembleScores,
    image_of_text: Tensor,
    protocol: Protocol,
    *,
    images: int,
    meter: StageMeter,
    processes: Processes,
    progress: bool,
) -> tuple[RetrievalResult, tuple[Tensor, Tensor]]:
    """Hierarchical ranks of one gallery, and the (i2t, t2i) ranks of its coarse scores over the whole gallery."""
    spooled = SpooledScores(scores.coarse(protocol.coarse), images=images, texts=len(image_of_text))
    retriever = HierarchicalRetriever(
        spooled,
        scores.pairs(protocol.coarse),
        image_of_text,
        images=images,
        top_k=protocol.top_k,
        add_coarse=protocol.coarse == "release",
        progress=progress,
    )
    with meter.stage("coarse"):
        lists = retriever.shortlists()
        coarse = coarse_ranks(spooled, image_of_text, images=images)
    with meter.stage("fine"):
        pairs = listed_pairs(lists)
        shard = retriever.fine_shard(pairs, rank=processes.rank, world_size=processes.world_size)
        fine = merge_shards(pairs, processes.gather(shard))
    with meter.stage("rank"):
        return retriever.rank(lists, pairs, fine), coarse


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


def code_hash() -> str:
    """Hash of this package's sources that make features: a kept bank of older code is not believed."""
    package = Path(__file__).parents[1]
    sources = [*sorted((package / "encoders").glob("*.py")), package / "aggregator.py", package / "model.py"]
    digest = hashlib.blake2b()
    for source in [*sources, package / "retrieval" / "features.py", package / "retrieval" / "store.py"]:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:32]


def _mean(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).mean(0)


def _together(values: list[str]) -> str:
    return " + ".join(dict.fromkeys(values))


def _difference(theirs: float, honest: float) -> float:
    return 0.0 if theirs == honest else theirs - honest
