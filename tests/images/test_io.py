"""The one reader of picture files: kinds, orientation, bombs, and errors that name the file."""

import struct
import zlib

import cv2
import numpy as np
import pytest
from bad_json import error_of
from hypothesis import given, settings
from hypothesis import strategies as st

import hacan.images.io
from hacan.images.io import PIXEL_LIMIT, decode_picture, read_picture
from hacan.images.picture_size import header_size

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
    assert "there is no such file" in error_of(read_picture, path)
    assert "cannot be read" in error_of(read_picture, tmp_path)
    assert "cannot be read" in error_of(read_picture, "a\0b")
    for content, part in [
        (b"", "the file is empty"),
        (b"<html>404</html>", "damaged, or not a picture"),
        (encoded("ppm"), "JPEG, PNG, WebP, GIF, BMP, TIFF"),  # its header is not read: how large would it become?
        (encoded("png")[:20], "damaged, or not a picture"),
        (encoded("png")[:90], "damaged"),
        (encoded("jpg")[:200], "damaged"),
    ]:
        path.write_bytes(content)
        message = error_of(read_picture, path)
        assert str(path) in message and part in message


@pytest.mark.parametrize("kind", ["png", "jpg", "bmp", "webp", "tiff", "gif"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_files_that_were_cut_off_are_not_half_decoded(kind, share, capfd):
    noise = cv2.imencode(f".{kind}", picture(90, 120))[1].tobytes()
    assert decode_picture(noise, name="x").shape == (90, 120, 3)
    assert error_of(decode_picture, noise[: int(len(noise) * share)], name="x").startswith("x cannot be decoded")
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
    message = error_of(read_picture, path)
    assert "40000 x 30000" in message and str(path) in message
    assert 40_000 * 30_000 > PIXEL_LIMIT > 100_000_000  # scans of maps and paintings are fine


def test_a_limit_of_ones_own_counts_pixels(no_decoding):
    message = error_of(decode_picture, encoded("png"), name="the upload", pixel_limit=30 * 46 - 1)
    assert message.startswith("the upload claims to be 46 x 30 pixels: more than 1,379")


def test_as_many_pixels_as_the_limit_are_decoded():
    assert decode_picture(encoded("png"), name="x", pixel_limit=30 * 46).shape == (30, 46, 3)


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
