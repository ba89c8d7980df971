"""The text backbone of the settings: a transformers encoder, with weights of a hub, a folder or any file."""

import difflib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import constants as hub
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from hacan.errors import UserError
from hacan.foreign import bert_sizes, names_of_bert
from hacan.settings import ModelSettings
from hacan.weights import load_exactly, no_hub_weights, weights_at

log = logging.getLogger(__name__)


class Vocabulary(Protocol):
    """What the model must know of a tokenizer."""

    pad_token_id: int | None

    def __len__(self) -> int: ...


def build_text_backbone(
    settings: ModelSettings,
    *,
    tokenizer: Vocabulary | None,
    load_weights: bool,
    config: dict[str, Any] | None,
    trust: bool,
) -> PreTrainedModel:
    """A transformers encoder with the weights of `text_weights`."""
    name, weights = settings.text_encoder, settings.text_weights
    if config is not None:
        return _random_text(_config_of_type({**config}))
    if not load_weights or weights == "random":
        sizes = {} if tokenizer is None else {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        return _random_text(_text_config(settings, **(sizes if weights == "random" else {})))
    if weights == "pretrained" and not Path(name).is_dir():
        return _text_from_hub(settings)
    path = name if weights == "pretrained" else weights
    key = "text_encoder" if weights == "pretrained" else "text_weights"
    state = weights_at(key, path, trust=trust)
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if (folder / "config.json").is_file():
        found = _read_config(folder, settings.text_encoder_args)
    elif Path(name).is_dir():
        found = _read_config(Path(name), settings.text_encoder_args)
    else:
        found = _config_of_type(
            {**bert_sizes(names_of_bert(state, prefix="bert"), source=path), **settings.text_encoder_args}
        )
    backbone = _random_text(found)
    state = names_of_bert(state, prefix=backbone.base_model_prefix)
    missing = load_exactly(backbone, state, source=f"{key}={path}", optional="pooler.")
    if missing:
        log.warning("%s=%s has no pooler: %s start at random", key, path, ", ".join(missing))
    return backbone


def check_vocabulary(tokenizer: Vocabulary, backbone: PreTrainedModel, *, name: str) -> None:
    """Every token that the tokenizer gives must have a place in the text encoder's table; `name`: whose encoder."""
    if len(tokenizer) > backbone.config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} words, but {name} knows only {backbone.config.vocab_size}: set "
            "tokenizer to the one that belongs to the encoder"
        )


def config_of_state(
    settings: ModelSettings, state: Mapping[str, torch.Tensor], *, source: str | Path, tokenizer: Vocabulary | None
) -> dict[str, Any]:
    """The config of the text encoder whose tensors are `state`: its kind from the settings, its sizes from the tensors.

    A BERT's tensors tell all its sizes. RoBERTa and others carry the same names and count positions otherwise: their
    kind has to be named, as a model type, a folder with a config.json, or a hub name that is in the cache.
    """
    name = settings.text_encoder
    try:
        found = None if name == "bert" else _text_config(settings)
    except UserError:
        if not Path(name).name.startswith("bert"):
            raise
        found = None
    if found is None:
        return {**bert_sizes(state, source=source), **settings.text_encoder_args}
    sizes = {} if settings.text_weights != "random" or tokenizer is None else {"pad_token_id": tokenizer.pad_token_id}
    words = next((value for key, value in state.items() if key.endswith("word_embeddings.weight")), None)
    if words is not None:
        sizes["vocab_size"] = len(words)
    return {**found.to_dict(), **sizes}


def _text_from_hub(settings: ModelSettings) -> PreTrainedModel:
    """The encoder of that hub name, from the hub or from its cache."""
    name = settings.text_encoder
    try:
        backbone, info = AutoModel.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, **settings.text_encoder_args
        )
    except (OSError, ValueError) as error:
        raise UserError(no_hub_weights("text", name, name, error)) from error
    _check_kind(backbone.config)
    missing = sorted(info["missing_keys"])
    if [key for key in missing if not key.startswith("pooler.")]:
        raise UserError(f"text_encoder={name!r}: its weights lack {', '.join(missing[:3])}; use another encoder")
    if missing:
        log.warning("text_encoder=%r has no pooler weights: %s start at random", name, ", ".join(missing))
    return backbone


def _random_text(config: PretrainedConfig) -> PreTrainedModel:
    """An encoder of that config, in float32, its weights random."""
    _check_kind(config)
    try:
        return AutoModel.from_config(config).float()
    except ValueError as error:
        raise UserError(f"text_encoder of type {config.model_type!r} cannot be built: {error}") from error


def _check_kind(config: PretrainedConfig) -> None:
    if config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or config.is_encoder_decoder:
        raise UserError(
            f"text_encoder of type {config.model_type!r}: expected an encoder that reads both ways, as a masked "
            "language model does, such as bert, roberta, mpnet or distilbert"
        )


def _text_config(settings: ModelSettings, **sizes: int | None) -> PretrainedConfig:
    """The config behind `text_encoder`: a folder, a model type, or a hub name."""
    name, arguments = settings.text_encoder, {**sizes, **settings.text_encoder_args}
    if Path(name).is_dir():
        return _read_config(Path(name), arguments)
    if name not in CONFIG_MAPPING:
        try:
            return AutoConfig.from_pretrained(name, **arguments)
        except (OSError, ValueError) as error:
            raise UserError(
                f"text_encoder={name!r} with text_weights={settings.text_weights}: expected a model type of "
                "transformers (bert, roberta, distilbert, ...), a folder with a config.json, or a hub name that is in "
                f"the cache {hub.HF_HUB_CACHE}"
            ) from error
    plain = AutoConfig.for_model(name)
    unknown = [key for key in settings.text_encoder_args if not hasattr(plain, key)]
    if unknown:
        close = difflib.get_close_matches(unknown[0], plain.to_dict(), n=3, cutoff=0)
        raise UserError(
            f"text_encoder_args: a config of {name!r} has no {unknown[0]!r}; did you mean {', '.join(close)}?"
        )
    return _config_of_type({"model_type": name, **arguments})


def _config_of_type(fields: dict[str, Any]) -> PretrainedConfig:
    model_type = fields.pop("model_type")
    try:
        return AutoConfig.for_model(model_type, **fields)
    except (ValueError, TypeError) as error:
        raise UserError(f"text_encoder_args={fields} do not make a config of type {model_type!r}: {error}") from error


def _read_config(folder: Path, arguments: dict[str, Any]) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder, **arguments)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} has no config.json of a transformers encoder: {str(error)[:200]}") from error
