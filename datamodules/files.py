"""Find files and folders and read JSON; errors name the place and what was expected there."""

import json
import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path, PurePath
from typing import Any

from datamodules.records import CaptionedImage
from hacan.errors import UserError

_NAMES = {dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number"}


def first_folder(candidates: Sequence[Path], *, what: str) -> Path:
    """Return the first of `candidates` that is a folder."""
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    raise UserError(f"{what} not found: looked for {_listed(candidates)}")


def first_file(candidates: Sequence[Path], *, what: str) -> Path:
    """Return the first of `candidates` that is a file."""
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise UserError(f"{what} not found: looked for {_listed(candidates)}")


def check_root(data_root: Path) -> None:
    """Raise `UserError` if `data_root` is not a folder."""
    if not data_root.is_dir():
        state = "is not a folder" if data_root.exists() else "does not exist"
        raise UserError(f"data_root={str(data_root)!r} {state}; give the folder that holds the data set's folder")


def locate_files(paths: Iterable[Path]) -> dict[Path, Path | None]:
    """Return the files that `paths` name, None where there is none.

    A name in another Unicode normal form than that of the file (macOS and zip programs change it) is matched. Each
    folder is listed once, because a stat per file takes minutes on NFS.
    """

    @cache
    def names(folder: Path) -> dict[str, str]:
        entries = _file_names(folder)
        return {unicodedata.normalize("NFC", name): name for name in entries} | {name: name for name in entries}

    @cache
    def located_folder(folder: Path) -> Path:
        if folder.is_dir() or folder.parent == folder:
            return folder
        parent = located_folder(folder.parent)
        wanted = unicodedata.normalize("NFC", folder.name)
        inner = [path for path in parent.glob("*/") if unicodedata.normalize("NFC", path.name) == wanted]
        return inner[0] if inner else folder

    def located(path: Path) -> Path | None:
        folder = located_folder(path.parent)
        name = names(folder).get(path.name) or names(folder).get(unicodedata.normalize("NFC", path.name))
        return None if name is None else folder / name

    return {path: located(path) for path in paths}


def locate_images(records: Sequence[CaptionedImage], *, listed_in: Path) -> list[CaptionedImage]:
    """Return the records with the paths of their files.

    Raise `UserError` if images listed in `listed_in` are missing, with the first one and the number of others.
    """
    files = locate_files(record.path for record in records)
    missing = [path for path, file in files.items() if file is None]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"image {missing[0]}{others}, listed in {listed_in}, not found; complete the images "
            "(scripts/check_data.py lists them all)"
        )
    return [replace(record, path=files[record.path] or record.path) for record in records]


def safe_path(folder: Path, name: str, *, where: str) -> Path:
    """Return `folder / name`; raise `UserError` for unprintable characters and for paths out of the folder."""
    if not name or any(character < " " or "\ud800" <= character <= "\udfff" for character in name):
        raise UserError(f"{where} is {name[:80]!r}: expected the name of an image file")
    if os.path.isabs(name) or ".." in PurePath(name).parts:
        raise UserError(f"{where} is {name[:80]!r}: expected a path within {folder}")
    return folder / name


def _file_names(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except (OSError, ValueError) as error:
        raise UserError(f"the folder {folder} cannot be listed: {error}") from error


def _listed(candidates: Sequence[Path]) -> str:
    return " or ".join(str(candidate) for candidate in candidates)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; raise `UserError` with line and column if it is not valid."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    return parse_json(text, where=str(path))


def parse_json(text: str, *, where: str) -> Any:
    """Return the value of a JSON text; `where` is named in errors."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{where} is broken JSON at {place}: {error.msg}; download or write it again") from error
    except (RecursionError, ValueError) as error:  # nested thousands deep; a number of thousands of digits
        raise UserError(f"{where} is JSON that cannot be read: {error}") from error


def expect(value: Any, kind: type, *, where: str) -> Any:
    """Return `value`; raise `UserError` if it is not of `kind` (True and False are not numbers)."""
    if not isinstance(value, kind) or (kind in (int, float) and isinstance(value, bool)):
        shown = repr(value)
        found = "nothing (null)" if value is None else shown if len(shown) <= 40 else f"{shown[:40]}..."
        raise UserError(f"{where} is {found}: expected {_NAMES[kind]}")
    return value


def member(value: Any, key: str, kind: type, *, where: str) -> Any:
    """Return `value[key]`; raise `UserError` if it is missing or not of `kind`."""
    if key not in expect(value, dict, where=where):
        there = ", ".join(repr(name[:40]) for name in sorted(value)[:8]) or "no keys"
        raise UserError(f"{where} lacks the key {key!r}; it has {there}")
    return expect(value[key], kind, where=f"{where}, {key!r}")


def caption_of(value: Any, key: str, *, where: str) -> str:
    """Return the text `value[key]`, with lone surrogates (valid in JSON, not in UTF-8) replaced."""
    text = member(value, key, str, where=where)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
