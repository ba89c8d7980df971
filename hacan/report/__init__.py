"""Heatmaps of image-caption pairs, and the HTML report of an evaluation."""
