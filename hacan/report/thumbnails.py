"""Small JPEGs for HTML files, as bytes or as data URIs."""

import base64

import cv2
import numpy as np

QUALITY = 78  # of thumbnails


def shrink(image: np.ndarray, longest: int) -> np.ndarray:
    """Return [H, W, 3] uint8 with a long side of at most `longest` pixels; smaller images are returned as they are."""
    scale = longest / max(image.shape[:2])
    if scale >= 1:
        return image
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def jpeg(image: np.ndarray, *, quality: int = QUALITY) -> bytes:
    """Return [H, W, 3] uint8 RGB as the content of a JPEG file."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image is {image.dtype} of shape {image.shape}, expected uint8 [H, W, 3]")
    _, content = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    return content.tobytes()


def data_uri(image: np.ndarray, *, quality: int = QUALITY) -> str:
    """Return [H, W, 3] uint8 RGB as data:image/jpeg;base64,..., the source of an img element."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg(image, quality=quality)).decode()
