"""Recall and time of the approximate index (HNSW) that a Qdrant server searches with, on synthetic vectors.

    .venv/bin/pip install --target EXTRA qdrant-edge-py==0.9.0      # the server's own code, in this process
    PYTHONPATH=EXTRA .venv/bin/python scripts/benchmarks/recall.py [--vectors 1000000] [--width 768] [--ef 64 128 256]

1,000,000 x 768 takes some 8 GB of disk. Settings of the graph are the server's: m = 16,
ef_construct = 100, ef = 128 where a query does not say otherwise.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from synthetic_vectors import Embeddings
from tqdm import tqdm

K, QUERIES, BATCH = 50, 200, 2000


def fill(shard: Any, edge: ModuleType, vectors: Embeddings, number: int, queries: np.ndarray) -> np.ndarray:
    """Store the vectors; returns the exact K nearest of each query, [Q, K] row numbers, found on the way."""
    generator = np.random.default_rng(1)
    best = np.full((len(queries), 0), 0.0, np.float32)
    rows = np.zeros(best.shape, np.int64)
    for start in tqdm(range(0, number, BATCH), desc="storing vectors", unit="batch", mininterval=5):
        some = vectors.draw(min(BATCH, number - start), generator)
        points = [edge.Point(start + k, vector, None) for k, vector in enumerate(some.tolist())]
        shard.update(edge.UpdateOperation.upsert_points(points))
        best = np.concatenate([best, queries @ some.T], 1)
        rows = np.concatenate(
            [rows, np.broadcast_to(np.arange(start, start + len(some)), (len(queries), len(some)))], 1
        )
        kept = np.argpartition(-best, min(K, best.shape[1]) - 1, axis=1)[:, :K]
        best, rows = np.take_along_axis(best, kept, 1), np.take_along_axis(rows, kept, 1)
    return rows


def ask(shard: Any, edge: ModuleType, query: list[float], parameters: Any) -> tuple[set[int], float]:
    """The rows found, and the milliseconds it took."""
    start = time.perf_counter()
    found = shard.query(
        edge.QueryRequest(limit=K, query=edge.Query.Nearest(query), params=parameters, with_payload=False)
    )
    return {int(point.id) for point in found}, (time.perf_counter() - start) * 1000


def main() -> int:
    """Parse the command line and measure; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--m", type=int, default=16)
    parser.add_argument("--ef-construct", type=int, default=100)
    parser.add_argument("--ef", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--exact", type=int, default=10, help="queries that are also scanned exactly, for their time")
    parser.add_argument("--scratch", type=Path, help="a folder on a disk with room")
    options = parser.parse_args()
    try:
        import qdrant_edge as edge
    except ImportError:
        print("error: this needs the package qdrant-edge-py: see the top of this file", file=sys.stderr)
        return 2
    vectors = Embeddings(options.width)
    queries = vectors.draw(QUERIES, np.random.default_rng(2))
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        config = edge.EdgeConfig(
            vectors=edge.EdgeVectorParams(size=options.width, distance=edge.Distance.Dot),
            hnsw_config=edge.HnswIndexConfig(options.m, options.ef_construct, 10_000),
            optimizers=edge.EdgeOptimizersConfig(
                default_segment_number=1, max_segment_size=100_000_000, indexing_threshold=1000
            ),
        )
        shard = edge.EdgeShard.create(folder, config)
        start = time.perf_counter()
        truth = [set(rows.tolist()) for rows in fill(shard, edge, vectors, options.vectors, queries)]
        print(f"stored {options.vectors:,} x {options.width} in {time.perf_counter() - start:.0f} s", flush=True)
        start = time.perf_counter()
        shard.optimize()
        print(f"index built in {time.perf_counter() - start:.0f} s; {shard.info()}", flush=True)
        print("\n| search | recall of the exact 50 | median ms | max ms |\n| --- | --- | --- | --- |")
        for name, number, parameters in (
            *((f"HNSW, ef = {ef}", QUERIES, edge.SearchParams(hnsw_ef=ef)) for ef in options.ef),
            ("exact scan", options.exact, edge.SearchParams(exact=True)),
        ):
            answers = [ask(shard, edge, query, parameters) for query in queries[:number].tolist()]
            recall = statistics.mean(len(found & true) / K for (found, _), true in zip(answers, truth, strict=False))
            times = [took for _, took in answers]
            print(f"| {name} | {recall:.4f} | {statistics.median(times):.1f} | {max(times):.1f} |", flush=True)
        shard.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
