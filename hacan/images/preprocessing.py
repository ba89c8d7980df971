"""Preprocessing of evaluation and inference: an RGB image to the normalised square of the image encoder (METHOD 1).

Evaluation, loaded models, search and reports preprocess images here.
"""

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

MEAN = (0.485, 0.456, 0.406)  # ImageNet statistics, RGB
STD = (0.229, 0.224, 0.225)
MAX_ASPECT = 8  # longer images are cropped to this ratio of sides before resizing, which bounds the memory


def uses_centre_crop(datasets: str) -> bool:
    """Return whether evaluation crops the centre of this data set's images; the demo's scenes are resized whole."""
    return datasets != "scenes"


def preprocess_image(image: np.ndarray, *, image_size: int, centre_crop: bool = True) -> Tensor:
    """Return [3, image_size, image_size] normalised floats of an [H, W, 3] uint8 RGB image."""
    return normalise(resize_image(image, image_size=image_size, centre_crop=centre_crop)[None])[0]


def resize_image(image: np.ndarray, *, image_size: int, centre_crop: bool) -> Tensor:
    """Return [3, image_size, image_size] uint8 of an [H, W, 3] uint8 RGB image.

    centre_crop: resize the short side to round(image_size * 256 / 224), then crop the centre (METHOD section 1);
    otherwise resize the whole image to the square.
    """
    pixels = to_tensor(image)
    if not centre_crop:
        return functional.resize(pixels, [image_size, image_size], antialias=True)
    height, width = pixels.shape[1:]
    limit = MAX_ASPECT * min(height, width)
    top, left = max(0, (height - limit) // 2), max(0, (width - limit) // 2)
    pixels = pixels[:, top : height - top, left : width - left]
    pixels = functional.resize(pixels, [round(image_size * 256 / 224)], antialias=True)
    return functional.center_crop(pixels, [image_size, image_size])


def normalise(images: Tensor) -> Tensor:
    """Return [B, 3, H, W] uint8 as floats in ImageNet statistics; a batch at once is five times cheaper than each."""
    pixels = functional.to_dtype(images.contiguous(), torch.float32, scale=True)
    return functional.normalize(pixels, list(MEAN), list(STD), inplace=True)


def to_tensor(image: np.ndarray) -> Tensor:
    """Return [H, W, 3] uint8 as [3, H, W]; raise `ValueError` for any other array."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image is {image.dtype} of shape {image.shape}, expected uint8 [H, W, 3], RGB")
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
