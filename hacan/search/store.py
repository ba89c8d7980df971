"""Global embeddings with payloads in LanceDB, in a folder or in an object storage.

docs/decisions/vector-store.md explains the choice.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, cast

import lancedb
import numpy as np
import pyarrow as pa
from lancedb.query import LanceVectorQueryBuilder

from hacan.errors import UserError

EXACT = 20_000  # items that are scanned; above, an approximate index is built
PARTITION, PROBES = 1500, 30  # items of a partition of that index; partitions that a query reads, at least
SLACK = 32  # additional items per query, so that ties are broken by id
OLD_VERSIONS = timedelta(minutes=10)  # kept for readers of other processes
COMPACT_AFTER = 20_000  # items added in one indexing
REMOTE_REFRESH = timedelta(seconds=5)  # how often a reader looks for a new version in an object storage
ID = re.compile(r"[0-9a-f]{1,64}")


class Item(NamedTuple):
    """An image or a text in the store."""

    id: str  # hash of its content, in hexadecimal
    payload: dict[str, Any]


class Hit(NamedTuple):
    """An item found by the coarse search."""

    id: str
    coarse: float  # cosine of the global embeddings
    payload: dict[str, Any]


class VectorTable:
    """Unit vectors [d] with payloads, by id.

    address: a folder, or the URI of an object storage. Several processes can read while one writes; every reader sees
    complete batches. width: d, to create the table; None: it must exist.
    """

    def __init__(self, address: str, name: str, *, width: int | None = None) -> None:
        self.address, self.name, self._added = address, name, 0
        refresh = REMOTE_REFRESH if "://" in address else timedelta(0)
        with self._errors("opened"):
            database = lancedb.connect(address, read_consistency_interval=refresh)
            if width is None:
                self._table = database.open_table(name)
            else:
                vector = pa.list_(pa.float32(), width)
                schema = pa.schema([("id", pa.string()), ("vector", vector), ("payload", pa.string())])
                self._table = database.create_table(name, schema=schema)
            self._schema = self._table.schema

    def add(self, ids: Sequence[str], vectors: np.ndarray, payloads: Sequence[dict]) -> None:
        """Store n items with vectors [n, d]; those whose id is there already are left as they are."""
        flat = pa.array(np.ascontiguousarray(vectors, np.float32).ravel())
        columns = [
            pa.array(ids, pa.string()),
            pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
            pa.array([json.dumps(payload) for payload in payloads]),
        ]
        with self._errors("written"):
            batch = pa.Table.from_arrays(columns, schema=self._schema)
            self._table.merge_insert("id").when_not_matched_insert_all().execute(batch)
            self._added += len(ids)
            if self._added >= COMPACT_AFTER:
                self._compact()

    def describe(self, item: str, payload: dict) -> None:
        """Replace the payload of an item."""
        with self._errors("written"):
            self._table.update(where=_among([item]), values={"payload": json.dumps(payload)})

    def remove(self, ids: Sequence[str]) -> None:
        """Remove items."""
        if ids:
            with self._errors("written"):
                self._table.delete(_among(ids))

    def optimise(self) -> None:
        """Merge small files, and keep an approximate index if there are more than `EXACT` items."""
        with self._errors("written"):
            self._compact()
            wanted = self._table.count_rows() // PARTITION
            if wanted * PARTITION < EXACT:
                return
            built = [int(index.name.rpartition("_")[2]) for index in self._table.list_indices()]
            if not built or wanted >= 2 * built[0]:  # centroids of a table half as large serve badly
                for index in self._table.list_indices():
                    self._table.drop_index(index.name)
                self._table.create_index(
                    metric="dot", num_partitions=wanted, index_type="IVF_FLAT", name=f"vector_{wanted}", sample_rate=64
                )

    def _compact(self) -> None:
        self._added = 0
        self._table.optimize(cleanup_older_than=OLD_VERSIONS)

    def items(self) -> Iterator[Item]:
        """Yield all items of the latest version, by id."""
        with self._errors("read"):
            self._table.checkout_latest()
            found = self._table.search().select(["id", "payload"]).to_arrow().sort_by("id")
            for row in found.to_pylist():
                yield Item(row["id"], json.loads(row["payload"]))

    def item(self, item: str) -> Item | None:
        """Return one item, or None."""
        if not ID.fullmatch(item):
            return None
        with self._errors("read"):
            found = self._table.search().where(_among([item])).select(["id", "payload"]).limit(1).to_list()
            return Item(found[0]["id"], json.loads(found[0]["payload"])) if found else None

    def count(self) -> int:
        """Return the number of items."""
        with self._errors("read"):
            return self._table.count_rows()

    def nearest(self, query: np.ndarray, k: int) -> list[Hit]:
        """Return the k items with the highest cosine to the unit vector [d], best first; ties by id."""
        query = query.astype(np.float32)
        with self._errors("read"):
            search = cast(LanceVectorQueryBuilder, self._table.search(query)).distance_type("dot")
            search = search.nprobes(max(PROBES, self._table.count_rows() // PARTITION // 8)).limit(k + SLACK)
            found = search.select(["id", "payload", "vector", "_distance"]).to_arrow()
            vectors = found["vector"].combine_chunks().flatten().to_numpy().reshape(len(found), len(query))
            # LanceDB returns 1 - cosine, which has fewer digits.
            rows = zip(found["id"].to_pylist(), (vectors @ query).tolist(), found["payload"].to_pylist(), strict=True)
            best = sorted(rows, key=lambda row: (-round(row[1], 6), row[0]))[:k]
            return [Hit(item, coarse, json.loads(payload)) for item, coarse, payload in best]

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Turn the errors of LanceDB into a `UserError`; a damaged file can raise any kind, and panics of Rust."""
        try:
            yield
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"the vectors of the index, {self.address} (table {self.name}), cannot be {what}: {reason}; if it is "
                "damaged, index the images into a new folder"
            ) from error


def _among(ids: Sequence[str]) -> str:
    """Return the SQL condition of some ids; raise `ValueError` for one that is not hexadecimal."""
    if bad := [item for item in ids if not ID.fullmatch(item)]:
        raise ValueError(f"{bad[0]!r} is not an id")
    return f"id IN ({', '.join(repr(item) for item in ids)})"
