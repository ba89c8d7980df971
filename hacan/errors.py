"""Errors that a user can correct, and how a command line ends with them: one line, status 2. Standard library only."""

import contextlib
import errno
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

# Messages of torch.distributed (gloo) when another process of the run has ended.
PEER_ENDED = ("closed by peer", "reset by peer", "Connection reset")


class UserError(Exception):
    """A mistake in input, files or settings. The message is one line: what, where, what was expected, what to do.

    `run.py` and the scripts print it without a traceback; any other exception is a bug and keeps its traceback.
    """


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with one line on stderr and status 2 for `UserError`, a full disk and an ended peer process."""
    try:
        yield
    except UserError as error:
        _exit(str(error), error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = error.filename2 or error.filename or "a log or a feature file"  # filename2: the target of a copy
        _exit(f"{error.strerror}: {where}; free space there, then continue with resume_from=last", error)
    except RuntimeError as error:
        if not any(words in str(error) for words in PEER_ENDED):
            raise
        _exit("another process of this run has ended; its own message gives the reason", error)


def print_error(error: UserError | str) -> int:
    """Print one line to stderr and return 2, the exit status of every script for wrong input."""
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"
    prefix = "error" if is_first_process() else f"error (process {rank})"
    print(f"{prefix}: {printable(error)}", file=sys.stderr)
    return 2


def path(value: str) -> Path:
    """Return the path that an option of a script gives; a leading ~ is the home folder."""
    return Path(value).expanduser()


def printable(text: object) -> str:
    r"""Return a file name, or a message with one, for people: what cannot be shown is escaped.

    A name can hold line breaks, control sequences of terminals, marks that reverse the writing, and bytes that are not
    UTF-8, which Python has as lone surrogates. ASCII text without control characters stays as it is.

    >>> printable("caf\udce9\n.jpg")
    'caf\\xe9\\n.jpg'
    """
    return "".join(
        letter if letter.isprintable() else f"\\x{ord(letter) - 0xDC00:02x}" if "\udc80" <= letter <= "\udcff"
        else letter.encode("unicode_escape").decode()
        for letter in str(text)
    )  # fmt: skip


def _exit(message: str, error: Exception) -> NoReturn:
    raise SystemExit(print_error(message)) from error


def is_first_process() -> bool:
    """Return whether this is the process that records the run, under torchrun, SLURM or Lightning's own launcher."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def require_writable(folder: Path, *, key: str) -> None:
    """Raise `UserError` if no file can be written to `folder`; `key` is the setting that names it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise UserError(f"{key}: nothing can be written to {folder} ({error.strerror}); give another folder") from error
