"""Run the commands of a study, several at a time, and resume what is not finished."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

from hacan.errors import UserError
from hacan.lock import FolderLock
from scripts.reproduction.plan import Run

ROOT = Path(__file__).resolve().parents[2]


def finished_folder(run: Run, out: Path) -> Path | None:
    """Return the record folder of the run's evaluation, the newest one with a metrics.json, or None."""
    return max((path.parent for path in (out / "runs" / run.name).glob("*/metrics.json")), key=_number, default=None)


def best_checkpoint(name: str, out: Path) -> Path | None:
    """Return the best checkpoint of a finished training, or None."""
    found = (out / "runs" / name).glob("*/checkpoints/best.ckpt")
    return max(found, key=lambda path: _number(path.parents[1]), default=None)


def _number(folder: Path) -> int:
    return int(folder.name) if folder.name.isdigit() else -1


class Execution:
    """The processes of a study. A signal ends them; their checkpoints are saved, and the next call resumes them."""

    def __init__(self, runs: Sequence[Run], *, out: Path, jobs: int, report: Callable[[str], None]) -> None:
        self.runs, self.out, self.jobs, self.report = runs, out, jobs, report
        self.failed: list[str] = []
        self._processes: set[subprocess.Popen] = set()
        self._stopped = threading.Event()
        self._seconds: list[float] = []
        self._left = 0
        self._slots: Queue[int] = Queue()
        for slot in range(jobs):
            self._slots.put(slot)

    def run_all(self) -> None:
        """Run everything that has no result yet: trainings, then evaluations of their checkpoints."""
        self.out.mkdir(parents=True, exist_ok=True)
        with FolderLock(self.out, remedy="wait for it, or give another --out"):
            missing = [run for run in self.runs if finished_folder(run, self.out) is None]
            self.report(f"{len(self.runs) - len(missing)} of {len(self.runs)} runs are finished, {len(missing)} to do")
            self._left = len(missing)
            for phase in ([run for run in missing if not run.needs], [run for run in missing if run.needs]):
                with ThreadPoolExecutor(self.jobs) as pool:
                    try:
                        list(pool.map(self._one, phase))
                    except BaseException:
                        self.stop()
                        raise

    def stop(self) -> None:
        """Send SIGTERM to the running processes: a training saves its state."""
        self._stopped.set()
        for process in list(self._processes):
            process.send_signal(signal.SIGTERM)

    def _one(self, run: Run) -> None:
        if self._stopped.is_set():
            return
        checkpoints = {name: path for name in run.needs if (path := best_checkpoint(name, self.out)) is not None}
        if len(checkpoints) < len(run.needs):
            self.failed.append(run.name)
            missing = ", ".join(sorted(set(run.needs) - set(checkpoints)))
            self.report(f"{run.name}: not evaluated, because {missing} has no checkpoint")
            return
        command = run.command(checkpoints)
        if not run.needs and list((self.out / "runs" / run.name).glob("*/checkpoints/last.ckpt")):
            command.append("resume_from=last")
        slot, start = self._slots.get(), time.monotonic()
        log = self.out / "logs" / f"{run.name}.log"
        log.parent.mkdir(exist_ok=True)
        try:
            with open(log, "ab") as file:
                process = subprocess.Popen(
                    [sys.executable, str(ROOT / "run.py"), *command[2:]],
                    cwd=Path.cwd(),
                    env=os.environ | _share_of_machine(slot, self.jobs),
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C reaches this process only, which ends the others by SIGTERM
                )
                self._processes.add(process)
                status = process.wait()
                self._processes.discard(process)
        finally:
            self._slots.put(slot)
        self._left -= 1
        if self._stopped.is_set():
            return
        if status or finished_folder(run, self.out) is None:
            self.failed.append(run.name)
            self.report(f"{run.name}: failed with status {status}, see {log}")
            return
        self._seconds.append(time.monotonic() - start)
        left = self._left * sum(self._seconds) / len(self._seconds) / self.jobs
        self.report(f"{run.name}: {self._seconds[-1]:.0f} s; {self._left} runs left, about {left / 60:.0f} min")


def _share_of_machine(slot: int, jobs: int) -> dict[str, str]:
    """Return the environment of one of `jobs` processes: a share of the cores, and one GPU if there are any."""
    if jobs == 1:
        return {}
    share = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    if shutil.which("nvidia-smi") is None:
        return share
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    return share | {"CUDA_VISIBLE_DEVICES": str(slot % max(1, listed.count("GPU ")))}


def check_same_study(out: Path, runs: Sequence[Run]) -> None:
    """Raise `UserError` if a run in `out` had another command than it has now."""
    for run in runs:
        record = out / "commands" / f"{run.name}.txt"
        if record.is_file() and record.read_text().strip() != run.shell():
            raise UserError(
                f"{record} has another command than this study now gives for {run.name}; give another --out, or remove "
                f"{out / 'runs' / run.name} and {record}"
            )


def write_commands(out: Path, runs: Sequence[Run]) -> None:
    """Write the command of every run below `out`/commands."""
    (out / "commands").mkdir(parents=True, exist_ok=True)
    for run in runs:
        (out / "commands" / f"{run.name}.txt").write_text(run.shell() + "\n")
