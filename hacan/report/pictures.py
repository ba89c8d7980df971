"""Pictures inside an HTML file: small JPEGs as data URIs."""

import base64

import cv2
import numpy as np

QUALITY = 78  # of thumbnails


def thumbnail(picture: np.ndarray, *, longest: int) -> np.ndarray:
    """[H, W, 3] uint8 -> the same picture, its long side `longest` pixels at most."""
    scale = longest / max(picture.shape[:2])
    if scale >= 1:
        return picture
    height, width = (max(1, round(side * scale)) for side in picture.shape[:2])
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)


def data_uri(picture: np.ndarray, *, quality: int = QUALITY) -> str:
    """[H, W, 3] uint8 RGB -> data:image/jpeg;base64,..."""
    done, content = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise ValueError(f"a picture of shape {picture.shape} and {picture.dtype} could not be encoded as JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(content.tobytes()).decode()
