"""The images or the texts of an index: vectors and payloads in the store, fine features in files of their own.

The entry in the store is written after the features, so every listed item is complete.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from hacan.errors import UserError
from hacan.search.files import IndexFiles
from hacan.search.store import ID, VectorTable

THREADS = 16  # files of a shortlist are read at once, which an object storage needs


class Collection:
    """A table of the store with one float16 file per item: its features `high` [n, d], then `mid` [m, d].

    high, mid: shapes of the features.
    """

    def __init__(self, table: VectorTable, files: IndexFiles, *, high: tuple[int, int], mid: tuple[int, int]) -> None:
        self.table, self._files, self.high, self.mid = table, files, high, mid

    def put(
        self, ids: Sequence[str], *, high: np.ndarray, mid: np.ndarray, pooled: np.ndarray, payloads: Sequence[dict]
    ) -> None:
        """Store n items: features [n, ...] of both levels, global embeddings [n, d] of unit length, payloads."""
        features = np.concatenate([high.reshape(len(ids), -1), mid.reshape(len(ids), -1)], 1)
        with np.errstate(over="ignore"):  # checked below
            half = features.astype(np.float16)
        if not np.isfinite(half).all():
            raise UserError(
                f"features up to {np.abs(features).max():.3g} do not fit float16, as an index holds them: the model "
                "has diverged, or was trained at another scale; train it again, or index with another checkpoint"
            )
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(self._files.write, map(self._name, ids), [values.tobytes() for values in half]))
        self.table.add(ids, pooled, payloads)

    def remove(self, ids: Sequence[str]) -> None:
        """Remove items."""
        self.table.remove(ids)
        self._files.remove(self._name(item) for item in ids)

    def features(self, ids: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return (high, mid) of some items, float16 [n, ...]."""
        with ThreadPoolExecutor(THREADS) as pool:
            values = torch.from_numpy(np.stack(list(pool.map(self._read, ids))))
        high, mid = values.to(device).split([int(np.prod(self.high)), int(np.prod(self.mid))], 1)
        return high.reshape(-1, *self.high), mid.reshape(-1, *self.mid)

    def _read(self, item: str) -> np.ndarray:
        expected = 2 * int(np.prod(self.high) + np.prod(self.mid))
        try:
            content = self._files.read(self._name(item))
        except FileNotFoundError:
            content = b""
        if len(content) != expected:
            raise UserError(
                f"{self._files.address}/{self._name(item)} has {len(content)} bytes, expected {expected}: the index is "
                "damaged, or its image was removed this moment; search again, or index into a new folder"
            )
        return np.frombuffer(content, np.float16)

    def _name(self, item: str) -> str:
        if not ID.fullmatch(item):
            raise UserError(f"{self._files.address} holds the id {item[:80]!r}, which is none: the index is damaged")
        return f"features/{self.table.name}/{item[:2]}/{item}.f16"
