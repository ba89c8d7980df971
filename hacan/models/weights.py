"""Weights files: safe reading, and loading with errors that name the file, the keys and the shapes."""

import json
import logging
import pickle
import re
import socket
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import constants as hub
from safetensors.torch import load_file
from torch import Tensor, nn

from hacan.errors import UserError

log = logging.getLogger(__name__)

# Keys of the state dict inside checkpoints, in order of preference.
CONTAINERS = ("state_dict", "model", "model_state_dict", "module", "model_ema", "net")
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")


# Classes that Lightning 1.3, which wrote the public checkpoints, pickles beside the tensors. They are read as inert
# classes and as a dict, so that nothing of them runs.
_LIGHTNING = "pytorch_lightning."
LIGHTNING_GLOBALS: list[Any] = [
    (type("ModelCheckpoint", (), {}), f"{_LIGHTNING}callbacks.model_checkpoint.ModelCheckpoint"),
    (type("LearningRateMonitor", (), {}), f"{_LIGHTNING}callbacks.lr_monitor.LearningRateMonitor"),
    (type("EarlyStopping", (), {}), f"{_LIGHTNING}callbacks.early_stopping.EarlyStopping"),
    (dict, f"{_LIGHTNING}utilities.parsing.AttributeDict"),
]


class BrokenFileError(UserError):
    """A truncated or damaged file, or one of another type than its name says."""


def read_file(path: str | Path, *, trust: bool = False) -> dict[str, Any]:
    """Return the content of a .safetensors, .pth, .pt, .bin or .ckpt file.

    Pickles are read with `weights_only=True`: tensors, plain values and `LIGHTNING_GLOBALS`. With `trust` any pickle is
    read, which can run code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights file {path} is missing" if not path.exists() else f"{path} is not a file")
    _check_checksums(path)
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        with torch.serialization.safe_globals(LIGHTNING_GLOBALS):
            content = torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        wanted = _wanted_code(error)
        if wanted is None:
            raise BrokenFileError(f"{path} is broken, truncated or no weights file") from error
        raise UserError(
            f"{path} is a pickle of more than tensors (it needs {wanted}), which can run code: not read. If you "
            "trust its author, add trust_checkpoint=True"
        ) from error
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ImportError as error:
        raise UserError(f"{path} is a pickle that needs the module {error.name!r}, which is not installed") from error
    except Exception as error:  # unpickling noise raises many kinds of errors
        raise BrokenFileError(f"{path} is broken, truncated or no weights file") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a dict of tensors (a state dict)")
    return dict(content)


def _check_checksums(path: Path) -> None:
    """Raise `BrokenFileError` if a record of a zip archive, the format of torch.save, fails its CRC-32."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # damaged archives raise many kinds of errors
        raise BrokenFileError(f"{path} is damaged: {error}") from error
    if damaged is not None:
        raise BrokenFileError(f"{path} is damaged: its record {damaged} does not have the stored checksum")


def read_state(path: str | Path, *, trust: bool = False) -> dict[str, Tensor]:
    """Return the state dict of a weights file or of a Hugging Face folder."""
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, trust=trust)
    return tensors_of(read_file(path, trust=trust), source=path)


def tensors_of(content: Mapping[str, Any], *, source: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a file's content: those below `state_dict`, `model`, ..., or its own."""
    for name in CONTAINERS:
        if isinstance(content.get(name), Mapping):
            content = content[name]
            break
    state = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise UserError(f"{source} holds no tensors; its keys are {_some(list(content))}")
    if all(key.startswith("module.") for key in state):  # added by DataParallel
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def load_exactly(
    module: nn.Module, state: Mapping[str, Tensor], *, source: str | Path, optional: str = ""
) -> list[str]:
    """Load `state` into `module`; raise `UserError` with the file if keys are missing or shapes differ.

    Additional keys are ignored. Keys that start with `optional` may be missing; they are returned.
    """
    own = module.state_dict()
    missing = [key for key in own if key not in state]
    lacking = [key for key in missing if not (optional and key.startswith(optional))]
    if lacking:
        raise UserError(
            f"{source} lacks {len(lacking)} of the {len(own)} tensors of {type(module).__name__}: {_some(lacking)}; "
            f"its own keys are {_some(list(state))}. These weights belong to another architecture"
        )
    wrong = [
        f"{key} is {list(state[key].shape)}, expected {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if wrong:
        raise UserError(f"{source} has {len(wrong)} tensors of another shape: {'; '.join(wrong[:3])}")
    module.load_state_dict({key: state.get(key, own[key]) for key in own})
    return missing


def weights_at(key: str, path: str, *, trust: bool) -> dict[str, Tensor]:
    """Return the state dict at the path of the config key `key`."""
    if not Path(path).exists():
        raise UserError(f"{key}={path}: there is no such file or folder; give a path, `pretrained` or `random`")
    return read_state(path, trust=trust)


def check_hub(*names: str, timeout: float = 3.0) -> None:
    """Switch huggingface_hub to its offline mode if one of the names is not local and the hub cannot be reached.

    Otherwise it retries for about a minute before it reports a missing name. With a proxy nothing is checked.
    """
    if hub.HF_HUB_OFFLINE or getproxies() or all(Path(name).expanduser().exists() for name in names):
        return
    address = urlsplit(hub.ENDPOINT)
    try:
        socket.create_connection((address.hostname or "", address.port or 443), timeout=timeout).close()
    except OSError as error:
        log.warning("%s cannot be reached (%s): only local files and the hub's cache are used", hub.ENDPOINT, error)
        hub.HF_HUB_OFFLINE = True


def no_hub_weights(kind: str, name: str, hub_id: str, error: Exception) -> str:
    """Return the error message for weights that the hub and its cache do not have."""
    reason = str(error).strip().splitlines()[0].split(". ")[0].rstrip(".")
    return (
        f"no weights for {kind}_encoder={name!r}: {hub_id} is neither a folder here nor in the cache "
        f"{hub.HF_HUB_CACHE}, and the hub did not provide it ({reason}). Give a local path, {kind}_weights=PATH, or "
        f"{kind}_weights=random to train from scratch"
    )


def _read_folder(folder: Path, *, trust: bool) -> dict[str, Tensor]:
    for name in FOLDER_FILES:
        if (folder / name).is_file():
            return read_state(folder / name, trust=trust)
        index = folder / f"{name}.index.json"
        if index.is_file():  # sharded weights
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            return {key: value for file in files for key, value in read_state(folder / file, trust=trust).items()}
    raise UserError(f"{folder} has no weights: expected one of {', '.join(FOLDER_FILES)} in it")


def _some(keys: list[Any], count: int = 3) -> str:
    """Return the first keys and the number of the others."""
    more = f" and {len(keys) - count} more" if len(keys) > count else ""
    return ", ".join(str(key) for key in keys[:count]) + more


def _wanted_code(error: Exception) -> str | None:
    """Return the class or function that a refused pickle needs, or None if the pickle is broken."""
    found = re.search(r"GLOBAL (\S+)|(?:class|global|function|type) (\S+\.\S+)", str(error))
    return (found[1] or found[2]) if found else None
