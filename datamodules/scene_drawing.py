"""Draw the demo's scenes with OpenCV and store them as a Karpathy file with PNG images."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from datamodules.files import locate_files, read_json
from datamodules.karpathy import parse_karpathy
from datamodules.records import CaptionedImage
from datamodules.scenes import Scene, SceneIndex, caption_scene, sample_scenes
from hacan.errors import UserError

FORMAT = 1  # increase it when the same parameters give other images or captions
JSON_NAME = "dataset_scenes.json"
DEFAULT_COUNTS = {"train": 1000, "val": 100, "test": 200}
SCENE_SIZE = 112  # pixels; a margin of an eighth keeps things inside mild crops
INK = {  # blue, green, red, as OpenCV orders them
    "red": (40, 40, 215),
    "green": (60, 160, 50),
    "blue": (210, 80, 40),
    "yellow": (40, 220, 240),
    "purple": (160, 50, 130),
    "orange": (20, 130, 245),
    "white": (245, 245, 245),
    "gray": (128, 128, 128),
    "black": (25, 25, 25),
}
RADIUS = {"small": 0.066, "large": 0.105}  # of the image's side
_PNG = (cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE)  # flat colours: smaller, and decoded twice as fast
_FINE = 4  # factor of supersampling, for smooth edges
_FRACTION_BITS = 4


def draw_scene(scene: Scene, *, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return an image of `scene`, [size, size, 3] uint8 BGR; `rng` varies positions and colours slightly."""
    canvas = np.empty((size * _FINE, size * _FINE, 3), np.uint8)
    canvas[:] = _tint(scene.background, rng)
    places = (0.29, 0.71) if len(scene.things) == 2 else (0.245, 0.5, 0.755)
    across = rng.uniform(0.35, 0.65)  # where the row lies vertically, the column horizontally
    for along, thing in zip(places, scene.things, strict=True):
        along = along + rng.uniform(-0.01, 0.01)
        beside = across + rng.uniform(-0.04, 0.04)
        x, y = (along, beside) if scene.layout == "row" else (beside, along)
        radius = RADIUS[thing.size] * rng.uniform(0.93, 1.0)
        centre = np.array([x, y]) * size * _FINE
        _draw_thing(canvas, thing.shape, centre, radius * size * _FINE, _tint(thing.colour, rng))
    return cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)


def _tint(colour: str, rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = np.clip(np.array(INK[colour]) + rng.integers(-10, 11, size=3), 0, 255).tolist()
    return red, green, blue


def _draw_thing(canvas: np.ndarray, shape: str, centre: np.ndarray, radius: float, ink: tuple[int, int, int]) -> None:
    scale = 1 << _FRACTION_BITS
    if shape == "circle":
        x, y = (int(value) for value in np.round(centre * scale))
        cv2.circle(canvas, (x, y), round(radius * scale), ink, -1, cv2.LINE_8, _FRACTION_BITS)
        return
    if shape == "square":
        angles, radii = np.array([45, 135, 225, 315]), np.array(1.15)
    elif shape == "triangle":
        angles, radii = np.array([-90, 30, 150]), np.array(1.2)
    elif shape == "star":
        angles, radii = -90 + 36 * np.arange(10), np.where(np.arange(10) % 2 == 0, 1.2, 0.5)
    else:
        raise ValueError(f"shape={shape!r} cannot be drawn; expected circle, square, triangle or star")
    turns = np.deg2rad(angles)
    corners = centre + radius * np.stack([radii * np.cos(turns), radii * np.sin(turns)], axis=1)
    cv2.fillPoly(canvas, [np.round(corners * scale).astype(np.int32)], ink, cv2.LINE_8, _FRACTION_BITS)


def write_scenes(
    folder: Path | str,
    *,
    counts: Mapping[str, int] = DEFAULT_COUNTS,
    seed: int = 0,
    scene_size: int = SCENE_SIZE,
    progress: bool = True,
) -> Path:
    """Write the demo's images and `dataset_scenes.json` to `folder` and return the path of the JSON file.

    The JSON file is written last and atomically: if it exists, all its images exist.
    """
    folder = Path(folder)
    parameters = _parameters(counts, seed, scene_size)
    image_folder = _image_folder(folder, parameters)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".making-", dir=folder))
        try:
            images = _make(staging, dict(counts), seed=seed, scene_size=scene_size, progress=progress)
            os.chmod(staging, 0o755)
            _put_in_place(staging, image_folder)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        for image in images:
            image["filepath"] = image_folder.name
        content = {"dataset": "scenes", "parameters": parameters, "images": images}
        target = folder / JSON_NAME
        draft = folder / f".dataset_scenes.{os.getpid()}.json"
        draft.write_text(json.dumps(content), encoding="utf-8")
        os.replace(draft, target)
        for stale in folder.glob("images-*"):
            if stale != image_folder:
                shutil.rmtree(stale, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"the demo's images could not be written to {folder}: {error}; give a folder to write in, data_root=PATH"
        ) from error
    return target


def _put_in_place(staging: Path, image_folder: Path) -> None:
    """Rename `staging` to `image_folder`, unless another process has written the same images meanwhile."""
    names = set(os.listdir(staging))

    def there() -> bool:
        return image_folder.is_dir() and names <= set(os.listdir(image_folder))

    if not there():
        shutil.rmtree(image_folder, ignore_errors=True)
        try:
            os.replace(staging, image_folder)
        except OSError:
            if not there():
                raise
    shutil.rmtree(staging, ignore_errors=True)


def _make(folder: Path, counts: dict[str, int], *, seed: int, scene_size: int, progress: bool) -> list[dict]:
    """Write all images to `folder` and return the entries of a Karpathy file."""
    images: list[dict] = []
    with tqdm(total=sum(counts.values()), desc="drawing scenes", unit="image", disable=not progress) as bar:
        for split, scenes in sample_scenes(counts, seed=seed).items():
            index = SceneIndex(scenes)
            for scene in scenes:
                number = len(images)
                rng = np.random.default_rng([seed, 1, number])
                image_pixels = draw_scene(scene, size=scene_size, rng=rng)
                name = f"scene_{number:05d}.png"
                if not cv2.imwrite(str(folder / name), image_pixels, _PNG):
                    raise OSError(f"OpenCV could not write {folder / name}")
                captions, _ = caption_scene(scene, index, rng)
                sentences = [{"raw": caption, "imgid": number} for caption in captions]
                images.append({"filename": name, "split": split, "imgid": number, "sentences": sentences})
                bar.update()
    return images


def read_scenes(
    folder: Path | str,
    *,
    counts: Mapping[str, int] = DEFAULT_COUNTS,
    seed: int = 0,
    scene_size: int = SCENE_SIZE,
    progress: bool = True,
) -> list[CaptionedImage]:
    """Return the demo's records; write images and captions if they are missing or have other parameters."""
    folder = Path(folder)
    found = _found(folder, _parameters(counts, seed, scene_size))
    if found is None:
        write_scenes(folder, counts=counts, seed=seed, scene_size=scene_size, progress=progress)
        found = _found(folder, _parameters(counts, seed, scene_size))
    if found is None:
        raise UserError(f"{folder / JSON_NAME} was deleted while it was read, perhaps by another run")
    return found


def _found(folder: Path, parameters: dict) -> list[CaptionedImage] | None:
    """Return the records on disk, or None if they are missing, damaged or have other parameters."""
    path = folder / JSON_NAME
    try:
        content = read_json(path)
        if not isinstance(content, dict) or content.get("parameters") != parameters:
            return None
        records = parse_karpathy(content, folder, where=str(path), use_restval=False)
    except UserError:
        return None
    return None if None in locate_files(record.path for record in records).values() else records


def _parameters(counts: Mapping[str, int], seed: int, scene_size: int) -> dict:
    unknown = set(counts) - set(DEFAULT_COUNTS)
    if unknown or any(count < 1 for count in counts.values()):
        raise ValueError(f"counts={dict(counts)}: expected one or more images for each of train, val and test")
    return {"format": FORMAT, "counts": dict(counts), "seed": seed, "scene_size": scene_size}


def _image_folder(folder: Path, parameters: dict) -> Path:
    digest = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:8]
    return folder / f"images-{digest}"
