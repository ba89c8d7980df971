"""Items of one kind in an index, pictures or texts: the vector and payload of each in the store, its features beside.

A row of the feature files and the entry of that number in the store are one item. The entry is written after the
features, so that what the store lists is complete.
"""

from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np
import torch
from torch import Tensor

from hacan.search.feature_file import RowFile
from hacan.search.store import Hit, Item, VectorStore


class Shelf:
    """One collection of a store with the float16 files of both fine levels, `high` and `mid`."""

    def __init__(self, store: VectorStore, collection: str, *, high: RowFile, mid: RowFile, width: int) -> None:
        self._store, self._collection = store, collection
        self.high, self.mid = high, mid
        store.make(collection, width=width)

    def put(
        self, rows: Sequence[int], *, high: np.ndarray, mid: np.ndarray, pooled: np.ndarray, payloads: Sequence[dict]
    ) -> None:
        """Items [n]: features [n, ...] of both levels, global embeddings [n, d] of unit length, payloads."""
        self.high.write(rows, high)
        self.mid.write(rows, mid)
        self._store.put(self._collection, rows, pooled, payloads)

    def describe(self, row: int, payload: dict) -> None:
        """Another payload for an item; its vector and features stay."""
        self._store.describe(self._collection, row, payload)

    def remove(self, rows: Sequence[int]) -> None:
        """Take items out; their rows are free."""
        self._store.remove(self._collection, rows)

    def count(self) -> int:
        """Number of items."""
        return self._store.count(self._collection)

    def item(self, row: int) -> Item | None:
        """One item, or None."""
        return self._store.item(self._collection, row)

    def items(self) -> list[Item]:
        """All items, by row."""
        return list(self._store.items(self._collection))

    def nearest(self, vector: np.ndarray, k: int) -> list[Hit]:
        """The k items of the highest cosine with a unit vector [d], best first."""
        return self._store.nearest(self._collection, vector, k)

    def features(self, rows: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """(high, mid) of these rows, float16 [n, ...]."""
        high, mid = (torch.from_numpy(file.read(rows)).to(device) for file in (self.high, self.mid))
        return high, mid


def free_rows(used: set[int]) -> Iterator[int]:
    """Rows that no item holds, from 0."""
    return (row for row in count() if row not in used)
