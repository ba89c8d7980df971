"""Check a data set split by split before training (`scripts/check_data.py`)."""

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from datamodules.captions_file import NAMES as CAPTIONS_FILES
from datamodules.captions_file import read_captions_file
from datamodules.evaluation_data import unreadable_images
from datamodules.files import locate_files
from datamodules.karpathy import COCO, FLICKR8K, FLICKR30K, Layout, read_karpathy
from datamodules.readers import read_records
from datamodules.records import CAPTIONS_PER_IMAGE, SPLITS, CaptionedImage
from datamodules.scene_drawing import JSON_NAME as SCENES_JSON
from hacan.errors import UserError

SCENES = Layout(folders=("scenes",), image_folders=("",), json_name=SCENES_JSON)  # read from disk, never drawn
LOOKED_FOR = {
    "f30k": FLICKR30K.folders,
    "f8k": FLICKR8K.folders,
    "coco": COCO.folders,
    "captions": CAPTIONS_FILES,
    "scenes": SCENES.folders,
}
OFFICIAL = {  # images of each split, METHOD section 7 (COCO's train: with restval)
    "f30k": {"train": 29_000, "val": 1_014, "test": 1_000},
    "f8k": {"train": 6_000, "val": 1_000, "test": 1_000},
    "coco": {"train": 82_783 + 30_504, "val": 5_000, "test": 5_000},
}


@dataclass
class SplitFindings:
    """Counts and problems of one split."""

    images: int = 0
    captions: int = 0
    missing: list[Path] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)  # reasons, which name the image
    without_captions: int = 0
    empty_captions: int = 0


@dataclass
class Findings:
    """Counts and problems of one data set. `problem`: why it could not be read, or None."""

    name: str
    splits: dict[str, SplitFindings] = field(default_factory=dict)
    problem: str | None = None
    listed_twice: int = 0  # images that two records share
    further_captions: int = 0  # beyond the first five of an image, which are not used by default
    decoded: bool = False

    @property
    def complete(self) -> bool:
        """Whether each split has images and captions, and all image files exist and are readable."""
        return self.problem is None and all(
            split.captions and not split.missing and not split.unreadable for split in self.splits.values()
        )


def present_data_sets(data_root: Path) -> list[str]:
    """Return the names of the data sets found in `data_root`."""
    return [name for name, places in LOOKED_FOR.items() if any((data_root / place).exists() for place in places)]


def inspect_data_set(
    name: str, data_root: Path, *, use_restval: bool = True, decode: bool = False, progress: bool = True
) -> Findings:
    """Read the files of a data set and check that its images exist; `decode`: also decode each image."""
    findings = Findings(name, decoded=decode)
    try:
        records = _listed_records(name, data_root, use_restval=use_restval)
        files = locate_files(record.path for record in records)
    except UserError as error:
        findings.problem = str(error)
        return findings
    findings.splits = {split: SplitFindings() for split in SPLITS}
    for record in records:
        split = findings.splits[record.split]
        split.images += 1
        captions = record.captions[: CAPTIONS_PER_IMAGE.get(name)]
        findings.further_captions += len(record.captions) - len(captions)
        split.captions += len(captions)
        split.without_captions += not captions
        split.empty_captions += sum(not caption.strip() for caption in captions)
        if files[record.path] is None:
            split.missing.append(record.path)
    findings.listed_twice = sum(count - 1 for count in Counter(record.path for record in records).values())
    if decode:
        there = [replace(record, path=file) for record in records if (file := files[record.path]) is not None]
        for record, reason in unreadable_images(there, progress=progress):
            findings.splits[record.split].unreadable.append(reason)
    return findings


def _listed_records(name: str, data_root: Path, *, use_restval: bool) -> list[CaptionedImage]:
    if name == "scenes":
        return read_karpathy(data_root, SCENES, use_restval=False, check_files=False)
    if name == "captions":
        return read_captions_file(data_root, check_files=False)
    return read_records(name, data_root, use_restval=use_restval, captions_per_image=0, check_files=False)


def describe(findings: Findings, *, most: int = 10) -> str:
    """Return a table, with at most `most` entries of each kind of problem."""
    if findings.problem is not None:
        return f"{findings.name}: {findings.problem}"
    lines = [
        f"{findings.name}: {'complete' if findings.complete else 'INCOMPLETE'}"
        f"{', every image was decoded' if findings.decoded else ''}",
        f"  {'split':<6}{'images':>9}{'captions':>10}{'missing':>9}{'bad':>6}  notes",
    ]
    problems = []
    for name, split in findings.splits.items():
        bad = str(len(split.unreadable)) if findings.decoded else "-"
        row = f"  {name:<6}{split.images:>9}{split.captions:>10}{len(split.missing):>9}{bad:>6}"
        lines.append(f"{row}  {'; '.join(_notes(findings.name, name, split))}".rstrip())
        problems += _some([f"missing: {path}" for path in split.missing], most)
        problems += _some([f"bad: {reason}" for reason in split.unreadable], most)
    if findings.listed_twice:
        lines.append(f"  {findings.listed_twice} image(s) are listed more than once")
    if findings.further_captions:
        lines.append(
            f"  {findings.further_captions} caption(s) beyond the first {CAPTIONS_PER_IMAGE[findings.name]} of an "
            "image are not used (captions_per_image=0 uses all)"
        )
    return "\n".join(lines + [f"  {problem}" for problem in problems])


def _notes(data_set: str, name: str, split: SplitFindings) -> list[str]:
    notes = []
    official = OFFICIAL.get(data_set, {}).get(name)
    if not split.images:
        notes.append("EMPTY: no images")
    elif not split.captions:
        notes.append("EMPTY: no captions")
    if official is not None and split.images != official:
        notes.append(f"the published split has {official} images")
    if split.without_captions:
        notes.append(f"{split.without_captions} images without a caption")
    if split.empty_captions:
        notes.append(f"{split.empty_captions} empty captions")
    return notes


def _some(lines: list[str], most: int) -> list[str]:
    return lines[:most] + ([f"... and {len(lines) - most} more"] if len(lines) > most else [])
