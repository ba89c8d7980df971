"""Results as text for a terminal: what was measured, the honest numbers, and the audit, labelled as such."""

import math

from hacan.retrieval.eccv_cxc import TITLES
from hacan.retrieval.evaluate import Evaluation
from hacan.retrieval.metrics import RECALLS
from hacan.retrieval.provenance import name_of_alignment
from hacan.types import RetrievalMetrics

DIRECTIONS = ("i2t", "t2i")
NAME = 20  # width of the first column


def format_table(evaluation: Evaluation) -> str:
    """Coarse only, hierarchical with its intervals, and the first release's rule with what it adds: lines of text."""
    hierarchical = f"hierarchical K={evaluation.receipt['top_k']}"
    lines = [_title(evaluation), "", f"{'':{NAME}}{'image to text':^21}   {'text to image':^21}"]
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
        lines += _extended(evaluation.extended)
    lines.append("Audit, not a result: the first release counts a query whose shortlist misses as rank 0, a hit.")
    lines.append(_recalls("release's rule", evaluation.release_rule))
    lines.append(_recalls("it would add", evaluation.inflation, sign="+"))
    return "\n".join(lines)


def _title(evaluation: Evaluation) -> str:
    receipt = evaluation.receipt
    model = name_of_alignment(receipt)
    if receipt["ensemble"]:
        names = ", ".join(member["checkpoint"] for member in receipt["members"])
        model = f"ENSEMBLE of {len(receipt['members'])} models, scores averaged ({names}): {model}"
    return (
        f"{receipt['dataset']} {receipt['split']}, {receipt['protocol']}: {receipt['images']:,} images, "
        f"{receipt['texts']:,} texts; coarse score: {receipt['coarse']}\n{model}"
    )


def _recalls(name: str, metrics: RetrievalMetrics, *, sign: str = "") -> str:
    values = metrics._asdict()
    cells = [_number(values[f"r{k}_{direction}"], sign) for direction in DIRECTIONS for k in RECALLS]
    return _line(name, cells, _number(metrics.rsum, sign))


def _ranks(name: str, metrics: RetrievalMetrics) -> str:
    values = metrics._asdict()
    kinds = ("median", "mean", "missed")
    return _line(name, [_number(values[f"{kind}_{direction}"]) for direction in DIRECTIONS for kind in kinds], "")


def _extended(metrics: dict[str, dict[str, float]]) -> list[str]:
    """ECCV Caption and CxC, hierarchical."""
    lines = [f"{'judged matches, %':{NAME + 4}}{'image to text':>14}{'text to image':>16}"]
    for name, title in TITLES.items():
        lines.append(f"{title:{NAME + 4}}{metrics[name]['i2t']:>14.1f}{metrics[name]['t2i']:>16.1f}")
    return [*lines, ""]


def _line(name: str, cells: list[str], last: str) -> str:
    both = ["".join(f"{cell:>7}" for cell in part) for part in (cells[:3], cells[3:])]
    return f"{name:{NAME}}{both[0]}   {both[1]}{last:>10}".rstrip()


def _number(value: float, sign: str = "") -> str:
    return "-" if math.isinf(value) else f"{value:{sign}.1f}"
