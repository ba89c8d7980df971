"""Provenance of a result: hashes and versions of what it depends on, and whether two results are comparable."""

import hashlib
import json
import math
import os
import platform
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hacan.alignment import STREAMS
from hacan.errors import UserError
from hacan.models.hacan import HACAN

TIE_RULE = "a tie with a wrong item counts against us, at the border of the shortlist too"
MISS_RULE = "no correct item in the shortlist: no rank, a miss at every K"
PACKAGES = ("torch", "timm", "transformers", "numpy", "opencv-python-headless")

# Fields that must be equal for a comparison to be meaningful.
DATA_FIELDS = ("dataset", "split", "protocol", "images", "texts", "queries_i2t", "queries_t2i", "ids_hash")
RULE_FIELDS = ("tie_rule", "miss_rule", "top_k", "coarse")
# Fields that describe the compared systems; differences are listed.
SYSTEM_FIELDS = ("alignment", "direction", "precision", "features", "members")

PACKAGE = Path(__file__).parents[1]
# Code that influences features: everything between an image file or a token and the stored array.
FEATURE_CODE = ("models", "images", "types.py", "retrieval/ensemble.py", "retrieval/feature_cache.py")


def alignment_title(record: Mapping[str, Any]) -> str:
    """Return the alignment of a provenance record for people: "hybrid alignment, direction t2i"."""
    direction = f", direction {record['direction']}" if record["direction"] else ""
    return f"{record['alignment']} alignment{direction}"


def versions() -> dict[str, str]:
    """Return the versions of Python and the packages that influence numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


# -- hashes (hexadecimal) ---------------------------------------------------------------------------------------------


def content_hash(value: Any) -> str:
    """Return a hash of plain values; equal values have equal hashes."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=32).hexdigest()


def hash_of_files(paths: Sequence[str | Path], *, progress: bool = True) -> str:
    """Return a hash of the contents of files, in their order."""

    def digest(path: str | Path) -> str:
        try:
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "blake2b").hexdigest()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}; an evaluation needs every image") from error

    with ThreadPoolExecutor(4) as pool:
        digests = pool.map(digest, paths)
        return content_hash(
            list(tqdm(digests, total=len(paths), desc="hash", unit="file", delay=2, disable=not progress))
        )


def hash_of_tensors(state: Mapping[str, Tensor]) -> str:
    """Return a hash of names, types, shapes and values of tensors, such as a state dict."""
    total = hashlib.blake2b(digest_size=32)
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def code_hash(package: Path = PACKAGE) -> str:
    """Return a hash of the code that influences features."""
    digest = hashlib.blake2b()
    for name in FEATURE_CODE:
        path = package / name
        for source in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            digest.update(source.read_bytes())
    return digest.hexdigest()[:32]


def architecture_hash(model: HACAN) -> str:
    """Return a hash of what turns inputs into features besides the weights: modules, levels, the text encoder's config.

    The alignment is not included: models that differ in it alone share their features.
    """
    modules = {name: repr(module) for name, module in model.named_children() if module is not model.alignment}
    text = {k: v for k, v in model.text_encoder.backbone.config.to_dict().items() if not k.startswith("_")}
    text.pop("transformers_version", None)  # `versions` has it
    return content_hash([modules, model.image_encoder.levels, model.text_encoder.levels, repr(sorted(text.items()))])


def model_summary(model: HACAN) -> dict[str, Any]:
    """Return the architecture and the hyper-parameters of the alignment as plain values, for the record of a result."""
    return {
        "image_encoder": model.image_encoder.name,
        "image_levels": list(model.image_encoder.levels),
        "text_encoder": model.text_encoder.name,
        "text_levels": list(model.text_encoder.levels),
        "embed_dim": model.project_image_high.out_features,
        "activation": repr(model.aggregate_image.activation),
        **model.alignment.hyperparameters,
        **({} if model.alignment.streams == STREAMS else {"streams": list(model.alignment.streams)}),
    }


# -- comparing records ------------------------------------------------------------------------------------------------


def differing_fields(one: Mapping[str, Any], other: Mapping[str, Any], fields: tuple[str, ...]) -> list[str]:
    """Return the fields in which two records differ; a field that only one of them has differs too."""
    absent = object()
    return [field for field in fields if one.get(field, absent) != other.get(field, absent)]


def check_comparable(one: Mapping[str, Any], other: Mapping[str, Any], *, across: tuple[str, ...] = ()) -> list[str]:
    """Return the fields in which the systems of two records differ; raise `UserError` if they measure different things.

    across: fields of `RULE_FIELDS` that may differ, such as top_k.
    """
    forbidden = [field for field in across if field not in RULE_FIELDS]
    if forbidden:
        raise UserError(
            f"results cannot be compared across {forbidden[0]}: a paired test needs the same queries; across may name "
            f"{', '.join(RULE_FIELDS)}"
        )
    for field in differing_fields(one, other, DATA_FIELDS + RULE_FIELDS):
        if field not in across:
            hint = f" (to compare across it on purpose: --across {field})" if field in RULE_FIELDS else ""
            raise UserError(
                f"the results measure different things: {field} is {one.get(field)!r} in the first and "
                f"{other.get(field)!r} in the second{hint}"
            )
    return differing_fields(one, other, RULE_FIELDS + SYSTEM_FIELDS)


# -- files ------------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that it is there completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON atomically; infinity and NaN, which it does not have, become null."""
    write_atomically(path, json.dumps(_strict(value), indent=1, allow_nan=False) + "\n")


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
