"""Our checkpoints: what they hold besides the weights, reading, and writing.

A checkpoint is a Lightning file whose key `hacan` describes the model, or an exported folder with the same description
in config.json. The model can be rebuilt from it without the run's config, the hub, or the backbones' own files.
"""

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hacan.errors import UserError
from hacan.models.factory import build_model, model_settings
from hacan.models.hacan import HACAN
from hacan.models.weights import BrokenFileError, read_file
from hacan.settings import Settings

DESCRIPTION = "hacan"  # the key in a checkpoint
FORMAT = 1
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"  # in an exported folder


# Files of a tokenizer that a checkpoint stores; code in its folder is not.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt"),
)


# -- the description --------------------------------------------------------------------------------------------------


def describe_model(model: HACAN, settings: Settings, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what is needed besides the weights to rebuild the model, as plain values."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {file.name: file.read_text(encoding="utf-8") for file in sorted(Path(folder).glob("*.*"))}
    description = {
        "format": FORMAT,
        "settings": settings.to_flat(),
        "text_config": model.text_encoder.backbone.config.to_dict(),
        "tokenizer": tokenizer_files(files),
    }
    return json.loads(json.dumps(description, default=str))


def tokenizer_files(files: Mapping[str, str]) -> dict[str, str]:
    """Return the known files of a tokenizer, without the config entry that names Python code."""
    found = {name: files[name] for name in TOKENIZER_FILES if name in files}
    config = json.loads(found.get("tokenizer_config.json", "{}"))
    if "auto_map" in config:
        found["tokenizer_config.json"] = json.dumps({k: v for k, v in config.items() if k != "auto_map"}, indent=1)
    return found


def model_from_description(description: Mapping[str, Any], *, score_memory: int = 256) -> HACAN:
    """Return the model that `describe_model` described, with random weights."""
    if description.get("format") != FORMAT:
        raise UserError(
            f"the checkpoint has format {description.get('format')!r}, expected {FORMAT}: another version of this "
            "program wrote it; read it with that version"
        )
    return build_model(
        model_settings(description["settings"]),
        image_size=description["settings"]["image_size"],
        score_memory=score_memory,
        load_weights=False,
        text_config=description["text_config"],
    )


def tokenizer_from_description(description: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """Return the tokenizer whose files `describe_model` stored. Code in a tokenizer's folder is never run."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in tokenizer_files(description["tokenizer"]).items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


# -- reading ----------------------------------------------------------------------------------------------------------


def read_checkpoint(path: str | Path, *, trust: bool = False) -> dict[str, Any]:
    """Return the content of a checkpoint file or of an exported folder.

    trust: also read pickles of more than tensors, which can run code. The error for a broken file names the newest
    readable checkpoint beside it.
    """
    path = Path(path)
    if path.is_dir():
        return read_exported(path)
    try:
        content = read_file(path, trust=trust)
    except BrokenFileError as error:
        others = [other for other in path.parent.glob(f"*{path.suffix}") if other != path and zipfile.is_zipfile(other)]
        newest = max(others, key=lambda other: other.stat().st_mtime, default=None)
        remedy = f"the newest readable one beside it is {newest}" if newest else "there is no readable one beside it"
        raise BrokenFileError(f"{error}; {remedy}") from error
    exported = path.suffix == ".safetensors" and (path.parent / CONFIG_FILE).is_file()
    return read_exported(path.parent) if exported else content


def read_exported(folder: Path) -> dict[str, Any]:
    """Return the content of a folder that `scripts/export.py` or `save_pretrained` wrote, as that of a checkpoint."""
    config = folder / CONFIG_FILE
    if not config.is_file():
        raise UserError(f"{folder} is a folder without {CONFIG_FILE}: expected one that scripts/export.py wrote")
    try:
        description = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BrokenFileError(f"{config} is broken: {error}") from error
    if not isinstance(description, dict) or "settings" not in description or "text_config" not in description:
        raise UserError(
            f"{config} does not describe a HACAN (no settings, no text_config): expected a folder that "
            "scripts/export.py wrote"
        )
    names = [name for name in description.pop("tokenizer_files", []) if name in TOKENIZER_FILES]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise UserError(f"{folder} lacks the tokenizer's {', '.join(missing) or 'files'}: export the checkpoint again")
    description["tokenizer"] = {name: (folder / name).read_text(encoding="utf-8") for name in names}
    return {DESCRIPTION: description, "state_dict": read_file(folder / WEIGHTS_FILE)}


# -- writing ----------------------------------------------------------------------------------------------------------


def atomic_save(content: Any, path: str | Path) -> None:
    """`torch.save` to a temporary file, then rename it: a crash or a full disk leaves the previous file."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    written = None
    try:
        with open(partial, "wb") as file:
            written = _FileWithError(file)
            torch.save(content, written)  # type: ignore[arg-type]  # it needs write and flush only
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        kept = f"; the previous {path.name} is kept" if path.exists() else ""
        cause = written.error if written is not None and written.error is not None else error
        reason = getattr(cause, "strerror", None) or str(cause).strip().splitlines()[0]
        raise UserError(f"cannot write {path}: {reason}{kept}. Free space there, or give save_path=PATH") from error
    finally:
        partial.unlink(missing_ok=True)


class _FileWithError:
    """A file that keeps the error of a failed write; torch reports a full disk as "unexpected pos 64 vs 0"."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        """Write to the file."""
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Do nothing: a second failure here would hide the first."""


def file_hash(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, on systems where a folder can be opened."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
