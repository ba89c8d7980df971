"""Draw the architecture of HACAN as docs/images/architecture.svg (METHOD sections 1, 2, 4 and 6).

Examples:
  python scripts/figures/architecture.py
  python scripts/figures/architecture.py --out architecture.png

"""

import argparse
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

DEFAULT = Path(__file__).resolve().parents[2] / "docs" / "images" / "architecture.svg"
IMAGE, TEXT, FINE, GLOBAL, INK = "#cfe2f3", "#fde2c4", "#d9ead3", "#e6dcf0", "#22303c"  # distinct in greyscale too


def box(axes: Axes, x: float, y: float, width: float, height: float, label: str, colour: str, size: float = 9) -> None:
    """Draw a rounded box with its lower left corner at (x, y)."""
    axes.add_patch(
        FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.8",
            facecolor=colour,
            edgecolor=INK,
            linewidth=0.9,
        )
    )
    axes.text(
        x + width / 2, y + height / 2, label, ha="center", va="center", fontsize=size, color=INK, linespacing=1.35
    )


def arrow(axes: Axes, *points: tuple[float, float], colour: str = INK, dashed: bool = False) -> None:
    """Draw a line through the points, with a head at the last one."""
    style: dict[str, Any] = {"color": colour, "linewidth": 1.1, "linestyle": "--" if dashed else "-"}
    for start, end in pairwise(points[:-1]):
        axes.plot(*zip(start, end, strict=True), solid_capstyle="round", **style)
    axes.add_patch(
        FancyArrowPatch(points[-2], points[-1], arrowstyle="-|>", mutation_scale=9, shrinkA=0, shrinkB=0, **style)
    )


def draw() -> Figure:
    """Return the figure."""
    figure = Figure(figsize=(10.6, 6.6))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 106), ylim=(0, 66))
    axes.axis("off")
    axes.add_patch(
        FancyBboxPatch(
            (0.6, 0.6), 104.8, 64.8, boxstyle="round,pad=0,rounding_size=1.6", facecolor="white", edgecolor="#b8c2cc"
        )
    )
    # inputs and encoders
    box(axes, 2, 46, 9, 8, "image\n224 x 224", "white")
    box(axes, 2, 20, 9, 8, "caption\n[CLS] ... [SEP]", "white", 8)
    box(axes, 15, 42, 13, 16, "ConvNeXt-Base\n\nstage 4\nstage 3", IMAGE)
    box(axes, 15, 16, 13, 16, "BERT-base\n\nlayer 12\nlayer 10", TEXT)
    arrow(axes, (11, 50), (15, 50))
    arrow(axes, (11, 24), (15, 24))
    # levels
    levels = (
        (53, "$V_h$: 49 regions, high level", IMAGE),
        (45.5, "$V_m$: 196 regions, mid level", IMAGE),
        (27, "$T_h$: W tokens, high level", TEXT),
        (19.5, "$T_m$: W tokens, mid level", TEXT),
    )
    for y, label, colour in levels:
        box(axes, 33, y, 21, 5, label, colour)
        arrow(axes, (28, y + 2.5), (33, y + 2.5))
    axes.text(30.5, 56.6, "Linear", fontsize=8, ha="center", color=INK)
    # global branch
    box(axes, 33, 38.2, 21, 4.6, "global vector, aggregator: $I$", GLOBAL)
    box(axes, 33, 33.2, 21, 4.6, "global vector, aggregator: $T$", GLOBAL)
    arrow(axes, (24, 42), (24, 40.5), (33, 40.5))
    arrow(axes, (24, 32), (24, 35.5), (33, 35.5))
    # fine alignment
    box(axes, 66, 51.5, 20, 6, "KSF($V_h$, $T_h$)\nkey semantic filter", FINE)
    box(axes, 66, 43, 20, 6, "LRG($V_h$, $T_m$)\nlocal relationship guidance", FINE, 8.4)
    box(axes, 66, 24.5, 20, 6, "LRG($V_m$, $T_h$)\nlocal relationship guidance", FINE, 8.4)
    blue, orange = "#2b6ca3", "#b3641b"
    arrow(axes, (54, 56.3), (66, 56.3), colour=blue)
    arrow(axes, (54, 54.4), (60.4, 54.4), (60.4, 47), (66, 47), colour=blue)
    arrow(axes, (54, 48), (57.6, 48), (57.6, 29), (66, 29), colour=blue)
    arrow(axes, (54, 30.6), (62.4, 30.6), (62.4, 52.8), (66, 52.8), colour=orange)
    arrow(axes, (54, 28.2), (58.6, 28.2), (58.6, 26), (66, 26), colour=orange)
    arrow(axes, (54, 22), (64.2, 22), (64.2, 44.6), (66, 44.6), colour=orange)
    # scores and losses
    box(axes, 91, 42.5, 12, 13, "fine score\n$F_{ij}$ = KSF\n+ LRG + LRG", FINE)
    arrow(axes, (86, 54.5), (91, 52.5))
    arrow(axes, (86, 46), (91, 48))
    arrow(axes, (86, 27.5), (88.5, 27.5), (88.5, 45), (91, 45))
    box(axes, 66, 33.7, 20, 6.2, "global score $s(I, T)$\ncosine", GLOBAL)
    arrow(axes, (54, 40.5), (66, 37.9))
    arrow(axes, (54, 35.5), (66, 35.7))
    box(axes, 91, 58.4, 12, 5, "triplet loss", "white")
    arrow(axes, (97, 55.5), (97, 58.4))
    box(axes, 91, 33.7, 12, 6.2, "global loss\n(GCD)", "white")
    arrow(axes, (86, 36.8), (91, 36.8))
    arrow(axes, (99.5, 42.5), (99.5, 39.9), dashed=True)
    axes.text(100.1, 41.2, "hard\nnegatives", fontsize=6.5, va="center", color=INK)
    # inference
    axes.plot([3, 103], [13.6, 13.6], color="#b8c2cc", linewidth=0.9)
    axes.text(3, 11.2, "Inference, coarse to fine", fontsize=9.5, weight="bold", color=INK, va="center")
    steps = (
        (3, 25, "1. global score of the query\nand the whole gallery", GLOBAL),
        (35, 20, "2. shortlist:\nthe best K = 50", "white"),
        (62, 20, "3. fine score of the\nshortlist only", FINE),
        (89, 14, "ranking by\nthe fine score", "white"),
    )
    for x, width, label, colour in steps:
        box(axes, x, 2.4, width, 6.4, label, colour)
    for (x, width, *_), (following, *_) in pairwise(steps):
        arrow(axes, (x + width, 5.6), (following, 5.6))
    return figure


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT, help="SVG or PNG file to write (default: %(default)s)")
    options = parser.parse_args(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if options.out.suffix == ".svg" else None
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "hacan"}):
        draw().savefig(options.out, dpi=110, transparent=True, metadata=metadata)
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
