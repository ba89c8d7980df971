"""Vector stores under the same load: docs/decisions/vector-store.md quotes what this prints.

    .venv/bin/pip install --target EXTRA qdrant-client==1.20.0
    PYTHONPATH=EXTRA .venv/bin/python scripts/benchmarks/compare_stores.py [--vectors 100000] [--only LanceDB]

Each store works on a new folder, one store after the other, with the same vectors and payloads. Times are wall-clock
seconds and seconds of processor time of this process.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from synthetic_vectors import Embeddings
from tqdm import tqdm

K, QUERIES = 50, 20
GONE = 100


class LanceDB:
    """LanceDB as an index uses it."""

    def __init__(self, folder: Path, width: int, *, new: bool = False) -> None:
        from hacan.search.store import VectorTable

        self.table = VectorTable(str(folder), "vectors", width=width if new else None)

    def put(self, rows: list[int], vectors: np.ndarray) -> None:
        """Store items [n] with vectors [n, d]."""
        self.table.add([f"{row:08x}" for row in rows], vectors, [payload(row) for row in rows])

    def finish(self) -> None:
        """End a filling."""
        self.table.optimise()

    def nearest(self, query: np.ndarray) -> list[int]:
        """Return the rows of the K nearest."""
        return [int(hit.id, 16) for hit in self.table.nearest(query, K)]

    def remove(self, rows: list[int]) -> None:
        """Remove items."""
        self.table.remove([f"{row:08x}" for row in rows])

    def describe(self, row: int) -> None:
        """Replace a payload."""
        self.table.describe(f"{row:08x}", payload(row + 1))

    def close(self) -> None:
        """Do nothing: nothing is held open."""


class Qdrant:
    """qdrant-client with a local path, which earlier versions used."""

    def __init__(self, folder: Path, width: int, *, new: bool = False) -> None:
        from qdrant_client import QdrantClient, models

        self._client, self._models = QdrantClient(path=str(folder)), models
        if new:
            size = models.VectorParams(size=width, distance=models.Distance.DOT)
            self._client.create_collection("vectors", vectors_config=size)

    def put(self, rows: list[int], vectors: np.ndarray) -> None:
        """Store items [n] with vectors [n, d]."""
        payloads = [payload(row) for row in rows]
        self._client.upsert("vectors", self._models.Batch(ids=rows, vectors=vectors.tolist(), payloads=payloads))

    def finish(self) -> None:
        """End a filling."""

    def nearest(self, query: np.ndarray) -> list[int]:
        """Return the rows of the K nearest."""
        found = self._client.query_points("vectors", query=query.tolist(), limit=K, with_payload=True)
        return [int(point.id) for point in found.points]

    def remove(self, rows: list[int]) -> None:
        """Remove items."""
        self._client.delete("vectors", points_selector=self._models.PointIdsList(points=rows))

    def describe(self, row: int) -> None:
        """Replace a payload."""
        self._client.overwrite_payload("vectors", payload=payload(row + 1), points=[row])

    def close(self) -> None:
        """Close the folder for other processes."""
        self._client.close()


STORES = (LanceDB, Qdrant)


def payload(row: int) -> dict:
    """Return what an indexed image has."""
    return {"paths": [f"/pictures/{row:07d}.jpg"]}


def spent(function: Callable[[], object]) -> tuple[float, float, object]:
    """Return wall-clock seconds, processor seconds, and the result of a call."""
    before, start = time.process_time(), time.perf_counter()
    result = function()
    return time.perf_counter() - start, time.process_time() - before, result


def measure(kind: type, vectors: np.ndarray, queries: np.ndarray, folder: Path, *, batch: int) -> None:
    """Print every figure of one store."""
    store = kind(folder, vectors.shape[1], new=True)

    def fill() -> None:
        for start in tqdm(range(0, len(vectors), batch), desc=kind.__name__, unit="batch", mininterval=5):
            rows = list(range(start, min(start + batch, len(vectors))))
            store.put(rows, vectors[rows])

    def show(what: str, took: float, worked: float) -> None:
        print(f"| {kind.__name__} | {what} | {took:.3f} | {worked:.3f} |", flush=True)

    show(f"fill {len(vectors):,}, {batch} at a time", *spent(fill)[:2])
    show("finish (merge files, build an index)", *spent(store.finish)[:2])
    show("first query, top 50", *spent(lambda: store.nearest(queries[0]))[:2])
    answers = [spent(lambda query=query: store.nearest(query)) for query in queries]
    show("query, top 50: median of 20", *(statistics.median(answer[k] for answer in answers) for k in (0, 1)))
    truth = [set(np.argsort(-(vectors @ query), kind="stable")[:K].tolist()) for query in queries]
    recall = statistics.mean(len(set(answer[2]) & true) / K for answer, true in zip(answers, truth, strict=True))
    show("another payload for one item", *spent(lambda: store.describe(0))[:2])
    show(f"delete {GONE}", *spent(lambda: store.remove(list(range(GONE))))[:2])
    left = spent(lambda: store.nearest(vectors[0]))[2]
    store.close()
    took, worked, store = spent(lambda: kind(folder, vectors.shape[1]))
    show("open again", took, worked)
    show("first query after that", *spent(lambda: store.nearest(queries[0]))[:2])
    found = len(set(left) & set(range(GONE)))
    print(f"{kind.__name__}: recall of the exact 50 {recall:.4f}; deleted items that are still found: {found}")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
    print(f"{kind.__name__}: {size:.0f} MiB on disk")
    store.close()


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--batch", type=int, default=16, help="items that are stored at a time, as in an indexing")
    parser.add_argument("--only", choices=[kind.__name__ for kind in STORES], help="one of them")
    parser.add_argument("--scratch", type=Path, help="a folder on a disk with room")
    options = parser.parse_args()
    drawn = Embeddings(options.width)
    vectors, queries = (drawn.draw(n, np.random.default_rng(k)) for k, n in enumerate((options.vectors, QUERIES)))
    print("| store | what | wall-clock s | processor s |\n| --- | --- | ---: | ---: |")
    for kind in (kind for kind in STORES if options.only in (None, kind.__name__)):
        with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
            measure(kind, vectors, queries, Path(folder), batch=options.batch)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
