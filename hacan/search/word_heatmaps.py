"""Word heatmaps of indexed images, from their stored features."""

import numpy as np
import torch

from hacan.checkpoints.pretrained import Pretrained
from hacan.errors import UserError
from hacan.images.preprocessing import preprocess_image
from hacan.report.attention import pair_attention
from hacan.report.heatmaps import Explanation, StreamMaps, image_of_pixels, words_of
from hacan.types import EncodedImages


def explain_features(pretrained: Pretrained, images: EncodedImages, image: np.ndarray, text: str) -> Explanation:
    """Return the heatmaps as `hacan.report.heatmaps.explain` does, from stored features of an image [H, W, 3]."""
    size = pretrained.image_size
    attention = pair_attention(pretrained.model.alignment, images, pretrained.encode_texts([text]))
    mid, high = pretrained.model.region_grids(height=size, width=size)
    some = next(iter(attention.values())).values
    words = words_of(text, pretrained.tokenizer, max_text_len=pretrained.max_text_len)
    words = [word for word in words if not word.special and not torch.isnan(some[list(word.tokens)]).any()]
    if not words:
        raise UserError(f"the sentence {text!r} has no word in the vocabulary of the model: there are no heatmaps")
    streams = []
    for name, found in attention.items():
        grid = mid if name == "lrg_mid" else high
        by_word = torch.stack([found.values[list(word.tokens)].mean(0) for word in words])
        streams.append(StreamMaps(name, by_word.view(-1, *grid).numpy(), found.unit, found.score))
    seen = image_of_pixels(preprocess_image(image, image_size=size, centre_crop=pretrained.centre_crop))
    return Explanation(seen, text, words, streams)
