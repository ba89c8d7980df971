"""Encode a split once, and keep its features: each image and each caption once, captions without padding.

A cache entry is a folder named by a hash of everything that influences features (`cache_key`). It holds one
memory-mapped .npy file per array and one completion mark per shard of batches, with a checksum of the shard's values.
An interrupted encoding resumes after its last complete shard; damaged or foreign files fail the checksum and are
encoded again. Regions and tokens are float16 unless that loses accuracy, global embeddings float32.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from hacan.errors import UserError
from hacan.retrieval.ensemble import Scorer
from hacan.retrieval.provenance import code_hash, content_hash, versions, write_atomically
from hacan.retrieval.stage_meter import MIB, StageMeter
from hacan.types import EncodedImages, Gallery, PackedTexts, Processes, Split

log = logging.getLogger(__name__)

FORMAT = 2  # of a cache entry
SHARD_BATCHES = 8  # batches between two completion marks
FLOAT32_NEEDED = "float32-needed"  # a file in an entry whose features do not fit float16
FLOAT16_ERROR = 2**-9  # relative error of a batch beyond which float16 is not accurate enough (rounding alone: 2^-12)
LAST_USED = "last-used"  # a file whose modification time is the entry's last use
IN_USE_SECONDS = 600.0  # after its last write an entry may still belong to another evaluation

Features = dict[str, Tensor]  # high, mid, pooled


@dataclass(frozen=True, kw_only=True)
class FeatureStorage:
    """Where features are stored. folder: of the cache, or None; memory: MiB held in memory, the rest is mapped.

    half: store regions and tokens in float16 if that is accurate, otherwise in float32.
    """

    folder: Path | None = None
    memory: int = 8192
    half: bool = True


class _NeedsFloat32(Exception):
    pass


def encode_gallery(
    scorer: Scorer,
    split: Split,
    *,
    storage: FeatureStorage,
    meter: StageMeter,
    processes: Processes | None = None,
    progress: bool = True,
) -> Gallery:
    """Encode the N images and M captions of a split, or load what the cache holds of them.

    Several processes share the batches, and need a cache folder that all of them see. Batches are the same for every
    number of processes, so the features are too.
    """
    processes = processes or Processes()
    if storage.folder is not None and not split.images_hash:
        raise ValueError("split.images_hash is empty; pass a hash of the images to cache their features")
    if processes.world_size > 1 and storage.folder is None:
        raise ValueError(
            f"world_size is {processes.world_size} without a cache folder; pass one that every process sees"
        )
    if not len(split.ids) or not len(split.image_of_text):
        raise UserError(
            f"the split has {len(split.ids)} images and {len(split.image_of_text)} captions; both are needed"
        )
    text_rows, lengths, tokens_hash = _read_tokens(split)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    image_rows = list(torch.arange(len(split.ids)).split(split.batch_size))

    def image_features(pixels: Tensor) -> Features:
        return scorer.encode_images(pixels)._asdict()

    def text_features(token_ids: Tensor, mask: Tensor) -> Features:
        texts = scorer.encode_texts(token_ids, mask)
        return {"high": texts.high[texts.mask], "mid": texts.mid[texts.mask], "pooled": texts.pooled}

    for dtype in (torch.float16, torch.float32) if storage.half else (torch.float32,):
        key = cache_key(scorer, split, tokens_hash, dtype)
        encoder = _Encoder(dtype, key, storage, processes, progress)
        try:
            with meter.stage("encode images"):
                images = encoder.run("images", image_features, split.image_batches, image_rows, None)
            with meter.stage("encode texts"):
                texts = encoder.run("texts", text_features, split.text_batches, text_rows, offsets)
        except _NeedsFloat32 as error:
            log.warning("%s: the features are stored in float32, which doubles their size", error)
            continue
        return Gallery(EncodedImages(**images), PackedTexts(**texts, offsets=offsets), split.image_of_text)
    raise AssertionError("float32 always fits")


def cache_key(scorer: Scorer, split: Split, tokens_hash: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return everything that influences features, as plain values."""
    return {
        "checkpoint": scorer.checkpoint_hash,
        "architecture": scorer.architecture_hash,
        "precision": scorer.precision,
        "device": scorer.device.type,
        "images": split.images_hash,
        "tokens": tokens_hash,
        "versions": versions(),
        "code": code_hash(),
        "dtype": str(dtype),
        "format": FORMAT,
    }


def _read_tokens(split: Split) -> tuple[list[Tensor], Tensor, str]:
    """Return the rows of every batch of captions, the length of every caption [M], and a hash of all tokens."""
    batch_rows: list[Tensor] = []
    lengths = torch.full((len(split.image_of_text),), -1)
    tokens = [b""] * len(lengths)
    for rows, token_ids, mask in split.text_batches(range(len(lengths))):
        batch_rows.append(rows)
        lengths[rows] = mask.sum(1)
        for row, ids, real in zip(rows.tolist(), token_ids, mask, strict=True):
            tokens[row] = ids[real].numpy().tobytes()
    if bool((lengths < 0).any()):
        raise ValueError(f"text_batches left out {int((lengths < 0).sum())} of {len(lengths)} texts; yield every row")
    return batch_rows, lengths, content_hash([lengths.tolist(), hashlib.blake2b(b"".join(tokens)).hexdigest()])


class _Encoder:
    """Encodes images and texts of one split into arrays of one precision."""

    def __init__(
        self, dtype: torch.dtype, key: dict[str, Any], storage: FeatureStorage, processes: Processes, progress: bool
    ) -> None:
        self.dtypes = {"high": dtype, "mid": dtype, "pooled": torch.float32}
        self.processes, self.progress = processes, progress
        self.memory_left = storage.memory * MIB
        self.key_hash = content_hash(key)
        # Without a cache the arrays are mapped to temporary files, whose mappings outlive their names.
        self.scratch = tempfile.TemporaryDirectory(prefix="hacan-features-")
        self.entry = (storage.folder or Path(self.scratch.name)) / self.key_hash[:24]
        mark_used(self.entry)
        write_atomically(self.entry / "key.json", json.dumps(key, indent=1))

    def run(
        self,
        half: str,
        encode: Callable[..., Features],
        batches: Callable[[Sequence[int]], Iterable[tuple[Tensor, ...]]],
        batch_rows: list[Tensor],
        offsets: Tensor | None,
    ) -> Features:
        """Return the arrays of one half, `images` or `texts`: {high, mid, pooled}."""
        rows = sum(map(len, batch_rows))
        shards = [torch.cat(batch_rows[at : at + SHARD_BATCHES]) for at in range(0, len(batch_rows), SHARD_BATCHES)]
        shard_of_row = torch.empty(rows, dtype=torch.int64)
        for number, shard in enumerate(shards):
            shard_of_row[shard] = number
        arrays = _Arrays(self.entry / half, self.dtypes, rows, offsets, self.key_hash)
        complete = [arrays.is_complete(number, shard) for number, shard in enumerate(shards)]
        if any(complete):
            log.info("%s: %d of %d shards are cached", half, sum(complete), len(shards))
        rank, world_size = self.processes.rank, self.processes.world_size
        mine = [number for number in range(rank, len(shards), world_size) if not complete[number]]
        missing = {number: len(shards[number]) for number in mine}
        asked = torch.cat([shards[number] for number in mine]).tolist() if mine and not self._needs_float32() else []
        bar = tqdm(total=len(asked), desc=f"encode {half}", unit=half[:-1], delay=2, disable=not self.progress)
        for index, *inputs in batches(asked) if asked else ():
            features = encode(*inputs)
            _check_finite(half, index, features)
            if problem := self._loses_accuracy(half, features):
                write_atomically(self.entry / FLOAT32_NEEDED, problem)
                break
            arrays.write(index, features)
            for number, count in zip(*shard_of_row[index].unique(return_counts=True), strict=True):
                missing[int(number)] -= int(count)
                if missing[int(number)] == 0:
                    arrays.mark_complete(int(number), shards[int(number)])
            bar.update(len(index))
        bar.close()
        self.processes.barrier()
        if self._needs_float32():  # found by any process
            raise _NeedsFloat32((self.entry / FLOAT32_NEEDED).read_text(errors="replace"))
        left = sum(missing.values())
        if world_size > 1:
            arrays.reopen()
            left = sum(len(shard) for number, shard in enumerate(shards) if not arrays.is_complete(number, shard))
        if left:
            raise ValueError(f"{left} of {rows} {half} were not encoded; the batches left them out")
        loaded = arrays.load(memory=self.memory_left)
        self.memory_left -= sum(array.numel() * array.element_size() for array in loaded.values())
        return loaded

    def _needs_float32(self) -> bool:
        return (self.entry / FLOAT32_NEEDED).is_file()

    def _loses_accuracy(self, half: str, features: Features) -> str:
        """Return why float16 would overflow or lose more than its rounding; empty if it does not."""
        for name in ("high", "mid"):
            exact = features[name].float()
            lost = (features[name].to(self.dtypes[name]).float() - exact).norm()
            if not bool(lost <= FLOAT16_ERROR * exact.norm()):
                return f"{name} features of {half} do not fit float16 (up to {exact.abs().max():.3g})"
        return ""


def _check_finite(half: str, rows: Tensor, features: Features) -> None:
    bad = [name for name, value in features.items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise UserError(
            f"the model gives non-finite features ({', '.join(bad)}) for {half} {rows[0]} to {rows[-1]} of the split: "
            "evaluate with precision=32-true; if they remain, the checkpoint is damaged"
        )


class _Arrays:
    """The arrays of one half, mapped to files. In `high` and `mid` of texts, row j owns offsets[j]:offsets[j + 1]."""

    def __init__(
        self, folder: Path, dtypes: dict[str, torch.dtype], rows: int, offsets: Tensor | None, seed: str
    ) -> None:
        self.folder, self.dtypes, self.rows, self.offsets, self.seed = folder, dtypes, rows, offsets, seed
        self.reopen()

    def reopen(self) -> None:
        """Map the files of the folder, if all of them are there and have the expected type and length."""
        self.arrays: Features = {}
        for name, dtype in self.dtypes.items():
            array = _open_npy(self.folder / f"{name}.npy")
            if array is None or array.dtype != dtype or array.shape[:1] != (self._length(name),):
                self.arrays = {}
                return
            self.arrays[name] = array

    def _length(self, name: str) -> int:
        return self.rows if name == "pooled" or self.offsets is None else int(self.offsets[-1])

    def _places(self, name: str, rows: Tensor) -> Tensor:
        if name == "pooled" or self.offsets is None:
            return rows
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        shifts = self.offsets[rows] - lengths.cumsum(0) + lengths
        return torch.arange(int(lengths.sum())) + shifts.repeat_interleave(lengths)

    def write(self, rows: Tensor, features: Features) -> None:
        """Write the features of some rows; arrays that are missing or have other widths are created."""
        for name, value in features.items():
            shape = (self._length(name), *value.shape[1:])
            if name not in self.arrays or self.arrays[name].shape != shape:
                self.arrays[name] = map_npy(self.folder / f"{name}.npy", shape, self.dtypes[name])
            self.arrays[name][self._places(name, rows)] = value.to("cpu", self.dtypes[name])

    def mark_complete(self, shard: int, rows: Tensor) -> None:
        """Record the checksum of a shard whose rows have all been written."""
        write_atomically(self.folder / f"shard-{shard}", self._checksum(rows))

    def is_complete(self, shard: int, rows: Tensor) -> bool:
        """Return whether the shard is marked and its values have the recorded checksum."""
        mark = self.folder / f"shard-{shard}"
        return bool(self.arrays) and mark.is_file() and mark.read_bytes() == self._checksum(rows).encode()

    def _checksum(self, rows: Tensor) -> str:
        checksum = zlib.crc32(self.seed.encode())
        for name, array in self.arrays.items():
            checksum = zlib.crc32(f"{name} {tuple(array.shape)}".encode(), checksum)
            values = array[self._places(name, rows)].contiguous().numpy()
            checksum = zlib.crc32(values.reshape(-1).view(np.uint8).data, checksum)
        return f"{checksum:08x}"

    def load(self, *, memory: int) -> Features:
        """Return the arrays, copied into memory if they fit."""
        size = sum(array.numel() * array.element_size() for array in self.arrays.values())
        return {name: array.clone() for name, array in self.arrays.items()} if size <= memory else self.arrays


def map_npy(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the array of an .npy file, memory-mapped; create the file if there is none of that shape and type."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):  # one of several processes creates it
            present = _open_npy(path)
            if present is not None and present.shape == shape and present.dtype == dtype:
                return present
            path.unlink(missing_ok=True)
            array = np.lib.format.open_memmap(path, "w+", torch.empty(0, dtype=dtype).numpy().dtype, shape)
            with open(path, "r+b") as file:  # reserve the space: writing to a mapped file on a full disk is a SIGBUS
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
            return torch.from_numpy(array)
    except OSError as error:
        path.unlink(missing_ok=True)
        needed, free = int(np.prod(shape)) * dtype.itemsize // MIB, shutil.disk_usage(path.parent).free // MIB
        raise UserError(
            f"the features need {needed} MiB in {path}, where {free} MiB are free ({error.strerror}): free space "
            "there, or set log_dir to another disk"
        ) from error


def _open_npy(path: Path) -> Tensor | None:
    """Return the mapped array of a file; None if the file is missing or not a valid .npy."""
    try:
        return torch.from_numpy(np.lib.format.open_memmap(path, "r+"))
    except Exception:  # numpy parses the header as Python: a damaged one raises errors of many types
        return None


def mark_used(entry: Path) -> None:
    """Mark a cache entry as recently used; create its folder if needed."""
    entry.mkdir(parents=True, exist_ok=True)
    (entry / LAST_USED).touch()


def prune(folder: Path, *, budget: int, began: float) -> list[Path]:
    """Delete the least recently used entries until the rest fits `budget` MiB; return the deleted ones.

    Entries used since `began` (time.time() at the start of this evaluation) and those that another evaluation has
    written to within `IN_USE_SECONDS` are kept.
    """
    if not folder.is_dir():
        return []
    files = {
        entry: [file for file in entry.rglob("*") if file.is_file()] for entry in folder.iterdir() if entry.is_dir()
    }
    used = {entry: max((file.stat().st_mtime for file in inside), default=0.0) for entry, inside in files.items()}
    sizes = {entry: sum(file.stat().st_size for file in inside) for entry, inside in files.items()}
    total, deleted = sum(sizes.values()), []
    for entry in sorted(used, key=lambda entry: used[entry]):
        if total <= budget * MIB or used[entry] >= min(began, time.time() - IN_USE_SECONDS):
            break
        shutil.rmtree(entry)
        total -= sizes[entry]
        deleted.append(entry)
    if deleted:
        freed = sum(sizes[entry] for entry in deleted) / MIB
        log.info("%s: deleted %d cache entries, %.0f MiB (feature_disk=%d)", folder, len(deleted), freed, budget)
    return deleted
