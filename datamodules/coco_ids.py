"""MS-COCO from its own annotation files, split by lists of annotation ids (METHOD section 7, the `ids` layout)."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datamodules.files import caption_of, check_root, first_folder, locate_images, member, read_json, safe_path
from datamodules.karpathy import COCO, image_folder
from datamodules.records import CaptionedImage
from hacan.errors import UserError

ID_FILES = {"train": "train", "val": "dev", "test": "test"}  # split -> name in coco_*_ids.npy


class Annotation(NamedTuple):
    """A caption and its image."""

    image_id: int
    caption: str
    path: Path


def read_coco_ids(data_root: Path, *, use_restval: bool, check_files: bool = True) -> list[CaptionedImage]:
    """Return the records of `annotations/captions_{train,val}2014.json` and `annotations/coco_*_ids.npy`.

    A list contains the annotations of a split; an image has those of its captions that are listed, in their order.
    """
    check_root(data_root)
    folder = first_folder([data_root / name for name in COCO.folders], what="the data set's folder")
    annotations_folder = first_folder([folder / "annotations", data_root / "annotations"], what="COCO's annotations")
    images_folder = image_folder(folder, COCO)
    annotations: dict[int, Annotation] = {}
    for year in ("train2014", "val2014"):
        path = annotations_folder / f"captions_{year}.json"
        annotations.update(parse_annotations(read_json(path), images_folder / year, where=str(path)))
    records: list[CaptionedImage] = []
    owner: dict[int, str] = {}
    for split, name in ID_FILES.items():
        names = [name, "restval"] if split == "train" and use_restval else [name]
        captions: dict[int, list[Annotation]] = {}
        for name in names:
            path = annotations_folder / f"coco_{name}_ids.npy"
            for annotation in _chosen(annotations, path):
                if owner.setdefault(annotation.image_id, split) != split:
                    raise UserError(f"{path}: image {annotation.image_id} is in {owner[annotation.image_id]} as well")
                captions.setdefault(annotation.image_id, []).append(annotation)
        records.extend(
            CaptionedImage(
                path=group[0].path, captions=tuple(one.caption for one in group), image_id=image_id, split=split
            )
            for image_id, group in captions.items()
        )
    return locate_images(records, listed_in=annotations_folder) if check_files else records


def _chosen(annotations: dict[int, Annotation], path: Path) -> list[Annotation]:
    chosen = []
    for annotation_id in read_ids(path):
        if annotation_id not in annotations:
            raise UserError(f"{path} lists the annotation {annotation_id}, which no captions file beside it has")
        chosen.append(annotations[annotation_id])
    return chosen


def read_ids(path: Path) -> list[int]:
    """Return the annotation ids of a .npy file; pickles are refused, because they can run code."""
    try:
        ids = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(
            f"the list of ids {path} not found; {_remedy(path)}a {COCO.json_name} in {path.parent.parent} also works"
        ) from error
    except Exception as error:  # numpy raises many types on damaged files
        raise UserError(f"{path} is not an array of ids (.npy): {' '.join(str(error).split())}") from error
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
        kind = f"{ids.dtype} of shape {ids.shape}" if isinstance(ids, np.ndarray) else type(ids).__name__
        raise UserError(f"{path} holds {kind}: expected a non-empty one-dimensional array of integers")
    return ids.tolist()


def _remedy(path: Path) -> str:
    return "use_restval=False trains without it; " if "restval" in path.name else ""


def parse_annotations(content: Any, images_folder: Path, *, where: str) -> dict[int, Annotation]:
    """Return the captions of a COCO captions file's content by annotation id."""
    paths: dict[int, Path] = {}
    for number, image in enumerate(member(content, "images", list, where=where)):
        place = f"{where}, images[{number}]"
        name = member(image, "file_name", str, where=place)
        paths[_id(image, "id", place)] = safe_path(images_folder, name, where=f"{place}, 'file_name'")
    found: dict[int, Annotation] = {}
    for number, annotation in enumerate(member(content, "annotations", list, where=where)):
        place = f"{where}, annotations[{number}]"
        image_id = _id(annotation, "image_id", place)
        if image_id not in paths:
            raise UserError(f"{place}, 'image_id' is {image_id}: there is no such image in this file")
        caption = caption_of(annotation, "caption", where=place)
        found[_id(annotation, "id", place)] = Annotation(image_id, caption, paths[image_id])
    return found


def _id(value: Any, key: str, place: str) -> int:
    number = member(value, key, int, where=place)
    if not -(2**63) <= number < 2**63:
        raise UserError(f"{place}, {key!r} is {number}: expected a number of 64 bits")
    return number
