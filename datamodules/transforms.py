"""Pixels: a decoded picture to the normalised square that the image encoder reads (METHOD section 1)."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from datamodules.framing import Framing

MEAN = (0.485, 0.456, 0.406)  # ImageNet statistics, RGB
STD = (0.229, 0.224, 0.225)

Transform = Callable[[np.ndarray], Tensor]


def training_transform(image_size: int, framing: Framing) -> Transform:
    """[H, W, 3] uint8 RGB to [3, image_size, image_size] uint8: RandomResizedCrop and flip by torch's generator."""
    return _TrainingCrop(image_size, framing)


def evaluation_transform(image_size: int, framing: Framing) -> Transform:
    """[H, W, 3] uint8 RGB to [3, image_size, image_size] uint8, without chance.

    `centre_crop`: the short side becomes round(image_size * 256 / 224), then the centre is cut out.
    """
    return _CentreCrop(image_size) if framing.centre_crop else _Squeeze(image_size)


def normalise(pictures: Tensor) -> Tensor:
    """[B, 3, H, W] uint8 to float in ImageNet's statistics; on a batch at once, which is five times cheaper."""
    pixels = F.to_dtype(pictures.contiguous(), torch.float32, scale=True)
    return F.normalize(pixels, list(MEAN), list(STD), inplace=True)


# Classes, because worker processes may have to pickle them; torchvision's functional kernels, because its transform
# classes cost as much again per picture as the work they do.


class _TrainingCrop:
    def __init__(self, image_size: int, framing: Framing) -> None:
        self._size, self._flip = [image_size, image_size], framing.flip
        self._crop = v2.RandomResizedCrop(image_size, scale=framing.crop_area, ratio=framing.crop_ratio)

    def __call__(self, picture: np.ndarray) -> Tensor:
        image = _to_tensor(picture)
        box = self._crop.make_params([image])
        image = F.resized_crop(image, **box, size=self._size, antialias=True)
        return F.horizontal_flip(image) if self._flip and torch.rand(1).item() < 0.5 else image


class _CentreCrop:
    def __init__(self, image_size: int) -> None:
        self._size, self._short_side = [image_size, image_size], round(image_size * 256 / 224)

    def __call__(self, picture: np.ndarray) -> Tensor:
        image = F.resize(_without_long_ends(_to_tensor(picture)), [self._short_side], antialias=True)
        return F.center_crop(image, self._size)


class _Squeeze:
    def __init__(self, image_size: int) -> None:
        self._size = [image_size, image_size]

    def __call__(self, picture: np.ndarray) -> Tensor:
        return F.resize(_to_tensor(picture), self._size, antialias=True)


def _to_tensor(picture: np.ndarray) -> Tensor:
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(f"picture is {picture.dtype} of shape {picture.shape}; expected uint8 [H, W, 3], RGB")
    return torch.from_numpy(picture).permute(2, 0, 1)


def _without_long_ends(image: Tensor) -> Tensor:
    """The middle of a picture more than 8 times as long as wide: resizing all of 1 x 5000 would fill the memory."""
    height, width = image.shape[-2:]
    short = min(height, width)
    top, left = ((side - 8 * short) // 2 if side > 8 * short else 0 for side in (height, width))
    return image[..., top : height - top, left : width - left]
