"""Uploaded pictures: of fewer kinds than a folder may hold, smaller, and judged before they are decoded."""

import numpy as np

from hacan.errors import UserError
from hacan.images.io import decode_image


def picture_of_upload(content: bytes, *, most_pixels: int) -> np.ndarray:
    """[H, W, 3] uint8 RGB of a JPEG, PNG or WebP file; whatever else it is called, its content decides."""
    webp = content[:4] == b"RIFF" and content[8:12] == b"WEBP"
    if not webp and not content.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")):
        raise UserError("that file is no JPEG, PNG or WebP picture: choose another one")
    return decode_image(content, name="the picture", max_pixels=most_pixels)
