"""HACAN: two encoders, four projections, two aggregators and the fine alignment (METHOD sections 1 and 2)."""

from typing import Self

import torch
from torch import Tensor, nn

from hacan.alignment import FineAlignment
from hacan.models.image_encoder import ImageEncoder
from hacan.models.text_encoder import TextEncoder
from hacan.types import EncodedImages, EncodedTexts, PackedTexts


class HACAN(nn.Module):
    """Images and captions to regions, tokens and global embeddings of one joint width, and their scores.

    All parts are arguments; `hacan.models.factory` builds them from settings.
    """

    def __init__(
        self,
        *,
        image_encoder: ImageEncoder,
        text_encoder: TextEncoder,
        project_image_high: nn.Linear,
        project_image_mid: nn.Linear,
        project_text_high: nn.Linear,
        project_text_mid: nn.Linear,
        aggregate_image: nn.Module,
        aggregate_text: nn.Module,
        alignment: FineAlignment,
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.project_image_high = project_image_high
        self.project_image_mid = project_image_mid
        self.project_text_high = project_text_high
        self.project_text_mid = project_text_mid
        self.aggregate_image = aggregate_image
        self.aggregate_text = aggregate_text
        self.alignment = alignment
        self.frozen = False
        self.frozen_dropout = True

    def encode_images(self, pixels: Tensor) -> EncodedImages:
        """Return the features of normalised pixels [N, 3, H, W]: regions [N, R, d] of both levels, global [N, d]."""
        if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
            raise ValueError(
                f"pixels is {list(pixels.shape)} of {pixels.dtype}, expected [N, 3, H, W] normalised floats; "
                "hacan.images.preprocessing makes them from image files"
            )
        with self._backbone_gradients():
            features = self.image_encoder(pixels)
        return self.project_images(features.high, features.mid, features.pooled)

    def project_images(self, high: Tensor, mid: Tensor, pooled: Tensor) -> EncodedImages:
        """Return the features of N images from the outputs of the image backbone, [N, R, C] twice and [N, C]."""
        return EncodedImages(
            high=self.project_image_high(high),
            mid=self.project_image_mid(mid),
            pooled=self.aggregate_image(pooled),
        )

    def encode_texts(self, token_ids: Tensor, token_mask: Tensor) -> EncodedTexts:
        """Return the features of token ids [M, W] int64 with a mask [M, W] bool (True: a real token).

        Tokens [M, W, d] of both levels, the mask, and the global embeddings [M, d].
        """
        if token_ids.ndim != 2 or token_ids.shape != token_mask.shape or token_mask.dtype != torch.bool:
            raise ValueError(
                f"token_ids is {list(token_ids.shape)} and token_mask {list(token_mask.shape)} of {token_mask.dtype}, "
                "expected [M, W] both, the mask bool: True where a token is real"
            )
        with self._backbone_gradients():
            features = self.text_encoder(token_ids, token_mask)
        return self.project_texts(features.high, features.mid, token_mask, features.pooled)

    def project_texts(self, high: Tensor, mid: Tensor, mask: Tensor, pooled: Tensor) -> EncodedTexts:
        """Return the features of M texts from the outputs of the text backbone, [M, W, C] twice, [M, W] and [M, C]."""
        return EncodedTexts(
            high=self.project_text_high(high),
            mid=self.project_text_mid(mid),
            mask=mask,
            pooled=self.aggregate_text(pooled),
        )

    def score(self, images: EncodedImages, texts: EncodedTexts | PackedTexts) -> Tensor:
        """Return the fine similarity of all pairs, [N, M] float32 (METHOD sections 2 and 3)."""
        return self.alignment(images, texts)

    def global_similarity(self, images: EncodedImages, texts: EncodedTexts | PackedTexts) -> Tensor:
        """Return the cosine of the global embeddings of all pairs, [N, M] float32 (METHOD sections 4 and 6)."""
        with torch.autocast(images.pooled.device.type, enabled=False):
            return images.pooled.float() @ texts.pooled.float().T

    @torch.no_grad()
    def region_grids(self, *, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return (rows, columns) of the mid and of the high level for images of a size in pixels."""
        weight = self.project_image_high.weight
        was_training = self.training
        self.eval()
        try:
            features = self.image_encoder(torch.zeros(1, 3, height, width, device=weight.device, dtype=weight.dtype))
        finally:
            self.train(was_training)
        return features.mid_grid, features.high_grid

    def freeze_backbones(self, frozen: bool, *, dropout: bool = True) -> None:
        """Freeze or unfreeze both encoders (METHOD section 5).

        Frozen encoders have no gradients and no graph, and BatchNorm keeps its running statistics. Dropout and
        stochastic depth stay active in training with `dropout`, as in the release.
        """
        self.frozen, self.frozen_dropout = frozen, dropout
        self.image_encoder.requires_grad_(not frozen)
        self.text_encoder.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the training mode; a frozen encoder, or with dropout only its BatchNorm, stays in evaluation mode."""
        super().train(mode)
        if mode and self.frozen:
            for module in (*self.image_encoder.modules(), *self.text_encoder.modules()):
                if isinstance(module, nn.modules.batchnorm._BatchNorm) or not self.frozen_dropout:
                    module.eval()
        return self

    def _backbone_gradients(self) -> torch.set_grad_enabled:
        """Disable gradients while the encoders are frozen."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen)


@torch.no_grad()
def describe_non_finite(
    alignment: FineAlignment, images: EncodedImages, texts: EncodedTexts | PackedTexts, pairs: Tensor | None = None
) -> str:
    """Return which streams have fine scores that are not finite, and whether the features are finite."""
    streams = []
    for stream in alignment.streams:
        one = {"streams": (stream,)}
        scores = alignment(images, texts, **one) if pairs is None else alignment.pairs(images, texts, pairs, **one)
        streams += [] if scores.isfinite().all() else [stream]
    real = texts.mask if isinstance(texts, EncodedTexts) else slice(None)
    features = (images.high, images.mid, texts.high[real], texts.mid[real])
    finite = all(bool(values.isfinite().all()) for values in features)
    why = "although all features are" if finite else "and neither are the features of the encoders"
    return f"alignment={alignment.name}: scores of {', '.join(streams) or 'their sum'} are not finite, {why}"
