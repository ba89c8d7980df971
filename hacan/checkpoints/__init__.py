"""Checkpoints: ours, the public release's, and exported folders."""

from hacan.checkpoints.checkpoint import read_checkpoint
from hacan.checkpoints.loading import load_checkpoint, open_checkpoint

__all__ = ["load_checkpoint", "open_checkpoint", "read_checkpoint"]
