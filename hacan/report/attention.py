"""Token-by-region attention maps of an image and a caption, one per stream."""

from typing import NamedTuple

import torch
from torch import Tensor

from hacan.alignment import LEVELS, FineAlignment
from hacan.errors import UserError
from hacan.types import EncodedImages, EncodedTexts


class StreamAttention(NamedTuple):
    """The map of one stream."""

    values: Tensor  # [W, R] float32; rows of excluded tokens are NaN
    unit: str  # of the values
    score: float  # contribution to the fine similarity


@torch.no_grad()
def pair_attention(alignment: FineAlignment, images: EncodedImages, texts: EncodedTexts) -> dict[str, StreamAttention]:
    """Return the maps of a pair by stream; R are the regions of the stream's image level in row-major order.

    Values and units are those of the form's `attention`; raises `UserError` if the form does not define it.
    """
    if len(images.high) != 1 or len(texts.high) != 1:
        raise ValueError(f"{len(images.high)} images and {len(texts.high)} texts were given, expected one of each")
    if not alignment.streams:
        raise UserError("streams=[]: the score is the cosine of the global embeddings, which has no heatmaps")
    if not alignment.has_attention:
        raise UserError(
            f"alignment={alignment.name} has no heatmaps: {type(alignment).__name__} defines no attention(); "
            "docs/changing-the-method.md shows how to add it"
        )
    if not bool(texts.mask.any()):
        raise ValueError("the text has no tokens")
    found = {}
    with torch.autocast(images.high.device.type, enabled=False):
        for stream in alignment.streams:
            of_image, of_text = LEVELS[stream]
            tokens = getattr(texts, of_text).masked_fill(~texts.mask[..., None], 0)
            dtype = torch.promote_types(tokens.dtype, torch.float32)
            regions = getattr(images, of_image).to(dtype)
            values = alignment.attention(regions, tokens.to(dtype), texts.mask, stream)[0, 0].float().cpu()
            score = float(alignment(images, texts, streams=(stream,)))
            found[stream] = StreamAttention(values, alignment.attention_units[stream], score)
    return found
