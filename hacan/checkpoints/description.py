"""What a model of ours says about itself beside its weights, and the model and tokenizer that come out of it again.

It travels in checkpoints under the key `hacan`, and as config.json with the tokenizer's files in an exported folder, so
that a model can be rebuilt without the run's config, without the hub and without the files its backbones came from.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hacan.errors import UserError
from hacan.models.factory import build_model, model_settings
from hacan.models.hacan import HACAN
from hacan.models.weights import BrokenFileError, read_file
from hacan.settings import Settings

DESCRIPTION = "hacan"  # our key in a checkpoint
FORMAT = 1
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"  # of an exported folder


def describe_model(model: HACAN, settings: Settings, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What is needed beside the weights to rebuild the model: plain values, which `weights_only` and JSON can read."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {file.name: file.read_text(encoding="utf-8") for file in sorted(Path(folder).iterdir())}
    description = {
        "format": FORMAT,
        "settings": settings.to_flat(),
        "text_config": model.text_encoder.backbone.config.to_dict(),
        "tokenizer": files,
    }
    return json.loads(json.dumps(description, default=str))


def model_from_description(description: Mapping[str, Any], *, score_memory: int = 256) -> HACAN:
    """The model that `describe_model` described, its weights random."""
    if description.get("format") != FORMAT:
        raise UserError(
            f"a checkpoint of format {description.get('format')!r}, expected {FORMAT}: written by another version of "
            "this program; read it with that one"
        )
    return build_model(
        model_settings(description["settings"]),
        image_size=description["settings"]["image_size"],
        score_memory=score_memory,
        load_weights=False,
        text_config=description["text_config"],
    )


def tokenizer_from_description(description: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer whose files `describe_model` kept."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in description["tokenizer"].items():
            (Path(folder) / Path(name).name).write_text(text, encoding="utf-8")
        return AutoTokenizer.from_pretrained(folder)


def read_exported(folder: Path) -> dict[str, Any]:
    """A folder that `scripts/export.py` wrote, as the content of a checkpoint of ours."""
    config = folder / CONFIG_FILE
    if not config.is_file():
        raise UserError(f"{folder} is a folder without {CONFIG_FILE}: expected one that scripts/export.py wrote")
    try:
        description = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BrokenFileError(f"{config} is broken: {error}") from error
    if not isinstance(description, dict) or "settings" not in description or "text_config" not in description:
        raise UserError(
            f"{config} does not describe a HACAN (no settings, no text_config): scripts/export.py writes it"
        )
    names = [Path(name).name for name in description.pop("tokenizer_files", [])]
    lacking = [name for name in names if not (folder / name).is_file()]
    if lacking or not names:
        raise UserError(f"{folder} lacks the tokenizer's {', '.join(lacking) or 'files'}: export the checkpoint again")
    description["tokenizer"] = {name: (folder / name).read_text(encoding="utf-8") for name in names}
    return {DESCRIPTION: description, "state_dict": read_file(folder / WEIGHTS_FILE)}
