"""Karpathy's split files: Flickr30K, Flickr8K, MS-COCO (METHOD section 7)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.folders import check_image_files, check_root, first_file, first_folder, safe_path
from datamodules.json_files import caption_of, expect, member, read_json
from datamodules.records import CaptionedImage
from hacan.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a data set lies under data_root; the first that is there counts."""

    folders: tuple[str, ...]
    image_folders: tuple[str, ...]  # under the folder; "" is the folder itself
    json_name: str
    holding: tuple[str, ...] = ()  # the folder of images is the one that holds one of these


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
    """The records of one data set; `use_restval`: restval images are train images, otherwise they are left out."""
    check_root(data_root)
    if (data_root / layout.json_name).is_file():
        raise UserError(
            f"data_root={str(data_root)!r} holds {layout.json_name} itself; put both into a folder named "
            f"{' or '.join(layout.folders)}, and give the folder that holds that one"
        )
    folder = first_folder([data_root / name for name in layout.folders], what="the data set's folder")
    json_path = first_file([folder / layout.json_name], what="the split file")
    pictures = image_folder(folder, layout)
    records = parse_karpathy(read_json(json_path), pictures, where=str(json_path), use_restval=use_restval)
    if check_files:
        check_image_files((record.path for record in records), listed_in=json_path)
    return records


def image_folder(folder: Path, layout: Layout) -> Path:
    """The folder that file names in the JSON are relative to."""
    candidates = [folder / name for name in layout.image_folders]
    if not layout.holding:
        return first_folder(candidates, what="the folder of images")
    inner = [candidate / name for candidate in candidates for name in layout.holding]
    return first_folder(inner, what="the folder of images").parent


def parse_karpathy(content: Any, pictures: Path, *, where: str, use_restval: bool) -> list[CaptionedImage]:
    """Records of a Karpathy file's content; what is not as it should be is a `UserError` with the place."""
    records: list[CaptionedImage] = []
    seen: dict[int, str] = {}
    for number, image in enumerate(member(content, "images", list, where=where)):
        place = f"{where}, images[{number}]"
        name = member(image, "filename", str, where=place)
        split = member(image, "split", str, where=place)
        if split not in ("train", "restval", "val", "test"):
            raise UserError(f"{place}, 'split' is {split!r}: expected one of train, restval, val, test")
        image_id = member(image, "imgid", int, where=place) if "imgid" in image else number
        if not -(2**63) <= image_id < 2**63:
            raise UserError(f"{place}, 'imgid' is {image_id}: expected a number of 64 bits")
        if image_id in seen:
            raise UserError(f"{place}, 'imgid' {image_id} is that of {seen[image_id]!r} too: expected one per image")
        seen[image_id] = name
        inner = expect(image.get("filepath", ""), str, where=f"{place}, 'filepath'")
        folder = safe_path(pictures, inner, where=f"{place}, 'filepath'") if inner else pictures
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
                split="train" if split == "restval" else split,
            )
        )
    if not records:
        raise UserError(f"{where} lists no images")
    return records
