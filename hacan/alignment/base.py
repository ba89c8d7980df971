"""The contract of a fine alignment, two equations on dense tensors, and the registry of forms."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hacan.alignment.scoring import STREAMS, Texts, score_all_pairs, score_listed_pairs
from hacan.errors import UserError
from hacan.types import EncodedImages

DIRECTIONS = ("i2t", "t2i", "both")
FORMS: dict[str, type["FineAlignment"]] = {}  # every registered form by its name


class FineAlignment(nn.Module):
    """fine(i, j) = KSF(V_h, T_h) + LRG(V_h, T_m) + LRG(V_m, T_h)  (METHOD sections 2 and 3).

    The equations take regions [*, N, R, d], tokens [*, M, L, d] and mask [*, M, L] (bool, True: a real token), and
    return scores [*, N, M]; `*` are optional batch dimensions, as in `torch.matmul`. Features are float32 or float64.
    Padding tokens are zeros, and every caption has at least one real token.

    The keyword arguments of a form's constructor are its hyper-parameters. Each is an attribute of the same name and a
    config key. `score_memory` bounds the working set, in MiB beyond features and scores.
    """

    name: ClassVar[str] = ""  # set by `register`
    attention_units: ClassVar[Mapping[str, str]] = dict.fromkeys(STREAMS, "attention")  # unit of the colour scale

    def __init__(self, *, score_memory: float = 256) -> None:
        super().__init__()
        if score_memory <= 0:
            raise ValueError(f"score_memory={score_memory!r}: expected a number of MiB above 0")
        self.score_memory = score_memory
        self.streams: tuple[str, ...] = STREAMS  # terms of the sum; none: the cosine of the global embeddings

    def key_semantic_filter(self, regions: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """KSF of V_h and T_h: [*, N, R, d], [*, M, L, d], [*, M, L] -> [*, N, M]."""
        raise NotImplementedError(f"{type(self).__name__} defines no key_semantic_filter")

    def local_relationship_guidance(self, regions: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """LRG of V_h and T_m, and of V_m and T_h: [*, N, R, d], [*, M, L, d], [*, M, L] -> [*, N, M]."""
        raise NotImplementedError(f"{type(self).__name__} defines no local_relationship_guidance")

    def attention(self, regions: Tensor, tokens: Tensor, mask: Tensor, stream: str) -> Tensor:
        """Optional, for heatmaps: attention of `stream`, [*, N, M, L, R]; NaN for excluded tokens."""
        raise NotImplementedError

    @property
    def has_attention(self) -> bool:
        """Whether this form defines `attention`."""
        return type(self).attention is not FineAlignment.attention

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The constructor's keyword arguments and their values, for settings and provenance."""
        return {key: getattr(self, key) for key in hyperparameters_of(type(self))}

    def forward(self, images: EncodedImages, texts: Texts, *, streams: tuple[str, ...] = STREAMS) -> Tensor:
        """Return the fine similarity of all pairs, [N, M] in at least float32; 0 for a caption without tokens.

        streams: terms of the sum to compute; those that `self.streams` does not have are left out.
        """
        if not self.streams:
            return images.pooled.float() @ texts.pooled.float().T
        return score_all_pairs(self, images, texts, self._used(streams))

    def pairs(
        self, images: EncodedImages, texts: Texts, pairs: Tensor, *, streams: tuple[str, ...] = STREAMS
    ) -> Tensor:
        """Return the fine similarity [P] of listed `pairs` [P, 2] int64 (image, text), in any order."""
        if not self.streams:
            return (images.pooled[pairs[:, 0]].float() * texts.pooled[pairs[:, 1]].float()).sum(-1)
        return score_listed_pairs(self, images, texts, pairs, self._used(streams))

    def _used(self, streams: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(stream for stream in streams if stream in self.streams or stream not in STREAMS)


def register(name: str) -> Callable[[type[FineAlignment]], type[FineAlignment]]:
    """Class decorator that registers a form as `alignment=NAME`."""

    def add(form: type[FineAlignment]) -> type[FineAlignment]:
        known = FORMS.get(name, form)
        if (known.__module__, known.__qualname__) != (form.__module__, form.__qualname__):
            raise ValueError(f"{known.__module__}.{known.__qualname__} is registered as {name!r}: choose another name")
        form.name, FORMS[name] = name, form
        return form

    return add


def form_of(name: str) -> type[FineAlignment]:
    """Return the form registered as `name`; raise `UserError` with the known names if there is none."""
    if name not in FORMS:
        raise UserError(f"alignment={name!r}: expected one of {', '.join(FORMS)}")
    return FORMS[name]


def hyperparameters_of(form: type[FineAlignment]) -> dict[str, Any]:
    """Return a form's hyper-parameters, its constructor's arguments, and their defaults (`Parameter.empty`: none)."""
    found: dict[str, inspect.Parameter] = {}
    for parent in form.__mro__[: form.__mro__.index(FineAlignment)]:
        parameters = inspect.signature(parent).parameters
        found = dict(parameters) | found
        if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters.values()):
            break  # otherwise the rest is passed to the parent
    named = {k: v for k, v in found.items() if v.kind not in (v.VAR_POSITIONAL, v.VAR_KEYWORD)}
    return {k: v.default for k, v in named.items() if k != "score_memory"}


def build_alignment(name: str, values: Mapping[str, Any], *, score_memory: float = 256) -> FineAlignment:
    """Return the form `name` with its hyper-parameters from `values`; other keys are ignored."""
    form = form_of(name)
    for key, default in hyperparameters_of(form).items():
        if key not in values and default is inspect.Parameter.empty:
            raise UserError(f"alignment={name} needs the config key {key}: add it to config.py and settings.py")
    if values.get("ksf", "focal") != "focal" and "ksf" not in hyperparameters_of(form):
        raise UserError(f"ksf={values['ksf']}: alignment={name} has only its own Key Semantic Filter; use ksf=focal")
    built = form(**{key: values[key] for key in hyperparameters_of(form) if key in values})
    built.score_memory = score_memory
    built.streams = tuple(values.get("streams", STREAMS))
    if lost := [key for key in hyperparameters_of(form) if not hasattr(built, key)]:
        raise UserError(f"alignment={name}: {form.__name__} does not keep its argument {lost[0]} as self.{lost[0]}")
    return built


def masked_mean(values: Tensor, mask: Tensor | None, dim: int, *, keepdim: bool = False) -> Tensor:
    """Return the mean over `dim` of the entries where `mask` (broadcast to `values`) is True; None: of all."""
    if mask is None:
        return values.mean(dim, keepdim=keepdim)
    total = values.masked_fill(~mask, 0).sum(dim, keepdim=keepdim)
    return total / mask.sum(dim, keepdim=keepdim)


def inverse_norm(vectors: Tensor) -> Tensor:
    """Return 1 / max(||x||, 1e-8) over the last dimension; its gradient at 0 is 0."""
    return torch.linalg.vector_norm(vectors, dim=-1).clamp_min(1e-8).reciprocal()


def all_dots(sources: Tensor, queries: Tensor) -> Tensor:
    """Return the dot products of sources [*, B, s, d] with queries [*, A, q, d]: [*, B, s, A, q]."""
    dots = sources.flatten(-3, -2) @ queries.flatten(-3, -2).mT
    return dots.unflatten(-1, queries.shape[-3:-1]).unflatten(-3, sources.shape[-3:-1])
