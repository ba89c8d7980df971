"""What every call of an alignment begins with: its arguments checked, its captions at hand, its blocks planned."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hacan.alignment.bank import TokenBank
from hacan.alignment.packing import CaptionOrder, pack_texts
from hacan.alignment.plan import Plan, derived_rows, make_plan
from hacan.alignment.scratch import Scratch, scratch_of_thread
from hacan.alignment.sides import STREAMS, Tokens
from hacan.types import EncodedImages, EncodedTexts, PackedTexts


class Form(Protocol):
    """What a call asks of an alignment (`FineAlignment` says what each is)."""

    drop_ends: bool
    score_memory: int
    derive_tokens: Callable[..., Tokens]


class Call(NamedTuple):
    """What is there for one call."""

    plan: Plan
    bank: TokenBank
    scratch: Scratch
    gradient: bool  # whether something asks for gradients


@contextmanager
def call_on(
    form: Form,
    images: EncodedImages,
    texts: EncodedTexts | PackedTexts | TokenBank,
    streams: tuple[str, ...],
    pairs: Tensor | None = None,
) -> Iterator[Call]:
    """One call of `form`: all pairs, or those listed [P, 2]. Inside, gradients are on if something asks for them."""
    unknown = [stream for stream in streams if stream not in STREAMS]
    if unknown or not streams:
        raise ValueError(f"streams={streams!r}: expected some of {', '.join(STREAMS)}")
    prepared = texts if isinstance(texts, TokenBank) else None
    texts = prepared.texts if prepared else _packed(texts)
    _check_widths(images, texts)
    if pairs is not None:
        _check_pairs(pairs, len(images.high), len(texts.offsets) - 1)
    device = images.high.device
    dtype = torch.promote_types(torch.promote_types(images.high.dtype, texts.high.dtype), torch.float32)
    if prepared and (prepared.derive, prepared.device, prepared.dtype) != (form.derive_tokens, device, dtype):
        raise ValueError(
            f"texts were prepared in {prepared.dtype} on {prepared.device}, and images are {images.high.dtype} on "
            f"{device}: expected texts that this very alignment prepared, on the device of the images and of their type"
        )
    plan = make_plan(images, device, dtype, score_memory=form.score_memory)
    with _exact((*images[:2], *texts[:2])) as gradient:
        bank = prepared or _bank(form, texts, streams, device, dtype, captions=None if pairs is None else pairs[:, 1])
        yield Call(plan, bank, scratch_of_thread(device, dtype, active=not gradient), gradient)


@torch.no_grad()
def prepared_texts(form: Form, texts: EncodedTexts | PackedTexts) -> TokenBank:
    """All captions, for any stream of many calls, without gradients."""
    high, mid, *rest = _packed(texts)
    texts = PackedTexts(high.detach(), mid.detach(), *rest)
    with _exact(texts[:2]):
        return _bank(form, texts, STREAMS, high.device, torch.promote_types(high.dtype, torch.float32))


def _bank(
    form: Form,
    texts: PackedTexts,
    streams: tuple[str, ...],
    device: torch.device,
    dtype: torch.dtype,
    *,
    captions: Tensor | None = None,
) -> TokenBank:
    """A bank of these captions, which may repeat; None: of all."""
    chosen = torch.arange(len(texts.offsets) - 1) if captions is None else captions.unique()
    return TokenBank(
        texts,
        CaptionOrder(texts, chosen, drop_ends=form.drop_ends),
        form.derive_tokens,
        streams=streams,
        device=device,
        dtype=dtype,
        scratch=scratch_of_thread(device, dtype, active=not torch.is_grad_enabled()),
        rows=derived_rows(texts.high.shape[1], dtype, score_memory=form.score_memory),
    )


def _packed(texts: EncodedTexts | PackedTexts) -> PackedTexts:
    return texts if isinstance(texts, PackedTexts) else pack_texts(texts)


@contextmanager
def _exact(features: Sequence[Tensor]) -> Iterator[bool]:
    """Outside of autocast, and with gradients only if some features ask for them; yields whether."""
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in features)
    with torch.autocast(features[0].device.type, enabled=False), torch.set_grad_enabled(gradient):
        yield gradient


def _check_widths(images: EncodedImages, texts: PackedTexts) -> None:
    if len({x.shape[-1] for x in (*images[:2], *texts[:2])}) > 1:
        raise ValueError(
            f"regions are {list(images.high.shape)} and {list(images.mid.shape)}, tokens {list(texts.high.shape)} "
            f"and {list(texts.mid.shape)}: expected one width d; project them to one width first"
        )


def _check_pairs(pairs: Tensor, images: int, texts: int) -> None:
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64:
        raise ValueError(f"pairs is {list(pairs.shape)} of {pairs.dtype}, expected [P, 2] int64: (image, text)")
    if len(pairs) and (int(pairs.min()) < 0 or int(pairs[:, 0].max()) >= images or int(pairs[:, 1].max()) >= texts):
        raise ValueError(
            f"pairs name items outside of {images} images and {texts} texts; check their order: image, text"
        )
