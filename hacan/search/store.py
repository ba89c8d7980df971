"""Global embeddings with path and hash in Qdrant: inside this process, or a cluster by another address.

docs/decisions/vector-store.md says why Qdrant, and what was seen of it.
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

LISTED = 1000  # items that travel at a time when all are listed
SLACK = 32  # items fetched beyond the asked ones, so that ties at the border fall by one rule: the earlier row first
KEY = "QDRANT_API_KEY"  # environment variable of a cluster's key; it is written nowhere
# Said at 20,000 points, in the middle of the progress bar; docs/search.md says from where on to think of a server.
warnings.filterwarnings("ignore", message="Local mode is not recommended for collections")


class Item(NamedTuple):
    """What the store knows of one picture or text."""

    row: int  # its id, and its row in the feature files
    payload: dict[str, Any]


class Hit(NamedTuple):
    """An item that a coarse search found."""

    row: int
    coarse: float  # cosine of the global embeddings
    payload: dict[str, Any]


class VectorStore:
    """Collections of unit vectors [d] with a payload, numbered by rows.

    address: a folder, or the URL of a Qdrant server or cluster. A folder belongs to one process at a time.
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
        """The collection, made where there is none."""
        if not self._client.collection_exists(collection):
            # Vectors are unit length already: the dot product is the cosine, and stays what the model gave.
            self._client.create_collection(
                collection, vectors_config=models.VectorParams(size=width, distance=models.Distance.DOT)
            )
        if "://" not in self.address:
            _keep_a_write_ahead_log(Path(self.address, "collection", collection, "storage.sqlite"))

    def put(self, collection: str, rows: Sequence[int], vectors: np.ndarray, payloads: Sequence[dict]) -> None:
        """Items [n] at these rows, with vectors [n, d]; those that were there are replaced."""
        self._client.upsert(
            collection,
            models.Batch(ids=list(rows), vectors=vectors.astype(np.float32).tolist(), payloads=list(payloads)),
            wait=True,
        )

    def describe(self, collection: str, row: int, payload: dict) -> None:
        """Another payload for an item; its vector stays."""
        self._client.overwrite_payload(collection, payload=payload, points=[row], wait=True)

    def remove(self, collection: str, rows: Sequence[int]) -> None:
        """Take items out."""
        if rows:
            self._client.delete(collection, points_selector=models.PointIdsList(points=list(rows)), wait=True)

    def items(self, collection: str) -> Iterator[Item]:
        """All items, by row."""
        offset = None
        while True:
            points, offset = self._client.scroll(collection, limit=LISTED, offset=offset, with_payload=True)
            for point in points:
                yield Item(int(point.id), point.payload or {})
            if offset is None:
                return

    def item(self, collection: str, row: int) -> Item | None:
        """One item, or None."""
        points = self._client.retrieve(collection, [row], with_payload=True)
        return Item(int(points[0].id), points[0].payload or {}) if points else None

    def count(self, collection: str) -> int:
        """Number of items."""
        return self._client.count(collection, exact=True).count

    def nearest(self, collection: str, query: np.ndarray, k: int) -> list[Hit]:
        """The k items of the highest cosine with the unit vector [d], best first; of equals the earlier row first."""
        points = self._client.query_points(
            collection, query=query.astype(np.float32).tolist(), limit=k + SLACK, with_payload=True
        ).points
        hits = [Hit(int(point.id), float(point.score), point.payload or {}) for point in points]
        return sorted(hits, key=lambda hit: (-hit.coarse, hit.row))[:k]

    def close(self) -> None:
        """Let another process have the folder."""
        self._client.close()


def _keep_a_write_ahead_log(database: Path) -> None:
    """Have SQLite append each commit to a log, once and for all: as safe as its usual journal, with fewer waits.

    qdrant-client commits every point by itself and offers no other way; docs/decisions/vector-store.md has the times.
    Where the file system cannot do it SQLite keeps its journal, which is slower and works as well.
    """
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
