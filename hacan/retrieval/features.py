"""A split encoded once into a bank: each image and each caption once, half precision, captions without padding.

Regions and tokens are float16, global embeddings float32 (they are small, and the coarse ranking is theirs). The bank
lives in memory, or mapped to files where it is larger than `feature_memory`. Kept in a folder it is found again by a
hash over everything that made it; an interrupted encoding goes on after its last complete batch.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hacan.errors import UserError
from hacan.retrieval.banks import mark_used
from hacan.retrieval.store import MIB, ArraySpec, RowStore, write_atomically
from hacan.types import EncodedImages, EncodedTexts, Gallery, PackedTexts

log = logging.getLogger(__name__)

FORMAT = 1  # of a bank's folder
TOO_NARROW = "float16-too-narrow"  # a file that says so, for the other processes and for the next run
HALF_ERROR = 2**-9  # relative error of a batch beyond which float16 is too narrow for it (rounding alone: 2^-12)

ImageBatches = Callable[[Sequence[int]], Iterable[tuple[Tensor, Tensor]]]
TextBatches = Callable[[Sequence[int]], Iterable[tuple[Tensor, Tensor, Tensor]]]


class HalfTooNarrow(Exception):
    """Features that float16 cannot hold: they are encoded again, into a bank of float32."""


def encode_gallery(
    encode_images: Callable[[Tensor], EncodedImages],
    encode_texts: Callable[[Tensor, Tensor], EncodedTexts],
    image_batches: ImageBatches,
    text_batches: TextBatches,
    *,
    image_of_text: Tensor,
    images: int,
    batch_size: int,
    feature_memory: int,
    folder: Path | None = None,
    key: Mapping[str, Any] | None = None,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
    stage: Callable[[str], AbstractContextManager] = nullcontext,
    progress: bool = True,
) -> Gallery:
    """Encode a split of N images and M texts, each once, or take up what was encoded before.

    encode_images(pixels) and encode_texts(token_ids, token_mask) are the model's, in evaluation mode, on their device.
    image_batches(rows) yields (rows [B], pixels) and text_batches(rows) (rows [B], token_ids [B, W], mask [B, W]) of
    the rows asked for, in that order or in one of their own, `batch_size` at a time. image_of_text [M].
    feature_memory: MiB kept in memory; what is beyond is mapped to files.
    folder: where banks are kept; `key`: what made this one (checkpoint, pictures, precision, ...). A bank is used
    again only if its key is equal; the tokens are hashed into it here.
    Several processes (rank of world_size) need one folder that all of them see, and meet at `barrier()`; batches are
    cut the same way whatever their number, so that the features are too. stage(name): a context around each half.
    """
    if folder is not None and key is None:
        raise ValueError("folder is given without a key; pass what made the features, at least the checkpoint's hash")
    if world_size > 1 and folder is None:
        raise ValueError(f"world_size is {world_size} without a folder; pass one that every process sees")
    arguments = (encode_images, encode_texts, image_batches, text_batches)
    plan = _Plan(text_batches, image_of_text, images=images, batch_size=batch_size)
    for dtype in (torch.float16, torch.float32):
        made_by = {**(key or {}), "tokens": plan.tokens_hash, "dtype": str(dtype), "format": FORMAT}
        home = None if folder is None else folder / content_hash(made_by)[:24]
        if home is not None:
            mark_used(home)
        try:
            return _Encoding(
                plan,
                dtype=dtype,
                home=home,
                budget=feature_memory * MIB,
                rank=rank,
                world_size=world_size,
                barrier=barrier,
                stage=stage,
                progress=progress,
            ).run(*arguments)
        except HalfTooNarrow as error:
            log.warning("%s: the features are kept in float32, which doubles their size", error)
    raise AssertionError("float32 is never too narrow")


def select_images(gallery: Gallery, rows: slice) -> Gallery:
    """The part of a gallery that holds some neighbouring images and all of their captions, numbered anew."""
    images, texts, image_of_text = gallery
    if rows.start == 0 and rows.stop == len(images.high):
        return gallery
    chosen = ((image_of_text >= rows.start) & (image_of_text < rows.stop)).nonzero().flatten()
    lengths = texts.offsets[chosen + 1] - texts.offsets[chosen]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    if len(chosen) and int(chosen[-1] - chosen[0]) == len(chosen) - 1:  # neighbours: a view, no copy
        tokens = slice(int(texts.offsets[chosen[0]]), int(texts.offsets[chosen[-1] + 1]))
    else:
        tokens = torch.arange(int(offsets[-1])) + (texts.offsets[chosen] - offsets[:-1]).repeat_interleave(lengths)
    return Gallery(
        images=EncodedImages(*(values[rows] for values in images)),
        texts=PackedTexts(texts.high[tokens], texts.mid[tokens], offsets, texts.pooled[chosen]),
        image_of_text=image_of_text[chosen] - rows.start,
    )


def content_hash(value: Any) -> str:
    """Hash (hex) of plain values: equal values, equal hash."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=32).hexdigest()


def hash_of_files(paths: Sequence[str | Path], *, progress: bool = True) -> str:
    """Hash (hex) over the contents of files, in their order: a picture that was replaced in place changes it."""

    def digest(path: str | Path) -> str:
        try:
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "blake2b").hexdigest()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}; an evaluation needs every picture") from error

    with ThreadPoolExecutor(4) as pool:
        digests = pool.map(digest, paths)
        return content_hash(
            list(tqdm(digests, total=len(paths), desc="hash", unit="file", delay=2, disable=not progress))
        )


def hash_of_tensors(state: Mapping[str, Tensor]) -> str:
    """Hash (hex) over names, types, shapes and bytes of tensors, such as a model's state dict."""
    total = hashlib.blake2b(digest_size=32)
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


class _Plan:
    """How a split is cut into batches: the same for every number of processes, and after every interruption."""

    def __init__(self, text_batches: TextBatches, image_of_text: Tensor, *, images: int, batch_size: int) -> None:
        if not images or not len(image_of_text):
            raise UserError(f"the split has {images} images and {len(image_of_text)} captions; nothing to evaluate")
        self.images, self.image_of_text = images, image_of_text
        self.image_rows = list(torch.arange(images).split(batch_size))
        # Tokens are cheap to read: one pass for the lengths, which say where every caption will lie, and for the hash.
        self.text_rows: list[Tensor] = []
        lengths = torch.full((len(image_of_text),), -1)
        total = [b""] * len(image_of_text)
        for rows, token_ids, mask in text_batches(range(len(image_of_text))):
            self.text_rows.append(rows)
            lengths[rows] = mask.sum(1)
            for row, ids, real in zip(rows.tolist(), token_ids, mask, strict=True):
                total[row] = ids[real].numpy().tobytes()
        if bool((lengths < 0).any()):
            left = int((lengths < 0).sum())
            raise ValueError(f"text_batches left out {left} of {len(lengths)} texts; yield every row that is asked for")
        self.offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        self.tokens_hash = content_hash([lengths.tolist(), hashlib.blake2b(b"".join(total)).hexdigest()])


class _Encoding:
    """One encoding of one split at one precision."""

    def __init__(
        self,
        plan: _Plan,
        *,
        dtype: torch.dtype,
        home: Path | None,
        budget: int,
        rank: int,
        world_size: int,
        barrier: Callable[[], None],
        stage: Callable[[str], AbstractContextManager],
        progress: bool,
    ) -> None:
        self._plan, self._dtype, self._home, self._budget = plan, dtype, home, budget
        self._rank, self._world_size, self._barrier, self._progress = rank, world_size, barrier, progress
        self._stage = stage

    def run(
        self,
        encode_images: Callable[[Tensor], EncodedImages],
        encode_texts: Callable[[Tensor, Tensor], EncodedTexts],
        image_batches: ImageBatches,
        text_batches: TextBatches,
    ) -> Gallery:
        plan = self._plan

        def image_features(pixels: Tensor) -> dict[str, Tensor]:
            images = encode_images(pixels)
            return {"high": images.high, "mid": images.mid, "pooled": images.pooled}

        def text_features(token_ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
            texts = encode_texts(token_ids, mask)
            real = texts.mask
            return {"high": texts.high[real], "mid": texts.mid[real], "pooled": texts.pooled}

        with self._stage("encode images"):
            images = self._encoded(
                "images", image_features, image_batches, plan.image_rows, rows=plan.images, offsets=None
            )
        with self._stage("encode texts"):
            texts = self._encoded(
                "texts", text_features, text_batches, plan.text_rows, rows=len(plan.image_of_text), offsets=plan.offsets
            )
        return Gallery(
            images=EncodedImages(**images),
            texts=PackedTexts(**texts, offsets=plan.offsets),
            image_of_text=plan.image_of_text,
        )

    def _encoded(
        self,
        half: str,
        encode: Callable[..., dict[str, Tensor]],
        batches: Callable[[Sequence[int]], Iterable[tuple[Tensor, ...]]],
        batch_rows: list[Tensor],
        *,
        rows: int,
        offsets: Tensor | None,
    ) -> dict[str, Tensor]:
        """The arrays of one half, images or texts: {high, mid, pooled}."""
        folder = None if self._home is None else self._home / half
        store = self._known_store(folder, rows, offsets)
        done = store.done if store else torch.zeros(rows, dtype=torch.bool)
        mine = [part for part in batch_rows[self._rank :: self._world_size] if not bool(done[part].all())]
        mine = [] if self._too_narrow() else mine
        if int(done.sum()):
            log.info("%s: %d of %d were encoded before", half, int(done.sum()), rows)
        bar = tqdm(
            total=sum(map(len, mine)), desc=f"encode {half}", unit=half[:-1], delay=2, disable=not self._progress
        )
        for index, *inputs in batches(torch.cat(mine).tolist()) if mine else ():
            features = encode(*inputs)
            self._check_finite(half, index, features)
            try:
                narrow = self._narrowed(half, features)
            except HalfTooNarrow as error:
                if self._home is None:
                    raise
                write_atomically(self._home / TOO_NARROW, str(error))
                break
            if store is None:
                store = self._new_store(folder, rows, offsets, features)
            store.write(index, narrow)
            bar.update(len(index))
        bar.close()
        self._barrier()
        if self._too_narrow():  # one process found it; all of them start again
            raise HalfTooNarrow((self._home / TOO_NARROW).read_text())
        if store is None:
            store = self._known_store(folder, rows, offsets)
        elif self._world_size > 1:
            store.refresh()
        if store is None or not bool(store.done.all()):
            left = rows if store is None else int((~store.done).sum())
            raise ValueError(f"{left} of {rows} {half} were not encoded; the batches left them out")
        self._budget -= sum(array.numel() * array.element_size() for array in store.arrays.values())
        return store.arrays

    def _too_narrow(self) -> bool:
        return self._home is not None and (self._home / TOO_NARROW).is_file()

    def _known_store(self, folder: Path | None, rows: int, offsets: Tensor | None) -> RowStore | None:
        """The store that an earlier run, or another process, has begun."""
        if folder is None or not (folder / "shapes.json").is_file():
            return None
        return self._store(json.loads((folder / "shapes.json").read_text()), folder, rows, offsets)

    def _new_store(
        self, folder: Path | None, rows: int, offsets: Tensor | None, features: dict[str, Tensor]
    ) -> RowStore:
        """A store for features such as the first batch's."""
        items = {"high": rows, "mid": rows} if offsets is None else {"high": int(offsets[-1]), "mid": int(offsets[-1])}
        shapes = {name: [items.get(name, rows), *value.shape[1:]] for name, value in features.items()}
        if folder is not None:
            write_atomically(folder / "shapes.json", json.dumps(shapes))
        return self._store(shapes, folder, rows, offsets)

    def _store(self, shapes: dict[str, list[int]], folder: Path | None, rows: int, offsets: Tensor | None) -> RowStore:
        specs = {
            name: ArraySpec(
                shape=tuple(shape),
                dtype=torch.float32 if name == "pooled" else self._dtype,
                offsets=None if name == "pooled" else offsets,
            )
            for name, shape in shapes.items()
        }
        fits = sum(spec.bytes for spec in specs.values()) <= self._budget
        return RowStore(specs, rows=rows, folder=folder, in_memory=fits, writer=self._rank)

    def _check_finite(self, half: str, rows: Tensor, features: dict[str, Tensor]) -> None:
        bad = [name for name, value in features.items() if not bool(torch.isfinite(value).all())]
        if bad:
            raise UserError(
                f"the model gives non-finite features ({', '.join(bad)}) for {half} {rows[0]} to {rows[-1]} of the "
                "split: evaluate with precision=32-true; if they stay, the checkpoint is broken"
            )

    def _narrowed(self, half: str, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Features in the bank's precision; raises where float16 would overflow or lose more than its rounding."""
        types = {"high": self._dtype, "mid": self._dtype, "pooled": torch.float32}
        narrow = {name: value.to(types[name]) for name, value in features.items()}
        if self._dtype == torch.float16:
            for name in ("high", "mid"):
                exact = features[name].float()
                lost, size = (narrow[name].float() - exact).norm(), exact.norm()
                if not bool(lost <= HALF_ERROR * size):
                    raise HalfTooNarrow(f"{name} features of {half} do not fit float16 (up to {exact.abs().max():.3g})")
        return narrow
