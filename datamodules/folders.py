"""Finds folders and images on disk; what is missing is named, with what was looked for."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from hacan.errors import UserError


def first_folder(candidates: Sequence[Path], *, what: str) -> Path:
    """The first of `candidates` that is a folder."""
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    raise UserError(f"{what} not found: looked for {_listed(candidates)}")


def first_file(candidates: Sequence[Path], *, what: str) -> Path:
    """The first of `candidates` that is a file."""
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise UserError(f"{what} not found: looked for {_listed(candidates)}")


def check_root(data_root: Path) -> None:
    """`data_root` is a folder."""
    if not data_root.is_dir():
        state = "is not a folder" if data_root.exists() else "does not exist"
        raise UserError(f"data_root={str(data_root)!r} {state}; give the folder that holds the data set's folder")


def missing_files(paths: Iterable[Path]) -> list[Path]:
    """Those of `paths` that are no files; each folder is listed once: asking for every file takes minutes on NFS."""
    listings: dict[Path, set[str]] = {}
    missing = []
    for path in paths:
        folder = path.parent
        if folder not in listings:
            listings[folder] = _file_names(folder)
        if path.name not in listings[folder]:
            missing.append(path)
    return missing


def check_image_files(paths: Iterable[Path], *, listed_in: Path) -> None:
    """All images that `listed_in` speaks of are there; the first that is not is named, with how many others."""
    missing = missing_files(paths)
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"image {missing[0]}{others}, listed in {listed_in}, not found; complete the images "
            "(scripts/check_data.py lists them all)"
        )


def safe_path(folder: Path, name: str, *, where: str) -> Path:
    """`folder / name`, which has to be a path that a file system can hold and a line can show."""
    if not name or any(character < " " or "\ud800" <= character <= "\udfff" for character in name):
        raise UserError(f"{where} is {name[:80]!r}: expected the name of a image file")
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
