"""Uncertainty of recalls: bootstrap intervals over queries, and a paired test of two rankings of the same queries.

R@1, R@5 and R@10 depend on a query only through the bin of its rank. Drawing n queries with replacement and counting
bins is one multinomial draw, so a resample costs four numbers, without approximation. The same holds for the per-query
differences of the paired test.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from hacan.errors import UserError
from hacan.retrieval.metrics import RECALLS
from hacan.retrieval.provenance import DATA_FIELDS, RULE_FIELDS, SYSTEM_FIELDS, check_comparable

STAGES = ("hierarchical", "coarse")
TITLES = {
    "r1_i2t": "i2t R@1",
    "r5_i2t": "i2t R@5",
    "r10_i2t": "i2t R@10",
    "r1_t2i": "t2i R@1",
    "r5_t2i": "t2i R@5",
    "r10_t2i": "t2i R@10",
    "rsum": "Rsum",
}
# Settings of a model that metrics.json had under another name before.
RENAMED_SETTINGS = {"temperature": "lambda_softmax"}


def recall_intervals(
    folds: list[tuple[Tensor, Tensor]], *, resamples: int, seed: int, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Return percentile bootstrap intervals of the six recalls and Rsum: {name: (low, high)} in percent.

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
    return {name: (float(low[index]), float(high[index])) for index, name in enumerate(TITLES)}


def paired_test(
    ours: list[tuple[Tensor, Tensor]], theirs: list[tuple[Tensor, Tensor]], *, resamples: int = 10_000, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Compare two rankings of the same queries: {name: {difference, low, high, p}} for the six recalls and Rsum.

    ours, theirs: (ranks_i2t, ranks_t2i) of each fold, in the same order of queries. difference: ours - theirs in
    percent, with its bootstrap 95% interval over queries. p: two-sided sign-flip test, whose null hypothesis is that
    each query's two outcomes could be swapped.

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
        for index, name in enumerate(TITLES)
    }


def _resampled_recalls(ranks: Tensor, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """Return R@1, R@5, R@10 in percent of resampled queries, [resamples, 3]."""
    bins = torch.bucketize(ranks, torch.tensor(RECALLS, dtype=ranks.dtype), right=True)
    counts = torch.bincount(bins, minlength=len(RECALLS) + 1).numpy()
    draws = generator.multinomial(len(ranks), counts / len(ranks), size=resamples)
    return 100.0 * draws[:, : len(RECALLS)].cumsum(1) / len(ranks)


# -- comparing saved results ------------------------------------------------------------------------------------------


class SavedResult(NamedTuple):
    """The files that `Evaluation.save` writes."""

    path: Path  # of metrics.json
    provenance: dict[str, Any]
    metrics: dict[str, dict[str, float | None]]  # by stage
    ranks: dict[str, list[tuple[Tensor, Tensor]]]  # by stage: (i2t, t2i) of each fold


def load_result(path: Path) -> SavedResult:
    """Return the result in a folder or of a metrics.json, with the ranks.npz beside it; raise `UserError` otherwise."""
    file = path / "metrics.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text())
        metrics = {stage: dict(content[stage]) for stage in STAGES}
        record = dict(content["receipt"])
        for field in (*DATA_FIELDS, *RULE_FIELDS, *SYSTEM_FIELDS):
            record[field]  # all of them are needed for a comparison
        record["members"] = [
            {RENAMED_SETTINGS.get(key, key): value for key, value in member.items()} for member in record["members"]
        ]
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); give the folder of an evaluated run") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is not a complete metrics.json ({error!r}); give the folder of an evaluated run"
        ) from error
    beside = file.with_name("ranks.npz")
    try:
        with np.load(beside) as arrays:
            folds = range(sum(name.startswith("coarse_i2t_") for name in arrays))
            ranks = {
                stage: [
                    (torch.from_numpy(arrays[f"{stage}_i2t_{fold}"]), torch.from_numpy(arrays[f"{stage}_t2i_{fold}"]))
                    for fold in folds
                ]
                for stage in STAGES
            }
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise UserError(
            f"{beside} holds no ranks ({error}); a paired test needs the ranks.npz that was written with {file.name}"
        ) from error
    return SavedResult(file, record, metrics, ranks)


def compare_results(
    one: SavedResult, other: SavedResult, *, across: tuple[str, ...] = (), resamples: int = 10_000, seed: int = 0
) -> str:
    """Return the comparison as text; raise `UserError` with the field if the two are not comparable."""
    differing = check_comparable(one.provenance, other.provenance, across=across)
    record = one.provenance
    lines = [
        f"first:  {one.path}",
        f"second: {other.path}",
        f"{record['dataset']} {record['split']}, {record['protocol']}: {record['queries_i2t']:,} image and "
        f"{record['queries_t2i']:,} text queries",
    ]
    lines += [
        f"they differ in {field}: {_short(one, other, field)} | {_short(other, one, field)}" for field in differing
    ]
    if not differing:
        lines.append("all recorded fields are equal: the same models, measured twice")
    for stage in STAGES:
        found = paired_test(one.ranks[stage], other.ranks[stage], resamples=resamples, seed=seed)
        lines += ["", f"{stage:14}{'first':>9}{'second':>9}{'first - second':>17}{'95% interval':>20}{'p':>9}"]
        for name, title in TITLES.items():
            row = found[name]
            interval = f"{row['low']:+.2f} to {row['high']:+.2f}"
            lines.append(
                f"  {title:12}{one.metrics[stage][name]:>9.2f}{other.metrics[stage][name]:>9.2f}"
                f"{row['difference']:>+17.2f}{interval:>20}{row['p']:>9.4f}"
            )
    lines += [
        "",
        f"p: two-sided sign-flip test over queries, {resamples:,} flips; interval: paired bootstrap over queries",
    ]
    return "\n".join(lines)


def _short(result: SavedResult, other: SavedResult, field: str) -> str:
    """Return the value of a field; of members their files and hashes, and the settings that the other does not have."""
    if field != "members":
        return str(result.provenance.get(field))
    elsewhere = [setting for member in other.provenance["members"] for setting in member.items()]
    parts = []
    for member in result.provenance["members"]:
        facts = [f"{key}={value}" for key, value in member.items() if (key, value) not in elsewhere]
        facts = [fact for fact in facts if not fact.startswith(("checkpoint=", "hash="))]
        parts.append(f"{member['checkpoint']} ({', '.join([member['hash'][:8], *facts])})")
    return ", ".join(parts)
