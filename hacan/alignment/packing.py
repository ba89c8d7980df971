"""Captions without padding: what EncodedTexts holds, one real token after the other."""

import torch
from torch import Tensor

from hacan.types import EncodedTexts, PackedTexts


def pack_texts(texts: EncodedTexts) -> PackedTexts:
    """[M, W, d] padded tokens -> [L, d] real ones; the mask may have its True entries anywhere."""
    mask = texts.mask
    if mask.dtype != torch.bool or texts.high.shape[:2] != mask.shape or texts.mid.shape != texts.high.shape:
        raise ValueError(
            f"texts.high is {list(texts.high.shape)}, texts.mid {list(texts.mid.shape)} and texts.mask "
            f"{list(mask.shape)} of {mask.dtype}, expected [M, W, d] twice and [M, W] bool"
        )
    offsets = torch.zeros(len(mask) + 1, dtype=torch.int64)
    offsets[1:] = mask.sum(1).cumsum(0).cpu()
    return PackedTexts(high=texts.high[mask], mid=texts.mid[mask], offsets=offsets, pooled=texts.pooled)


def lengths_of(texts: PackedTexts) -> Tensor:
    """Tokens of each caption, [M] int64."""
    return texts.offsets[1:] - texts.offsets[:-1]
