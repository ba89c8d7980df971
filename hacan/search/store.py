"""Global embeddings with payloads in Qdrant, embedded in this process or on a server.

docs/decisions/vector-store.md explains the choice.
"""

import contextlib
import os
import sqlite3
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from qdrant_client import QdrantClient, models

from hacan.errors import UserError

LISTED = 1000  # items per request when all are listed
SLACK = 32  # additional items per query, so that ties are broken by row
KEY = "QDRANT_API_KEY"  # environment variable with the key of a server; never stored
# Printed at 20,000 points, in the progress bar; docs/search.md says when to use a server.
warnings.filterwarnings("ignore", message="Local mode is not recommended for collections")


class Item(NamedTuple):
    """An image or a text in the store."""

    row: int  # its id, and its row in the feature files
    payload: dict[str, Any]


class Hit(NamedTuple):
    """An item found by the coarse search."""

    row: int
    coarse: float  # cosine of the global embeddings
    payload: dict[str, Any]


class VectorStore:
    """Collections of unit vectors [d] with payloads, numbered by rows.

    address: a folder, which one process can open at a time, or the URL of a Qdrant server or cluster.
    """

    def __init__(self, address: str | Path) -> None:
        self.address = str(address)
        try:
            if "://" in self.address:
                self._client = QdrantClient(url=self.address, api_key=os.environ.get(KEY), check_compatibility=False)
                self._client.get_collections()
            else:
                self._client = QdrantClient(path=self.address, force_disable_check_same_thread=True)
        except RuntimeError as error:
            if "already accessed" in str(error):
                raise UserError(
                    f"{self.address} is open in another process (an indexing, or scripts/serve.py): wait for it or end "
                    "it, or keep the vectors on a Qdrant server, --store URL"
                ) from error
            raise
        except Exception as error:
            if "://" in self.address:
                raise UserError(
                    f"no Qdrant answers at {self.address} ({' '.join(str(error).split())[:200]}): start it, or correct "
                    f"the address; its key is read from {KEY}"
                ) from error
            raise

    def make(self, collection: str, *, width: int) -> None:
        """Create the collection if it does not exist."""
        if not self._client.collection_exists(collection):
            # Vectors have unit length, so the dot product is the cosine.
            self._client.create_collection(
                collection, vectors_config=models.VectorParams(size=width, distance=models.Distance.DOT)
            )
        if "://" not in self.address:
            _keep_a_write_ahead_log(Path(self.address, "collection", collection, "storage.sqlite"))

    def put(self, collection: str, rows: Sequence[int], vectors: np.ndarray, payloads: Sequence[dict]) -> None:
        """Store n items with vectors [n, d]; existing rows are replaced."""
        self._client.upsert(
            collection,
            models.Batch(ids=list(rows), vectors=vectors.astype(np.float32).tolist(), payloads=list(payloads)),
            wait=True,
        )

    def describe(self, collection: str, row: int, payload: dict) -> None:
        """Replace the payload of an item."""
        self._client.overwrite_payload(collection, payload=payload, points=[row], wait=True)

    def remove(self, collection: str, rows: Sequence[int]) -> None:
        """Remove items."""
        if rows:
            self._client.delete(collection, points_selector=models.PointIdsList(points=list(rows)), wait=True)

    def items(self, collection: str) -> Iterator[Item]:
        """Yield all items, by row."""
        offset = None
        while True:
            points, offset = self._client.scroll(collection, limit=LISTED, offset=offset, with_payload=True)
            for point in points:
                yield Item(int(point.id), point.payload or {})
            if offset is None:
                return

    def item(self, collection: str, row: int) -> Item | None:
        """Return one item, or None."""
        points = self._client.retrieve(collection, [row], with_payload=True)
        return Item(int(points[0].id), points[0].payload or {}) if points else None

    def count(self, collection: str) -> int:
        """Return the number of items."""
        return self._client.count(collection, exact=True).count

    def nearest(self, collection: str, query: np.ndarray, k: int) -> list[Hit]:
        """Return the k items with the highest cosine to the unit vector [d], best first; ties by row."""
        points = self._client.query_points(
            collection, query=query.astype(np.float32).tolist(), limit=k + SLACK, with_payload=True
        ).points
        hits = [Hit(int(point.id), float(point.score), point.payload or {}) for point in points]
        return sorted(hits, key=lambda hit: (-hit.coarse, hit.row))[:k]

    def close(self) -> None:
        """Close the store, so that another process can open the folder."""
        self._client.close()


def _keep_a_write_ahead_log(database: Path) -> None:
    """Switch SQLite to a write-ahead log, which is as safe as its journal and faster.

    qdrant-client commits every point separately; docs/decisions/vector-store.md has the times. On a file system without
    support SQLite keeps its journal.
    """
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
