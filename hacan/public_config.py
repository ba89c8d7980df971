"""Config keys of the two public HACAN codes (METHOD section 5): accepted, translated, or refused with the key to use.

Standard library only: `hacan/settings.py` calls `translate` before it validates a config.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hacan.errors import UserError

# Defined in the public codes' config and never read there. They have no effect here either.
WITHOUT_EFFECT = (
    "patch_size",
    "image_only",
    "vocab_size",
    "whole_word_masking",
    "mlm_prob",
    "num_top_layer",
    "num_heads",
    "num_layers",
    "mlp_ratio",
    "drop_rate",
    "optim_type",
    "weight_decay",
    "decay_power",
    "max_steps",
    "warmup_steps",
    "end_lr",
    "lr_mult_head",
    "lr_mult_cross_modal",
    "get_recall_metric",
)

# Refused: a key here does what the name says, or what the key did in the public codes.
REPLACED = {
    "lr_update": "use lr_decay_every, the number of epochs between two decays of the learning rate",
    "hidden_size": "use embed_dim, the width of the joint embedding space",
    "vit": "use image_encoder, the name of a timm backbone",
    "experiment_name": "use exp_name, the name of the run's folder under log_dir",
    "load_path": "use log_dir and exp_name for the folder of the run, or checkpoint=PATH to load weights",
    "input_image_embed_size": "leave it out: the width is read from image_encoder",
    "input_text_embed_size": "leave it out: the width is read from text_encoder",
}

# The public codes' own keys, which are no settings here.
PUBLIC_KEYS = (*WITHOUT_EFFECT, *REPLACED, "loss_names", "val_check_interval")

# `exp_name` selects the data set in the public codes.
DATASET_OF_EXPERIMENT = {"finetune_irtr_f30k": "f30k", "finetune_irtr_coco": "coco"}


def text_encoder_of(tokenizer: str) -> str:
    """Return the default text encoder: BERT, or the folder `tokenizer` if it contains an encoder's config too.

    The public codes load BERT's weights from the tokenizer's folder.
    """
    folder = Path(tokenizer).expanduser()
    return tokenizer if (folder / "config.json").is_file() else "bert-base-uncased"


def ignored_keys(config: Mapping[str, Any]) -> list[str]:
    """Return the keys of `config` that are accepted although they have no effect, here or in the public codes."""
    return [key for key in config if key in WITHOUT_EFFECT]


def translate(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` without the public codes' own keys and with their notations in ours.

    Keys without an effect are dropped (`ignored_keys` lists them for a warning). Raise `UserError` for a key that has
    another name here, and for a value that asks for something that this program does not do.
    """
    translated: dict[str, Any] = {}
    for key, value in config.items():
        if key in REPLACED:
            raise UserError(f"{key}={value!r} is a config key of the public code: {REPLACED[key]}")
        if key == "loss_names":
            _check_loss_names(value)
        elif key == "val_check_interval":
            _check_interval(value)
        elif key == "num_gpus" and isinstance(value, list | tuple):
            translated[key] = _device_count(value)
        elif key in ("resume_from", "checkpoint") and value is None:
            translated[key] = ""
        elif key not in WITHOUT_EFFECT:
            translated[key] = value
    if translated.get("activation") == "relu":
        raise UserError(
            "activation='relu': the public code applies no activation for this value; use activation=none for the same "
            "model, or leaky_relu (the default) or tanh"
        )
    return translated


def _check_loss_names(value: Any) -> None:
    """Accept the one task that HACAN has, `irtr` (image-text retrieval)."""
    weights = value if isinstance(value, Mapping) else {}
    others = [name for name, weight in weights.items() if weight and name != "irtr"]
    if others or not weights.get("irtr"):
        raise UserError(
            f"loss_names={value!r}: HACAN has the task irtr only; leave the key out; loss chooses the global loss"
        )


def _check_interval(value: Any) -> None:
    if value != 1:
        raise UserError(
            f"val_check_interval={value!r}: validation runs once after each epoch; leave the key out, or give 1.0"
        )


def _device_count(devices: list | tuple) -> int:
    """Return the number of devices of a list such as [0, 1]."""
    if not devices or list(devices) != list(range(len(devices))):
        visible = ",".join(str(device) for device in devices)
        raise UserError(
            f"num_gpus={list(devices)!r}: expected a number, or the list of the first devices such as [0, 1]; to "
            f"choose devices, set CUDA_VISIBLE_DEVICES={visible} and num_gpus={max(len(devices), 1)}"
        )
    return len(devices)
