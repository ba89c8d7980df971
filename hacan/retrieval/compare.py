"""Two saved results against each other: refused where they measure different things, else a paired test."""

import json
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from hacan.errors import UserError
from hacan.retrieval.provenance import DATA_FIELDS, RULE_FIELDS, SYSTEM_FIELDS, check_comparable
from hacan.retrieval.significance import NAMES, paired_test

STAGES = ("hierarchical", "coarse")
TITLES = dict(zip(NAMES, ("i2t R@1", "i2t R@5", "i2t R@10", "t2i R@1", "t2i R@5", "t2i R@10", "Rsum"), strict=True))


class SavedResult(NamedTuple):
    """What `Evaluation.save` wrote."""

    path: Path  # of metrics.json
    receipt: dict[str, Any]
    metrics: dict[str, dict[str, float | None]]  # by stage
    ranks: dict[str, list[tuple[Tensor, Tensor]]]  # by stage: (i2t, t2i) of each fold


def load_result(path: Path) -> SavedResult:
    """A result from its folder or its metrics.json; ranks.npz has to lie beside it."""
    file = path / "metrics.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text())
        metrics = {stage: dict(content[stage]) for stage in STAGES}
        receipt = dict(content["receipt"])
        for field in (*DATA_FIELDS, *RULE_FIELDS, *SYSTEM_FIELDS):
            receipt[field]  # a receipt that leaves something open is none
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); give the folder of an evaluated run") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is no complete metrics.json ({error!r}); give the folder of an evaluated run"
        ) from error
    beside = file.with_name("ranks.npz")
    try:
        with np.load(beside) as arrays:
            folds = range(sum(name.startswith("coarse_i2t_") for name in arrays))
            ranks = {
                stage: [
                    tuple(torch.from_numpy(arrays[f"{stage}_{direction}_{fold}"]) for direction in ("i2t", "t2i"))
                    for fold in folds
                ]
                for stage in STAGES
            }
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise UserError(
            f"{beside} holds no ranks ({error}); a paired test needs the ranks.npz that was written with {file.name}"
        ) from error
    return SavedResult(file, receipt, metrics, ranks)


def compare_results(
    one: SavedResult, other: SavedResult, *, across: tuple[str, ...] = (), resamples: int = 10_000, seed: int = 0
) -> str:
    """The comparison as lines of text; UserError naming the field where the receipts say that it would mean nothing."""
    differing = check_comparable(one.receipt, other.receipt, across=across)
    lines = [f"first:  {one.path}", f"second: {other.path}"]
    receipt = one.receipt
    lines.append(
        f"{receipt['dataset']} {receipt['split']}, {receipt['protocol']}: {receipt['queries_i2t']:,} image and "
        f"{receipt['queries_t2i']:,} text queries"
    )
    lines += [
        f"they differ in {field}: {_short(one, other, field)} | {_short(other, one, field)}" for field in differing
    ]
    if not differing:
        lines.append("the receipts agree in everything: the same models, measured twice")
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
    """The field's value; of members their files and hashes, and of their settings those that the other has not."""
    if field != "members":
        return str(result.receipt.get(field))
    elsewhere = [setting for member in other.receipt["members"] for setting in member.items()]
    parts = []
    for member in result.receipt["members"]:
        facts = [f"{key}={value}" for key, value in member.items() if (key, value) not in elsewhere]
        facts = [fact for fact in facts if not fact.startswith(("checkpoint=", "hash="))]
        parts.append(f"{member['checkpoint']} ({', '.join([member['hash'][:8], *facts])})")
    return ", ".join(parts)
