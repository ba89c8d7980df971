"""Settings become modules: the only place that knows names, sizes and where pretrained weights come from."""

import dataclasses
import difflib
import logging
import sys
from pathlib import Path
from typing import Any, Protocol

import timm
import torch
from huggingface_hub import constants as hub
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from hacan.aggregator import Aggregator
from hacan.alignment import build_alignment
from hacan.encoders import ImageEncoder, TextEncoder
from hacan.errors import UserError
from hacan.foreign import bert_sizes, names_of_bert, names_of_convnext
from hacan.model import HACAN
from hacan.settings import ModelSettings
from hacan.weights import load_exactly, read_state

log = logging.getLogger(__name__)


class Vocabulary(Protocol):
    """What the model must know of a tokenizer."""

    pad_token_id: int | None

    def __len__(self) -> int: ...


def build_model(
    settings: ModelSettings,
    *,
    image_size: int,
    score_memory: int,
    tokenizer: Vocabulary | None = None,
    load_weights: bool = True,
    text_config: dict[str, Any] | None = None,
    trust: bool = False,
) -> HACAN:
    """The model of the settings.

    image_size: side of the pictures in pixels; score_memory: MiB of working set in fine scoring; tokenizer: sizes the
    vocabulary of a random text encoder, and is checked against that of others. `load_weights=False` leaves both
    encoders random, for a checkpoint to be loaded; `text_config` is then the stored config of the text encoder, so that
    neither hub nor files are needed. `trust` reads weights files that are pickles of more than tensors.
    """
    image_backbone = _image_backbone(settings, image_size=image_size, load_weights=load_weights, trust=trust)
    text_backbone = _text_backbone(
        settings, tokenizer=tokenizer, load_weights=load_weights, config=text_config, trust=trust
    )
    image = ImageEncoder(backbone=image_backbone, levels=settings.image_levels, name=settings.image_encoder)
    text = TextEncoder(backbone=text_backbone, levels=settings.text_levels, name=settings.text_encoder)
    if tokenizer is not None and len(tokenizer) > text_backbone.config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} words, but text_encoder={settings.text_encoder!r} knows only "
            f"{text_backbone.config.vocab_size}: set tokenizer to the one that belongs to the encoder"
        )
    width = settings.embed_dim
    model = HACAN(
        image_encoder=image,
        text_encoder=text,
        project_image_high=nn.Linear(image.high_width, width),
        project_image_mid=nn.Linear(image.mid_width, width),
        project_text_high=_text_projection(text.width, width),
        project_text_mid=_text_projection(text.width, width),
        aggregate_image=Aggregator(in_dim=image.high_width, embed_dim=width, activation=settings.activation),
        aggregate_text=Aggregator(in_dim=text.width, embed_dim=width, activation=settings.activation),
        alignment=build_alignment(
            settings.alignment,
            direction=settings.direction,
            temperature=settings.lambda_softmax,
            focal_type=settings.focal_type,
            score_memory=score_memory,
        ),
    )
    _try_on_blank_picture(model, settings, image_size=image_size)
    return model


def _text_projection(in_dim: int, out_dim: int) -> nn.Linear:
    """Linear with weights Normal(0, 0.02) and zero bias (METHOD section 1)."""
    linear = nn.Linear(in_dim, out_dim)
    nn.init.normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear


def _image_backbone(settings: ModelSettings, *, image_size: int, load_weights: bool, trust: bool) -> nn.Module:
    """A timm model for pictures of that size, with the weights of `image_weights`."""
    name, weights = settings.image_encoder, settings.image_weights
    from_hub = load_weights and weights == "pretrained"
    if not timm.is_model(name):
        close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3) or timm.list_models()[:3]
        raise UserError(f"image_encoder={name!r}: timm has no such model; did you mean {' or '.join(close)}?")
    try:
        hub_id = getattr(timm.get_pretrained_cfg(name, allow_unregistered=True), "hf_hub_id", None) or name
    except RuntimeError as error:
        tags = ", ".join(timm.list_pretrained(f"{name.split('.')[0]}.*")) or "none"
        raise UserError(
            f"image_encoder={name!r}: timm has no such weights; the names with weights are {tags}"
        ) from error
    try:
        backbone = timm.create_model(name, pretrained=from_hub, num_classes=0, **settings.image_encoder_args)
    except (TypeError, AssertionError) as error:
        raise UserError(
            f"image_encoder_args={settings.image_encoder_args}: image_encoder={name!r} does not take them: {error}"
        ) from error
    except (OSError, RuntimeError) as error:
        if not from_hub:
            raise UserError(f"image_encoder={name!r} cannot be built: {error}") from error
        raise UserError(_no_weights("image", name, hub_id, error)) from error
    if load_weights and weights not in ("pretrained", "random"):
        state = names_of_convnext(_weights_at("image_weights", weights, trust=trust))
        load_exactly(backbone, _fitted(state, backbone), source=f"image_weights={weights}")
    patches = getattr(backbone, "patch_embed", None)
    if hasattr(backbone, "set_input_size") and getattr(patches, "img_size", None) not in (None, (image_size,) * 2):
        try:
            backbone.set_input_size(img_size=(image_size, image_size))
        except (AssertionError, ValueError, RuntimeError) as error:
            raise UserError(f"image_size={image_size}: image_encoder={name!r} cannot take it: {error}") from error
    return backbone


def _fitted(state: dict[str, torch.Tensor], backbone: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict as timm fits it to the model (older namings, position embeddings of another picture size)."""
    own = backbone.state_dict()
    for key, value in own.items():  # a Linear and a 1 x 1 convolution hold the same numbers
        if (
            key in state
            and {state[key].ndim, value.ndim} == {2, 4}
            and state[key].squeeze().shape == value.squeeze().shape
        ):
            state[key] = state[key].reshape(value.shape)
    convert = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    if convert is None or all(key in state and state[key].shape == value.shape for key, value in own.items()):
        return state
    try:
        return convert(dict(state), backbone)
    except (KeyError, IndexError, AttributeError, AssertionError, RuntimeError) as error:
        log.debug("timm does not know these weights (%s): taken as they are, and checked", error)
        return state


def _text_backbone(
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
    state = _weights_at(key, path, trust=trust)
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


def _text_from_hub(settings: ModelSettings) -> PreTrainedModel:
    """The encoder of that hub name, from the hub or from its cache."""
    name = settings.text_encoder
    try:
        backbone, info = AutoModel.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, **settings.text_encoder_args
        )
    except (OSError, ValueError) as error:
        raise UserError(_no_weights("text", name, name, error)) from error
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


def _weights_at(key: str, path: str, *, trust: bool) -> dict[str, torch.Tensor]:
    if not Path(path).exists():
        raise UserError(f"{key}={path}: there is no such file or folder; give a path, `pretrained` or `random`")
    return read_state(path, trust=trust)


def _no_weights(kind: str, name: str, hub_id: str, error: Exception) -> str:
    """One line for weights that could not be had: which, where they were looked for, how to give a path."""
    reason = str(error).strip().splitlines()[0].split(". ")[0].rstrip(".")
    return (
        f"no weights for {kind}_encoder={name!r}: {hub_id} is neither a folder here nor in the cache "
        f"{hub.HF_HUB_CACHE}, and the hub did not give it ({reason}). Give a local path, {kind}_weights=PATH, or "
        f"{kind}_weights=random to start from nothing"
    )


def _try_on_blank_picture(model: HACAN, settings: ModelSettings, *, image_size: int) -> None:
    """Fail now, and in one line, where the backbone cannot take pictures of that size."""
    try:
        model.region_grids(height=image_size, width=image_size)
    except (AssertionError, ValueError, RuntimeError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"image_encoder={settings.image_encoder!r} fails on pictures of image_size={image_size} pixels: {error}"
        ) from error


def model_settings(flat: dict[str, Any]) -> ModelSettings:
    """The model's part of a flat config, such as a checkpoint keeps it."""
    names = [field.name for field in dataclasses.fields(ModelSettings)]
    missing = [name for name in names if name not in flat]
    if missing:
        raise UserError(f"the stored settings lack {', '.join(missing)}: written by another version")
    return ModelSettings(**{name: tuple(v) if isinstance(v := flat[name], list) else v for name in names})
