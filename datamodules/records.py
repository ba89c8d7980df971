"""What a data set is here: a list of images with their captions. Standard library only, nothing of torch."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hacan.errors import UserError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class CaptionedImage:
    """One image on disk with its captions (any number of them, METHOD section 6) and the split it belongs to."""

    path: Path
    captions: tuple[str, ...]
    image_id: int
    split: str


def of_split(records: Iterable[CaptionedImage], split: str) -> list[CaptionedImage]:
    """The records of one split, in their order; a split without any is a `UserError` that says which ones there are."""
    records = list(records)
    chosen = [record for record in records if record.split == split]
    if not chosen:
        counts = Counter(record.split for record in records)
        there = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items())) or "none at all"
        raise UserError(f"the split {split!r} has no images: the data set's splits are {there}")
    return chosen
