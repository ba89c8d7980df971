"""How images are cut to squares; numbers only, so that what reads no pixels need not import torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Framing:
    """How a image is cut to a square: at random in training, always in the same way in evaluation."""

    crop_area: tuple[float, float]  # share of the image's area that a training crop covers
    crop_ratio: tuple[float, float]  # width over height of a training crop
    flip: bool  # mirror half of the training images
    centre_crop: bool  # evaluation: the centre of the image; False: all of it, squeezed to a square


PHOTOS = Framing(crop_area=(0.08, 1.0), crop_ratio=(3 / 4, 4 / 3), flip=True, centre_crop=True)
"""METHOD section 1: RandomResizedCrop and a flip; evaluation on the centre, at 256/224 of the size before."""

SCENES = Framing(crop_area=(0.8, 1.0), crop_ratio=(1.0, 1.0), flip=False, centre_crop=False)
"""The embedded demo: its captions say left and right, and name every shape. No flip, no crop that cuts a shape away."""
