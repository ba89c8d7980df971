"""The figures of an evaluation as HTML: headline, results with intervals, the audit, the receipt, the curve over K."""

import html
import json
import math
from collections.abc import Mapping
from typing import Any

from hacan.report.charts import Line, line_chart
from hacan.retrieval.curve import COLUMNS, Curve
from hacan.retrieval.eccv_cxc import TITLES
from hacan.retrieval.metrics import RECALLS
from hacan.retrieval.results import Evaluation

DIRECTIONS = {"i2t": "image to text", "t2i": "text to image"}
RANKS = {"median": "median rank", "mean": "mean rank", "missed": "missed, %"}


def headline(evaluation: Evaluation) -> str:
    """The figures that people quote, with their intervals."""
    values = evaluation.hierarchical
    figures = [
        ("Rsum", "rsum", "of 600"),
        ("R@1, image to text", "r1_i2t", "%"),
        ("R@1, text to image", "r1_t2i", "%"),
        ("missed, image to text", "missed_i2t", "%"),
        ("missed, text to image", "missed_t2i", "%"),
    ]
    cards = []
    for name, key, unit in figures:
        interval = _interval(evaluation, "hierarchical", key)
        note = f"95%: {interval}" if interval else ""
        cards.append(
            f'<div class="card"><dt>{name}</dt><dd><b>{number(getattr(values, key))}</b> <span>{unit}</span>'
            f"<small>{note}</small></dd></div>"
        )
    return f'<dl class="cards">{"".join(cards)}</dl>'


def results_tables(evaluation: Evaluation) -> str:
    """Coarse only and hierarchical, by direction."""
    stages = {"coarse": evaluation.coarse, "hierarchical": evaluation.hierarchical}
    heads = ["coarse only", f"hierarchical, K&nbsp;=&nbsp;{evaluation.provenance['top_k']}"]

    def row(name: str, key: str) -> str:
        cells = ""
        for stage, metrics in stages.items():
            interval = _interval(evaluation, stage, key)
            small = f" <small>{interval}</small>" if interval else ""
            cells += f"<td>{number(getattr(metrics, key))}{small}</td>"
        return f'<tr><th scope="row">{name}</th>{cells}</tr>'

    return _by_direction(row, heads)


def audit_tables(evaluation: Evaluation) -> str:
    """The first release's rule beside the honest figures."""
    columns = (evaluation.hierarchical, evaluation.release_rule, evaluation.inflation)

    def row(name: str, key: str) -> str:
        honest, release, more = (getattr(metrics, key) for metrics in columns)
        return (
            f'<tr><th scope="row">{name}</th><td>{number(honest)}</td><td>{number(release)}</td>'
            f"<td>{number(more, sign='+')}</td></tr>"
        )

    return _by_direction(row, ["honest", "release's rule", "it would add"], ranks=False)


def judged_table(evaluation: Evaluation) -> str:
    """ECCV Caption and CxC; nothing where they were not measured."""
    if evaluation.extended is None:
        return ""
    rows = []
    for key, name in TITLES.items():
        cells = "".join(f"<td>{number(evaluation.extended[key][direction])}</td>" for direction in DIRECTIONS)
        rows.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    title = "judged matches of ECCV Caption and CxC, hierarchical, %"
    return f'<div class="judged">{_table(title, list(DIRECTIONS.values()), rows)}</div>'


def _by_direction(row: Any, heads: list[str], *, ranks: bool = True) -> str:
    tables = []
    for direction, name in DIRECTIONS.items():
        rows = [row(f"R@{k}", f"r{k}_{direction}") for k in RECALLS]
        rows += [row(text, f"{kind}_{direction}") for kind, text in RANKS.items() if ranks]
        tables.append(_table(name, heads, rows))
    tables.append(_table("both directions", heads, [row("Rsum", "rsum")]))
    return f'<div class="tables">{"".join(tables)}</div>'


def _table(caption: str, heads: list[str], rows: list[str]) -> str:
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    top = f"<caption>{caption}</caption><thead><tr><td></td>{head}</tr></thead>"
    return f"<table>{top}<tbody>{''.join(rows)}</tbody></table>"


def stages_table(receipt: dict[str, Any]) -> str:
    """Seconds and peak memory of each stage."""
    rows = []
    names = list(dict.fromkeys(key for figures in receipt["stages"].values() for key in figures))
    for stage, figures in receipt["stages"].items():
        cells = "".join(f"<td>{number(figures.get(name, math.nan), digits=2)}</td>" for name in names)
        rows.append(f'<tr><th scope="row">{html.escape(stage)}</th>{cells}</tr>')
    heads = [html.escape(name.replace("_mib", ", MiB").replace("_", " ")) for name in names]
    return _table("time and memory, by stage", heads, rows)


def receipt_list(receipt: dict[str, Any]) -> str:
    """Everything that makes the numbers comparable, as it stands in metrics.json."""
    return _listed({key: value for key, value in receipt.items() if key != "stages"})


def _listed(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<dt>{html.escape(key.replace('_', ' '))}</dt><dd>{_shown(value)}</dd>" for key, value in values.items()
    )
    return f'<dl class="receipt">{rows}</dl>'


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return _listed(value)
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        return "".join(map(_listed, value))
    return html.escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def curve_charts(curve: Curve) -> list[str]:
    """Rsum, the ceilings, the seconds and the memory over K."""
    k = list(range(1, len(curve.values) + 1))
    chosen = curve.suggested_k
    full = float(curve.rsum[-1])
    ends = [k[0], k[-1]]
    axis = {"x_label": "K, length of the shortlist", "log_x": True}
    return [
        line_chart(
            "Rsum over K",
            [
                Line("hierarchical", k, curve.rsum.tolist()),
                Line("all pairs, fine", ends, [full, full], 1, dashed=True),
                Line("coarse only", ends, [curve.coarse_rsum] * 2, 4, dashed=True),
            ],
            y_label="Rsum, of 600",
            mark=(chosen, float(curve.rsum[chosen - 1]), f"suggested: K = {chosen}"),
            **axis,
        ),
        line_chart(
            "Ceiling: a correct item is in the shortlist",
            [
                Line(name, k, curve.values[:, COLUMNS.index(f"ceiling_{direction}")].tolist(), colour)
                for colour, (direction, name) in enumerate(DIRECTIONS.items())
            ],
            y_label="% of queries",
            from_zero=True,
            **axis,
        ),
        line_chart(
            "Seconds, both directions",
            [
                Line("hierarchical, measured", list(curve.seconds), list(curve.seconds.values())),
                Line("all pairs, fine", ends, [curve.full_seconds] * 2, 1, dashed=True),
            ],
            y_label="seconds",
            from_zero=True,
            **axis,
        ),
        line_chart(
            "Peak memory of the process",
            [Line("hierarchical, measured", list(curve.host_peak_mib), list(curve.host_peak_mib.values()))],
            y_label="MiB",
            from_zero=True,
            **axis,
        ),
    ]


def number(value: float, *, sign: str = "", digits: int = 1) -> str:
    """A figure as people read it; a dash where there is none."""
    return f"{value:{sign},.{digits}f}" if math.isfinite(value) else "–"


def _interval(evaluation: Evaluation, stage: str, key: str) -> str:
    found = evaluation.intervals.get(stage, {}).get(key)
    return "" if found is None else f"{found[0]:.1f} – {found[1]:.1f}"
