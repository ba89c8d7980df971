"""Pictures for a page: small JPEGs, and uploads that are judged before they are decoded."""

import base64
import io

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from hacan.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP")
QUALITY = 80


def shrunk(picture: np.ndarray, longest: int) -> np.ndarray:
    """[H, W, 3] uint8 -> the same picture, its long side `longest` pixels at most."""
    height, width = picture.shape[:2]
    scale = min(1.0, longest / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return picture if scale == 1 else cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


def jpeg(picture: np.ndarray, longest: int) -> bytes:
    """[H, W, 3] uint8 RGB -> a JPEG whose long side is `longest` pixels at most."""
    done, content = cv2.imencode(
        ".jpg", np.ascontiguousarray(shrunk(picture, longest)[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
    )
    if not done:
        raise ValueError(f"picture is {picture.dtype} of shape {picture.shape}, expected uint8 [H, W, 3]")
    return content.tobytes()


def data_uri(picture: np.ndarray, longest: int) -> str:
    """The JPEG as the source of an img element."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg(picture, longest)).decode()


def picture_of_upload(content: bytes, *, most_pixels: int) -> np.ndarray:
    """[H, W, 3] uint8 RGB of a JPEG, PNG or WebP file; its header is judged before anything is decoded."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as header:
            width, height = header.size
    except Image.DecompressionBombError as error:
        raise UserError(
            f"the picture has far more than {most_pixels / 1e6:.0f} million pixels, the most allowed: shrink it"
        ) from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise UserError("that file is no JPEG, PNG or WebP picture: choose another one") from error
    if width * height > most_pixels:
        raise UserError(
            f"the picture has {width} x {height} pixels, expected {most_pixels / 1e6:.0f} million at most: shrink it"
        )
    try:
        picture = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error:
        picture = None
    if picture is None:
        raise UserError("that picture is damaged and cannot be decoded: choose another one")
    return picture
