"""Synchronise an index with a folder of images or a list of texts: encode new items, remove deleted ones.

Items are identified by content: a moved file keeps its features, and a copy is a second path of the same item.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from hacan.checkpoints.pretrained import Pretrained
from hacan.errors import UserError
from hacan.images.io import read_image
from hacan.search.collection import Collection, free_rows
from hacan.search.folder import hash_of_file, hash_of_text, images_below
from hacan.search.store import Item


class Update(NamedTuple):
    """Numbers of items that an update added, kept, moved and removed."""

    added: int
    kept: int
    moved: int  # kept, under other paths
    removed: int
    bad: list[tuple[str, str]]  # path, reason


def sync_folder(
    collection: Collection, pretrained: Pretrained, folder: str | Path, *, batch_size: int, progress: bool
) -> Update:
    """Make the collection hold exactly the images below `folder`, and those of other folders."""
    folder = Path(folder).resolve()
    bad: list[tuple[str, str]] = []
    present: dict[str, list[str]] = {}
    for path in tqdm(images_below(folder), desc="reading", unit="file", delay=1, disable=not progress):
        try:
            present.setdefault(hash_of_file(path), []).append(str(path))
        except OSError as error:
            bad.append((str(path), error.strerror or str(error)))
    items = collection.items()
    moved, gone = _update_known(collection, items, folder, present)
    known = {item.payload["hash"] for item in items}
    fresh = [(content, found) for content, found in present.items() if content not in known]
    rows = free_rows({item.row for item in items} - set(gone))
    added = 0
    bar = tqdm(total=len(fresh), desc="encoding", unit="image", disable=not progress or not fresh)
    for start in range(0, len(fresh), batch_size):
        part = fresh[start : start + batch_size]
        added += _add_images(collection, pretrained, part, rows, bad)
        bar.update(len(part))
    bar.close()
    return Update(added, len(items) - len(gone), moved, len(gone), bad)


def sync_texts(
    collection: Collection, pretrained: Pretrained, texts: Sequence[str], *, batch_size: int, progress: bool
) -> Update:
    """Make the collection hold exactly these texts."""
    items = collection.items()
    wanted = {hash_of_text(text): text for text in texts}
    gone = [item.row for item in items if item.payload["hash"] not in wanted]
    collection.remove(gone)
    known = {item.payload["hash"] for item in items}
    fresh = [(content, text) for content, text in wanted.items() if content not in known]
    rows = free_rows({item.row for item in items} - set(gone))
    bar = tqdm(total=len(fresh), desc="encoding texts", unit="text", disable=not progress or not fresh)
    for start in range(0, len(fresh), batch_size):
        part = fresh[start : start + batch_size]
        _add_texts(collection, pretrained, part, list(islice(rows, len(part))))
        bar.update(len(part))
    bar.close()
    return Update(len(fresh), len(items) - len(gone), 0, len(gone), [])


def _update_known(
    collection: Collection, items: list[Item], folder: Path, present: dict[str, list[str]]
) -> tuple[int, list[int]]:
    """Remove deleted items and update the paths of moved ones; return the number moved and the freed rows."""
    moved, gone = 0, []
    for item in items:
        here = present.get(item.payload["hash"], [])
        elsewhere = [path for path in item.payload["paths"] if not Path(path).is_relative_to(folder)]
        if here:  # found below this folder: drop other paths whose file no longer exists
            elsewhere = [path for path in elsewhere if Path(path).is_file()]
        paths = sorted({*here, *elsewhere})
        if not paths:
            gone.append(item.row)
        elif paths != item.payload["paths"]:
            collection.describe(item.row, {**item.payload, "paths": paths})
            moved += 1
    collection.remove(gone)
    return moved, gone


def _add_images(
    collection: Collection,
    pretrained: Pretrained,
    part: list[tuple[str, list[str]]],
    rows: Iterator[int],
    bad: list[tuple[str, str]],
) -> int:
    images, payloads = [], []
    for content, paths in part:
        try:
            images.append(read_image(paths[0]))
            payloads.append({"hash": content, "paths": sorted(paths)})
        except UserError as error:
            bad += [(path, str(error)) for path in paths]
    if not images:
        return 0
    encoded = pretrained.encode_images(images)
    high, mid, pooled = (values.float().cpu().numpy() for values in (encoded.high, encoded.mid, encoded.pooled))
    collection.put(list(islice(rows, len(images))), high=high, mid=mid, pooled=pooled, payloads=payloads)
    return len(images)


def _add_texts(collection: Collection, pretrained: Pretrained, part: list[tuple[str, str]], rows: list[int]) -> None:
    encoded = pretrained.encode_texts([text for _, text in part])
    lengths = encoded.mask.sum(1).tolist()
    padded = []
    for file, values in ((collection.high, encoded.high), (collection.mid, encoded.mid)):
        padded.append(np.zeros((len(part), *file.shape), np.float32))
        for k, length in enumerate(lengths):  # real tokens first, whichever side the tokenizer pads
            padded[-1][k, :length] = values[k][encoded.mask[k]].float().cpu().numpy()
    payloads = [
        {"hash": content, "text": text, "tokens": length} for (content, text), length in zip(part, lengths, strict=True)
    ]
    collection.put(rows, high=padded[0], mid=padded[1], pooled=encoded.pooled.float().cpu().numpy(), payloads=payloads)
