"""Checkpoints: reading, writing, and exporting them."""

from hacan.checkpoints.checkpoint import load_checkpoint, open_checkpoint, read_checkpoint

__all__ = ["load_checkpoint", "open_checkpoint", "read_checkpoint"]
