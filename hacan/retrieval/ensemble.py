"""Models as the evaluator calls them, and their scores over a gallery; several models are an ensemble (METHOD 5)."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hacan.alignment import STREAMS
from hacan.errors import UserError
from hacan.models.hacan import HACAN, describe_non_finite
from hacan.retrieval.provenance import hash_of_tensors
from hacan.types import EncodedImages, EncodedTexts, Gallery, PackedTexts

LRG_STREAMS = ("lrg_high", "lrg_mid")
KSF_STREAMS = ("ksf",)
AUTOCAST_TYPES = {"32-true": None, "16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


class Scorer(NamedTuple):
    """The functions of one model that an evaluation calls, and what identifies the model."""

    name: str  # the checkpoint's file
    checkpoint_hash: str  # of all weights
    alignment: str  # registered name of the form
    direction: str  # i2t, t2i or both; "" for a form without a direction
    precision: str  # of the encoders
    device: torch.device
    encode_images: Callable[[Tensor], EncodedImages]  # pixels [B, 3, H, W]
    encode_texts: Callable[[Tensor, Tensor], EncodedTexts]  # token ids, mask [B, W]
    score: Callable[[EncodedImages, PackedTexts, tuple[str, ...]], Tensor]  # all pairs, sum of the streams: [n, M]
    score_pairs: Callable[[EncodedImages, PackedTexts, Tensor, tuple[str, ...]], Tensor]  # pairs [P, 2] -> [P]
    architecture_hash: str = ""  # see provenance.architecture_hash
    settings: Mapping[str, Any] = MappingProxyType({})  # plain values for the provenance record


def build_scorer(
    model: HACAN,
    *,
    name: str,
    device: torch.device,
    precision: str = "32-true",
    architecture_hash: str = "",
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Scorer:
    """Return the scorer of a HACAN, which is set to evaluation mode and moved to `device`.

    precision: "32-true", or "16-mixed" or "bf16-mixed" for encoders under autocast. The alignment is always float32.
    """
    if precision not in AUTOCAST_TYPES:
        raise ValueError(f"precision is {precision!r}; choose from {', '.join(AUTOCAST_TYPES)}")
    model = model.eval().to(device)

    def autocast() -> AbstractContextManager:
        dtype = AUTOCAST_TYPES[precision]
        return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)

    @torch.no_grad()
    def encode_images(pixels: Tensor) -> EncodedImages:
        with autocast():
            return model.encode_images(pixels.to(device, non_blocking=True))

    @torch.no_grad()
    def encode_texts(token_ids: Tensor, token_mask: Tensor) -> EncodedTexts:
        with autocast():
            return model.encode_texts(token_ids.to(device, non_blocking=True), token_mask.to(device, non_blocking=True))

    @torch.no_grad()
    def score(images: EncodedImages, texts: PackedTexts, streams: tuple[str, ...]) -> Tensor:
        return checked(model.alignment(images, texts, streams=streams), images, texts)

    @torch.no_grad()
    def score_pairs(images: EncodedImages, texts: PackedTexts, pairs: Tensor, streams: tuple[str, ...]) -> Tensor:
        return checked(model.alignment.pairs(images, texts, pairs, streams=streams), images, texts, pairs)

    def checked(scores: Tensor, images: EncodedImages, texts: PackedTexts, pairs: Tensor | None = None) -> Tensor:
        if not bool(scores.isfinite().all()):
            raise UserError(describe_non_finite(model.alignment, images, texts, pairs))
        return scores

    return Scorer(
        name=name,
        checkpoint_hash=hash_of_tensors(model.state_dict()),
        alignment=model.alignment.name,
        direction=model.alignment.hyperparameters.get("direction", ""),
        precision=precision,
        device=device,
        encode_images=encode_images,
        encode_texts=encode_texts,
        score=score,
        score_pairs=score_pairs,
        architecture_hash=architecture_hash,
        settings=settings,
    )


class GalleryScores:
    """Coarse and fine scores over a gallery, the mean over the scorers; rows are slices of the gallery's images.

    coarse_kind: `global`, the cosine of the global embeddings, or `release`, 0.2 * global + 0.8 * KSF; with `release`
    the fine score is the coarse score plus the two LRG terms (METHOD section 6). Features stay where the gallery has
    them; the images of a call are moved to the scorer's device, the texts once.
    """

    def __init__(self, scorers: Sequence[Scorer], galleries: Sequence[Gallery], *, coarse_kind: str) -> None:
        if coarse_kind not in ("global", "release"):
            raise ValueError(f"coarse_kind is {coarse_kind!r}; choose global or release")
        self._release = coarse_kind == "release"
        self._models = [
            (scorer, gallery.images, _texts_on(scorer.device, gallery.texts))
            for scorer, gallery in zip(scorers, galleries, strict=True)
        ]
        self.image_of_text = galleries[0].image_of_text
        self.images = len(galleries[0].images.high)

    @property
    def adds_coarse(self) -> bool:
        """Whether the fine score of a pair is its coarse score plus `pairs`."""
        return self._release

    def coarse(self, rows: slice) -> Tensor:
        """Return the coarse scores of some images and all texts, [n, M]."""
        return _mean([self._coarse(*model, rows) for model in self._models])

    def fine(self, rows: slice) -> Tensor:
        """Return the complete fine scores of some images and all texts, [n, M]."""
        if self._release:
            return _mean([self._coarse(*model, rows) + self._fine(*model, rows, LRG_STREAMS) for model in self._models])
        return _mean([self._fine(*model, rows, STREAMS) for model in self._models])

    def pairs(self, pairs: Tensor) -> Tensor:
        """Return the scores [P] of listed pairs [P, 2] (image, text) of neighbouring images; see `adds_coarse`."""
        first = int(pairs[:, 0].min())
        rows = slice(first, int(pairs[:, 0].max()) + 1)
        local = torch.stack([pairs[:, 0] - first, pairs[:, 1]], 1)
        streams = LRG_STREAMS if self._release else STREAMS
        return _mean(
            [
                scorer.score_pairs(_images_on(scorer.device, images, rows), texts, local, streams)
                for scorer, images, texts in self._models
            ]
        )

    def _coarse(self, scorer: Scorer, images: EncodedImages, texts: PackedTexts, rows: slice) -> Tensor:
        cosine = images.pooled[rows].to(scorer.device) @ texts.pooled.T
        return 0.2 * cosine + 0.8 * self._fine(scorer, images, texts, rows, KSF_STREAMS) if self._release else cosine

    @staticmethod
    def _fine(
        scorer: Scorer, images: EncodedImages, texts: PackedTexts, rows: slice, streams: tuple[str, ...]
    ) -> Tensor:
        return scorer.score(_images_on(scorer.device, images, rows), texts, streams)


def _texts_on(device: torch.device, texts: PackedTexts) -> PackedTexts:
    return PackedTexts(texts.high.to(device), texts.mid.to(device), texts.offsets, texts.pooled.to(device))


def _images_on(device: torch.device, images: EncodedImages, rows: slice) -> EncodedImages:
    return EncodedImages(*(values[rows].to(device, non_blocking=True) for values in images))


def _mean(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).mean(0)
