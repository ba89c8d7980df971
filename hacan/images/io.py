"""The one reader of picture files: decoded by OpenCV to RGB, its size read from the header first.

Training, evaluation, inference, search and reports read through here, so that all see the same pixels, and none of
them decodes a bomb. Nothing of torch: what only looks at pictures (`scripts/check_data.py`) starts quickly.
"""

from pathlib import Path

import cv2
import numpy as np

from hacan.errors import UserError
from hacan.images.picture_size import KINDS, header_size

# What OpenCV says of a damaged picture names no file; our errors do.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

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
        raise UserError(f"picture {path} cannot be read: there is no such file") from error
    except (OSError, ValueError) as error:
        raise UserError(f"picture {path} cannot be read: {error}") from error
    return decode_picture(content, name=f"picture {path}")


def decode_picture(content: bytes, *, name: str, pixel_limit: int = PIXEL_LIMIT) -> np.ndarray:
    """The picture of a file's content, as `read_picture` gives it; `name` begins the message of what is wrong with it.

    Only kinds of files whose header tells the size are decoded: of others nobody knows how much memory they take.
    """
    if not content:
        raise UserError(f"{name} cannot be decoded: the file is empty")
    size = header_size(content)
    if size is None:
        raise UserError(
            f"{name} cannot be decoded: it is damaged, or not a picture of a kind that is read here ({KINDS})"
        )
    if size[0] * size[1] > pixel_limit:
        raise UserError(
            f"{name} claims to be {size[0]} x {size[1]} pixels: more than {pixel_limit:,} are not decoded "
            "(a decompression bomb?); shrink or remove it"
        )
    try:
        picture = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        raise UserError(f"{name} cannot be decoded: {' '.join(str(error).split())}") from error
    if picture is None:
        raise UserError(f"{name} cannot be decoded: it is damaged ({len(content)} bytes)")
    return picture
