"""The images or the texts of an index: vectors and payloads in the store, fine features in files.

Row k of the feature files and entry k of the store belong to one item. The entry is written after the features, so
every listed item is complete.
"""

from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np
import torch
from torch import Tensor

from hacan.search.feature_file import FeatureFile
from hacan.search.store import Hit, Item, VectorStore


class Collection:
    """A collection of the vector store with the float16 files of both feature levels, `high` and `mid`."""

    def __init__(self, store: VectorStore, collection: str, *, high: FeatureFile, mid: FeatureFile, width: int) -> None:
        self._store, self._collection = store, collection
        self.high, self.mid = high, mid
        store.make(collection, width=width)

    def put(
        self, rows: Sequence[int], *, high: np.ndarray, mid: np.ndarray, pooled: np.ndarray, payloads: Sequence[dict]
    ) -> None:
        """Store n items: features [n, ...] of both levels, global embeddings [n, d] of unit length, payloads."""
        self.high.write(rows, high)
        self.mid.write(rows, mid)
        self._store.put(self._collection, rows, pooled, payloads)

    def describe(self, row: int, payload: dict) -> None:
        """Replace the payload of an item."""
        self._store.describe(self._collection, row, payload)

    def remove(self, rows: Sequence[int]) -> None:
        """Remove items; their rows become free."""
        self._store.remove(self._collection, rows)

    def count(self) -> int:
        """Return the number of items."""
        return self._store.count(self._collection)

    def item(self, row: int) -> Item | None:
        """Return one item, or None."""
        return self._store.item(self._collection, row)

    def items(self) -> list[Item]:
        """Return all items, by row."""
        return list(self._store.items(self._collection))

    def nearest(self, vector: np.ndarray, k: int) -> list[Hit]:
        """Return the k items with the highest cosine to a unit vector [d], best first."""
        return self._store.nearest(self._collection, vector, k)

    def features(self, rows: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return (high, mid) of some rows, float16 [n, ...]."""
        high, mid = (torch.from_numpy(file.read(rows)).to(device) for file in (self.high, self.mid))
        return high, mid


def free_rows(used: set[int]) -> Iterator[int]:
    """Yield the free rows, from 0."""
    return (row for row in count() if row not in used)
