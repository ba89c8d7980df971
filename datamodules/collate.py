"""Items of a training batch to a `PairBatch`, padded to its own longest caption."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hacan.images.preprocessing import normalise
from hacan.types import PairBatch


class Pair(NamedTuple):
    """One image with one of its captions."""

    image: Tensor  # [3, H, W] uint8
    tokens: np.ndarray  # [W] int32
    image_id: int
    caption_id: int


class UnreadableImage(NamedTuple):
    """Stands where a image could not be read: an exception would lose its type between processes."""

    path: str
    reason: str


def pad_tokens(captions: Sequence[np.ndarray], padding_id: int) -> tuple[Tensor, Tensor]:
    """Token ids [B, W] int64 and their mask [B, W] bool, W being the longest caption's."""
    width = max((len(tokens) for tokens in captions), default=0)
    token_ids = torch.full((len(captions), width), padding_id, dtype=torch.int64)
    mask = torch.zeros(len(captions), width, dtype=torch.bool)
    for row, tokens in enumerate(captions):
        token_ids[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
        mask[row, : len(tokens)] = True
    return token_ids, mask


class PairCollator:
    """Makes batches of items; one of its own per run, because it knows the id of padding and the size of images."""

    def __init__(self, *, padding_id: int, image_size: int) -> None:
        self._padding_id, self._image_size = padding_id, image_size

    def __call__(self, items: Sequence[Pair | UnreadableImage]) -> tuple[PairBatch, list[UnreadableImage]]:
        """(The batch of the items that could be read, of no pair at all where none could; the unreadable ones.)"""
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
