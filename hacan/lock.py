"""One run per folder: a lock file that says who writes there, and that a dead process does not hold for ever."""

import json
import os
import socket
from pathlib import Path

from hacan.errors import UserError

LOCK = ".lock"


class FolderLock:
    """Holds `folder` for this process, from `acquire` to `release`.

    A lock is stale, and taken over, when its process no longer lives on this machine, or when it is of the same SLURM
    job: a job that was queued again after its node died.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._held = False

    def acquire(self) -> None:
        """Take the lock, or say who has it."""
        owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": _started(os.getpid()),
            "job": os.environ.get("SLURM_JOB_ID", ""),
        }
        mine = self.path.with_name(f"{LOCK}-{owner['host']}-{owner['pid']}")
        mine.write_text(json.dumps(owner), encoding="utf-8")
        try:
            while True:
                try:
                    os.link(mine, self.path)  # fails where a lock is; a name appears with its content or not at all
                except FileExistsError:
                    self._remove_if_stale(owner)
                else:
                    break
        finally:
            mine.unlink()
        self._held = True

    def release(self) -> None:
        """Give the folder back; without effect where it is not held."""
        if self._held:
            self.path.unlink(missing_ok=True)
        self._held = False

    def _remove_if_stale(self, me: dict[str, object]) -> None:
        try:
            other = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        except ValueError:
            other = {}
        pid, host = other.get("pid"), other.get("host")
        same_job = bool(me["job"]) and other.get("job") == me["job"]
        if host == me["host"] and isinstance(pid, int):
            dead = not _lives(pid) or other.get("started") != _started(pid)
        else:
            dead = same_job
        if not dead:
            raise UserError(
                f"another run writes to {self.path.parent} (process {pid} on {host}); give this one another folder, "
                f"save_path=PATH, or delete {self.path} if that run is over"
            )
        self.path.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True


def _started(pid: int) -> str:
    """When a process started, in clock ticks: tells it from a later one of the same number; empty where unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
