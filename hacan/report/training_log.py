"""Loss and recall curves of a training, from the CSV file of its run."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from hacan.report.charts import Line, line_chart

LOG = Path("csv") / "metrics.csv"


def find_training_log(run_folder: Path, checkpoints: Sequence[str]) -> Path | None:
    """Return the log of this run if it trained, else that of the run of the only checkpoint, else None."""
    places = [run_folder / LOG]
    if len(checkpoints) == 1:
        places.append(Path(checkpoints[0]).resolve().parent.parent / LOG)
    return next((place for place in places if place.is_file()), None)


def training_charts(log: Path) -> list[Figure]:
    """Return charts of losses over steps and of validation recalls over epochs, for the columns that the log has."""
    with open(log, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = list(rows[0]) if rows else []

    def line(column: str, name: str, *, over: str, dashed: bool = False) -> Line:
        kept = [row for row in rows if row.get(column)]
        # Lightning counts epochs and steps from 0, the chart from 1.
        return Line(name, [_number(row[over]) + 1 for row in kept], [_number(row[column]) for row in kept], dashed)

    global_losses = [name for name in names if name.startswith("train/global_")]
    losses = [line(f"train/{name}", name, over="step") for name in ("total", "triplet")]
    parts = [line(name, name.removeprefix("train/global_"), over="step") for name in global_losses]
    recalls = [
        line(f"val/r{k}_{direction}", f"R@{k} {direction}", over="epoch", dashed=direction == "t2i")
        for direction in ("i2t", "t2i")
        for k in (1, 5, 10)
    ]
    rsum = [line("val/rsum", "Rsum", over="epoch")]
    charts = [
        line_chart("Training loss", losses, x_label="optimiser step", y_label="loss", from_zero=True),
        line_chart("Global loss, unweighted", parts, x_label="optimiser step", y_label="loss", from_zero=True),
        line_chart("Validation recalls", recalls, x_label="epoch", y_label="percent", from_zero=True),
        line_chart("Validation Rsum", rsum, x_label="epoch", y_label="of 600"),
    ]
    return [chart for chart in charts if chart is not None]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # a killed run can leave half a line
        return math.nan
