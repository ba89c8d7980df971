"""Karpathy's split files: Flickr30K, Flickr8K, MS-COCO (METHOD section 7)."""

import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.files import (
    caption_of,
    check_root,
    expect,
    first_file,
    first_folder,
    locate_images,
    member,
    read_json,
    safe_path,
)
from datamodules.records import SPLIT_NAMES, CaptionedImage
from hacan.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Folders and files of a data set below data_root; of several names the first that exists is used."""

    folders: tuple[str, ...]
    image_folders: tuple[str, ...]  # under the folder; "" is the folder itself
    json_name: str
    holding: tuple[str, ...] = ()  # subfolders by which the image folder is recognised


FLICKR30K = Layout(
    folders=("f30k", "flickr30k"),
    image_folders=("images", "flickr30k-images"),
    json_name="dataset_flickr30k.json",
)
FLICKR8K = Layout(folders=("f8k", "flickr8k"), image_folders=("images",), json_name="dataset_flickr8k.json")
COCO = Layout(
    folders=("coco",),
    image_folders=("images", ""),
    json_name="dataset_coco.json",
    holding=("train2014", "val2014"),
)


def read_karpathy(
    data_root: Path, layout: Layout, *, use_restval: bool, check_files: bool = True
) -> list[CaptionedImage]:
    """Return the records of a data set; `use_restval`: add the restval images to train, otherwise omit them."""
    check_root(data_root)
    if (data_root / layout.json_name).is_file():
        raise UserError(
            f"data_root={str(data_root)!r} holds {layout.json_name} itself; put both into a folder named "
            f"{' or '.join(layout.folders)}, and give the folder that holds that one"
        )
    folder = first_folder([data_root / name for name in layout.folders], what="the data set's folder")
    json_path = first_file([folder / layout.json_name], what="the split file")
    images_folder = image_folder(folder, layout)
    records = parse_karpathy(read_json(json_path), images_folder, where=str(json_path), use_restval=use_restval)
    return locate_images(records, listed_in=json_path) if check_files else records


def image_folder(folder: Path, layout: Layout) -> Path:
    """Return the folder that file names in the JSON are relative to."""
    candidates = [folder / name for name in layout.image_folders]
    if not layout.holding:
        return first_folder(candidates, what="the folder of images")
    inner = [candidate / name for candidate in candidates for name in layout.holding]
    return first_folder(inner, what="the folder of images").parent


def parse_karpathy(content: Any, images_folder: Path, *, where: str, use_restval: bool) -> list[CaptionedImage]:
    """Return the records of a Karpathy file's content; raise `UserError` with the place of an invalid entry."""
    records: list[CaptionedImage] = []
    seen: dict[int, str] = {}
    splits: dict[str, str] = {}
    for number, image in enumerate(member(content, "images", list, where=where)):
        place = f"{where}, images[{number}]"
        name = member(image, "filename", str, where=place)
        split = member(image, "split", str, where=place)
        if split not in ("restval", *SPLIT_NAMES):
            raise UserError(f"{place}, 'split' is {split!r}: expected one of train, restval, val, test")
        image_id = member(image, "imgid", int, where=place) if "imgid" in image else number
        if not -(2**63) <= image_id < 2**63:
            raise UserError(f"{place}, 'imgid' is {image_id}: expected a number of 64 bits")
        if image_id in seen:
            raise UserError(f"{place}, 'imgid' {image_id} is that of {seen[image_id]!r} too: expected one per image")
        seen[image_id] = name
        inner = expect(image.get("filepath", ""), str, where=f"{place}, 'filepath'")
        folder = safe_path(images_folder, inner, where=f"{place}, 'filepath'") if inner else images_folder
        captions = tuple(
            caption_of(sentence, "raw", where=f"{place}, sentences[{index}]")
            for index, sentence in enumerate(member(image, "sentences", list, where=place))
        )
        if split == "restval" and not use_restval:
            continue
        records.append(
            CaptionedImage(
                path=safe_path(folder, name, where=f"{place}, 'filename'"),
                captions=captions,
                image_id=image_id,
                split="train" if split == "restval" else SPLIT_NAMES[split],
            )
        )
        path, chosen = unicodedata.normalize("NFC", os.path.normpath(records[-1].path)), records[-1].split
        if splits.setdefault(path, chosen) != chosen:
            raise UserError(
                f"{place}: {name!r} is in the split {chosen!r} here and in {splits[path]!r} above; an image belongs to "
                "one split"
            )
    if not records:
        raise UserError(f"{where} lists no images")
    return records
