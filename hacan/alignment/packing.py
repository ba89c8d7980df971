"""Captions without padding, in the order in which they are scored: short ones first."""

import torch
from torch import Tensor

from hacan.alignment.segments import Segments, ranges, run_lengths
from hacan.types import EncodedTexts, PackedTexts


def pack_texts(texts: EncodedTexts) -> PackedTexts:
    """[M, W, d] padded tokens -> [L, d] real ones; the mask may have its True entries anywhere."""
    mask = texts.mask
    if mask.dtype != torch.bool or texts.high.shape[:2] != mask.shape or texts.mid.shape[:2] != mask.shape:
        raise ValueError(
            f"texts.high is {list(texts.high.shape)}, texts.mid {list(texts.mid.shape)} and texts.mask "
            f"{list(mask.shape)} of {mask.dtype}, expected [M, W, d] twice and [M, W] bool"
        )
    offsets = torch.zeros(len(mask) + 1, dtype=torch.int64)
    offsets[1:] = mask.sum(1).cumsum(0).cpu()
    return PackedTexts(high=texts.high[mask], mid=texts.mid[mask], offsets=offsets, pooled=texts.pooled)


class CaptionOrder:
    """Captions to be scored, sorted by length, and where their tokens stand in a PackedTexts; empty ones are left out.

    `captions` [m] their numbers, `lengths` [m], both int64 on the CPU.
    """

    def __init__(self, texts: PackedTexts, captions: Tensor, *, drop_ends: bool) -> None:
        """`drop_ends`: the first and the last token ([CLS], [SEP]) take no part where a caption has more than 2."""
        starts = texts.offsets[captions]
        lengths = texts.offsets[captions + 1] - starts
        if drop_ends:
            starts = starts + (lengths > 2).long()
            lengths = lengths - 2 * (lengths > 2).long()
        order = torch.argsort(lengths, stable=True)
        order = order[lengths[order] > 0]
        self.captions, self.lengths, self._starts = captions[order], lengths[order], starts[order]
        self._firsts = self.lengths.cumsum(0) - self.lengths
        new_run = torch.ones_like(self.lengths, dtype=torch.bool)
        new_run[1:] = run_lengths(self.lengths).diff() != 0
        places = torch.arange(len(self.lengths))
        self._run_places = places - torch.where(new_run, places, 0).cummax(0).values
        self._identity = torch.full((len(texts.offsets) - 1,), -1, dtype=torch.int64)
        self._identity[self.captions] = places

    def __len__(self) -> int:
        return len(self.captions)

    def places_of(self, captions: Tensor) -> Tensor:
        """Where captions stand in this order, -1 for those without a token."""
        return self._identity[captions]

    def chunks(self, places: Tensor, rows: int) -> list[Tensor]:
        """Places, cut so that each part has at most `rows` tokens (or is a single caption)."""
        if len(places) == 0:
            return []
        sizes, size, tokens = [], 0, 0
        for length in self.lengths[places].tolist():
            if size and tokens + length > rows:
                sizes.append(size)
                size, tokens = 0, 0
            size, tokens = size + 1, tokens + length
        return list(places.split([*sizes, size]))

    def segments(self, places: Tensor, device: torch.device) -> Segments:
        """The captions at these places as segments of a token matrix."""
        return Segments(self.lengths[places], device)

    def bank_rows(self, places: Tensor) -> Tensor:
        """Rows of the PackedTexts that hold the tokens of the captions at these places, [T]."""
        return ranges(self._starts[places], self.lengths[places])

    def rows(self, places: Tensor) -> Tensor:
        """Rows of those tokens when all captions of this order stand one after the other, [T]."""
        return ranges(self._firsts[places], self.lengths[places])

    def places_in_run(self, places: Tensor) -> Tensor:
        """Where each caption stands among those of its run (`run_lengths`), [m]."""
        return self._run_places[places]
