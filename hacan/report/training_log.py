"""The loss and recall curves of a training, from the CSV file that its run wrote."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from hacan.report.charts import Line, line_chart

LOG = Path("csv") / "metrics.csv"


def find_training_log(run_folder: Path, checkpoints: Sequence[str]) -> Path | None:
    """The log of this run when it trained, or of the run whose folder holds the only checkpoint; else None."""
    places = [run_folder / LOG]
    if len(checkpoints) == 1:
        places.append(Path(checkpoints[0]).resolve().parent.parent / LOG)
    return next((place for place in places if place.is_file()), None)


def training_charts(log: Path) -> list[str]:
    """Charts of losses over steps and of validation recalls over epochs; those that the log has figures for."""
    with open(log, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = list(rows[0]) if rows else []

    def line(column: str, name: str, colour: int, *, over: str, dashed: bool = False) -> Line:
        kept = [row for row in rows if row.get(column)]
        # Lightning's epochs and steps count from 0; people's from 1
        return Line(name, [_number(r[over]) + 1 for r in kept], [_number(r[column]) for r in kept], colour, dashed)

    globals_ = [name for name in names if name.startswith("train/global_")]
    losses = [line(f"train/{name}", name, k, over="step") for k, name in enumerate(("total", "triplet"))]
    parts = [line(name, name.removeprefix("train/global_"), k, over="step") for k, name in enumerate(globals_)]
    recalls = [
        line(f"val/r{k}_{d}", f"R@{k} {d}", colour, over="epoch", dashed=d == "t2i")
        for d in ("i2t", "t2i")
        for colour, k in enumerate((1, 5, 10))
    ]
    steps, epochs = {"x_label": "optimiser step"}, {"x_label": "epoch"}
    charts = [
        line_chart("Training loss", losses, y_label="loss", from_zero=True, **steps),
        line_chart("Global loss, before its weight", parts, y_label="loss", from_zero=True, **steps),
        line_chart("Validation recalls", recalls, y_label="percent", from_zero=True, **epochs),
        line_chart("Validation Rsum", [line("val/rsum", "Rsum", 0, over="epoch")], y_label="of 600", **epochs),
    ]
    return [chart for chart in charts if chart]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # a line that a killed run left half written
        return math.nan
