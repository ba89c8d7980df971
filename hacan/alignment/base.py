"""The contract of a fine alignment, and the registry of forms.

A form subclasses `FineAlignment`, states its two equations on dense tensors, and registers under a name:

    @register("mine")
    class MyAlignment(FineAlignment): ...

Blocks, memory, listed pairs and recomputation in the backward pass are in `scoring.py`; a form knows nothing of them.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hacan.alignment.scoring import STREAMS, score_all_pairs, score_listed_pairs
from hacan.errors import UserError
from hacan.types import EncodedImages, EncodedTexts, PackedTexts

DIRECTIONS = ("i2t", "t2i", "both")

FORMS: dict[str, type["FineAlignment"]] = {}  # every registered form by its name


class FineAlignment(nn.Module):
    """fine(i, j) = KSF(V_h, T_h) + LRG(V_h, T_m) + LRG(V_m, T_h)  (METHOD sections 2 and 3).

    The equations take regions [*, N, R, d], tokens [*, M, L, d] and mask [*, M, L] (bool, True: a real token), and give
    scores [*, N, M]; `*` are optional batch dimensions, as in `torch.matmul`. Features are float32 or float64. Tokens
    that are padding hold zeros, and every caption has at least one real token.

    The keyword arguments of a form's constructor, `score_memory` aside, are its hyper-parameters. Each is kept as an
    attribute of the same name, and has a config key of that name. `score_memory` is the working set in MiB beyond
    features and scores; scores do not depend on it.
    """

    name: ClassVar[str] = ""  # set by `register`
    attention_units: ClassVar[Mapping[str, str]] = dict.fromkeys(STREAMS, "attention")  # what a heatmap's scale shows

    def __init__(self, *, score_memory: float = 256) -> None:
        super().__init__()
        if score_memory <= 0:
            raise ValueError(f"score_memory={score_memory!r}: expected a number of MiB above 0")
        self.score_memory = score_memory

    def key_semantic_filter(self, regions: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """KSF of V_h and T_h: [*, N, R, d], [*, M, L, d], [*, M, L] -> [*, N, M]."""
        raise NotImplementedError

    def local_relationship_guidance(self, regions: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """LRG of V_h and T_m, and of V_m and T_h: [*, N, R, d], [*, M, L, d], [*, M, L] -> [*, N, M]."""
        raise NotImplementedError

    def attention(self, regions: Tensor, tokens: Tensor, mask: Tensor, stream: str) -> Tensor:
        """Optional, for heatmaps: what `stream` looks at, [*, N, M, L, R]; NaN for tokens that take no part."""
        raise NotImplementedError

    @property
    def has_attention(self) -> bool:
        """Whether this form defines `attention`."""
        return type(self).attention is not FineAlignment.attention

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The constructor's keyword arguments and their present values, for settings and provenance."""
        return {key: getattr(self, key) for key in hyperparameters_of(type(self))}

    def equation(self, stream: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The equation of a stream."""
        return self.key_semantic_filter if stream == "ksf" else self.local_relationship_guidance

    def forward(
        self, images: EncodedImages, texts: EncodedTexts | PackedTexts, *, streams: tuple[str, ...] = STREAMS
    ) -> Tensor:
        """Fine similarity of all pairs, [N, M] float32 (float64 for float64 features), the sum of `streams`.

        A caption without tokens scores 0.
        """
        return score_all_pairs(self, images, texts, streams)

    def pairs(
        self,
        images: EncodedImages,
        texts: EncodedTexts | PackedTexts,
        pairs: Tensor,
        *,
        streams: tuple[str, ...] = STREAMS,
    ) -> Tensor:
        """Fine similarity of listed pairs: `pairs` [P, 2] int64 (image, text) in any order -> scores [P]."""
        return score_listed_pairs(self, images, texts, pairs, streams)

    @torch.no_grad()
    def describe_non_finite(
        self, images: EncodedImages, texts: EncodedTexts | PackedTexts, pairs: Tensor | None = None
    ) -> str:
        """Say which streams gave scores that are not finite, and whether the features are."""
        streams = []
        for stream in STREAMS:
            one = {"streams": (stream,)}
            scores = self(images, texts, **one) if pairs is None else self.pairs(images, texts, pairs, **one)
            streams += [] if scores.isfinite().all() else [stream]
        real = texts.mask if isinstance(texts, EncodedTexts) else slice(None)
        features = (images.high, images.mid, texts.high[real], texts.mid[real])
        finite = all(bool(values.isfinite().all()) for values in features)
        why = "although all features are" if finite else "and neither are the features that the encoders gave"
        return f"alignment={self.name}: scores of {', '.join(streams) or 'their sum'} are not finite, {why}"


def register(name: str) -> Callable[[type[FineAlignment]], type[FineAlignment]]:
    """Class decorator: make a form available as `alignment=NAME`."""

    def add(form: type[FineAlignment]) -> type[FineAlignment]:
        if name in FORMS and FORMS[name].__qualname__ != form.__qualname__:
            raise ValueError(f"alignment {name!r} is registered by {FORMS[name].__qualname__} already; choose a name")
        form.name = name
        FORMS[name] = form
        return form

    return add


def hyperparameters_of(form: type[FineAlignment]) -> list[str]:
    """Names of a form's hyper-parameters: the keyword arguments of its constructor."""
    return [key for key in inspect.signature(form).parameters if key != "score_memory"]


def form_of(name: str) -> type[FineAlignment]:
    """The form registered under `name`; a UserError names the others."""
    if name not in FORMS:
        raise UserError(f"alignment={name!r}: expected one of {', '.join(FORMS)}")
    return FORMS[name]


def build_alignment(name: str, values: Mapping[str, Any], *, score_memory: float = 256) -> FineAlignment:
    """The form called `name`, its hyper-parameters taken from `values`; what it does not read is ignored.

    A hyper-parameter that `values` lacks takes the constructor's default; without one, a UserError says so.
    """
    form = form_of(name)
    parameters = inspect.signature(form).parameters
    for key in hyperparameters_of(form):
        if key not in values and parameters[key].default is inspect.Parameter.empty:
            raise UserError(
                f"alignment={name}: {form.__name__} needs {key}, which is no config key; add it to config.py"
            )
    given = {key: values[key] for key in hyperparameters_of(form) if key in values}
    return form(**given, score_memory=score_memory)


def masked_mean(values: Tensor, mask: Tensor | None, dim: int, *, keepdim: bool = False) -> Tensor:
    """Mean over `dim` of the entries where `mask` (broadcast to `values`) is True; None: of all."""
    if mask is None:
        return values.mean(dim, keepdim=keepdim)
    total = values.masked_fill(~mask, 0).sum(dim, keepdim=keepdim)
    return total / mask.sum(dim, keepdim=keepdim)


def inverse_norm(vectors: Tensor) -> Tensor:
    """1 / max(||x||, 1e-8) over the last dimension. Its gradient at 0 is 0."""
    return torch.linalg.vector_norm(vectors, dim=-1).clamp_min(1e-8).reciprocal()


def all_dots(sources: Tensor, queries: Tensor) -> Tensor:
    """Dot products of sources [*, B, s, d] with queries [*, A, q, d]: [*, B, s, A, q]."""
    dots = sources.flatten(-3, -2) @ queries.flatten(-3, -2).mT
    return dots.unflatten(-1, queries.shape[-3:-1]).unflatten(-3, sources.shape[-3:-1])
