"""The one evaluator behind every number: validation during training, Flickr 1K, COCO 5K and COCO 1K five-fold.

It takes models as callables (`Member`) and a split as iterators (`Split`); METHOD section 6 is its protocol.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from hacan.retrieval.banks import prune_banks
from hacan.retrieval.curve import mean_curve, trade_off
from hacan.retrieval.eccv_cxc import extended_metrics
from hacan.retrieval.ensemble import EnsembleScores, Member, MemberScores
from hacan.retrieval.features import encode_gallery, select_images
from hacan.retrieval.provenance import StageMeter, versions
from hacan.retrieval.ranking import HierarchicalRetriever, coarse_ranks, listed_pairs, merge_shards
from hacan.retrieval.results import Evaluation, Protocol, Split, folds_of, summarise
from hacan.retrieval.store import SpooledScores
from hacan.types import Gallery, RetrievalResult

__all__ = ["Evaluation", "Processes", "Protocol", "Split", "evaluate"]

PACKAGE = Path(__file__).parents[1]
# Code that influences features: everything between an image file and the encoders' output.
FEATURE_CODE = ("models", "images", "types.py", "retrieval/features.py", "retrieval/store.py")


class Processes(NamedTuple):
    """The place of this process among those that evaluate together; alone by default."""

    rank: int = 0
    world_size: int = 1
    barrier: Callable[[], None] = lambda: None
    gather: Callable[[Tensor], list[Tensor]] = lambda shard: [shard]  # the shards of all, in the order of ranks


def evaluate(
    members: Sequence[Member],
    split: Split,
    protocol: Protocol,
    *,
    feature_memory: int,
    folder: Path | None = None,
    feature_disk: int | None = None,
    bootstrap: int = 0,
    seed: int = 0,
    curve: bool = False,
    processes: Processes | None = None,
    progress: bool = True,
) -> Evaluation:
    """Encode the split with every member, rank it coarse to fine in both directions, and count honestly.

    folder: where features are kept, for an evaluation that is interrupted; None: nowhere. feature_memory: MiB of
    features held in memory, all members together; feature_disk: MiB of features kept in `folder`, those of this
    evaluation in any case; None: all that ever were. bootstrap: resamples behind the 95% intervals, 0 for none.
    curve: also score all pairs, for the trade-off over K (with several processes each of them does).
    """
    if not members:
        raise ValueError("members is empty; pass at least one model")
    processes = processes or Processes()
    meter, began = StageMeter(members[0].device), time.time()
    galleries = encode_members(
        members, split, meter, feature_memory=feature_memory, folder=folder, processes=processes, progress=progress
    )
    if folder is not None and feature_disk is not None and processes.rank == 0:
        prune_banks(folder, budget=feature_disk, began=began)
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
    if folder is not None and not split.images_hash:
        raise ValueError("images_hash of the split is empty; pass a hash of its pictures where features are kept")
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
                    "form": member.form,
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
        coarse = coarse_ranks(spooled, image_of_text, images=images, progress=progress)
    with meter.stage("fine"):
        pairs = listed_pairs(lists)
        shard = retriever.fine_shard(pairs, rank=processes.rank, world_size=processes.world_size)
        fine = merge_shards(pairs, processes.gather(shard))
    with meter.stage("rank"):
        return retriever.rank(lists, pairs, fine), coarse


def code_hash(package: Path = PACKAGE) -> str:
    """Hash of the code that influences features; features cached by other code are not reused."""
    digest = hashlib.blake2b()
    for name in FEATURE_CODE:
        path = package / name
        for source in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            digest.update(source.read_bytes())
    return digest.hexdigest()[:32]
