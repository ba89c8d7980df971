"""Sources of an index: the images of a folder, and the texts of a CSV file."""

import hashlib
import os
from pathlib import Path

from hacan.csv_file import csv_columns, read_csv
from hacan.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
COLUMNS = ("caption", "text")


def images_below(folder: str | Path) -> list[Path]:
    """Return the absolute paths of all images below a folder, sorted; hidden files and links to folders are skipped."""
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the folder that holds your images")
    found = []

    def unreadable(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be listed ({error.strerror}): make it readable, or move it away")

    for place, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in files if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    return sorted(found)


def hash_of_file(path: Path) -> str:
    """Return the BLAKE2b hash of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=20)).hexdigest()


def hash_of_text(text: str) -> str:
    """Return the BLAKE2b hash of a text, in hexadecimal."""
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


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
