"""The two candidates for the vector store under the same load: docs/decisions/vector-store.md quotes what this prints.

    .venv/bin/pip install --target EXTRA pymilvus==3.0.2 milvus-lite==3.2.2
    PYTHONPATH=EXTRA .venv/bin/python scripts/benchmarks/compare_stores.py [--vectors 10000] [--only Qdrant]

Each store works on a new local file, one store after the other in this order, with the same vectors, batches and
payloads; inner product, exact search. Times are wall-clock seconds and seconds of processor time of this process.
"""

import argparse
import contextlib
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from synthetic_vectors import Embeddings
from tqdm import tqdm

K, QUERIES, BATCH = 50, 20, 16  # BATCH: images that an indexing stores at a time
GONE = 100


class Qdrant:
    """qdrant-client with a local path, as an index uses it."""

    def __init__(self, folder: Path, width: int) -> None:
        from hacan.search.store import VectorStore

        self._store = VectorStore(folder / "qdrant")
        self._store.make("vectors", width=width)

    def put(self, rows: list[int], vectors: np.ndarray, payloads: list[dict]) -> None:
        """Items [n] with vectors [n, d]."""
        self._store.put("vectors", rows, vectors, payloads)

    def nearest(self, query: np.ndarray) -> list[int]:
        """Rows of the K nearest."""
        return [hit.row for hit in self._store.nearest("vectors", query, K)]

    def remove(self, rows: list[int]) -> None:
        """Take items out."""
        self._store.remove("vectors", rows)

    def describe(self, row: int, vector: np.ndarray, payload: dict) -> None:
        """Another payload."""
        self._store.describe("vectors", row, payload)

    def close(self) -> None:
        """End."""
        self._store.close()


class QdrantJournal(Qdrant):
    """The same with SQLite's usual journal, as qdrant-client leaves it."""

    def __init__(self, folder: Path, width: int) -> None:
        super().__init__(folder, width)
        for database in folder.rglob("*.sqlite"):
            with contextlib.closing(sqlite3.connect(database)) as connection:
                connection.execute("PRAGMA journal_mode=DELETE")


class Milvus:
    """pymilvus with Milvus Lite's local file."""

    def __init__(self, folder: Path, width: int) -> None:
        from pymilvus import MilvusClient

        self._client = MilvusClient(str(folder / "milvus.db"))
        if not self._client.has_collection("vectors"):
            index = self._client.prepare_index_params()
            index.add_index("vector", index_type="FLAT", metric_type="IP")
            self._client.create_collection(
                "vectors", dimension=width, primary_field_name="id", vector_field_name="vector", metric_type="IP",
                auto_id=False, enable_dynamic_field=True, index_params=index, consistency_level="Strong",
            )  # fmt: skip
        self._client.load_collection("vectors")

    def put(self, rows: list[int], vectors: np.ndarray, payloads: list[dict]) -> None:
        """Items [n] with vectors [n, d]."""
        data = [
            {"id": row, "vector": vector, **payload}
            for row, vector, payload in zip(rows, vectors, payloads, strict=True)
        ]
        self._client.upsert("vectors", data)

    def nearest(self, query: np.ndarray) -> list[int]:
        """Rows of the K nearest."""
        found = self._client.search("vectors", data=[query], limit=K, output_fields=["paths", "hash"])
        return [hit["id"] for hit in found[0]]

    def remove(self, rows: list[int]) -> None:
        """Take items out."""
        self._client.delete("vectors", ids=rows)

    def describe(self, row: int, vector: np.ndarray, payload: dict) -> None:
        """Another payload."""
        self.put([row], vector[None], [payload])

    def close(self) -> None:
        """End."""
        self._client.close()


STORES = (Qdrant, Milvus, QdrantJournal)


def spent(function: Callable[[], object]) -> tuple[float, float, object]:
    """Wall-clock seconds, processor seconds, and what it returned."""
    before, start = time.process_time(), time.perf_counter()
    result = function()
    return time.perf_counter() - start, time.process_time() - before, result


def measure(kind: type, vectors: np.ndarray, queries: np.ndarray, folder: Path) -> None:
    """Print every figure of one store."""
    store = kind(folder, vectors.shape[1])

    def payload(row: int) -> dict:
        return {"hash": f"{row:040x}", "paths": [f"/pictures/{row:07d}.jpg"]}

    def fill() -> None:
        for start in tqdm(range(0, len(vectors), BATCH), desc=kind.__name__, unit="batch", mininterval=5):
            rows = list(range(start, min(start + BATCH, len(vectors))))
            store.put(rows, vectors[rows], [payload(row) for row in rows])

    def show(what: str, took: float, worked: float) -> None:
        print(f"| {kind.__name__} | {what} | {took:.3f} | {worked:.3f} |", flush=True)

    show(f"fill {len(vectors):,}, {BATCH} at a time", *spent(fill)[:2])
    show("first query, top 50", *spent(lambda: store.nearest(queries[0]))[:2])
    answers = [spent(lambda query=query: store.nearest(query)) for query in queries]
    show("query, top 50: median of 20", *(statistics.median(answer[k] for answer in answers) for k in (0, 1)))
    truth = [set(np.argsort(-(vectors @ query), kind="stable")[:K].tolist()) for query in queries]
    recall = statistics.mean(len(set(answer[2]) & true) / K for answer, true in zip(answers, truth, strict=True))
    show("another payload for one item", *spent(lambda: store.describe(0, vectors[0], payload(99)))[:2])
    show(f"delete {GONE}", *spent(lambda: store.remove(list(range(GONE))))[:2])
    left = spent(lambda: store.nearest(vectors[0]))[2]
    show("close", *spent(store.close)[:2])
    took, worked, store = spent(lambda: kind(folder, vectors.shape[1]))
    show("open again", took, worked)
    show("first query after that", *spent(lambda: store.nearest(queries[0]))[:2])
    ghosts = len(set(left) & set(range(GONE)))
    print(f"{kind.__name__}: recall of the exact 50 {recall:.4f}; deleted items that are still found: {ghosts}")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
    print(f"{kind.__name__}: {size:.0f} MiB on disk")
    store.close()


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--only", choices=[kind.__name__ for kind in STORES], help="one of them")
    parser.add_argument("--scratch", type=Path, help="a folder on a disk with room")
    options = parser.parse_args()
    drawn = Embeddings(options.width)
    vectors, queries = (drawn.draw(n, np.random.default_rng(k)) for k, n in enumerate((options.vectors, QUERIES)))
    print("| store | what | wall-clock s | processor s |\n| --- | --- | ---: | ---: |")
    for kind in (kind for kind in STORES if options.only in (None, kind.__name__)):
        with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
            measure(kind, vectors, queries, Path(folder))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
