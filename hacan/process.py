"""A process among others: whether it speaks for the run, and how it ends when something went wrong."""

import contextlib
import errno
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from hacan.errors import UserError

GONE = ("closed by peer", "reset by peer", "Connection reset")  # gloo's words where the other end has ended


def is_first_process() -> bool:
    """Whether this process records the run: the first one of torchrun, SLURM or Lightning's own launcher."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def must_be_writable(folder: Path, *, key: str) -> None:
    """Refuse a folder that no file can be made in, before anything is done; `key`: the setting that names it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise UserError(f"{key}: nothing can be written to {folder} ({error.strerror}); give another folder") from error


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """A mistake that a person can mend ends the program with its one line and status 2, without a traceback."""
    try:
        yield
    except UserError as error:
        _fail(str(error), error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = error.filename2 or error.filename or "a log or a feature file"  # of a copy its target
        _fail(f"{error.strerror}: {where}; free space there, then go on with resume_from=last", error)
    except RuntimeError as error:
        if not any(words in str(error) for words in GONE):
            raise
        _fail("another process of this run has ended; its own message says why", error)


def _fail(message: str, error: Exception) -> NoReturn:
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"
    print(f"error: {message}" if is_first_process() else f"error (process {rank}): {message}", file=sys.stderr)
    raise SystemExit(2) from error
