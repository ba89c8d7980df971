"""HACAN: hybrid attention-driven cross-layer alignment for image-text retrieval."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hacan.checkpoints.pretrained import Pretrained


def load_pretrained(path: str, *, device: str = "cpu") -> "Pretrained":
    """A trained model for inference, from a folder that `scripts/export.py` wrote or from a training's checkpoint."""
    from hacan.checkpoints.pretrained import Pretrained  # here: `import hacan` alone stays quick

    return Pretrained.load(path, device=device)
