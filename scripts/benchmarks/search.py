"""Times a search of an index at full size: the whole query, and the coarse stage alone over more and more images.

    python scripts/benchmarks/search.py [--pictures 10000] [--coarse 1000 10000 100000] [--threads 2]

The model has the full sizes (ConvNeXt-Base, BERT-Base, width 768, 49 and 196 regions) and random weights; the features
are synthetic. Needs 3.8 GB of disk for 10,000 images. Run it with nothing else on the machine.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from full_size import WIDTH, full_size_settings
from synthetic_vectors import Embeddings
from tqdm import tqdm
from transformers import BertTokenizerFast

from hacan.checkpoints.pretrained import Pretrained
from hacan.models.factory import build_model
from hacan.search import Index
from hacan.search.index import PICTURES, SHORTLIST
from hacan.search.store import VectorTable

SENTENCE = "two dogs run on grass with a man with a red hat"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(SENTENCE.split())]
REPEATS, BATCH = 20, 16


def full_size_model() -> Pretrained:
    """ConvNeXt-Base and BERT-Base with random weights; only the vocabulary is small."""
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(WORDS)}, do_lower_case=True)
    model = build_model(full_size_settings(direction="t2i"), image_size=224, score_memory=256, tokenizer=tokenizer)
    return Pretrained(model=model, tokenizer=tokenizer, image_size=224, centre_crop=True, max_text_len=32)


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Median and largest of REPEATS calls after a warm-up, in ms."""
    function()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        times.append((time.perf_counter() - start) * 1000)
    return statistics.median(times), max(times)


def payload(row: int) -> dict[str, Any]:
    """As an indexed image has it."""
    return {"paths": [f"/pictures/{row:07d}.jpg"]}


def fill(table: VectorTable, vectors: np.ndarray) -> None:
    """Add all vectors, BATCH at a time as an indexing does."""
    for start in tqdm(range(0, len(vectors), BATCH), desc="storing vectors", unit="batch", mininterval=5):
        rows = range(start, min(start + BATCH, len(vectors)))
        table.add([f"{row:08x}" for row in rows], vectors[rows], [payload(row) for row in rows])
    table.optimise()


def measure_queries(pictures: int, folder: Path) -> None:
    """The whole query, and its stages, with the model loaded."""
    generator = np.random.default_rng(0)
    index = Index.create(folder / "index", model=full_size_model())
    collection = index.collections[PICTURES]
    pooled = Embeddings(WIDTH).draw(pictures, generator)
    high, mid = (
        generator.standard_normal((BATCH, *shape)).astype(np.float32) for shape in (collection.high, collection.mid)
    )
    start = time.perf_counter()
    for first in tqdm(range(0, pictures, BATCH), desc="storing items", unit="batch", mininterval=5):
        rows = range(first, min(first + BATCH, pictures))
        some = slice(0, len(rows))
        ids, payloads = [f"{row:08x}" for row in rows], [payload(row) for row in rows]
        collection.put(ids, high=high[some], mid=mid[some], pooled=pooled[rows], payloads=payloads)
    collection.table.optimise()
    print(f"stored {pictures:,} items with their features in {time.perf_counter() - start:.0f} s", flush=True)
    query = index.pretrained.encode_texts([SENTENCE])
    hits = index.shortlist(query.pooled[0], PICTURES, SHORTLIST)
    print(f"\n| text query, {pictures:,} images, K = {SHORTLIST} | median ms | max ms |\n| --- | --- | --- |")
    for name, function in (
        ("encode the sentence", lambda: index.pretrained.encode_texts([SENTENCE])),
        ("coarse", lambda: index.shortlist(query.pooled[0], PICTURES, SHORTLIST)),
        ("fine, with reading of features", lambda: index.fine(query, hits)),
        ("whole query", lambda: index.search(SENTENCE)),
    ):
        print("| {} | {:.1f} | {:.1f} |".format(name, *timed(function)), flush=True)


def measure_coarse(sizes: list[int], folder: Path) -> None:
    """The coarse stage in the store, against brute force."""
    lines = [
        "\n| vectors | fill s | open again s | coarse median ms | max ms | recall of the exact 50 |",
        "|" + " --- |" * 6,
    ]
    for number in sizes:
        generator = np.random.default_rng(1)
        vectors, queries = (Embeddings(WIDTH).draw(n, generator) for n in (number, REPEATS))
        place = str(folder / f"coarse-{number}")
        start = time.perf_counter()
        fill(VectorTable(place, "vectors", width=WIDTH), vectors)
        filled = time.perf_counter() - start
        start = time.perf_counter()
        table = VectorTable(place, "vectors")
        opened = time.perf_counter() - start
        found = [{int(hit.id, 16) for hit in table.nearest(query, SHORTLIST)} for query in queries]
        exact = [set(np.argsort(-(vectors @ query), kind="stable")[:SHORTLIST].tolist()) for query in queries]
        recall = np.mean([len(one & other) / SHORTLIST for one, other in zip(found, exact, strict=True)])
        median, largest = timed(lambda table=table, query=queries[0]: table.nearest(query, SHORTLIST))
        lines.append(f"| {number:,} | {filled:.1f} | {opened:.3f} | {median:.1f} | {largest:.1f} | {recall:.4f} |")
        shutil.rmtree(place)
        print(*(lines if number == sizes[-1] else lines[-1:]), sep="\n", flush=True)


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=10_000, help="of the whole query; 0: leave it out")
    parser.add_argument("--coarse", type=int, nargs="*", default=[1000, 10_000, 100_000])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path, help="a folder on a disk with room")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        if options.pictures:
            measure_queries(options.pictures, Path(folder))
        measure_coarse(options.coarse, Path(folder))


if __name__ == "__main__":
    main()
