"""Crop decoded images to squares: randomly in training, deterministically in evaluation."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from hacan.images.preprocessing import resize_image, to_tensor

Transform = Callable[[np.ndarray], Tensor]


@dataclass(frozen=True, kw_only=True)
class Cropping:
    """Parameters of the training and the evaluation crop."""

    crop_area: tuple[float, float]  # range of the share of the image's area
    crop_ratio: tuple[float, float]  # range of width / height
    flip: bool  # mirror half of the training images
    centre_crop: bool  # evaluation: crop the centre; False: resize the whole image to a square


PHOTOS = Cropping(crop_area=(0.08, 1.0), crop_ratio=(3 / 4, 4 / 3), flip=True, centre_crop=True)
"""METHOD section 1: RandomResizedCrop and flip; evaluation: resize by 256/224 of the image size, centre crop."""

SCENES = Cropping(crop_area=(0.8, 1.0), crop_ratio=(1.0, 1.0), flip=False, centre_crop=False)
"""The embedded demo: no flip, because captions mention left and right, and no crop that removes a shape."""


def cropping_of(datasets: str) -> Cropping:
    """Return the cropping of a data set."""
    return SCENES if datasets == "scenes" else PHOTOS


def training_transform(image_size: int, cropping: Cropping) -> Transform:
    """Return the random crop and flip, [H, W, 3] uint8 RGB to [3, image_size, image_size] uint8."""
    return _TrainingCrop(image_size, cropping)


def evaluation_transform(image_size: int, cropping: Cropping) -> Transform:
    """Return the evaluation crop, [H, W, 3] uint8 RGB to [3, image_size, image_size] uint8 (METHOD section 1)."""
    return _EvaluationSquare(image_size, cropping)


# Classes, because worker processes may pickle them; torchvision's functional kernels, because its transform classes
# double the time per image.


class _TrainingCrop:
    def __init__(self, image_size: int, cropping: Cropping) -> None:
        self._size, self._flip = [image_size, image_size], cropping.flip
        self._crop = v2.RandomResizedCrop(image_size, scale=cropping.crop_area, ratio=cropping.crop_ratio)

    def __call__(self, image: np.ndarray) -> Tensor:
        pixels = to_tensor(image)
        box = self._crop.make_params([pixels])
        pixels = F.resized_crop(pixels, **box, size=self._size, antialias=True)
        return F.horizontal_flip(pixels) if self._flip and torch.rand(1).item() < 0.5 else pixels


class _EvaluationSquare:
    def __init__(self, image_size: int, cropping: Cropping) -> None:
        self._size, self._centre_crop = image_size, cropping.centre_crop

    def __call__(self, image: np.ndarray) -> Tensor:
        return resize_image(image, image_size=self._size, centre_crop=self._centre_crop)
