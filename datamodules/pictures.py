"""A picture file decoded by OpenCV to RGB, its size read from the header first."""

from pathlib import Path

import cv2
import numpy as np

from datamodules.picture_size import header_size
from hacan.errors import UserError

PIXEL_LIMIT = 178_956_970  # pixels; twice this is where Pillow refuses to decode as well


def read_picture(path: Path | str) -> np.ndarray:
    """The picture at `path`, [H, W, 3] uint8 RGB, turned upright by its EXIF orientation.

    Gray pictures get three equal channels, 16-bit ones are scaled to 8 bits, an alpha channel is dropped. Whatever
    cannot be decoded, or would fill the memory (more than `PIXEL_LIMIT` pixels), is a `UserError` naming the file.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError as error:
        raise UserError(f"picture {path} does not exist") from error
    except (OSError, ValueError) as error:
        raise UserError(f"picture {path} cannot be read: {error}") from error
    if not content:
        raise UserError(f"picture {path} is an empty file")
    size = header_size(content)
    if size is not None and size[0] * size[1] > PIXEL_LIMIT:
        raise UserError(
            f"picture {path} claims to be {size[0]} x {size[1]} pixels: more than {PIXEL_LIMIT:,} are not decoded "
            "(a decompression bomb?); shrink or remove it"
        )
    try:
        picture = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        raise UserError(f"picture {path} cannot be decoded: {' '.join(str(error).split())}") from error
    if picture is None:
        raise UserError(f"picture {path} cannot be decoded: it is damaged, or not a picture ({len(content)} bytes)")
    return picture
