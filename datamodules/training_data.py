"""Training data: pixels and tokens of (epoch, pair), and the loader that Lightning iterates."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from datamodules.loader import Pair, PairCollator, UnreadableImage, WatchedLoader
from datamodules.sampling import TrainingOrder, derived_seed
from datamodules.tokens import TokenTable
from datamodules.transforms import Transform
from hacan.errors import UserError
from hacan.images.io import read_image
from hacan.types import PairBatch

log = logging.getLogger(__name__)


class TrainingPairs(Dataset):
    """One item per caption of the split; the key (epoch, pair) seeds its augmentation. transform None: no pixels."""

    def __init__(
        self,
        *,
        paths: np.ndarray,
        image_ids: np.ndarray,
        image_of_text: np.ndarray,
        tokens: TokenTable,
        transform: Transform | None,
        seed: int,
    ) -> None:
        # arrays instead of lists: worker processes share their memory pages
        self._paths, self._image_ids, self._image_of_text = paths, image_ids, image_of_text
        self._tokens, self._transform, self._seed = tokens, transform, seed

    def __len__(self) -> int:
        return len(self._image_of_text)

    def __getitem__(self, key: tuple[int, int]) -> Pair | UnreadableImage:
        """Return the pair as augmented in that epoch; equal in every process and after every resumption."""
        epoch, caption = key
        image = int(self._image_of_text[caption])
        path = str(self._paths[image])
        if self._transform is None:
            return Pair(
                torch.zeros(3, 0, 0, dtype=torch.uint8), self._tokens[caption], int(self._image_ids[image]), caption
            )
        try:
            image_array = read_image(path)
        except UserError as error:
            return UnreadableImage(path, str(error))
        with seeded(derived_seed(self._seed, epoch, caption)):
            pixels = self._transform(image_array)
        return Pair(pixels, self._tokens[caption], int(self._image_ids[image]), caption)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global CPU generator within the context and restore it afterwards."""
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)


class TrainingLoader:
    """Batches of one process, from the position of `order` on.

    Wraps a torch DataLoader: it counts the batches that were yielded (not those that workers have prefetched) and the
    unreadable images. `len()` is that of the whole epoch. A batch without readable images is yielded with B = 0, so
    that all processes take the same number of batches.
    """

    def __init__(
        self,
        pairs: TrainingPairs,
        order: TrainingOrder,
        *,
        padding_id: int,
        image_size: int,
        num_workers: int,
        on_bad_image: str,
    ) -> None:
        self.sampler = order  # Lightning calls sampler.set_epoch
        self._on_bad_image = on_bad_image
        self.skipped: dict[str, str] = {}  # path -> reason, of the current epoch
        self._loader = WatchedLoader(
            pairs,
            num_workers=num_workers,
            batch_sampler=order,
            collate_fn=PairCollator(padding_id=padding_id, image_size=image_size),
            persistent_workers=num_workers > 0,
        )

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[PairBatch]:
        """Yield the rest of the epoch; the position is read at the first `next`."""
        self.skipped = {}
        position = self.sampler.next_batch
        epoch = self.sampler.epoch
        for batch, bad in self._loader:
            position += 1
            self._note_bad(bad)
            if position == len(self):
                self._report_skipped(epoch)
            self.sampler.set_position(epoch, position)
            yield batch

    def stop(self) -> None:
        """Stop the worker processes; the next iteration starts new ones."""
        self._loader.stop()

    def _note_bad(self, bad: list[UnreadableImage]) -> None:
        if bad and self._on_bad_image == "error":
            self.stop()
            raise UserError(f"{bad[0].reason}; on_bad_image=skip trains without unreadable images")
        if bad and not self.skipped:
            log.warning("skipped: %s; the number is reported at the end of the epoch", bad[0].reason)
        self.skipped.update({image.path: image.reason for image in bad})

    def _report_skipped(self, epoch: int) -> None:
        if self.skipped:
            first = next(iter(self.skipped.values()))
            log.warning("epoch %d: %d unreadable image(s) skipped, the first: %s", epoch, len(self.skipped), first)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next batch; yielded batches count as done."""
        return {"epoch": self.sampler.epoch, "batch": self.sampler.next_batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a position."""
        self.sampler.set_position(state["epoch"], state["batch"])
