"""One writing process per folder, by a lock of the operating system: it ends with its process, also after a kill."""

import json
import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from hacan.errors import UserError

LOCK, OWNER = ".lock", ".lock.json"
WAIT_SECONDS = 6.0  # worker processes of a killed run hold its lock until they notice, within 5 seconds


class FolderLock:
    """The exclusive right to write to `folder`, from `acquire` to `release`; also a context manager.

    remedy: what the error message advises if another process holds the lock. `OWNER` in the folder says who held it
    last, for that message only.
    """

    def __init__(self, folder: Path, *, remedy: str, wait: float | None = None) -> None:
        self.folder, self.remedy = folder, remedy
        self._lock = FileLock(folder / LOCK, timeout=WAIT_SECONDS if wait is None else wait)

    def acquire(self) -> None:
        """Take the lock; raise `UserError` if another process holds it, `OSError` if the folder cannot be written."""
        try:
            self._lock.acquire()
        except Timeout as error:
            raise UserError(f"{self.folder} is in use by another process{self._owner()}; {self.remedy}") from error
        owner = {"pid": os.getpid(), "host": socket.gethostname()}
        (self.folder / OWNER).write_text(json.dumps(owner), encoding="utf-8")

    def release(self) -> None:
        """Release the lock; without effect if this process does not hold it."""
        if self._lock.is_locked:
            (self.folder / OWNER).unlink(missing_ok=True)
            self._lock.release()

    def __enter__(self) -> "FolderLock":
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _owner(self) -> str:
        try:
            owner = json.loads((self.folder / OWNER).read_text(encoding="utf-8"))
            return f" (process {owner['pid']} on {owner['host']})"
        except (OSError, ValueError, KeyError, TypeError):  # it is being written: the message does without
            return ""
