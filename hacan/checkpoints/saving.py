"""Writing a file in one step, and the hash that says which file it was."""

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch

from hacan.errors import UserError


def atomic_save(content: Any, path: str | Path) -> None:
    """`torch.save` in one step, as the file system sees it: a crash or a full disk leaves the file that was there."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    written = None
    try:
        with open(partial, "wb") as file:
            written = _Written(file)
            torch.save(content, written)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        kept = f"; the {path.name} that was there is kept" if path.exists() else ""
        cause = written.error if written is not None and written.error is not None else error
        reason = getattr(cause, "strerror", None) or str(cause).strip().splitlines()[0]
        raise UserError(f"cannot write {path}: {reason}{kept}. Free space there, or give save_path=PATH") from error
    finally:
        partial.unlink(missing_ok=True)


class _Written:
    """A file that remembers why a write failed: torch's writer makes "unexpected pos 64 vs 0" of a full disk."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        """Write to the file."""
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Leave it to the end: a second failure there would hide the first."""


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal: which checkpoint a figure came from."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the system lets a folder be opened (Windows does not)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
