"""Pixels of evaluation and inference: a decoded picture to the normalised square that the image encoder reads.

METHOD section 1. The data modules, a loaded model, search and reports all frame and normalise here.
"""

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

MEAN = (0.485, 0.456, 0.406)  # ImageNet statistics, RGB
STD = (0.229, 0.224, 0.225)
LONGEST = 8  # a picture this many times as long as wide is trimmed first: resizing all of it would fill the memory


def is_centre_cropped(datasets: str) -> bool:
    """Whether evaluation cuts out the centre of this data set's pictures; the demo's scenes are squeezed whole."""
    return datasets != "scenes"


def evaluation_pixels(picture: np.ndarray, *, image_size: int, centre_crop: bool = True) -> Tensor:
    """[H, W, 3] uint8 RGB -> [3, image_size, image_size] float, normalised; framed as `evaluation_square` says."""
    return normalise(evaluation_square(picture, image_size=image_size, centre_crop=centre_crop)[None])[0]


def evaluation_square(picture: np.ndarray, *, image_size: int, centre_crop: bool) -> Tensor:
    """[H, W, 3] uint8 RGB -> [3, image_size, image_size] uint8, without chance.

    The short side becomes round(image_size * 256 / 224), then the centre is cut out; without `centre_crop` the whole
    picture is squeezed to the square (the demo's scenes, whose captions name every corner).
    """
    pixels = as_tensor(picture)
    if not centre_crop:
        return functional.resize(pixels, [image_size, image_size], antialias=True)
    height, width = pixels.shape[1:]
    limit = LONGEST * min(height, width)
    top, left = max(0, (height - limit) // 2), max(0, (width - limit) // 2)
    pixels = pixels[:, top : height - top, left : width - left]
    pixels = functional.resize(pixels, [round(image_size * 256 / 224)], antialias=True)
    return functional.center_crop(pixels, [image_size, image_size])


def normalise(pictures: Tensor) -> Tensor:
    """[B, 3, H, W] uint8 to float in ImageNet's statistics; on a batch at once, which is five times cheaper."""
    pixels = functional.to_dtype(pictures.contiguous(), torch.float32, scale=True)
    return functional.normalize(pixels, list(MEAN), list(STD), inplace=True)


def as_tensor(picture: np.ndarray) -> Tensor:
    """[H, W, 3] uint8 RGB as [3, H, W]; anything else is named."""
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(f"picture is {picture.dtype} of shape {picture.shape}, expected uint8 [H, W, 3], RGB")
    return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)
