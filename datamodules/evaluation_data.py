"""Evaluation data: every image and every caption of a split exactly once."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from datamodules.loader import UnreadableImage, WatchedLoader, pad_tokens
from datamodules.records import CaptionedImage
from datamodules.tokens import TokenTable
from datamodules.transforms import Transform
from hacan.errors import UserError
from hacan.images.io import read_image
from hacan.images.preprocessing import normalise


def unreadable_images(records: Sequence[CaptionedImage], *, progress: bool) -> Iterator[tuple[CaptionedImage, str]]:
    """Decode the images of all records and yield those that fail, with the reason."""

    def reason(record: CaptionedImage) -> str | None:
        try:
            read_image(record.path)
        except UserError as error:
            return str(error)
        return None

    threads = cv2.getNumberOfCPUs()
    with ThreadPoolExecutor(threads) as pool, tqdm(total=len(records), unit="image", disable=not progress) as bar:
        bar.set_description("decode")
        for start in range(0, len(records), 1024):  # map() submits everything at once; this bounds the queue
            part = records[start : start + 1024]
            for record, found in zip(part, pool.map(reason, part), strict=True):
                bar.update()
                if found is not None:
                    yield record, found


class EvaluationImages:
    """Batches (rows [B] int64, pixels [B, 3, H, W]) of the images `rows`; raises `UserError` for an unreadable one."""

    def __init__(
        self, paths: Sequence[str], rows: Sequence[int], *, transform: Transform, batch_size: int, num_workers: int
    ) -> None:
        self._loader = WatchedLoader(
            _ImageFiles(np.array([paths[row] for row in rows], dtype=np.str_), list(rows), transform),
            num_workers=num_workers,
            batch_size=batch_size,
            collate_fn=_stack,
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows, pixels, bad in self._loader:
            if bad:
                self._loader.stop()
                raise UserError(f"{bad[0].reason}; on_bad_image=skip evaluates without unreadable images")
            yield rows, pixels


class EvaluationTexts:
    """Batches (rows [B] int64, token ids [B, W], mask [B, W]) of the captions `rows`, shortest first.

    Sorting by length keeps the padding small.
    """

    def __init__(self, tokens: TokenTable, rows: Sequence[int], *, batch_size: int) -> None:
        asked = np.asarray(rows, np.int64)
        self._rows = asked[np.argsort(tokens.lengths[asked], kind="stable")]
        self._tokens, self._batch_size = tokens, batch_size

    def __len__(self) -> int:
        return -(-len(self._rows) // self._batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for start in range(0, len(self._rows), self._batch_size):
            rows = self._rows[start : start + self._batch_size]
            token_ids, mask = pad_tokens([self._tokens[row] for row in rows], self._tokens.padding_id)
            yield torch.from_numpy(rows), token_ids, mask


class _ImageFiles(Dataset):
    def __init__(self, paths: np.ndarray, rows: list[int], transform: Transform) -> None:
        self._paths, self._rows, self._transform = paths, rows, transform

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, position: int) -> tuple[int, Tensor | UnreadableImage]:
        path = str(self._paths[position])
        try:
            return self._rows[position], self._transform(read_image(path))
        except UserError as error:
            return self._rows[position], UnreadableImage(path, str(error))


def _stack(items: list[tuple[int, Tensor | UnreadableImage]]) -> tuple[Tensor, Tensor | None, list[UnreadableImage]]:
    rows = torch.tensor([row for row, _ in items], dtype=torch.int64)
    bad = [item for _, item in items if isinstance(item, UnreadableImage)]
    pixels = [item for _, item in items if not isinstance(item, UnreadableImage)]
    return rows, None if bad else normalise(torch.stack(pixels)), bad
