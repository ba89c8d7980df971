"""The name of a data set to its reader."""

from collections.abc import Sequence
from pathlib import Path

from datamodules.captions_file import read_captions_file
from datamodules.coco_ids import read_coco_ids
from datamodules.framing import PHOTOS, SCENES, Framing
from datamodules.karpathy import COCO, FLICKR8K, FLICKR30K, read_karpathy
from datamodules.records import SPLITS, CaptionedImage
from datamodules.scene_drawing import read_scenes
from hacan.errors import UserError

NAMES = ("f30k", "f8k", "coco", "captions", "scenes")


def read_records(
    datasets: str,
    data_root: str | Path,
    *,
    use_restval: bool = True,
    scenes_pictures: Sequence[int] = (1000, 100, 200),
    check_files: bool = True,
) -> list[CaptionedImage]:
    """All records of the data set `datasets` under `data_root` (METHOD section 7).

    `check_files`: every image must be there (not that it can be decoded). `scenes_pictures`: how many images the
    embedded demo draws for train, val and test. Images without a caption stay: they are distractors in a ranking.
    """
    root = Path(data_root).expanduser()
    if datasets == "f30k":
        return read_karpathy(root, FLICKR30K, use_restval=use_restval, check_files=check_files)
    if datasets == "f8k":
        return read_karpathy(root, FLICKR8K, use_restval=use_restval, check_files=check_files)
    if datasets == "coco":
        return _read_coco(root, use_restval=use_restval, check_files=check_files)
    if datasets == "captions":
        return read_captions_file(root, check_files=check_files)
    if datasets == "scenes":
        return read_scenes(root / "scenes", counts=dict(zip(SPLITS, scenes_pictures, strict=True)))
    raise UserError(f"datasets={datasets!r}: expected one of {', '.join(NAMES)}")


def framing_of(datasets: str) -> Framing:
    """How the images of a data set are cut to squares."""
    return SCENES if datasets == "scenes" else PHOTOS


def _read_coco(root: Path, *, use_restval: bool, check_files: bool) -> list[CaptionedImage]:
    """Karpathy's file where it is there, otherwise COCO's annotations with lists of ids."""
    folder = root / "coco"
    has_ids = any((place / "annotations").is_dir() for place in (folder, root))
    if has_ids and not (folder / COCO.json_name).is_file():
        return read_coco_ids(root, use_restval=use_restval, check_files=check_files)
    return read_karpathy(root, COCO, use_restval=use_restval, check_files=check_files)
