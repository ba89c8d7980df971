"""Pixels for inference: a picture file or array becomes what the image encoder reads (METHOD section 1)."""

from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from hacan.errors import UserError

MEAN = (0.485, 0.456, 0.406)  # ImageNet statistics, RGB
STD = (0.229, 0.224, 0.225)
LONGEST = 8  # a picture this many times as long as wide is trimmed first: resizing all of it would fill the memory


def read_picture(path: str | Path) -> np.ndarray:
    """The picture at `path`, [H, W, 3] uint8 RGB, upright by its EXIF orientation; a UserError names a bad file."""
    try:
        content = np.frombuffer(Path(path).read_bytes(), np.uint8)
    except OSError as error:
        raise UserError(f"picture {path} cannot be read: {error.strerror}") from error
    try:
        picture = cv2.imdecode(content, cv2.IMREAD_COLOR_RGB) if len(content) else None
    except cv2.error as error:
        raise UserError(f"picture {path} cannot be decoded: {' '.join(str(error).split())}") from error
    if picture is None:
        raise UserError(f"picture {path} cannot be decoded: it is damaged, or not a picture ({len(content)} bytes)")
    return picture


def evaluation_pixels(picture: np.ndarray, *, image_size: int, centre_crop: bool = True) -> Tensor:
    """[H, W, 3] uint8 RGB -> [3, image_size, image_size] float, normalised.

    The short side becomes round(image_size * 256 / 224), then the centre is cut out; without `centre_crop` the whole
    picture is squeezed to the square (the demo's scenes, whose captions name every corner).
    """
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(f"picture is {picture.dtype} of shape {picture.shape}, expected uint8 [H, W, 3], RGB")
    pixels = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)
    if centre_crop:
        height, width = pixels.shape[1:]
        limit = LONGEST * min(height, width)
        top, left = max(0, (height - limit) // 2), max(0, (width - limit) // 2)
        pixels = pixels[:, top : height - top, left : width - left]
        pixels = functional.resize(pixels, [round(image_size * 256 / 224)], antialias=True)
        pixels = functional.center_crop(pixels, [image_size, image_size])
    else:
        pixels = functional.resize(pixels, [image_size, image_size], antialias=True)
    return functional.normalize(functional.to_dtype(pixels, torch.float32, scale=True), list(MEAN), list(STD))
