"""Sources of an index: the images of a folder, and the texts of a CSV file."""

import hashlib
import os
import stat
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from hacan.csv_file import csv_columns, read_csv
from hacan.errors import UserError
from hacan.images.io import FORMATS, HEADER, image_kind

COLUMNS = ("caption", "text")
SUFFIXES = (*(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp"), *(".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2"))


@dataclass
class FolderContent:
    """The files below a folder."""

    images: list[Path] = field(default_factory=list)  # absolute, sorted
    left_out: Counter[str] = field(default_factory=Counter)  # files that are not read, by kind: ".txt", "HEIC", ...
    unreadable: list[tuple[str, str]] = field(default_factory=list)  # path of a file or folder, reason


def images_below(folder: str | Path) -> FolderContent:
    """Return all images below a folder; hidden files and links to folders are skipped.

    The content of a file decides whether it is an image, not its name; one that is named as an image and has another
    content is among the images too, because decoding it says what is wrong. Only regular files are opened.
    """
    folder = Path(folder).expanduser().resolve()
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the folder that holds your images")
    found = FolderContent()

    def unreadable(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise UserError(f"{folder} cannot be listed ({error.strerror}): make it readable") from error
        found.unreadable.append((error.filename, f"the folder cannot be listed: {error.strerror}"))

    for place, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(place, name) for name in files if not name.startswith(".")):
            try:
                kind = _kind(path)
            except OSError as error:
                found.unreadable.append((str(path), error.strerror or str(error)))
                continue
            if kind in FORMATS or kind in SUFFIXES:
                found.images.append(path)
            else:
                found.left_out[kind] += 1
    found.images.sort()
    return found


def _kind(path: Path) -> str:
    """Return the format of an image; of other files the suffix, or what they are."""
    if not stat.S_ISREG(path.stat().st_mode):
        return "pipes and devices"
    with open(path, "rb") as file:
        header = file.read(HEADER)
    return image_kind(header) or path.suffix.lower() or "without suffix"


def hash_of_file(path: Path) -> str:
    """Return the BLAKE2b hash of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=20)).hexdigest()


def hash_of_text(text: str) -> str:
    """Return the BLAKE2b hash of a text, in hexadecimal."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()


def texts_of_csv(path: str | Path) -> list[str]:
    """Return the distinct texts of a CSV file with a column `caption` or `text`, in the order of the file."""
    path = Path(path)
    columns = csv_columns(path)
    column = next((name for name in COLUMNS if name in columns), None)
    if column is None:
        raise UserError(
            f"{path} has the columns {', '.join(columns) or '(none)'}; expected caption or text in its first line"
        )
    texts = [row[column].strip() for _, row in read_csv(path)]
    texts = list(dict.fromkeys(text for text in texts if text))
    if not texts:
        raise UserError(f"{path} holds no text in its column {column!r}")
    return texts
