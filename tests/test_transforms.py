import struct
import zlib

import cv2
import numpy as np
import pytest
import torch
from bad_json import error_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from datamodules.framing import PHOTOS, SCENES
from datamodules.picture_size import header_size
from datamodules.pictures import PIXEL_LIMIT, read_picture
from datamodules.transforms import MEAN, STD, evaluation_transform, normalise, training_transform
from hacan.pixels import evaluation_pixels

RGB = (200, 100, 50)


def picture(height=30, width=46, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(kind, height=30, width=46):
    return cv2.imencode(f".{kind}", np.full((height, width, 3), RGB[::-1], np.uint8))[1].tobytes()


# reading


@pytest.mark.parametrize("kind", ["png", "jpg", "bmp", "webp", "tiff"])
def test_formats_come_out_as_rgb(tmp_path, kind):
    path = tmp_path / f"Straße 犬 {kind}"  # the name says nothing about the format
    path.write_bytes(encoded(kind))
    read = read_picture(path)
    assert read.shape == (30, 46, 3) and read.dtype == np.uint8
    assert np.abs(read.reshape(-1, 3).astype(int) - RGB).max() <= 6


@pytest.mark.parametrize(
    "pixels",
    [
        np.full((5, 7), 90, np.uint8),  # gray
        np.full((5, 7), 90 * 257, np.uint16),  # gray, 16 bits
        np.full((5, 7, 3), 90 * 257, np.uint16),
        np.dstack([np.full((5, 7, 3), 90, np.uint8), np.zeros((5, 7), np.uint8)]),  # wholly transparent
    ],
)
def test_gray_deep_and_transparent_pictures(tmp_path, pixels):
    path = tmp_path / "x.png"
    path.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    assert np.array_equal(read_picture(path), np.full((5, 7, 3), 90, np.uint8))


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (-1, -1)), (6, (0, -1)), (8, (-1, 0))])
def test_exif_orientation_turns_the_picture_upright(tmp_path, orientation, corner):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :8] = 255  # top left, as the camera held it
    tag = struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1) + tag + bytes(4)
    jpeg = cv2.imencode(".jpg", pixels)[1].tobytes()
    path = tmp_path / "x.jpg"
    path.write_bytes(jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:])
    read = read_picture(path)
    assert read.shape[:2] == ((16, 32) if orientation in (1, 3) else (32, 16))
    assert read[corner].min() > 240
    assert sum(read[y, x].min() > 128 for y in (0, -1) for x in (0, -1)) == 1
    assert header_size(path.read_bytes()) == (32, 16)


def test_pictures_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "x.png"
    assert "does not exist" in error_of(read_picture, path)
    assert "cannot be read" in error_of(read_picture, tmp_path)
    assert "cannot be read" in error_of(read_picture, "a\0b")
    for content, part in [
        (b"", "empty file"),
        (b"<html>404</html>", "damaged, or not a picture"),
        (encoded("png")[:90], "damaged"),
        (encoded("jpg")[:200], "damaged"),
    ]:
        path.write_bytes(content)
        message = error_of(read_picture, path)
        assert str(path) in message and part in message


def bomb(width=40_000, height=30_000):
    """A PNG of a few kilobytes whose header claims 1.2 gigapixels."""

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9999))) + chunk(b"IEND", b"")
    )


def test_a_decompression_bomb_is_not_decoded(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb())
    monkeypatch.setattr("datamodules.pictures.cv2.imdecode", lambda *_: pytest.fail("decoded"))
    message = error_of(read_picture, path)
    assert "40000 x 30000" in message and str(path) in message
    assert 40_000 * 30_000 > PIXEL_LIMIT > 100_000_000  # scans of maps and paintings are fine


@pytest.mark.parametrize("kind", ["png", "jpg", "bmp", "webp", "tiff", "gif"])
@pytest.mark.parametrize(("height", "width"), [(30, 46), (513, 7)])
def test_size_from_the_header(kind, height, width):
    assert header_size(encoded(kind, height, width)) == (width, height)


def test_size_of_lossless_webp_old_bmp_and_big_endian_tiff():
    lossless = cv2.imencode(".webp", picture(9, 300), [cv2.IMWRITE_WEBP_QUALITY, 101])[1].tobytes()
    assert lossless[12:16] == b"VP8L" and header_size(lossless) == (300, 9)
    extended = b"RIFF" + bytes(4) + b"WEBPVP8X" + bytes(8) + (699).to_bytes(3, "little") + (44).to_bytes(3, "little")
    assert header_size(extended) == (700, 45)
    assert header_size(b"BM" + bytes(12) + struct.pack("<IHH", 12, 70, 50)) == (70, 50)
    entries = struct.pack(">HHIHHHHII", 256, 3, 1, 80, 0, 257, 4, 1, 60)
    assert header_size(b"MM\0*" + struct.pack(">IH", 8, 2) + entries) == (80, 60)


@settings(max_examples=200, deadline=None)
@given(
    start=st.sampled_from(["png", "jpg", "bmp", "webp", "tiff", "gif"]).map(encoded),
    cut=st.integers(0, 60),
    tail=st.binary(max_size=30),
)
def test_damaged_headers_never_crash(start, cut, tail):
    for content in (start[:cut] + tail, tail):
        size = header_size(content)
        assert size is None or len(size) == 2


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


@pytest.mark.parametrize("framing", [PHOTOS, SCENES])
@pytest.mark.parametrize(("height", "width"), [(30, 46), (90, 41), (2, 300)])
def test_evaluation_agrees_with_what_a_loaded_model_does(framing, height, width):
    image = picture(height, width)
    mine = normalise(evaluation_transform(32, framing)(image)[None])[0]
    torch.testing.assert_close(
        mine, evaluation_pixels(image, image_size=32, centre_crop=framing.centre_crop), rtol=0, atol=1e-6
    )


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
        assert red.sum() >= 255 * 40 and green.sum() >= 255 * 40  # 8 x 8 pixels, at most shrunk to 96/112
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
