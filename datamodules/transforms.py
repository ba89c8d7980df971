"""A decoded image to the square of one data set: at random in training, as a loaded model frames it in evaluation."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from datamodules.framing import Framing
from hacan.images.preprocessing import resize_image, to_tensor

Transform = Callable[[np.ndarray], Tensor]


def training_transform(image_size: int, framing: Framing) -> Transform:
    """[H, W, 3] uint8 RGB to [3, image_size, image_size] uint8: RandomResizedCrop and flip by torch's generator."""
    return _TrainingCrop(image_size, framing)


def evaluation_transform(image_size: int, framing: Framing) -> Transform:
    """[H, W, 3] uint8 RGB to [3, image_size, image_size] uint8, without chance (METHOD section 1)."""
    return _EvaluationSquare(image_size, framing)


# Classes, because worker processes may have to pickle them; torchvision's functional kernels, because its transform
# classes cost as much again per image as the work they do.


class _TrainingCrop:
    def __init__(self, image_size: int, framing: Framing) -> None:
        self._size, self._flip = [image_size, image_size], framing.flip
        self._crop = v2.RandomResizedCrop(image_size, scale=framing.crop_area, ratio=framing.crop_ratio)

    def __call__(self, picture: np.ndarray) -> Tensor:
        image = to_tensor(picture)
        box = self._crop.make_params([image])
        image = F.resized_crop(image, **box, size=self._size, antialias=True)
        return F.horizontal_flip(image) if self._flip and torch.rand(1).item() < 0.5 else image


class _EvaluationSquare:
    def __init__(self, image_size: int, framing: Framing) -> None:
        self._size, self._centre_crop = image_size, framing.centre_crop

    def __call__(self, picture: np.ndarray) -> Tensor:
        return resize_image(picture, image_size=self._size, centre_crop=self._centre_crop)
