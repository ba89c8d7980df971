"""Line charts as inline SVG: text that scales, no library, no network."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 10, 42
MARKED = 30  # points at most for a line to have dots
POINTS = 300  # of a line at most; more are averaged in bins


class Line(NamedTuple):
    """One line of a chart; points without a finite value are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0  # one of the page's, 0 to 4
    dashed: bool = False


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    from_zero: bool = False,
    mark: tuple[float, float, str] | None = None,
) -> str:
    """A figure with title, chart and legend; '' when nothing can be drawn. `mark`: x, y and name of a point."""
    lines = [line._replace(x=points[0], y=points[1]) for line in lines if (points := _points(line, log_x))[0]]
    if not lines:
        return ""
    x_values = [x for line in lines for x in line.x]
    y_values = [y for line in lines for y in line.y]
    x_low, x_high = min(x_values), max(x_values)
    y_ticks = nice_ticks(0.0 if from_zero else min(y_values), max(y_values))
    y_low, y_high = min(y_ticks[0], *y_values), max(y_ticks[-1], *y_values)
    if log_x:
        x_ticks = _log_ticks(x_low, x_high)
    else:
        counts = all(float(x).is_integer() for x in x_values)  # epochs, steps: nothing lies between
        ticks = nice_ticks(x_low, x_high)
        x_ticks = [x for x in ticks if x_low <= x <= x_high and (x.is_integer() or not counts)]

    def across(x: float) -> float:
        low, high, value = (math.log(v) for v in (x_low, x_high, x)) if log_x else (x_low, x_high, x)
        return LEFT + (WIDTH - LEFT - RIGHT) * ((value - low) / (high - low) if high > low else 0.5)

    def up(y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * ((y - y_low) / (y_high - y_low) if y_high > y_low else 0.5)

    parts = []
    for tick in y_ticks:
        at = up(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_short(tick)}</text>')
    for tick in x_ticks:
        parts.append(
            f'<text x="{across(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_short(tick)}</text>'
        )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    centre = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{centre:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{html.escape(x_label)}</text>')
    parts.append(
        f'<text transform="translate(12 {middle:.0f}) rotate(-90)" text-anchor="middle">{html.escape(y_label)}</text>'
    )
    for line in lines:
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in zip(line.x, line.y, strict=True))
        style = f"line c{line.colour}{' dashed' if line.dashed else ''}"
        parts.append(f'<polyline class="{style}" points="{path}"/>')
        if len(line.x) <= MARKED:
            for x, y in zip(line.x, line.y, strict=True):
                tip = html.escape(f"{line.name}: {y:.4g} at {_short(x)}")
                parts.append(
                    f'<circle class="dot c{line.colour}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="3">'
                    f"<title>{tip}</title></circle>"
                )
    names = [(f"c{line.colour}{' dashed' if line.dashed else ''}", line.name) for line in lines]
    if mark is not None:
        parts.append(f'<circle class="mark" cx="{across(mark[0]):.1f}" cy="{up(mark[1]):.1f}" r="5"/>')
        names.append(("mark", mark[2]))
    legend = "".join(
        f'<li><svg class="key" viewBox="0 0 26 10" aria-hidden="true">{_key(style)}</svg>{html.escape(name)}</li>'
        for style, name in names
    )
    ends = "; ".join(f"{line.name}: from {line.y[0]:.4g} to {line.y[-1]:.4g}" for line in lines)
    return (
        f'<figure class="chart"><figcaption>{html.escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(f"{title}. {ends}")}">'
        f'{"".join(parts)}</svg><ul class="legend">{legend}</ul></figure>'
    )


def nice_ticks(low: float, high: float, *, about: int = 5) -> list[float]:
    """Round numbers (1, 2, 5 times a power of ten apart) from at most `low` to at least `high`.

    >>> nice_ticks(3.0, 97.0)
    [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]
    """
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, low + (abs(low) or 1) / 2
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(float(k * step), 12) for k in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten and their 2 and 5 within the range; powers alone where there would be many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if high / low < 300 else (1,)
    return [digit * 10.0**power for power in powers for digit in digits if low <= digit * 10.0**power <= high]


def _points(line: Line, log_x: bool) -> tuple[list[float], list[float]]:
    """The finite points of a line; more than POINTS of them as means of neighbours."""
    kept = [
        (x, y)
        for x, y in zip(line.x, line.y, strict=True)
        if math.isfinite(x) and math.isfinite(y) and (x > 0 or not log_x)
    ]
    if len(kept) > POINTS and not log_x:
        step = -(-len(kept) // POINTS)
        bins = [kept[at : at + step] for at in range(0, len(kept), step)]
        kept = [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in bins]
    return [x for x, _ in kept], [y for _, y in kept]


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _key(style: str) -> str:
    if style == "mark":
        return '<circle class="mark" cx="13" cy="5" r="4"/>'
    return f'<line class="line {style}" x1="1" x2="25" y1="5" y2="5"/>'
