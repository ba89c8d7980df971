"""Reading image files: Pillow judges the header, OpenCV decodes to RGB.

Training, evaluation, inference, search and reports read images here, so that all see the same pixels and none decodes
a decompression bomb. Independent of torch, so that scripts/check_data.py starts quickly.
"""

import io
import multiprocessing
import stat
import warnings
from multiprocessing.connection import Connection
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from hacan.errors import UserError

# OpenCV's messages about damaged images do not name the file; ours do.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # below the limit at which Pillow refuses

Image.init()
FORMATS = tuple(
    name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000") if name in Image.OPEN
)
HEADER = 32  # bytes that `image_kind` looks at
SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG2000",
    b"\0\0\0\x0cJXL \r\n\x87\n": "JPEG XL",
    b"8BPS": "PSD",
}
MAX_PIXELS = 178_956_970  # Pillow refuses more; hacan/__init__.py sets the same limit for OpenCV


def image_kind(header: bytes) -> str:
    """Return the image format of a file by its first `HEADER` bytes, such as JPEG or HEIC; empty for other files."""
    if header[:4] == b"RIFF" and header[8:12] == b"WEBP":
        return "WEBP"
    if header[:2] == b"BM" and header[6:10] == bytes(4):
        return "BMP"
    if header[4:8] == b"ftyp":
        brands = header[8:12] + header[16:]
        heic = header[8:11] in (b"hei", b"hev", b"mif", b"msf")
        return "AVIF" if b"avif" in brands or b"avis" in brands else "HEIC" if heic else ""
    return next((kind for signature, kind in SIGNATURES.items() if header.startswith(signature)), "")


def read_image(path: Path | str) -> np.ndarray:
    """Return the image at `path` as [H, W, 3] uint8 RGB, rotated as its EXIF orientation says.

    Grey images get three equal channels, 16 bits are scaled to 8, an alpha channel is dropped. Raise `UserError`, with
    the path, if the file cannot be read or decoded or has more than `MAX_PIXELS` pixels.
    """
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):  # reading a pipe or a device could wait for ever
            raise UserError(f"image {path} cannot be read: it is not a regular file")
        content = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"image {path} cannot be read: there is no such file") from error
    except (OSError, ValueError) as error:
        raise UserError(f"image {path} cannot be read: {error}") from error
    return decode_image(content, name=f"image {path}")


def decode_image(content: bytes, *, name: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return the image that the bytes of a file hold, as `read_image` does.

    Raise `UserError`, beginning with `name`, if it cannot be decoded or has more than `max_pixels` pixels.
    """
    if not content:
        raise UserError(f"{name} cannot be decoded: the file is empty")
    width, height = _size_in_header(content, name=name)
    _check_size(width, height, name=name, max_pixels=max_pixels)
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        raise UserError(f"{name} cannot be decoded: {' '.join(str(error).split())}") from error
    if image is None:
        raise UserError(f"{name} cannot be decoded: it is damaged ({len(content)} bytes)")
    _check_size(image.shape[1], image.shape[0], name=name, max_pixels=max_pixels)  # two parsers may disagree
    return image


def decode_within(seconds: float, content: bytes, *, name: str, max_pixels: int) -> np.ndarray:
    """Return what `decode_image` does, decoded in a process of its own, which is ended after this time.

    For files of strangers: small files can take the parsers minutes. Raise `UserError` as `decode_image` does, and if
    the time is over or the process ends early.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=_send_image, args=(sender, content, name, max_pixels), daemon=True)
    answer: np.ndarray | UserError = UserError(
        f"{name} is not decoded: it takes longer than {seconds:g} s; save it anew"
    )
    try:
        process.start()
        sender.close()
        if receiver.poll(seconds):
            answer = receiver.recv()
    except (EOFError, OSError):
        answer = UserError(f"{name} cannot be decoded: the decoder ended early; save it anew")
    finally:
        if process.pid is not None:
            process.kill()
            process.join()
        receiver.close()
    if isinstance(answer, UserError):
        raise answer
    return answer


def _send_image(sender: Connection, content: bytes, name: str, max_pixels: int) -> None:
    try:
        sender.send(decode_image(content, name=name, max_pixels=max_pixels))
    except UserError as error:
        sender.send(error)


def _size_in_header(content: bytes, *, name: str) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return image.size
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} is not decoded: {error} Shrink or remove it") from error
    except UnidentifiedImageError as error:
        raise UserError(
            f"{name} cannot be decoded: it is damaged, or not an image of a known format ({', '.join(FORMATS)})"
        ) from error
    except Exception as error:  # Pillow's plugins raise many kinds of errors for damaged headers
        raise UserError(f"{name} cannot be decoded: its header is damaged ({' '.join(str(error).split())})") from error


def _check_size(width: int, height: int, *, name: str, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise UserError(
            f"{name} has {width} x {height} pixels: more than {max_pixels:,} are not decoded (a decompression bomb?); "
            "shrink or remove it"
        )
