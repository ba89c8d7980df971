"""Fine features beside the vector store: one float16 file an array, a row an item, read through a memory map."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hacan.errors import UserError


class RowFile:
    """A file of float16 rows of one shape, which grows; a row that was never written reads as zeros.

    Rows are written with pwrite, not through the map: a full disk is then an error and not the end of the process.
    """

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.path, self.shape = path, tuple(shape)
        self._row_bytes = int(np.prod(shape)) * 2
        if not path.exists():
            path.touch()
        self._map: np.ndarray | None = None

    def write(self, rows: Sequence[int], values: np.ndarray) -> None:
        """Values [n, ...] at these rows, on the disk when this returns; what float16 cannot hold is refused."""
        with np.errstate(over="ignore"):  # found below
            half = values.astype(np.float16)
        if not np.isfinite(half).all():
            raise UserError(
                f"features up to {np.abs(values).max():.3g} do not fit float16, as {self.path.name} holds them: the "
                "model has diverged, or was trained at another scale; train it again, or index with another checkpoint"
            )
        try:
            with open(self.path, "r+b", buffering=0) as file:
                for row, value in zip(rows, half, strict=True):
                    content = memoryview(np.ascontiguousarray(value)).cast("B")
                    at = row * self._row_bytes
                    while content:  # a write may be cut short, by a full disk for one; the next one then says so
                        written = os.pwrite(file.fileno(), content, at)
                        content, at = content[written:], at + written
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; make room and run the same command again: it goes on"
            ) from error
        self._map = None

    def read(self, rows: Sequence[int]) -> np.ndarray:
        """Rows [n, ...], float16."""
        if self._map is None:
            held = os.path.getsize(self.path) // self._row_bytes
            self._map = np.memmap(self.path, np.float16, mode="r", shape=(held, *self.shape)) if held else None
        held = 0 if self._map is None else len(self._map)
        if len(rows) and max(rows) >= held:
            raise UserError(f"{self.path} ends at row {held}, expected row {max(rows)}: damaged; build the index anew")
        return np.stack([self._map[row] for row in rows]) if len(rows) else np.empty((0, *self.shape), np.float16)
