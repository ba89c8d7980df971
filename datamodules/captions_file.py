"""Custom data: `captions.csv` or `captions.jsonl` with image, caption and optionally split, beside the images."""

import hashlib
import logging
import posixpath
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from datamodules.files import (
    caption_of,
    check_root,
    expect,
    first_file,
    locate_images,
    member,
    parse_json,
    safe_path,
)
from datamodules.records import SPLIT_NAMES, SPLITS, CaptionedImage
from hacan.csv_file import csv_columns, read_csv
from hacan.errors import UserError

log = logging.getLogger(__name__)

NAMES = ("captions.csv", "captions.jsonl")
SHARES = {"test": 0.1, "val": 0.1}  # share of the images if the file has no splits; the rest is train


class Row(NamedTuple):
    """A row of the file."""

    image: str
    caption: str
    split: str | None  # None: not in the file
    place: str  # named in errors


def read_captions_file(data_root: Path, *, check_files: bool = True) -> list[CaptionedImage]:
    """Return the records of `data_root/captions.csv` or `.jsonl`; several rows of one image are several captions.

    Image names are relative to `data_root/images` if that folder exists, otherwise to `data_root`. Without a split, a
    hash of the image's name puts 10% into test and 10% into val; adding images does not move others.
    """
    check_root(data_root)
    path = first_file([data_root / name for name in NAMES], what="the captions file")
    rows = list(_csv_rows(path) if path.suffix == ".csv" else _jsonl_rows(path))
    if not rows:
        raise UserError(f"{path} has no captions")
    images_folder = data_root / "images" if (data_root / "images").is_dir() else data_root
    records = group_rows(rows, images_folder)
    if all(row.split is None for row in rows):
        counts = {split: sum(record.split == split for record in records) for split in SPLITS}
        log.warning("%s has no splits: images are assigned by a hash of their names, %s", path, counts)
    return locate_images(records, listed_in=path) if check_files else records


def group_rows(rows: list[Row], images_folder: Path) -> list[CaptionedImage]:
    """Return one record per image, in the order of first occurrence."""
    captions: dict[str, list[str]] = {}
    names: dict[str, str] = {}  # as in the file: their hashes decide the splits
    splits: dict[str, str | None] = {}
    for row in rows:
        safe_path(images_folder, row.image, where=f"{row.place}, 'image'")
        name = posixpath.normpath(row.image)  # "./dog.jpg" is "dog.jpg"
        image = unicodedata.normalize("NFC", name)
        names.setdefault(image, name)
        if row.split is not None and row.split not in SPLIT_NAMES:
            raise UserError(f"{row.place}, 'split' is {row.split!r}: expected one of {', '.join(SPLIT_NAMES)}")
        if (row.split is None) != (rows[0].split is None):
            here, there = ("no split", "one") if row.split is None else ("a split", "none")
            raise UserError(f"{row.place} has {here}, but {rows[0].place} has {there}: give all rows a split, or none")
        split = None if row.split is None else SPLIT_NAMES[row.split]
        if splits.setdefault(image, split) != split:
            raise UserError(
                f"{row.place}: {row.image!r} is in the split {split!r} here and in {splits[image]!r} above; an image "
                "belongs to one split"
            )
        captions.setdefault(image, []).append(row.caption)
    return [
        CaptionedImage(
            path=images_folder / image,
            captions=tuple(texts),
            image_id=number,
            split=splits[image] or split_of_name(names[image]),
        )
        for number, (image, texts) in enumerate(captions.items())
    ]


def split_of_name(image: str) -> str:
    """Return the split of an image by the SHA-256 of its name, for files without splits."""
    place = int.from_bytes(hashlib.sha256(image.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64
    for split, share in SHARES.items():
        if place < share:
            return split
        place -= share
    return "train"


def _csv_rows(path: Path) -> Iterator[Row]:
    columns = csv_columns(path)
    missing = [name for name in ("image", "caption") if name not in columns]
    if missing:
        raise UserError(
            f"{path} has no column {' and no column '.join(missing)}: its first line is {','.join(columns)!r}, "
            "expected image,caption or image,caption,split"
        )
    for place, row in read_csv(path):
        yield Row(row["image"].strip(), row["caption"], row.get("split", "").strip() or None, place)


def _jsonl_rows(path: Path) -> Iterator[Row]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: captions may hold other separators
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as JSON Lines in UTF-8: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        row = expect(parse_json(line, where=place), dict, where=place)
        split = row.get("split")
        yield Row(
            member(row, "image", str, where=place),
            caption_of(row, "caption", where=place),
            None if split is None else expect(split, str, where=f"{place}, 'split'") or None,
            place,
        )
