"""Pixels for inference: the same numbers as the evaluation's."""

import cv2
import numpy as np
import pytest
import torch

from datamodules.readers import NAMES
from datamodules.transforms import PHOTOS, SCENES, cropping_of, evaluation_transform
from hacan.images.io import read_image
from hacan.images.preprocessing import MEAN, STD, normalise, preprocess_image, uses_centre_crop


@pytest.mark.parametrize("shape", [(50, 70), (70, 50), (64, 64), (9, 200), (600, 20), (1, 1)])
@pytest.mark.parametrize("cropping", [PHOTOS, SCENES], ids=["photos", "scenes"])
def test_preprocess_image_equals_the_evaluation_transform(shape, cropping):
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    found = preprocess_image(picture, image_size=48, centre_crop=cropping.centre_crop)
    assert found.shape == (3, 48, 48) and found.dtype == torch.float32
    assert torch.equal(found, normalise(evaluation_transform(48, cropping)(picture)[None])[0])


def test_channels_come_as_red_green_blue_and_normalised(tmp_path):
    picture = np.zeros((20, 30, 3), np.uint8)
    picture[..., 2] = 255  # red, as OpenCV writes it
    cv2.imwrite(str(tmp_path / "red.png"), picture)
    pixels = preprocess_image(read_image(tmp_path / "red.png"), image_size=32)
    for channel, value in enumerate((1.0, 0.0, 0.0)):
        expected = (value - MEAN[channel]) / STD[channel]
        torch.testing.assert_close(pixels[channel], torch.full((32, 32), expected))


def test_the_centre_is_cut_out_at_224_of_256():
    picture = np.zeros((256, 356, 3), np.uint8)
    picture[16:240, 66:290] = 255  # exactly what a crop of 224 shows
    white = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(preprocess_image(picture, image_size=224), white[:, None, None].expand(3, 224, 224))


@pytest.mark.parametrize("array", [np.zeros((4, 5), np.uint8), np.zeros((4, 5, 3)), np.zeros((3, 4, 5), np.uint8)])
def test_wrong_arrays_are_named(array):
    with pytest.raises(ValueError, match=r"expected uint8 \[H, W, 3\], RGB"):
        preprocess_image(array, image_size=32)


def test_training_and_inference_agree_which_images_are_cropped():
    assert {name: uses_centre_crop(name) for name in NAMES} == {name: cropping_of(name).centre_crop for name in NAMES}
