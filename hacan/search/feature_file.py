"""Fine features of an index: a file of float16 rows, one per item, read through a memory map."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hacan.errors import UserError


class FeatureFile:
    """A growing file of float16 rows of one shape; rows that were never written read as zeros.

    Rows are written with pwrite, not through the map: a full disk is then an error instead of a SIGBUS.
    """

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.path, self.shape = path, tuple(shape)
        self._row_bytes = int(np.prod(shape)) * 2
        if not path.exists():
            path.touch()
        self._map: np.ndarray | None = None

    def write(self, rows: Sequence[int], values: np.ndarray) -> None:
        """Write values [n, ...] to some rows and to disk; raise `UserError` if float16 cannot represent them."""
        with np.errstate(over="ignore"):  # checked below
            half = values.astype(np.float16)
        if not np.isfinite(half).all():
            raise UserError(
                f"features up to {np.abs(values).max():.3g} do not fit float16, as {self.path.name} holds them: the "
                "model has diverged, or was trained at another scale; train it again, or index with another checkpoint"
            )
        try:
            with open(self.path, "r+b", buffering=0) as file:
                for row, value in zip(rows, half, strict=True):
                    content = memoryview(np.ascontiguousarray(value).data).cast("B")
                    at = row * self._row_bytes
                    while content:  # a full disk shortens a write; the next one raises
                        written = os.pwrite(file.fileno(), content, at)
                        content, at = content[written:], at + written
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; free space and run the same command again; it resumes"
            ) from error
        self._map = None

    def read(self, rows: Sequence[int]) -> np.ndarray:
        """Return rows [n, ...], float16."""
        if self._map is None:
            held = os.path.getsize(self.path) // self._row_bytes
            self._map = np.memmap(self.path, np.float16, mode="r", shape=(held, *self.shape)) if held else None
        held = 0 if self._map is None else len(self._map)
        if len(rows) and max(rows) >= held:
            raise UserError(
                f"{self.path} ends at row {held}, expected row {max(rows)}: the index is damaged; build it again"
            )
        return (
            np.stack([self._map[row] for row in rows])
            if len(rows) and self._map is not None
            else np.empty((0, *self.shape), np.float16)
        )
