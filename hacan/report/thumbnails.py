"""Pictures inside an HTML file: small JPEGs, as bytes or as data URIs."""

import base64

import cv2
import numpy as np

QUALITY = 78  # of thumbnails


def shrunk(picture: np.ndarray, longest: int) -> np.ndarray:
    """[H, W, 3] uint8 -> the same picture, its long side `longest` pixels at most."""
    scale = longest / max(picture.shape[:2])
    if scale >= 1:
        return picture
    height, width = (max(1, round(side * scale)) for side in picture.shape[:2])
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)


def jpeg(picture: np.ndarray, *, quality: int = QUALITY) -> bytes:
    """[H, W, 3] uint8 RGB -> the content of a JPEG file."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"picture is {picture.dtype} of shape {picture.shape}, expected uint8 [H, W, 3]")
    _, content = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    return content.tobytes()


def data_uri(picture: np.ndarray, *, quality: int = QUALITY) -> str:
    """[H, W, 3] uint8 RGB -> data:image/jpeg;base64,..., the source of an img element."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg(picture, quality=quality)).decode()
