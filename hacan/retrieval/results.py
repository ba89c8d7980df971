"""Results of an evaluation: metrics, audit, intervals, provenance record, files, and the printed table (METHOD 6)."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hacan.retrieval.curve import Curve
from hacan.retrieval.eccv_cxc import TITLES
from hacan.retrieval.ensemble import Scorer
from hacan.retrieval.metrics import RECALLS, mean_of_metrics, release_ranks, retrieval_metrics
from hacan.retrieval.provenance import MISS_RULE, TIE_RULE, alignment_title, content_hash, versions, write_json
from hacan.retrieval.significance import recall_intervals
from hacan.retrieval.stage_meter import StageMeter
from hacan.types import Gallery, RetrievalMetrics, RetrievalResult, Split

DIRECTIONS = ("i2t", "t2i")
NAME_WIDTH = 20  # of the first column of the table


class Protocol(NamedTuple):
    """How a split is evaluated (METHOD section 6)."""

    top_k: int = 50
    coarse: str = "global"
    fold5: bool = False
    bootstrap: int = 0  # resamples of the 95% intervals; 0: no intervals
    seed: int = 0
    curve: bool = False  # also score all pairs, for the trade-off over K


class Evaluation(NamedTuple):
    """Results of an evaluation. Lists have one entry per fold: one, or five."""

    provenance: dict[str, Any]
    coarse: RetrievalMetrics  # coarse scores alone, over the whole gallery
    hierarchical: RetrievalMetrics
    release_rule: RetrievalMetrics  # audit: with the first release's rule, a miss is rank 0
    intervals: dict[str, dict[str, tuple[float, float]]]  # 95%, by stage and metric; empty without bootstrap
    coarse_ranks: list[tuple[Tensor, Tensor]]  # (i2t, t2i) of the queries that have a correct item
    ranks: list[tuple[Tensor, Tensor]]
    results: list[RetrievalResult]  # ranks and shortlists of all queries, numbered within the fold
    curve: Curve | None = None  # mean over folds
    extended: dict[str, dict[str, float]] | None = None  # COCO: ECCV Caption and CxC, by metric and direction

    @property
    def inflation(self) -> RetrievalMetrics:
        """What the first release's rule adds to each metric."""
        pairs = zip(self.release_rule, self.hierarchical, strict=True)
        return RetrievalMetrics(*(0.0 if theirs == ours else theirs - ours for theirs, ours in pairs))

    def to_json(self) -> dict[str, Any]:
        """Return the content of metrics.json; its keys are a stable format."""
        return {
            "receipt": self.provenance,
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
        """Write metrics.json, ranks.npz (the rank of every query) and, if there is a curve, curve.csv and curve.png."""
        folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {}
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
    folds: list[slice],
    scorers: Sequence[Scorer],
    split: Split,
    protocol: Protocol,
    galleries: Sequence[Gallery],
    *,
    meter: StageMeter,
) -> Evaluation:
    """Return metrics, audit, intervals and provenance of the ranks of all folds."""
    ranks, coarse = [], []
    for rows, result, (coarse_i2t, coarse_t2i) in zip(folds, results, all_coarse, strict=True):
        # An image without captions stays in the gallery, but has no correct item as a query.
        asked = torch.bincount(split.image_of_text, minlength=len(split.ids))[rows] > 0
        ranks.append((result.ranks_i2t[asked], result.ranks_t2i))
        coarse.append((coarse_i2t[asked], coarse_t2i))
    intervals = {}
    if protocol.bootstrap:
        intervals = {
            "coarse": recall_intervals(coarse, resamples=protocol.bootstrap, seed=protocol.seed),
            "hierarchical": recall_intervals(ranks, resamples=protocol.bootstrap, seed=protocol.seed),
        }
    provenance = {
        "dataset": split.dataset,
        "split": split.name,
        "protocol": f"mean of {len(ranks)} folds, each ranked on its own" if protocol.fold5 else "whole split",
        "images": len(split.ids),
        "texts": len(split.captions),
        **({"left_out": split.left_out} if split.left_out else {}),
        "queries_i2t": sum(len(fold[0]) for fold in ranks),
        "queries_t2i": sum(len(fold[1]) for fold in ranks),
        "ids_hash": content_hash([list(split.ids), list(split.captions), split.image_of_text.tolist()]),
        "top_k": protocol.top_k,
        "coarse": protocol.coarse,
        "tie_rule": TIE_RULE,
        "miss_rule": MISS_RULE,
        "alignment": _joined([scorer.alignment for scorer in scorers]),
        "direction": _joined([scorer.direction for scorer in scorers]),
        "precision": _joined([scorer.precision for scorer in scorers]),
        "features": _joined([str(gallery.images.high.dtype).removeprefix("torch.") for gallery in galleries]),
        "ensemble": len(scorers) > 1,
        "members": [
            {
                "checkpoint": scorer.name,
                "hash": scorer.checkpoint_hash,
                "alignment": scorer.alignment,
                "direction": scorer.direction,
                **scorer.settings,
            }
            for scorer in scorers
        ],
        "bootstrap": protocol.bootstrap,
        "seed": protocol.seed,
        "device": str(scorers[0].device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "stages": meter.stages,
    }
    return Evaluation(
        provenance=provenance,
        coarse=mean_of_metrics([retrieval_metrics(*fold) for fold in coarse]),
        hierarchical=mean_of_metrics([retrieval_metrics(*fold) for fold in ranks]),
        release_rule=mean_of_metrics([retrieval_metrics(*map(release_ranks, fold)) for fold in ranks]),
        intervals=intervals,
        coarse_ranks=coarse,
        ranks=ranks,
        results=results,
    )


def _joined(values: list[str]) -> str:
    return " + ".join(dict.fromkeys(values))


# -- the printed table ------------------------------------------------------------------------------------------------


def format_table(evaluation: Evaluation) -> str:
    """Return the table of an evaluation: coarse, hierarchical with intervals, and the audit of the release's rule."""
    coarse, hierarchical = evaluation.provenance["coarse"], f"hierarchical K={evaluation.provenance['top_k']}"
    lines = [_title(evaluation), "", f"{'':{NAME_WIDTH}}{'image to text':^21}   {'text to image':^21}"]
    lines.append(_line("percent", [f"R@{k}" for k in RECALLS] * 2, "Rsum"))
    lines.append(_recalls("coarse only", evaluation.coarse))
    lines.append(_recalls(hierarchical, evaluation.hierarchical))
    for name, end in (("  95% from", 0), ("  95% to", 1)):
        if "hierarchical" in evaluation.intervals:
            ends = {key: interval[end] for key, interval in evaluation.intervals["hierarchical"].items()}
            lines.append(_recalls(name, evaluation.hierarchical._replace(**ends)))
    lines += ["", _line("rank, from 1", ["median", "mean", "miss %"] * 2, "")]
    lines += [_ranks("coarse only", evaluation.coarse), _ranks(hierarchical, evaluation.hierarchical)]
    lines += ["(mean over the queries that have a rank; miss: percent without a correct item in the shortlist)", ""]
    if evaluation.extended is not None:
        lines.append(f"{'judged matches, %':{NAME_WIDTH + 4}}{'image to text':>14}{'text to image':>16}")
        for name, title in TITLES.items():
            values = evaluation.extended[name]
            lines.append(f"{title:{NAME_WIDTH + 4}}{values['i2t']:>14.1f}{values['t2i']:>16.1f}")
        lines.append("")
    lines.append("Audit, not a result: the first release counts a query whose shortlist misses as rank 0, a hit.")
    lines += ["Its own printed numbers are reproduced only with coarse=release."] * (coarse != "release")
    lines.append(_recalls("release's rule", evaluation.release_rule))
    lines.append(_recalls("it would add", evaluation.inflation, sign="+"))
    return "\n".join(lines)


def _title(evaluation: Evaluation) -> str:
    record = evaluation.provenance
    model = alignment_title(record)
    left_out = f" ({record['left_out']} unreadable images left out)" if record.get("left_out") else ""
    if record["ensemble"]:
        names = ", ".join(member["checkpoint"] for member in record["members"])
        model = f"ENSEMBLE of {len(record['members'])} models, scores averaged ({names}): {model}"
    return (
        f"{record['dataset']} {record['split']}, {record['protocol']}: {record['images']:,} images, "
        f"{record['texts']:,} texts{left_out}; coarse score: {record['coarse']}\n{model}"
    )


def _recalls(name: str, metrics: RetrievalMetrics, *, sign: str = "") -> str:
    values = metrics._asdict()
    cells = [_number(values[f"r{k}_{direction}"], sign) for direction in DIRECTIONS for k in RECALLS]
    return _line(name, cells, _number(metrics.rsum, sign))


def _ranks(name: str, metrics: RetrievalMetrics) -> str:
    values = metrics._asdict()
    kinds = ("median", "mean", "missed")
    return _line(name, [_number(values[f"{kind}_{direction}"]) for direction in DIRECTIONS for kind in kinds], "")


def _line(name: str, cells: list[str], last: str) -> str:
    both = ["".join(f"{cell:>7}" for cell in part) for part in (cells[:3], cells[3:])]
    return f"{name:{NAME_WIDTH}}{both[0]}   {both[1]}{last:>10}".rstrip()


def _number(value: float, sign: str = "") -> str:
    return "-" if math.isinf(value) else f"{value:{sign}.1f}"
