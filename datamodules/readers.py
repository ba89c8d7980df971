"""Select the reader of a data set by name."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from datamodules.captions_file import read_captions_file
from datamodules.coco_ids import read_coco_ids
from datamodules.karpathy import COCO, FLICKR8K, FLICKR30K, read_karpathy
from datamodules.records import CAPTIONS_PER_IMAGE, SPLITS, CaptionedImage
from datamodules.scene_drawing import read_scenes
from hacan.errors import UserError

NAMES = ("f30k", "f8k", "coco", "captions", "scenes")


def read_records(
    datasets: str,
    data_root: str | Path,
    *,
    use_restval: bool = True,
    captions_per_image: int | None = None,
    scenes_pictures: Sequence[int] = (1000, 100, 200),
    check_files: bool = True,
) -> list[CaptionedImage]:
    """Return all records of the data set `datasets` in `data_root` (METHOD section 7).

    `captions_per_image`: only the first captions of an image, 0 for all; None: 5 for f30k, f8k and coco, else all.
    `check_files`: raise `UserError` for missing image files (they are not decoded). `scenes_pictures`: number of images
    of the embedded demo for train, val and test. Images without captions are kept, as distractors in a ranking.
    """
    root = Path(data_root).expanduser()
    if datasets == "f30k":
        records = read_karpathy(root, FLICKR30K, use_restval=use_restval, check_files=check_files)
    elif datasets == "f8k":
        records = read_karpathy(root, FLICKR8K, use_restval=use_restval, check_files=check_files)
    elif datasets == "coco":
        records = _read_coco(root, use_restval=use_restval, check_files=check_files)
    elif datasets == "captions":
        records = read_captions_file(root, check_files=check_files)
    elif datasets == "scenes":
        records = read_scenes(root / "scenes", counts=dict(zip(SPLITS, scenes_pictures, strict=True)))
    else:
        raise UserError(f"datasets={datasets!r}: expected one of {', '.join(NAMES)}")
    count = CAPTIONS_PER_IMAGE.get(datasets, 0) if captions_per_image is None else captions_per_image
    return [replace(record, captions=record.captions[:count]) for record in records] if count else records


def _read_coco(root: Path, *, use_restval: bool, check_files: bool) -> list[CaptionedImage]:
    """Read Karpathy's file if it exists, otherwise COCO's annotations with lists of ids."""
    folder = root / "coco"
    has_ids = any((place / "annotations").is_dir() for place in (folder, root))
    if has_ids and not (folder / COCO.json_name).is_file():
        return read_coco_ids(root, use_restval=use_restval, check_files=check_files)
    return read_karpathy(root, COCO, use_restval=use_restval, check_files=check_files)
