"""HACAN: hybrid attention-driven cross-layer alignment for image-text retrieval."""
