"""What the evaluator asks of a model, as callables: it never reaches into one. Several members are an ensemble."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hacan.errors import UserError
from hacan.models.hacan import describe_non_finite
from hacan.retrieval.features import hash_of_tensors
from hacan.types import EncodedImages, EncodedTexts, Gallery, PackedTexts

LRG_STREAMS = ("lrg_high", "lrg_mid")
KSF_STREAMS = ("ksf",)
ALL_STREAMS = KSF_STREAMS + LRG_STREAMS


class Member(NamedTuple):
    """One model of an evaluation."""

    name: str  # as people know it: the checkpoint's file
    checkpoint_hash: str  # over all weights
    alignment: str  # the registered name of its form
    direction: str  # i2t, t2i or both; "" of a form without a direction
    precision: str  # arithmetic of the encoders
    device: torch.device
    encode_images: Callable[[Tensor], EncodedImages]  # pixels [B, 3, H, W]
    encode_texts: Callable[[Tensor, Tensor], EncodedTexts]  # token ids, mask [B, W]
    score: Callable[[EncodedImages, PackedTexts, tuple[str, ...]], Tensor]  # all pairs, summed streams: [n, M]
    score_pairs: Callable[[EncodedImages, PackedTexts, Tensor, tuple[str, ...]], Tensor]  # pairs [P, 2] -> [P]
    form: str = ""  # hash of what the encoders are beside their weights: layers, levels, activations
    settings: Mapping[str, Any] = MappingProxyType({})  # plain values that say what the model is, for the receipt


def member_of(
    model: nn.Module,
    *,
    name: str,
    device: torch.device,
    precision: str = "32-true",
    form: str = "",
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Member:
    """A HACAN as a member. It is put into evaluation mode and onto `device`.

    precision: "32-true", or "16-mixed" and "bf16-mixed" for encoders under autocast; alignment is always float32.
    """
    types = {"32-true": None, "16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
    if precision not in types:
        raise ValueError(f"precision is {precision!r}; choose from {', '.join(types)}")
    model = model.eval().to(device)

    def arithmetic() -> AbstractContextManager:
        dtype = types[precision]
        return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)

    @torch.no_grad()
    def encode_images(pixels: Tensor) -> EncodedImages:
        with arithmetic():
            return model.encode_images(pixels.to(device, non_blocking=True))

    @torch.no_grad()
    def encode_texts(token_ids: Tensor, token_mask: Tensor) -> EncodedTexts:
        with arithmetic():
            return model.encode_texts(token_ids.to(device, non_blocking=True), token_mask.to(device, non_blocking=True))

    @torch.no_grad()
    def score(images: EncodedImages, texts: PackedTexts, streams: tuple[str, ...]) -> Tensor:
        scores = model.alignment(images, texts, streams=streams)
        _check_finite(model, scores, images, texts)
        return scores

    @torch.no_grad()
    def score_pairs(images: EncodedImages, texts: PackedTexts, pairs: Tensor, streams: tuple[str, ...]) -> Tensor:
        scores = model.alignment.pairs(images, texts, pairs, streams=streams)
        _check_finite(model, scores, images, texts, pairs)
        return scores

    return Member(
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
        form=form,
        settings=settings,
    )


def _check_finite(
    model: nn.Module, scores: Tensor, images: EncodedImages, texts: PackedTexts, pairs: Tensor | None = None
) -> None:
    if not bool(scores.isfinite().all()):
        raise UserError(describe_non_finite(model.alignment, images, texts, pairs))


class MemberScores:
    """Scores of a member over its gallery, by rows of the gallery: what a HierarchicalRetriever calls.

    The bank stays where it is; the images of a call travel to the member's device, the texts once.
    """

    def __init__(self, member: Member, gallery: Gallery) -> None:
        self._member, self._images = member, gallery.images
        high, mid, offsets, pooled = gallery.texts
        self._texts = PackedTexts(high.to(member.device), mid.to(member.device), offsets, pooled.to(member.device))

    def global_similarity(self, rows: slice) -> Tensor:
        """Cosine of the global embeddings of some images and all texts, [n, M] float32."""
        return self._images.pooled[rows].to(self._member.device) @ self._texts.pooled.T

    def release_coarse(self, rows: slice) -> Tensor:
        """The coarse score of the first public code, [n, M]: 0.2 * global + 0.8 * KSF (METHOD section 6)."""
        return 0.2 * self.global_similarity(rows) + 0.8 * self.all_fine(rows, KSF_STREAMS)

    def all_fine(self, rows: slice, streams: tuple[str, ...] = ALL_STREAMS) -> Tensor:
        """Fine scores of some images against all texts, [n, M]."""
        return self._member.score(self._some_images(rows), self._texts, streams)

    def pairs(self, pairs: Tensor, streams: tuple[str, ...] = ALL_STREAMS) -> Tensor:
        """Fine scores [P] of listed pairs [P, 2] (image, text) of neighbouring images."""
        first = int(pairs[:, 0].min())
        images = self._some_images(slice(first, int(pairs[:, 0].max()) + 1))
        local = torch.stack([pairs[:, 0] - first, pairs[:, 1]], 1)
        return self._member.score_pairs(images, self._texts, local, streams)

    def _some_images(self, rows: slice) -> EncodedImages:
        return EncodedImages(*(values[rows].to(self._member.device, non_blocking=True) for values in self._images))


class EnsembleScores:
    """The mean of the members' scores, fine and coarse (METHOD section 5)."""

    def __init__(self, members: Sequence[MemberScores]) -> None:
        self._members = members

    def coarse(self, kind: str) -> Callable[[slice], Tensor]:
        """From rows to coarse scores [n, M] of kind `global` or `release`."""
        if kind not in ("global", "release"):
            raise ValueError(f"coarse is {kind!r}; choose global or release")
        parts = [m.global_similarity if kind == "global" else m.release_coarse for m in self._members]
        return lambda rows: _mean([part(rows) for part in parts])

    def pairs(self, kind: str) -> Callable[[Tensor], Tensor]:
        """From pairs [P, 2] to fine scores [P]; of kind `release` without KSF, which its coarse score has counted."""
        if kind == "release":
            return lambda pairs: _mean([m.pairs(pairs, LRG_STREAMS) for m in self._members])
        return lambda pairs: _mean([m.pairs(pairs) for m in self._members])

    def all_fine_of(self, kind: str) -> Callable[[slice], Tensor]:
        """From rows to complete fine scores [n, M]; of kind `release` with its coarse score in place of KSF."""
        if kind == "release":
            return lambda rows: _mean([m.release_coarse(rows) + m.all_fine(rows, LRG_STREAMS) for m in self._members])
        return lambda rows: _mean([member.all_fine(rows) for member in self._members])


def _mean(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).mean(0)
