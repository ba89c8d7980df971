"""Charts of the report: matplotlib figures as inline SVG, whose text stays text."""

import io
import re
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = ("#1f5a99", "#c23b22", "#6a9f3a", "#d98b1f", "#777777")
MAX_POINTS = 300  # of a line; more are averaged in bins
MAX_MARKERS = 30  # lines with more points have no markers
NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


class Line(NamedTuple):
    """One line of a chart; points that are not finite are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


def line_chart(
    title: str, lines: Sequence[Line], *, x_label: str, y_label: str, from_zero: bool = False
) -> Figure | None:
    """Return a chart of lines over whole numbers, or None if no line has a point."""
    figure = Figure(figsize=(5.2, 3.1), layout="constrained")
    axes = figure.subplots()
    for number, line in enumerate(lines):
        x, y = _points(line)
        if len(x):
            colour = COLOURS[number % len(COLOURS)] if not line.dashed else COLOURS[(number - len(lines) // 2) % 5]
            marker = "o" if len(x) <= MAX_MARKERS else None
            style = "--" if line.dashed else "-"
            axes.plot(x, y, style, color=colour, marker=marker, markersize=4, linewidth=1.6, label=line.name)
    if not axes.lines:
        return None
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, framealpha=0.9, ncols=2 if len(lines) > 3 else 1)
    return figure


def inline_svg(figure: Figure, *, label: str) -> Markup:
    """Return a figure as an svg element for HTML; `label` describes it to screen readers."""
    content = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(content, format="svg", metadata=NO_METADATA)
    svg = content.getvalue()
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None
    return Markup('<svg viewBox="{}" role="img" aria-label="{}">').format(box[1], label) + Markup(body)


def _points(line: Line) -> tuple[np.ndarray, np.ndarray]:
    """Return the finite points; if there are more than `MAX_POINTS`, the means of neighbours."""
    x, y = np.asarray(line.x, float), np.asarray(line.y, float)
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) > MAX_POINTS:
        bins = np.array_split(np.arange(len(x)), MAX_POINTS)
        x, y = (np.array([values[part].mean() for part in bins]) for values in (x, y))
    return x, y
