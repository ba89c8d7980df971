"""Synchronise an index with a folder of images or a list of texts: encode new items, remove deleted ones.

Items are identified by content: a moved file keeps its features, and a copy is a second path of the same item.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hacan.checkpoints.pretrained import Pretrained
from hacan.errors import UserError
from hacan.images.io import read_image
from hacan.search.collection import Collection
from hacan.search.folder import hash_of_file, hash_of_text, images_below
from hacan.search.store import Item


@dataclass
class Update:
    """Numbers of items that an update added, kept, moved and removed."""

    added: int = 0
    kept: int = 0
    moved: int = 0  # kept, under other paths
    removed: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)  # path of an image or a folder, reason
    left_out: dict[str, int] = field(default_factory=dict)  # other files, by kind


def sync_folder(
    collection: Collection, pretrained: Pretrained, folder: str | Path, *, batch_size: int, progress: bool
) -> Update:
    """Make the collection hold exactly the images below `folder`, and those of other folders.

    Images that are in the index and cannot be read now, or whose folder cannot be listed, stay in it.
    """
    folder = Path(folder).expanduser().resolve()
    content = images_below(folder)
    update = Update(bad=content.unreadable, left_out=dict(content.left_out))
    present: dict[str, list[str]] = {}
    for path in tqdm(content.images, desc="reading", unit="file", delay=1, disable=not progress):
        try:
            present.setdefault(hash_of_file(path), []).append(str(path))
        except OSError as error:
            update.bad.append((str(path), error.strerror or str(error)))
    items = list(collection.table.items())
    _update_known(collection, items, folder, present, update)
    known = {item.id for item in items}
    fresh = [(item, found) for item, found in present.items() if item not in known]
    bar = tqdm(total=len(fresh), desc="encoding", unit="image", disable=not progress or not fresh)
    for start in range(0, len(fresh), batch_size):
        part = fresh[start : start + batch_size]
        update.added += _add_images(collection, pretrained, part, update.bad)
        bar.update(len(part))
    bar.close()
    if update.added or update.moved or update.removed:
        collection.table.optimise()
    return update


def sync_texts(
    collection: Collection, pretrained: Pretrained, texts: Sequence[str], *, batch_size: int, progress: bool
) -> Update:
    """Make the collection hold exactly these texts."""
    items = list(collection.table.items())
    wanted = {hash_of_text(text): text for text in texts}
    gone = [item.id for item in items if item.id not in wanted]
    collection.remove(gone)
    known = {item.id for item in items}
    fresh = [(item, text) for item, text in wanted.items() if item not in known]
    bar = tqdm(total=len(fresh), desc="encoding texts", unit="text", disable=not progress or not fresh)
    for start in range(0, len(fresh), batch_size):
        part = fresh[start : start + batch_size]
        _add_texts(collection, pretrained, part)
        bar.update(len(part))
    bar.close()
    if fresh or gone:
        collection.table.optimise()
    return Update(added=len(fresh), kept=len(items) - len(gone), removed=len(gone))


def _update_known(
    collection: Collection, items: list[Item], folder: Path, present: dict[str, list[str]], update: Update
) -> None:
    """Remove deleted items and update the paths of moved ones; count them in `update`."""
    gone = []
    unreadable = [Path(path) for path, _ in update.bad]
    for item in items:
        here = present.get(item.id, [])
        elsewhere = [path for path in item.payload["paths"] if not Path(path).is_relative_to(folder)]
        if here:  # found below this folder: drop other paths whose file no longer exists
            elsewhere = [path for path in elsewhere if Path(path).is_file()]
        elsewhere += [
            path for path in item.payload["paths"] if any(Path(path).is_relative_to(place) for place in unreadable)
        ]
        paths = sorted({*here, *elsewhere})
        if not paths:
            gone.append(item.id)
        elif paths != item.payload["paths"]:
            collection.table.describe(item.id, {**item.payload, "paths": paths})
            update.moved += 1
    collection.remove(gone)
    update.kept, update.removed = len(items) - len(gone), len(gone)


def _add_images(
    collection: Collection,
    pretrained: Pretrained,
    part: list[tuple[str, list[str]]],
    bad: list[tuple[str, str]],
) -> int:
    images, ids, payloads = [], [], []
    for item, paths in part:
        try:
            images.append(read_image(paths[0]))
            ids.append(item)
            payloads.append({"paths": sorted(paths)})
        except UserError as error:
            bad += [(path, str(error)) for path in paths]
    if not images:
        return 0
    encoded = pretrained.encode_images(images)
    high, mid, pooled = (values.float().cpu().numpy() for values in (encoded.high, encoded.mid, encoded.pooled))
    collection.put(ids, high=high, mid=mid, pooled=pooled, payloads=payloads)
    return len(images)


def _add_texts(collection: Collection, pretrained: Pretrained, part: list[tuple[str, str]]) -> None:
    encoded = pretrained.encode_texts([text for _, text in part])
    lengths = encoded.mask.sum(1).tolist()
    padded = []
    for shape, values in ((collection.high, encoded.high), (collection.mid, encoded.mid)):
        padded.append(np.zeros((len(part), *shape), np.float32))
        for k, length in enumerate(lengths):  # real tokens first, whichever side the tokenizer pads
            padded[-1][k, :length] = values[k][encoded.mask[k]].float().cpu().numpy()
    payloads = [{"text": text, "tokens": length} for (_, text), length in zip(part, lengths, strict=True)]
    ids = [item for item, _ in part]
    collection.put(ids, high=padded[0], mid=padded[1], pooled=encoded.pooled.float().cpu().numpy(), payloads=payloads)
