"""A trained HACAN for inference: pictures and captions in, scores out; no Lightning, no Sacred."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from hacan.checkpoints.checkpoint import open_checkpoint
from hacan.checkpoints.description import tokenizer_from_description
from hacan.errors import UserError
from hacan.images.io import read_image
from hacan.images.preprocessing import preprocess_image, uses_centre_crop
from hacan.models.hacan import HACAN
from hacan.types import EncodedImages, EncodedTexts


class Pretrained:
    """A model with its tokenizer and its way of framing pictures, in evaluation mode.

    >>> model = hacan.load_pretrained("exported")
    >>> images = model.encode_images(["cat.jpg", "dog.jpg"])
    >>> texts = model.encode_texts(["a sleeping cat", "a dog on a beach", "two trains"])
    >>> model.score(images, texts)  # [2, 3]: rows are images, columns texts
    """

    def __init__(
        self,
        *,
        model: HACAN,
        tokenizer: PreTrainedTokenizerBase,
        image_size: int,
        centre_crop: bool,
        max_text_len: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.model = model.eval().to(device)
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.centre_crop = centre_crop
        self.max_text_len = max_text_len
        self.device = torch.device(device)

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> Self:
        """From a folder that `scripts/export.py` wrote, or from a checkpoint of a training."""
        checkpoint = open_checkpoint(path)
        if checkpoint.description is None:
            raise UserError(
                f"{path} is a {checkpoint.kind} checkpoint, which holds no tokenizer and no settings: evaluate it with "
                "run.py, or give a checkpoint of a training here, or a folder that scripts/export.py wrote"
            )
        settings = checkpoint.description["settings"]
        return cls(
            model=checkpoint.model,
            tokenizer=tokenizer_from_description(checkpoint.description),
            image_size=settings["image_size"],
            centre_crop=uses_centre_crop(settings["datasets"]),
            max_text_len=settings["max_text_len"],
            device=device,
        )

    @torch.inference_mode()
    def encode_images(self, pictures: Sequence[str | Path | np.ndarray], *, batch_size: int = 32) -> EncodedImages:
        """N picture files or uint8 [H, W, 3] RGB arrays -> features of N images."""
        _must_be_several(pictures, "pictures")
        parts = []
        for start in range(0, len(pictures), batch_size):
            pixels = torch.stack([self._pixels(picture) for picture in pictures[start : start + batch_size]])
            parts.append(self.model.encode_images(pixels.to(self.device)))
        return EncodedImages(*(torch.cat(values) for values in zip(*parts, strict=True)))

    @torch.inference_mode()
    def encode_texts(self, captions: Sequence[str], *, batch_size: int = 256) -> EncodedTexts:
        """M captions -> features of M texts, padded to the longest; those over `max_text_len` tokens are cut."""
        _must_be_several(captions, "captions")
        parts = [self._encode_some(list(captions[at : at + batch_size])) for at in range(0, len(captions), batch_size)]
        width = max(part.mask.shape[1] for part in parts)
        return EncodedTexts(
            high=torch.cat([pad(part.high, (0, 0, 0, width - part.high.shape[1])) for part in parts]),
            mid=torch.cat([pad(part.mid, (0, 0, 0, width - part.mid.shape[1])) for part in parts]),
            mask=torch.cat([pad(part.mask, (0, width - part.mask.shape[1])) for part in parts]),
            pooled=torch.cat([part.pooled for part in parts]),
        )

    @torch.inference_mode()
    def score(self, images: EncodedImages, texts: EncodedTexts) -> Tensor:
        """Fine similarity of all pairs, [N, M] float32."""
        return self.model.score(images, texts)

    @torch.inference_mode()
    def global_similarity(self, images: EncodedImages, texts: EncodedTexts) -> Tensor:
        """Cosine of the global embeddings, [N, M] float32: coarse, and cheap over a large gallery."""
        return self.model.global_similarity(images, texts)

    def _pixels(self, picture: str | Path | np.ndarray) -> Tensor:
        array = picture if isinstance(picture, np.ndarray) else read_image(picture)
        return preprocess_image(array, image_size=self.image_size, centre_crop=self.centre_crop)

    def _encode_some(self, captions: list[str]) -> EncodedTexts:
        # a lone half of an emoji, which JSON can hold, is no text to the tokenizer
        whole = [caption.encode("utf-8", "replace").decode("utf-8") for caption in captions]
        encoded = self.tokenizer(
            whole, truncation=True, max_length=self.max_text_len, padding=True, return_tensors="pt"
        ).to(self.device)
        return self.model.encode_texts(encoded["input_ids"], encoded["attention_mask"].bool())


def _must_be_several(items: Sequence, name: str) -> None:
    if isinstance(items, (str, Path, np.ndarray)) or len(items) == 0:
        found = "an empty list" if not isinstance(items, (str, Path, np.ndarray)) else f"one {type(items).__name__}"
        raise ValueError(f"{name} is {found}, expected a list of at least one: [...]")
    kinds = (str,) if name == "captions" else (str, Path, np.ndarray)
    for place, item in enumerate(items):
        if not isinstance(item, kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{name}[{place}] is {item!r:.40} of type {type(item).__name__}, expected {expected}")
