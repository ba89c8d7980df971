"""Figures of a study."""

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from scripts.reproduction.summary import Difference, Result

BLUE, RED, GREY = "#1f5a99", "#c23b22", "#777777"


def draw_differences(differences: Mapping[str, "Difference"], *, reference: str) -> Figure:
    """Return a figure of each row's difference in Rsum to the reference: seeds, mean and interval."""
    figure = Figure(figsize=(8, 0.42 * len(differences) + 1.3), layout="constrained")
    axes = figure.add_subplot()
    for place, found in enumerate(reversed(list(differences.values()))):
        colour = {"higher": BLUE, "lower": RED}.get(found.verdict, GREY)
        if not math.isinf(found.low):
            axes.plot([found.low, found.high], [place, place], color=colour, linewidth=3, alpha=0.35)
        values = [one["difference"] for one in found.by_seed]
        axes.plot(values, [place] * len(values), "o", color=colour, markersize=4)
        axes.plot([found.mean], [place], "|", color=colour, markersize=16, markeredgewidth=2)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_ylim(-0.6, len(differences) - 0.4)
    axes.set_yticks(range(len(differences)), list(reversed(list(differences))))
    axes.set(xlabel=f"Rsum minus that of {reference}: seeds and 95% interval over seeds; grey: inside the noise")
    axes.grid(axis="x", alpha=0.25)
    return figure


def draw_training(groups: Mapping[str, Sequence["Result"]]) -> Figure | None:
    """Return a figure of the validation Rsum over epochs, the mean over the seeds of each row."""
    curves = {row: curve for row, group in groups.items() if (curve := _validation(group))}
    if not curves:
        return None
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for number, (row, curve) in enumerate(curves.items()):
        style = ("-", "--", ":", "-.")[number // 10 % 4]
        axes.plot(range(1, len(curve) + 1), curve, style, marker=".", label=row)
    axes.set(xlabel="epoch", ylabel="validation Rsum (mean over seeds)")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def _validation(group: Sequence["Result"]) -> list[float]:
    """Return the mean validation Rsum of every epoch that all seeds have; a resumed run has several logs."""
    seeds = []
    for result in group:
        epochs: dict[int, float] = {}
        for path in sorted(result.folder.parent.glob("*/csv/metrics.csv"), key=lambda path: int(path.parts[-3])):
            with open(path, newline="") as file:
                epochs |= {
                    int(row["epoch"]): float(row["val/rsum"]) for row in csv.DictReader(file) if row.get("val/rsum")
                }
        seeds.append([value for _, value in sorted(epochs.items())])
    return [statistics.fmean(values) for values in zip(*seeds, strict=False)]


def draw_trade_off(results: Sequence["Result"]) -> Figure | None:
    """Return a figure of Rsum and seconds over K, one line per run, from curve.csv."""
    paths = [result.folder / "curve.csv" for result in results if (result.folder / "curve.csv").is_file()]
    if not paths:
        return None
    figure = Figure(figsize=(9, 4), layout="constrained")
    quality, cost = figure.subplots(1, 2)
    for path in paths:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        k = np.array([int(row["k"]) for row in rows])
        quality.plot(k, [float(row["rsum"]) for row in rows], color=BLUE, alpha=0.6)
        timed = [(int(row["k"]), float(row["seconds"])) for row in rows if row["seconds"]]
        cost.plot(*zip(*timed, strict=True), "o-", color=BLUE, alpha=0.6, markersize=3)
    for axes, label in ((quality, "Rsum"), (cost, "seconds, both directions")):
        axes.set(xscale="log", xlabel="K, length of the shortlist", ylabel=label)
        axes.grid(alpha=0.25)
    return figure
