"""What the image encoder sees: training crops by torchvision's chance, evaluation without any."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from datamodules.transforms import PHOTOS, SCENES, evaluation_transform, training_transform
from hacan.images.preprocessing import MEAN, STD, normalise


def picture(height=30, width=46, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# transforms


def test_evaluation_is_resize_and_centre_crop_as_torchvision_does_it():
    for height, width in [(30, 46), (90, 41), (64, 64)]:
        image = picture(height, width)
        expected = v2.Compose(
            [
                v2.Resize(round(32 * 256 / 224)),
                v2.CenterCrop(32),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )(torch.from_numpy(image).permute(2, 0, 1))
        found = normalise(evaluation_transform(32, PHOTOS)(image)[None])[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert found.shape == (3, 32, 32)


def test_normalise_uses_imagenet_statistics():
    pixels = normalise(torch.full((2, 3, 5, 7), 255, dtype=torch.uint8))
    expected = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(pixels, expected.view(1, 3, 1, 1).expand(2, 3, 5, 7))


def test_training_crops_as_torchvision_does_and_flips_half():
    image = picture(60, 90)
    transform = training_transform(24, PHOTOS)
    reference = v2.Compose([v2.RandomResizedCrop(24, scale=PHOTOS.crop_area, ratio=PHOTOS.crop_ratio)])
    flips = 0
    for seed in range(60):
        torch.manual_seed(seed)
        found = transform(image)
        torch.manual_seed(seed)
        expected = reference(torch.from_numpy(image).permute(2, 0, 1))
        flipped = torch.equal(found, expected.flip(-1))
        assert flipped or torch.equal(found, expected)
        flips += flipped
    assert 15 < flips < 45


def test_scenes_are_never_flipped_and_keep_all_that_is_drawn():
    """Things keep off the border by 0.106 of the side: no crop may show less, and left stays left."""
    side = 112
    image = np.zeros((side, side, 3), np.uint8)
    margin = int(0.106 * side) + 1
    image[margin : margin + 8, margin : margin + 8] = (255, 0, 0)  # red at the top left
    image[-margin - 8 : -margin, -margin - 8 : -margin] = (0, 255, 0)  # green at the bottom right
    transform = training_transform(96, SCENES)
    for seed in range(40):
        torch.manual_seed(seed)
        red, green, _ = transform(image).float()
        assert red.sum() >= 255 * 40 and green.sum() >= 255 * 40  # 8 x 8 pixels, at most shrink to 96/112
        rows, columns = torch.meshgrid(torch.arange(96), torch.arange(96), indexing="ij")
        assert (red * rows).sum() / red.sum() < 48 and (red * columns).sum() / red.sum() < 48
        assert (green * rows).sum() / green.sum() > 48 and (green * columns).sum() / green.sum() > 48
    assert torch.equal(evaluation_transform(112, SCENES)(image), torch.from_numpy(image).permute(2, 0, 1))


def test_a_thread_of_pixels_does_not_fill_the_memory():
    image = np.repeat(np.arange(200, dtype=np.uint8)[None, :, None], 3, axis=2).repeat(2, axis=0)  # [2, 200, 3]
    found = evaluation_transform(32, PHOTOS)(image).float()
    assert found.shape == (3, 32, 32)
    assert abs(found.mean() - 99.5) < 1  # the centre of the ramp
    assert evaluation_transform(32, PHOTOS)(np.zeros((1, 100_000, 3), np.uint8)).shape == (3, 32, 32)


def test_arrays_of_other_kinds_are_refused():
    for wrong in (np.zeros((4, 5), np.uint8), np.zeros((4, 5, 4), np.uint8), np.zeros((4, 5, 3), np.float32)):
        with pytest.raises(ValueError, match="expected uint8"):
            evaluation_transform(32, PHOTOS)(wrong)
