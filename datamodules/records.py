"""A data set is a list of images with their captions. Standard library only."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hacan.errors import UserError

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {name: name for name in SPLITS} | {"dev": "val", "valid": "val", "validation": "val"}  # as in files
CAPTIONS_PER_IMAGE = {"f30k": 5, "f8k": 5, "coco": 5}  # the field's protocol (METHOD section 6); of others all


@dataclass(frozen=True, slots=True)
class CaptionedImage:
    """An image file with its captions (any number, METHOD section 6) and its split."""

    path: Path
    captions: tuple[str, ...]
    image_id: int
    split: str


def of_split(records: Iterable[CaptionedImage], split: str) -> list[CaptionedImage]:
    """Return the records of one split in order; raise `UserError` with the splits that exist if it has none."""
    records = list(records)
    chosen = [record for record in records if record.split == split]
    if not chosen:
        counts = Counter(record.split for record in records)
        there = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items())) or "none at all"
        raise UserError(f"the split {split!r} has no images: the data set's splits are {there}")
    return chosen
