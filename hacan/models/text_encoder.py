"""Text encoder: a BERT-like transformers encoder with two feature levels and a global vector (METHOD section 1)."""

import difflib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from huggingface_hub import constants as hub
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from hacan.errors import UserError
from hacan.models.weights import load_exactly, no_hub_weights, weights_at
from hacan.settings import ModelSettings

log = logging.getLogger(__name__)

CODE_KEYS = ("auto_map", "attn_implementation", "quantization_config", "custom_pipelines")  # of a transformers config


class TextFeatures(NamedTuple):
    """Features of M texts. Values at padding are meaningless."""

    high: Tensor  # [M, W, C] tokens of the high level
    mid: Tensor  # [M, W, C] tokens of the mid level
    pooled: Tensor  # [M, C] output of the pooler, or last state of the first token without a pooler


class TextEncoder(nn.Module):
    """A transformers encoder with two of its hidden states and a global vector.

    Levels are indices into `hidden_states`: 0 is the embedding output, k the output of layer k; negative indices count
    from the end. The global vector is the output of the pooler, or, without a pooler (DistilBERT, ELECTRA, ModernBERT),
    the last state of the first token (METHOD section 1).
    """

    def __init__(self, *, backbone: Any, levels: tuple[int, ...], name: str = "") -> None:
        """backbone: a model of transformers' `AutoModel`. name: for error messages."""
        super().__init__()
        self.name = name or type(backbone).__name__
        self.width: int = backbone.config.hidden_size
        self.levels = self._positions(levels, backbone.config.num_hidden_layers + 1)
        pad_id = backbone.config.pad_token_id
        self.pad_id: int = 0 if pad_id is None else pad_id
        self.max_tokens = _max_tokens(backbone)
        self.backbone = backbone

    def _positions(self, levels: tuple[int, ...], count: int) -> tuple[int, int]:
        """Return both levels as indices from 0."""
        mid, high = (level + count if level < 0 else level for level in levels)
        if not (0 <= mid < count and 0 <= high < count):
            raise UserError(
                f"text_levels={list(levels)}: text_encoder={self.name!r} has {count} hidden states (its embedding "
                f"output and {count - 1} layers): give two from {-count} to {count - 1}, such as [-2, -1]"
            )
        return mid, high

    @property
    def has_pooler(self) -> bool:
        """Whether the global vector comes from a pooler."""
        return getattr(self.backbone, "pooler", None) is not None

    def forward(self, token_ids: Tensor, token_mask: Tensor) -> TextFeatures:
        """Return both levels of tokens and the global vector of token ids [M, W] with a mask (True: a real token)."""
        if token_ids.shape[1] > self.max_tokens:
            raise UserError(
                f"captions of {token_ids.shape[1]} tokens, but text_encoder={self.name!r} has positions for "
                f"{self.max_tokens}: set max_text_len={self.max_tokens} or less"
            )
        # RoBERTa derives positions from the padding id, so padding must have that id too.
        outputs = self.backbone(
            input_ids=token_ids.masked_fill(~token_mask, self.pad_id),
            attention_mask=token_mask.long(),
            output_hidden_states=True,
            return_dict=True,
        )
        states = outputs.hidden_states
        pooled = outputs.pooler_output if self.has_pooler else outputs.last_hidden_state[:, 0]
        return TextFeatures(high=states[self.levels[1]], mid=states[self.levels[0]], pooled=pooled)


def _max_tokens(backbone: nn.Module) -> int:
    """Return the largest number of tokens: the position embeddings, less those that RoBERTa reserves for padding."""
    table = getattr(getattr(backbone, "embeddings", None), "position_embeddings", None)
    offset = getattr(table, "padding_idx", None)
    return getattr(backbone.config, "max_position_embeddings", 1 << 30) - (0 if offset is None else offset + 1)


class Vocabulary(Protocol):
    """The part of a tokenizer that the model needs."""

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
    """Return a transformers encoder with the weights of `text_weights`."""
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
    """Raise `UserError` if the tokenizer has more tokens than the text encoder; `name` identifies the encoder."""
    if len(tokenizer) > backbone.config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, but {name} only {backbone.config.vocab_size}: set tokenizer "
            "to the one of the encoder"
        )


def config_of_state(
    settings: ModelSettings, state: Mapping[str, torch.Tensor], *, source: str | Path, tokenizer: Vocabulary | None
) -> dict[str, Any]:
    """Return the config of the text encoder with tensors `state`: type from the settings, sizes from the tensors.

    The tensors of a BERT determine all its sizes. RoBERTa and others have the same names but other positions: the
    settings must give their model type, a folder with a config.json, or a hub name that is in the cache.
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
    """Return the encoder of a hub name, from the hub or its cache."""
    name = settings.text_encoder
    try:
        backbone, info = AutoModel.from_pretrained(
            name,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
            **settings.text_encoder_args,
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
    """Return an encoder of this config with random float32 weights."""
    _check_kind(config)
    try:
        return AutoModel.from_config(config).float()
    except ValueError as error:
        raise UserError(f"text_encoder of type {config.model_type!r} cannot be built: {error}") from error


def _check_kind(config: PretrainedConfig) -> None:
    if config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or config.is_encoder_decoder:
        raise UserError(
            f"text_encoder of type {config.model_type!r}: expected a bidirectional encoder (a masked "
            "language model), such as bert, roberta, mpnet or distilbert"
        )


def _text_config(settings: ModelSettings, **sizes: int | None) -> PretrainedConfig:
    """Return the config of `text_encoder`: a folder, a model type, or a hub name."""
    name, arguments = settings.text_encoder, {**sizes, **settings.text_encoder_args}
    if Path(name).is_dir():
        return _read_config(Path(name), arguments)
    if name not in CONFIG_MAPPING:
        try:
            return AutoConfig.from_pretrained(name, trust_remote_code=False, **arguments)
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
    # Entries that name code: `auto_map`, and attention kernels or quantisers of the hub.
    fields = {k: v for k, v in fields.items() if not k.startswith("_") and k not in CODE_KEYS}
    model_type = fields.pop("model_type")
    try:
        return AutoConfig.for_model(model_type, **fields)
    except (ValueError, TypeError) as error:
        raise UserError(f"text_encoder_args={fields} do not make a config of type {model_type!r}: {error}") from error


def _read_config(folder: Path, arguments: dict[str, Any]) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **arguments)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} has no config.json of a transformers encoder: {str(error)[:200]}") from error
    config._attn_implementation = None  # a hub kernel, which is code, can be named there; transformers chooses its own
    return config


def names_of_bert(state: Mapping[str, Tensor], *, prefix: str) -> dict[str, Tensor]:
    """Return a BERT state dict in current names: without `prefix.`, LayerNorm gamma/beta as weight/bias."""
    inside = any(key.startswith(f"{prefix}.") for key in state)
    renamed = {}
    for key, value in state.items():
        if inside and not key.startswith(f"{prefix}."):
            continue  # pretraining heads
        renamed[name_of_bert(key.removeprefix(f"{prefix}."))] = value
    return renamed


def name_of_bert(key: str) -> str:
    """Return the current name of a BERT tensor; TensorFlow files call LayerNorm's parameters gamma and beta."""
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", key))


def bert_sizes(state: Mapping[str, Tensor], *, source: str | Path) -> dict[str, Any]:
    """Return the sizes of a BERT from its tensors as config fields; heads are 64 wide, as in all published BERTs."""
    layers = {int(match[1]) for key in state if (match := re.match(r"encoder\.layer\.(\d+)\.", key))}
    names = {name: f"embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type")}
    if not layers or any(key not in state for key in names.values()):
        raise UserError(
            f"{source} has no config.json beside it, and its keys are not those of a BERT "
            f"(embeddings.word_embeddings.weight, encoder.layer.0...): they are {', '.join(list(state)[:3])}, ..."
        )
    tables = {name: state[key] for name, key in names.items()}
    width = tables["word"].shape[1]
    return {
        "model_type": "bert",
        "vocab_size": tables["word"].shape[0],
        "hidden_size": width,
        "num_hidden_layers": 1 + max(layers),
        "num_attention_heads": max(1, width // 64),
        "intermediate_size": state["encoder.layer.0.intermediate.dense.weight"].shape[0],
        "max_position_embeddings": tables["position"].shape[0],
        "type_vocab_size": tables["token_type"].shape[0],
    }
