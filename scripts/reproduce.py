"""Train and evaluate a grid of models through run.py, and summarise it: tables, figures, commands.

Examples:
  python scripts/reproduce.py demo --seeds 1 --rows full no_ksf
  python scripts/reproduce.py f8k --dry-run --set data_root=/data
  python scripts/reproduce.py f8k --out result/f8k --set data_root=/data --jobs 2
  python scripts/reproduce.py my_study.yaml --out result/mine --set data_root=/data

Studies: demo, f8k, f30k, coco (scripts/reproduction/studies/*.yaml), or the path of a YAML file of the same form.
The same command continues an interrupted study. Exit status: 0 complete, 1 some runs failed, 2 wrong input.

"""

import argparse
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hacan.errors import UserError, path, print_error
from scripts.reproduction.execute import Execution, check_same_study, finished_folder, write_commands
from scripts.reproduction.plan import Run, Study, load_study


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="demo, f8k, f30k, coco, or the path of a YAML file")
    parser.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="only these rows (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N - 1 of every row (default: %(default)s)")
    parser.add_argument("--out", type=path, help="folder of all results (default: result/study-STUDY)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one per GPU (default: %(default)s)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="config key of all runs; repeatable"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands and an estimate, and run nothing")
    options = parser.parse_args(arguments)
    try:
        study = load_study(options.study)
        out = options.out or Path("result") / f"study-{study.name}"
        keys = dict(_assignment(word) for word in options.set)
        if options.seeds < 1 or options.jobs < 1:
            raise UserError(f"--seeds {options.seeds} --jobs {options.jobs}: expected numbers from 1")
        runs = study.runs(rows=options.rows, seeds=options.seeds, out=out, keys=keys)
        if options.dry_run:
            print(plan_of(study, runs, out, jobs=options.jobs))
            return 0
        return run_study(study, runs, out, jobs=options.jobs)
    except UserError as error:
        return print_error(error)


def run_study(study: Study, runs: list[Run], out: Path, *, jobs: int) -> int:
    """Run what is missing and write the summary; return the exit status."""
    check_same_study(out, runs)
    write_commands(out, runs)
    execution = Execution(runs, out=out, jobs=jobs, report=lambda line: print(line, flush=True))
    for number in (signal.SIGTERM, signal.SIGINT):  # SIGINT is ignored in a background process of a shell
        signal.signal(number, _interrupt)
    interrupted = False
    try:
        execution.run_all()
    except KeyboardInterrupt:
        interrupted = True
        execution.stop()
        print("\ninterrupted; the same command continues", flush=True)
    from scripts.reproduction.summary import collect, write_summary  # imports torch

    results = collect(runs, out)
    if results:
        print("\n".join(f"wrote {path}" for path in write_summary(study, results, out)))
    if execution.failed:
        print(f"failed: {', '.join(execution.failed)}; the logs are in {out / 'logs'}", file=sys.stderr)
    return 1 if execution.failed or interrupted else 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def plan_of(study: Study, runs: list[Run], out: Path, *, jobs: int) -> str:
    """Return the commands of a study and an estimate of its time."""
    lines = [study.about.strip(), ""]
    for run in runs:
        state = "finished" if finished_folder(run, out) is not None else "to do"
        lines.append(f"{run.name} ({state}):\n  {run.shell()}")
    todo = [run for run in runs if not run.needs and finished_folder(run, out) is None]
    lines.append(f"\n{len(runs)} runs, {len(todo)} trainings to do")
    if study.seconds_per_run is None:
        lines.append("no estimate: the study file has no seconds_per_run, the measured time of one training")
    else:
        hours = len(todo) * study.seconds_per_run / jobs / 3600
        lines.append(f"about {hours:.1f} h for the trainings, at {study.seconds_per_run:g} s each and {jobs} at a time")
    return "\n".join(lines)


def _assignment(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals or not key.isidentifier():
        raise UserError(f"--set {word}: expected KEY=VALUE")
    path = Path(value).expanduser()
    return key, os.path.abspath(path) if value.startswith(("~", ".")) and path.exists() else value


if __name__ == "__main__":
    sys.exit(main())
