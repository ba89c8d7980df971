"""Checkpoints: reading any accepted kind, recognised by its keys, and saying what became of its tensors.

Ours is a Lightning checkpoint whose key `hacan` describes the model (`description.py`); others are the public
release's and plain weights (`release.py`).
"""

import dataclasses
import logging
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from hacan.checkpoints.description import (
    CONFIG_FILE,
    DESCRIPTION,
    describe_model,
    model_from_description,
    read_exported,
    tokenizer_from_description,
)
from hacan.checkpoints.release import RELEASE_DEFAULTS, is_release, name_of_release, release_settings
from hacan.checkpoints.saving import atomic_save, file_hash
from hacan.errors import UserError
from hacan.models.factory import build_model, model_settings
from hacan.models.hacan import HACAN
from hacan.models.text_encoder import Vocabulary, bert_sizes, config_of_state
from hacan.models.weights import BrokenFileError, load_exactly, read_file, tensors_of
from hacan.settings import ModelSettings

__all__ = [
    "Checkpoint",
    "atomic_save",
    "describe_model",
    "file_hash",
    "load_checkpoint",
    "model_from_description",
    "open_checkpoint",
    "read_checkpoint",
    "tokenizer_from_description",
]

log = logging.getLogger(__name__)

OUR_MODULES = ("image_encoder.", "text_encoder.", "project_", "aggregate_", "alignment.")


class Checkpoint(NamedTuple):
    """A checkpoint that was read, and what became of its tensors. None of ours is ever missing: that is an error."""

    model: HACAN
    kind: str  # "hacan", "release" or "plain"
    settings: ModelSettings  # those that the model was built with
    description: dict[str, Any] | None  # ours: what `describe_model` wrote
    mapped: dict[str, str]  # its name of a tensor -> ours
    ignored: list[str]  # its names without a use here


def load_checkpoint(path: str | Path, *, trust: bool = False, settings: ModelSettings | None = None) -> HACAN:
    """The model of any checkpoint that is accepted, in evaluation mode; see `open_checkpoint`."""
    return open_checkpoint(path, trust=trust, settings=settings).model


def open_checkpoint(
    path: str | Path,
    *,
    trust: bool = False,
    settings: ModelSettings | None = None,
    image_size: int = 224,
    score_memory: int = 256,
    load_tokenizer: Callable[[], Vocabulary] | None = None,
) -> Checkpoint:
    """Read a checkpoint of any accepted kind, recognised by its keys; the model comes in evaluation mode.

    - ours, or a folder that `scripts/export.py` wrote: the model is rebuilt from its own description;
    - the public release's: sizes come from its tensors, alignment, direction and activation from `settings`;
    - a plain state dict or safetensors file in our names: the architecture comes from `settings`, and of a text encoder
      that began at random the number of its padding from the tokenizer that `load_tokenizer` gives.

    What was mapped and ignored is returned and logged; a missing tensor or one of another shape is a UserError.
    """
    content = read_checkpoint(path, trust=trust)
    description = content.get(DESCRIPTION)
    tensors = tensors_of(content, source=path)
    names = {key: _our_name(key) for key in tensors}
    state = {names[key]: value for key, value in tensors.items()}
    if isinstance(description, Mapping):
        kind, model = "hacan", model_from_description(description, score_memory=score_memory)
        settings = model_settings(description["settings"])
    elif is_release(state):
        kind = "release"
        names = {key: name_of_release(name) for key, name in names.items()}
        state = {name: tensors[key] for key, name in names.items() if name}
        written = _config_inside(content)
        settings = release_settings(state, given=settings, written=written)
        _warn_of_other_ways(settings, written, source=path)
        text = {**bert_sizes(_text_tensors(state), source=path), **settings.text_encoder_args}
    elif all(any(key.startswith(module) for key in state) for module in ("image_encoder.", "text_encoder.")):
        if settings is None:
            raise UserError(
                f"{path} holds weights in our names, but not the settings that they belong to: give the config of its "
                "training, or a checkpoint (.ckpt) that a training wrote"
            )
        kind, tokenizer = "plain", load_tokenizer() if load_tokenizer is not None else None
        text = config_of_state(settings, _text_tensors(state), source=path, tokenizer=tokenizer)
    else:
        raise UserError(_unknown(path, state))
    if kind != "hacan":
        model = build_model(
            settings, image_size=image_size, score_memory=score_memory, load_weights=False, text_config=text
        )
    load_exactly(model, state, source=path)
    own = model.state_dict()
    found = Checkpoint(
        model=model.eval(),
        kind=kind,
        settings=settings,
        description=dict(description) if kind == "hacan" else None,
        mapped={key: name for key, name in names.items() if name in own},
        ignored=[key for key, name in names.items() if name not in own],
    )
    log.info(
        "%s: %s checkpoint; %d tensors mapped%s, none missing, %d ignored%s",
        path,
        kind,
        len(found.mapped),
        _renamed(found.mapped),
        len(found.ignored),
        f" ({', '.join(found.ignored)})" if found.ignored else "",
    )
    return found


def read_checkpoint(path: str | Path, *, trust: bool = False) -> dict[str, Any]:
    """What a checkpoint file or an exported folder holds; for a broken file, its newest whole neighbour is offered."""
    path = Path(path)
    if path.is_dir():
        return read_exported(path)
    try:
        content = read_file(path, trust=trust)
    except BrokenFileError as error:
        others = [other for other in path.parent.glob(f"*{path.suffix}") if other != path and zipfile.is_zipfile(other)]
        newest = max(others, key=lambda other: other.stat().st_mtime, default=None)
        remedy = f"the newest whole one beside it is {newest}" if newest else "there is no whole one beside it"
        raise BrokenFileError(f"{error}; {remedy}") from error
    exported = path.suffix == ".safetensors" and (path.parent / CONFIG_FILE).is_file()
    return read_exported(path.parent) if exported else content


def _our_name(key: str) -> str:
    """A key of a LightningModule's state dict, whose model is its attribute `model`, as the model's own."""
    name = key.removeprefix("model.")
    return name if name.startswith(OUR_MODULES) else key


def _text_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the text backbone, as it names them itself."""
    prefix = "text_encoder.backbone."
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _renamed(mapped: Mapping[str, str]) -> str:
    """Which module's tensors went to which of ours, and how many; nothing where they keep their names."""
    counts = Counter(
        (theirs.split(".")[0], ours.split(".")[0])
        for theirs, ours in mapped.items()
        if theirs not in (ours, f"model.{ours}")
    )
    groups = ", ".join(f"{theirs}.* -> {ours}.* {count}" for (theirs, ours), count in counts.items())
    return f" ({groups})" if groups else ""


def _config_inside(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The flat config that a Lightning checkpoint keeps among its hyper-parameters, or nothing."""
    kept = content.get("hyper_parameters")
    kept = kept.get("config", kept) if isinstance(kept, Mapping) else None
    return kept if isinstance(kept, Mapping) else {}


def _warn_of_other_ways(settings: ModelSettings, written: Mapping[str, Any], *, source: str | Path) -> None:
    """Say where this run scores otherwise than the release's own config has it: the config of this run decides."""
    now = dataclasses.asdict(settings)
    others = [
        f"{key}={written[key]!r}, here {now[key]!r}"
        for key in RELEASE_DEFAULTS
        if written.get(key, now[key]) != now[key]
    ]
    if others:
        log.warning("%s was written with %s: the config of this run holds", source, "; ".join(others))


def _unknown(path: str | Path, state: Mapping[str, Tensor]) -> str:
    first = ", ".join(list(state)[:3])
    if any(key.endswith("embeddings.word_embeddings.weight") for key in state):
        return f"{path} holds the weights of a text encoder alone ({first}, ...): give it as text_weights=PATH"
    if any(key in state for key in ("stem.0.weight", "downsample_layers.0.0.weight", "conv_stem.weight", "cls_token")):
        return f"{path} holds the weights of an image encoder alone ({first}, ...): give it as image_weights=PATH"
    return (
        f"{path} is no checkpoint of a kind known here: its keys are {first}, ...; expected ours (image_encoder.*, "
        "text_encoder.*) or the public release's (convnexts.*, text_transformer.*)"
    )
