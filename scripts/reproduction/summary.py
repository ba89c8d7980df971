"""Tables and figures of a study from the metrics.json and ranks.npz of its runs."""

import csv
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hacan.retrieval.significance import TITLES, load_result, paired_test
from scripts.reproduction.execute import finished_folder
from scripts.reproduction.plan import Run, Study

RECALLS = [name for name in TITLES if name != "rsum"]
# Two-sided 95% quantiles of Student's t distribution by degrees of freedom; more are close to the normal one.
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


class Result(NamedTuple):
    """The evaluation of a run."""

    run: Run
    folder: Path
    metrics: dict[str, Any]  # content of metrics.json


class Difference(NamedTuple):
    """Rsum of a row minus that of the reference, paired by seed."""

    mean: float
    low: float  # 95% interval over seeds, Student's t; infinite with one seed
    high: float
    by_seed: list[dict[str, float]]  # paired test over the queries: difference, low, high, p

    @property
    def verdict(self) -> str:
        """Return higher or lower if the interval over seeds and all intervals over queries exclude 0, else noise."""
        lows, highs = zip((self.low, self.high), *((one["low"], one["high"]) for one in self.by_seed), strict=True)
        return "higher" if min(lows) > 0 else "lower" if max(highs) < 0 else "inside the noise"


def collect(runs: Sequence[Run], out: Path) -> list[Result]:
    """Return the results of the finished runs."""
    results = []
    for run in runs:
        folder = finished_folder(run, out)
        if folder is not None:
            results.append(Result(run, folder, json.loads((folder / "metrics.json").read_text())))
    return results


def seconds_of(metrics: Mapping[str, Any]) -> float:
    """Return the seconds of the coarse and the fine stage of an evaluation."""
    stages = metrics["receipt"]["stages"]
    return sum(stages[name]["seconds"] for name in ("coarse", "fine", "rank"))


def difference(ours: Sequence[Result], theirs: Sequence[Result]) -> Difference | None:
    """Return the difference of two rows over the seeds that both have, or None if there is none."""
    by_seed = {result.run.seed: result for result in theirs}
    pairs = [(result, by_seed[result.run.seed]) for result in ours if result.run.seed in by_seed]
    if not pairs:
        return None
    tests = []
    for pair in pairs:
        ranks = [load_result(result.folder).ranks["hierarchical"] for result in pair]
        tests.append(paired_test(*ranks)["rsum"])
    values = [test["difference"] for test in tests]
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Difference(mean, -math.inf, math.inf, tests)
    half = T_95.get(len(values) - 1, 1.96) * statistics.stdev(values) / math.sqrt(len(values))
    return Difference(mean, mean - half, mean + half, tests)


def write_summary(study: Study, results: Sequence[Result], out: Path) -> list[Path]:
    """Write results.csv, tables.md and the figures to `out`; return their paths."""
    from scripts.reproduction.figures import draw_differences, draw_trade_off, draw_training  # matplotlib

    groups: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        groups[result.run.row, result.run.evaluation].append(result)
    written = [_write_csv(results, out / "results.csv")]
    reference = groups[study.reference, ""]
    differences = {
        row: found
        for row in [*study.rows, *study.ensembles]
        if row != study.reference and (found := difference(groups[row, ""], reference)) is not None
    }
    (out / "tables.md").write_text(_tables(study, groups, differences), encoding="utf-8")
    written.append(out / "tables.md")
    curves = [result for (_, kind), group in groups.items() if kind == "curve" for result in group]
    figures = {
        "differences.png": draw_differences(differences, reference=study.reference) if differences else None,
        "training.png": draw_training({row: groups[row, ""] for row in study.rows if groups[row, ""]}),
        "trade_off.png": draw_trade_off(curves),
    }
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(out / name, dpi=130)
            written.append(out / name)
    return written


def _write_csv(results: Sequence[Result], path: Path) -> Path:
    others = ("coarse_rsum", "release_rule_rsum", "seconds", "command", "folder")
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "seed", "evaluation", *RECALLS, "rsum", *others])
        for run, folder, metrics in results:
            recalls = [metrics["hierarchical"][name] for name in (*RECALLS, "rsum")]
            rsums = metrics["coarse"]["rsum"], metrics["release_rule"]["metrics"]["rsum"]
            numbers = [f"{value:.2f}" for value in (*recalls, *rsums, seconds_of(metrics))]
            writer.writerow([run.row, run.seed, run.evaluation, *numbers, run.shell(), folder])
    return path


def _tables(study: Study, groups: dict[tuple[str, str], list[Result]], differences: dict[str, Difference]) -> str:
    columns = "i2t R@1, 5, 10 | t2i R@1, 5, 10 | Rsum | sd | coarse Rsum | release's rule | seconds |"
    head = [f"| row | seeds | {columns}", "|---|---:|---|---|---:|---:|---:|---:|---:|"]
    lines = [f"# Study {study.name}", "", study.about.strip(), "", "## Rows", ""]
    lines += [
        "Mean over seeds, in percent; Rsum is the sum of the six recalls, sd its standard deviation over seeds.",
        "",
    ]
    lines += [
        "Release's rule: Rsum as the first public code counts, a miss as a hit. Seconds: coarse and fine stage.",
        "",
    ]
    lines += head
    for row, about in _entries(study):
        cells = _cells(groups[row, ""]) if groups[row, ""] else "0 | not run | | | | | |"
        lines.append(f"| {row}: {about} | {cells} |")
    for kind, evaluation in study.evaluations.items():
        found = {row: groups[row, kind] for row in study.rows if groups[row, kind]}
        if found:
            lines += ["", f"## {kind}: {evaluation.get('about', '')}", "", *head]
            lines += [f"| {row} | {_cells(group)} |" for row, group in found.items()]
    if differences:
        lines += ["", f"## Differences in Rsum to {study.reference}", ""]
        lines += [
            "Paired by seed. Over seeds: 95% interval of Student's t. Per seed: 95% bootstrap interval over queries."
        ]
        lines += ["A verdict needs all of them.", "", "| row | difference | over seeds | per seed | verdict |"]
        lines += ["|---|---:|---|---|---|"]
        for row, other in differences.items():
            each = [f"{one['difference']:+.1f} ({one['low']:+.1f} to {one['high']:+.1f})" for one in other.by_seed]
            over = "one seed" if math.isinf(other.low) else f"{other.low:+.1f} to {other.high:+.1f}"
            lines.append(f"| {row} | {other.mean:+.1f} | {over} | {'; '.join(each)} | {other.verdict} |")
    lines += [
        "",
        "## Commands",
        "",
        "Each gives the numbers of its row; the provenance record is in its metrics.json.",
        "",
    ]
    for row, _ in _entries(study):
        lines += [f"- {row}: `{result.run.shell()}` ({result.folder})" for result in groups[row, ""]]
    return "\n".join(lines) + "\n"


def _entries(study: Study) -> list[tuple[str, str]]:
    return [(row, entry.get("about", "")) for row, entry in {**study.rows, **study.ensembles}.items()]


def _cells(group: Sequence[Result]) -> str:
    """Return the cells of a table's row after its name: means over the runs of a group."""
    contents = [result.metrics for result in group]
    recalls = [f"{statistics.fmean(one['hierarchical'][name] for one in contents):.1f}" for name in RECALLS]
    rsums = [one["hierarchical"]["rsum"] for one in contents]
    spread = f"{statistics.stdev(rsums):.1f}" if len(rsums) > 1 else "-"
    coarse = statistics.fmean(one["coarse"]["rsum"] for one in contents)
    audit = statistics.fmean(one["release_rule"]["metrics"]["rsum"] for one in contents)
    seconds = statistics.fmean(map(seconds_of, contents))
    values = f"{statistics.fmean(rsums):.1f} | {spread} | {coarse:.1f} | {audit:.1f} | {seconds:.1f}"
    return f"{len(group)} | {', '.join(recalls[:3])} | {', '.join(recalls[3:])} | {values}"
