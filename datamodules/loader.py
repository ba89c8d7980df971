"""Collate training pairs, and load batches in worker processes that are stopped at once when one fails."""

import signal
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hacan.errors import UserError
from hacan.images.preprocessing import normalise
from hacan.types import PairBatch


class Pair(NamedTuple):
    """One image with one of its captions."""

    image: Tensor  # [3, H, W] uint8
    tokens: np.ndarray  # [W] int32
    image_id: int
    caption_id: int


class UnreadableImage(NamedTuple):
    """Takes the place of an image that could not be read; an exception would lose its type between processes."""

    path: str
    reason: str


def pad_tokens(captions: Sequence[np.ndarray], padding_id: int) -> tuple[Tensor, Tensor]:
    """Return token ids [B, W] int64 and their mask [B, W] bool; W is the length of the longest caption."""
    width = max((len(tokens) for tokens in captions), default=0)
    token_ids = torch.full((len(captions), width), padding_id, dtype=torch.int64)
    mask = torch.zeros(len(captions), width, dtype=torch.bool)
    for row, tokens in enumerate(captions):
        token_ids[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
        mask[row, : len(tokens)] = True
    return token_ids, mask


class PairCollator:
    """Collate function with the padding id and the image size of a run."""

    def __init__(self, *, padding_id: int, image_size: int) -> None:
        self._padding_id, self._image_size = padding_id, image_size

    def __call__(self, items: Sequence[Pair | UnreadableImage]) -> tuple[PairBatch, list[UnreadableImage]]:
        """Return the batch of the readable items (B = 0 if there are none) and the unreadable ones."""
        pairs = [item for item in items if isinstance(item, Pair)]
        bad = [item for item in items if isinstance(item, UnreadableImage)]
        token_ids, token_mask = pad_tokens([pair.tokens for pair in pairs], self._padding_id)
        none = torch.zeros(0, 3, self._image_size, self._image_size)
        batch = PairBatch(
            images=normalise(torch.stack([pair.image for pair in pairs])) if pairs else none,
            token_ids=token_ids,
            token_mask=token_mask,
            image_ids=torch.tensor([pair.image_id for pair in pairs], dtype=torch.int64),
            caption_ids=torch.tensor([pair.caption_id for pair in pairs], dtype=torch.int64),
        )
        return batch, bad


class WatchedLoader:
    """A torch DataLoader that reports a dead worker as `UserError` and can stop its workers explicitly."""

    def __init__(self, dataset: Dataset, *, num_workers: int, **arguments: Any) -> None:
        self._num_workers = num_workers
        self._iterator: Any = None
        self._loader = DataLoader(
            dataset,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_quiet_worker,
            **arguments,
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        try:
            self._iterator = iter(self._loader)
            yield from self._iterator
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker (pid"):  # other errors have a prefix "Caught ..."
                raise
            self.stop()
            raise UserError(
                f"a process that decodes images died ({' '.join(str(error).split())}); most often memory, or "
                f"/dev/shm, is full: try fewer than num_workers={self._num_workers}"
            ) from error

    def stop(self) -> None:
        """Stop the workers; the garbage collector would need 5 s for each."""
        if self._num_workers and self._iterator is not None:
            self._iterator._shutdown_workers()  # there is no public API; Lightning does the same
            self._loader._iterator = self._iterator = None


def _quiet_worker(_: int) -> None:
    """Use one thread, because OpenCV's pool does not survive a fork, and leave Ctrl-C to the training process."""
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
