"""Reading image files: formats, orientation, decompression bombs, errors that name the file."""

import os
import struct
import zlib

import cv2
import numpy as np
import pytest
from bad_json import error_of
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import hacan.images.io
from hacan.errors import UserError
from hacan.images.io import MAX_PIXELS, decode_image, read_image

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
    read = read_image(path)
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
def test_gray_deep_and_transparent_images(tmp_path, pixels):
    path = tmp_path / "x.png"
    path.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    assert np.array_equal(read_image(path), np.full((5, 7, 3), 90, np.uint8))


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (-1, -1)), (6, (0, -1)), (8, (-1, 0))])
def test_exif_orientation_is_applied(tmp_path, orientation, corner):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :8] = 255  # top left, as the camera held it
    tag = struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1) + tag + bytes(4)
    jpeg = cv2.imencode(".jpg", pixels)[1].tobytes()
    path = tmp_path / "x.jpg"
    path.write_bytes(jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:])
    read = read_image(path)
    assert read.shape[:2] == ((16, 32) if orientation in (1, 3) else (32, 16))
    assert read[corner].min() > 240
    assert sum(read[y, x].min() > 128 for y in (0, -1) for x in (0, -1)) == 1


def test_images_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "x.png"
    assert "there is no such file" in error_of(read_image, path)
    assert "cannot be read" in error_of(read_image, tmp_path)
    assert "cannot be read" in error_of(read_image, "a\0b")
    for content, part in [
        (b"", "the file is empty"),
        (b"<html>404</html>", "damaged"),
        (encoded("ppm"), "JPEG, PNG, WEBP, GIF, BMP, TIFF"),
        (encoded("png")[:20], "damaged"),
        (encoded("png")[:90], "damaged"),
        (encoded("jpg")[:200], "damaged"),
    ]:
        path.write_bytes(content)
        message = error_of(read_image, path)
        assert str(path) in message and part in message


@pytest.mark.parametrize("kind", ["png", "jpg", "bmp", "webp", "tiff", "gif"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_files_that_were_cut_off_are_not_half_decoded(kind, share, capfd):
    noise = cv2.imencode(f".{kind}", picture(90, 120))[1].tobytes()
    assert decode_image(noise, name="x").shape == (90, 120, 3)
    assert error_of(decode_image, noise[: int(len(noise) * share)], name="x").startswith("x cannot be decoded")
    assert "OpenCV" not in capfd.readouterr().err


def bomb(width=40_000, height=30_000):
    """A PNG of a few kilobytes whose header claims 1.2 gigapixels."""

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9999))) + chunk(b"IEND", b"")
    )


@pytest.fixture
def no_decoding(monkeypatch):
    monkeypatch.setattr(hacan.images.io.cv2, "imdecode", lambda *_: pytest.fail("decoded"))


def test_a_decompression_bomb_is_not_decoded(tmp_path, no_decoding):
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb())
    message = error_of(read_image, path)
    assert "1200000000 pixels" in message and str(path) in message
    assert 40_000 * 30_000 > MAX_PIXELS > 100_000_000  # scans of maps and paintings are fine


def test_a_limit_of_ones_own_counts_pixels(no_decoding):
    message = error_of(decode_image, encoded("png"), name="the upload", max_pixels=30 * 46 - 1)
    assert message.startswith("the upload has 46 x 30 pixels: more than 1,379")


def test_as_many_pixels_as_the_limit_are_decoded():
    assert decode_image(encoded("png"), name="x", max_pixels=30 * 46).shape == (30, 46, 3)


@pytest.mark.parametrize("kind", ["png", "jpg", "bmp", "webp", "tiff", "gif"])
@pytest.mark.parametrize(("height", "width"), [(30, 46), (513, 7)])
def test_the_size_in_the_header_is_checked_before_decoding(kind, height, width, no_decoding):
    message = error_of(decode_image, encoded(kind, height, width), name="x", max_pixels=height * width - 1)
    assert message.startswith(f"x has {width} x {height} pixels")


def test_the_decoded_size_is_checked_too(monkeypatch):
    """The header parser and the decoder can disagree about a file."""
    monkeypatch.setattr("hacan.images.io._size_in_header", lambda content, name: (16, 16))
    assert "x has 46 x 30 pixels" in error_of(decode_image, encoded("jpg"), name="x", max_pixels=1000)


def test_opencv_itself_refuses_more_than_the_limit(monkeypatch):
    monkeypatch.setattr("hacan.images.io._size_in_header", lambda content, name: (16, 16))
    assert "cannot be decoded" in error_of(decode_image, bomb(), name="x")
    assert int(os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"]) == MAX_PIXELS == 2 * Image.MAX_IMAGE_PIXELS


def decoy(size):
    """A JPEG whose true header follows a stuffed `FF 00` and a header of 16 x 16 that no decoder reads."""
    jpeg = cv2.imencode(".jpg", np.zeros((*size, 3), np.uint8))[1].tobytes()
    small = cv2.imencode(".jpg", np.zeros((16, 16, 3), np.uint8))[1].tobytes()
    at = small.index(b"\xff\xc0")
    frame = small[at : at + 2 + int.from_bytes(small[at + 2 : at + 4], "big")]
    return jpeg[:2] + b"\xff\x00" + (len(frame) + 2).to_bytes(2, "big") + frame[2:] + jpeg[2:]


def test_a_decoy_header_does_not_hide_the_true_size(no_decoding):
    assert "x has 400 x 300 pixels" in error_of(decode_image, decoy((300, 400)), name="x", max_pixels=100_000)


def test_a_jpeg_with_extra_bytes_before_a_marker_is_read():
    jpeg = encoded("jpg")
    end = 4 + int.from_bytes(jpeg[4:6], "big")  # of the first segment
    for extra in (b"\x00", b"\x12\x34", b"\xff\xff"):
        assert decode_image(jpeg[:end] + extra + jpeg[end:], name="x").shape == (30, 46, 3)


@settings(max_examples=200, deadline=None)
@given(
    start=st.sampled_from(["png", "jpg", "bmp", "webp", "tiff", "gif"]).map(encoded),
    cut=st.integers(0, 60),
    tail=st.binary(max_size=30),
)
def test_damaged_headers_raise_nothing_but_user_errors(start, cut, tail):
    for content in (start[:cut] + tail, tail):
        try:
            assert decode_image(content, name="x", max_pixels=10_000).shape[2] == 3
        except UserError as error:
            assert str(error).startswith("x ")
