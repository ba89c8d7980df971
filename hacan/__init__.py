"""HACAN: hybrid attention-driven cross-layer alignment for image-text retrieval."""

import getpass
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hacan.checkpoints.pretrained import Pretrained

# The largest image that OpenCV decodes, in pixels; it reads the variable when it is imported (hacan/images/io.py).
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", "178956970")

try:
    getpass.getuser()  # torch calls it on import
except (KeyError, OSError):  # a user id without a name, as in `docker run --user 12345`
    os.environ["USER"] = str(os.getuid())


def load_pretrained(path: str, *, device: str = "cpu") -> "Pretrained":
    """A trained model for inference, from a folder that `scripts/export.py` wrote or from a training's checkpoint."""
    from hacan.checkpoints.pretrained import Pretrained  # here: `import hacan` alone stays quick

    return Pretrained.load(path, device=device)
