"""Models from checkpoints of any accepted format: ours, the public release's, and plain weights."""

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hacan.checkpoints.checkpoint import (
    DESCRIPTION,
    model_from_description,
    read_checkpoint,
    tokenizer_from_description,
)
from hacan.checkpoints.release import RELEASE_DEFAULTS, is_release, name_of_release, public_form, release_settings
from hacan.errors import UserError
from hacan.models.factory import build_model, model_settings
from hacan.models.hacan import HACAN
from hacan.models.text_encoder import Vocabulary, bert_sizes, check_vocabulary, config_of_state
from hacan.models.weights import check_hub, load_exactly, tensors_of
from hacan.settings import ModelSettings, Settings

log = logging.getLogger(__name__)

MODULES = ("image_encoder.", "text_encoder.", "project_", "aggregate_", "alignment.")
MODEL_DATA_KEYS = ("image_size", "max_text_len")  # data settings that a checkpoint stores with the model


class Checkpoint(NamedTuple):
    """A model from a checkpoint, and what became of the checkpoint's tensors. No tensor of the model is missing."""

    model: HACAN
    kind: str  # "hacan", "release" or "plain"
    settings: ModelSettings  # those that the model was built with
    description: dict[str, Any] | None  # for kind "hacan": what `describe_model` wrote
    mapped: dict[str, str]  # name of a tensor in the file -> name in the model
    ignored: list[str]  # names in the file that the model has no use for


def load_checkpoint(path: str | Path, *, trust: bool = False, settings: ModelSettings | None = None) -> HACAN:
    """Return the model of a checkpoint of any accepted format, in evaluation mode; see `open_checkpoint`."""
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
    """Read a checkpoint; its format is detected from its keys, and the model is in evaluation mode.

    - ours, or an exported folder: the model is rebuilt from the stored description;
    - the public release's: sizes come from the tensors; alignment, direction and activation from `settings`;
    - a plain state dict or safetensors file with our names: the architecture comes from `settings`; `load_tokenizer`
      gives the padding token of a text encoder that was trained from scratch.

    Mapped and ignored tensors are returned and logged. Raise `UserError` if a tensor is missing or has another shape.
    """
    content = read_checkpoint(path, trust=trust)
    description = content.get(DESCRIPTION)
    tensors = tensors_of(content, source=path)
    names = {key: _model_name(key) for key in tensors}
    state = {names[key]: value for key, value in tensors.items()}
    if isinstance(description, Mapping):
        kind, model = "hacan", model_from_description(description, score_memory=score_memory)
        settings = model_settings(description["settings"])
    elif is_release(state):
        kind = "release"
        names = {key: name_of_release(name) or "" for key, name in names.items()}
        state = {name: tensors[key] for key, name in names.items() if name}
        stored = _stored_config(content)
        settings = release_settings(state, given=settings, written=stored)
        _report_form(settings, stored, source=path)
        _warn_of_other_settings(settings, stored, source=path)
        text = {**bert_sizes(_text_tensors(state), source=path), **settings.text_encoder_args}
    elif all(any(key.startswith(module) for key in state) for module in ("image_encoder.", "text_encoder.")):
        if settings is None:
            raise UserError(
                f"{path} holds weights without settings: give the config of its training, or a checkpoint (.ckpt) that "
                "a training wrote"
            )
        kind, tokenizer = "plain", load_tokenizer() if load_tokenizer is not None else None
        text = config_of_state(settings, _text_tensors(state), source=path, tokenizer=tokenizer)
    else:
        raise UserError(_unknown_format(path, state))
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
        description=dict(description) if isinstance(description, Mapping) else None,
        mapped={key: name for key, name in names.items() if name in own},
        ignored=[key for key, name in names.items() if name not in own],
    )
    log.info(
        "%s: %s checkpoint; %d tensors mapped%s, none missing, %d ignored%s",
        path,
        kind,
        len(found.mapped),
        _renamed_modules(found.mapped),
        len(found.ignored),
        f" ({', '.join(found.ignored)})" if found.ignored else "",
    )
    return found


def open_models(
    settings: Settings,
    load_tokenizer: Callable[[str], PreTrainedTokenizerBase],
    *,
    typed: Collection[str] = (),
) -> tuple[list[HACAN], PreTrainedTokenizerBase, Settings]:
    """Return the models of a run (those of `checkpoint`, or a new one), their tokenizer, and the effective settings.

    A checkpoint of ours determines architecture, alignment, tokenizer, image_size and max_text_len, whatever the config
    says; raise `UserError` if one of the `typed` keys contradicts it. The members of an ensemble must agree on the last
    three, because they get the same pixels and tokens.
    """

    def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
        if name != "scenes":
            check_hub(name)
        return load_tokenizer(name)

    torch.manual_seed(settings.run.seed)  # of new weights: Sacred seeds torch only if it was imported before
    if not settings.run.checkpoint:
        new = settings.model
        towers = ((new.image_encoder, new.image_weights), (new.text_encoder, new.text_weights))
        check_hub(*(name for name, weights in towers if weights == "pretrained"))
        tokenizer = tokenizer_of(settings.data.tokenizer)
        built = build_model(
            new,
            image_size=settings.data.image_size,
            score_memory=settings.eval.score_memory,
            tokenizer=tokenizer,
            trust=settings.run.trust_checkpoint,
        )
        return [built], tokenizer, settings
    opened = [
        open_checkpoint(
            path,
            trust=settings.run.trust_checkpoint,
            settings=settings.model,
            image_size=settings.data.image_size,
            score_memory=settings.eval.score_memory,
            load_tokenizer=partial(tokenizer_of, settings.data.tokenizer),
        )
        for path in settings.run.checkpoint
    ]
    models = [checkpoint.model for checkpoint in opened]
    first = next((checkpoint for checkpoint in opened if checkpoint.description is not None), opened[0])
    given, settings = settings, dataclasses.replace(settings, model=first.settings)
    if first.description is None:
        tokenizer = tokenizer_of(settings.data.tokenizer)
        for path, model in zip(settings.run.checkpoint, models, strict=True):
            check_vocabulary(tokenizer, model.text_encoder.backbone, name=path)
        return models, tokenizer, settings
    _check_ensemble(settings.run.checkpoint, opened)
    stored = {key: first.description["settings"][key] for key in MODEL_DATA_KEYS}
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, **stored))
    _check_typed(given, settings, typed, source=settings.run.checkpoint[0])
    return models, tokenizer_from_description(first.description), settings


def _check_typed(given: Settings, effective: Settings, typed: Collection[str], *, source: str) -> None:
    """Raise `UserError` if a typed key asks for another model than that of the checkpoint."""
    asked, used = given.to_flat(), effective.to_flat()
    encoders = {f"{side}_{key}" for side in ("image", "text") for key in ("encoder", "encoder_args", "weights")}
    decided = {*(field.name for field in dataclasses.fields(ModelSettings)), *MODEL_DATA_KEYS} - encoders
    for key in decided & set(typed):
        if asked[key] != used[key]:
            raise UserError(
                f"{key}={asked[key]!r}: {source} is of a model with {key}={used[key]!r}, which a checkpoint decides; "
                f"leave {key} out"
            )


def _check_ensemble(paths: tuple[str, ...], opened: list[Checkpoint]) -> None:
    """Raise `UserError` if the members of an ensemble were trained on other pixels or tokens."""
    for key in (*MODEL_DATA_KEYS, "tokenizer"):
        found = {}
        for path, checkpoint in zip(paths, opened, strict=True):
            if checkpoint.description is not None:
                stored = checkpoint.description
                found[path] = str(stored["tokenizer"] if key == "tokenizer" else stored["settings"][key])
        if len(set(found.values())) > 1:
            values = ", ".join(f"{path}: {value[:40]}" for path, value in found.items())
            raise UserError(f"checkpoint: the members of the ensemble differ in {key} ({values}); evaluate them apart")


def _model_name(key: str) -> str:
    """Return a key of a LightningModule's state dict, whose attribute `model` is the HACAN, as the model names it."""
    name = key.removeprefix("model.")
    return name if name.startswith(MODULES) else key


def _text_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the text backbone under its own names."""
    prefix = "text_encoder.backbone."
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _renamed_modules(mapped: Mapping[str, str]) -> str:
    """Return how many tensors of each module were renamed, for the log; empty if none were."""
    counts = Counter(
        (theirs.split(".")[0], ours.split(".")[0])
        for theirs, ours in mapped.items()
        if theirs not in (ours, f"model.{ours}")
    )
    groups = ", ".join(f"{theirs}.* -> {ours}.* {count}" for (theirs, ours), count in counts.items())
    return f" ({groups})" if groups else ""


def _stored_config(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the flat config among the hyper-parameters of a Lightning checkpoint; empty if there is none."""
    stored = content.get("hyper_parameters")
    stored = stored.get("config", stored) if isinstance(stored, Mapping) else None
    return stored if isinstance(stored, Mapping) else {}


def _report_form(settings: ModelSettings, stored: Mapping[str, Any], *, source: str | Path) -> None:
    """Log which public code wrote a checkpoint, and warn if the file does not say it or another form is used."""
    codes = {"hybrid": "the first public code", "revised": "the revised public code"}
    form, used = public_form(stored), settings.alignment
    if form is None:
        log.warning(
            "%s does not say which public code wrote it: scored with alignment=%s; give alignment=hybrid for the first "
            "code, alignment=revised for the revised one",
            source,
            used,
        )
    elif form in codes:
        level = logging.INFO if form == used else logging.WARNING
        log.log(level, "%s was written by %s: scored with alignment=%s", source, codes[form], used)


def _warn_of_other_settings(settings: ModelSettings, stored: Mapping[str, Any], *, source: str | Path) -> None:
    """Log in which keys the config in the checkpoint differs from this run's, which is used."""
    now = dataclasses.asdict(settings)
    others = [
        f"{key}={stored[key]!r}, here {now[key]!r}" for key in RELEASE_DEFAULTS if stored.get(key, now[key]) != now[key]
    ]
    if others:
        log.warning("%s was written with %s: the config of this run is used", source, "; ".join(others))


def _unknown_format(path: str | Path, state: Mapping[str, Tensor]) -> str:
    first = ", ".join(list(state)[:3])
    if any(key.endswith("embeddings.word_embeddings.weight") for key in state):
        return f"{path} holds the weights of a text encoder alone ({first}, ...): give it as text_weights=PATH"
    if any(key in state for key in ("stem.0.weight", "downsample_layers.0.0.weight", "conv_stem.weight", "cls_token")):
        return f"{path} holds the weights of an image encoder alone ({first}, ...): give it as image_weights=PATH"
    return (
        f"{path} is not a checkpoint of a known format: its keys are {first}, ...; expected ours (image_encoder.*, "
        "text_encoder.*) or the public release's (convnexts.*, text_transformer.*)"
    )
