"""Heatmaps of some pairs as JSON data, which the script of the report draws; a pair takes a few KiB."""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from tqdm import tqdm

from hacan.checkpoints.pretrained import Pretrained
from hacan.report.heatmaps import ALPHA, COLORMAP, FAINT, STREAM_NAMES, Explanation, explain
from hacan.report.query_selection import Query
from hacan.report.thumbnails import data_uri

Pair = tuple[int, int]  # image, text
LARGE_QUALITY = 92  # JPEG quality of images that are shown large


def pairs_to_explain(queries: Sequence[Query]) -> list[Pair]:
    """Return the pairs of each query with its first item and its best correct item."""
    pairs: dict[Pair, None] = {}
    for query in queries:
        for item in (query.best_correct, query.items[0]):
            pairs[pair_of(query, item.index)] = None
    return list(pairs)


def pair_of(query: Query, item: int) -> Pair:
    """Return a query and an item of its ranking as (image, text)."""
    return (query.index, item) if query.direction == "i2t" else (item, query.index)


def heatmap_data(
    pretrained: Pretrained,
    pairs: Sequence[Pair],
    *,
    paths: Sequence[str],
    captions: Sequence[str],
    image_of_text: Sequence[int],
    progress: bool,
) -> dict[str, Any]:
    """Return plain values: the pairs with their maps, each image once, and the colour map."""
    images: dict[int, str] = {}
    shown = []
    for image, text in tqdm(pairs, desc="heatmaps", unit="pair", disable=not progress):
        found = explain(pretrained, paths[image], captions[text])
        images.setdefault(image, data_uri(found.image, quality=LARGE_QUALITY))
        shown.append({"image": image, "correct": bool(image_of_text[text] == image), **_to_json(found)})
    colours = (colormaps[COLORMAP](np.arange(256))[:, :3] * 255).round().astype(int).tolist()
    return {"pairs": shown, "pictures": images, "colours": colours, "alpha": ALPHA, "faint": FAINT}


def _to_json(found: Explanation) -> dict[str, Any]:
    return {
        "caption": found.caption,
        "score": round(found.score, 4),
        "words": [{"text": word.text, "special": word.special} for word in found.words],
        "streams": [
            {
                "name": STREAM_NAMES[stream.stream],
                "score": round(stream.score, 4),
                "rows": stream.grids.shape[1],
                "columns": stream.grids.shape[2],
                "low": float(f"{stream.range[0]:.4g}"),
                "high": float(f"{stream.range[1]:.4g}"),
                "unit": stream.unit,
                "values": base64.b64encode(_bytes(stream.grids, *stream.range)).decode(),
            }
            for stream in found.streams
        ],
    }


def _bytes(grids: np.ndarray, low: float, high: float) -> bytes:
    """Return the values scaled from [low, high] to 0..255 and clipped, in the order word, row, column."""
    scaled = ((grids - low) / (high - low)).clip(0, 1) if high > low else np.zeros_like(grids)
    return np.rint(scaled * 255).astype(np.uint8).tobytes()
