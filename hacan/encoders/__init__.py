"""The two backbones: pictures and token ids become two feature levels and a global vector each (METHOD section 1)."""

from hacan.encoders.image import ImageEncoder, ImageFeatures
from hacan.encoders.text import TextEncoder, TextFeatures

__all__ = ["ImageEncoder", "ImageFeatures", "TextEncoder", "TextFeatures"]
