"""The heatmaps of some pairs as data for the page: its script draws them, so that a pair costs a few KiB."""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from tqdm import tqdm

from hacan.checkpoints.pretrained import Pretrained
from hacan.report.gallery import Query
from hacan.report.heatmaps import ALPHA, COLORMAP, FAINT, STREAM_NAMES, Explanation, explain
from hacan.report.thumbnails import data_uri

Pair = tuple[int, int]  # image, text
SEEN_QUALITY = 92  # of pictures that are shown enlarged


def pairs_to_explain(queries: Sequence[Query]) -> list[Pair]:
    """Of each query its first item and its best correct one: what was found, and what should have been."""
    pairs = {}
    for query in queries:
        for item in (query.best_correct, query.items[0]):
            pairs[pair_of(query, item.index)] = None
    return list(pairs)


def pair_of(query: Query, item: int) -> Pair:
    """A query and an item of its gallery as (image, text)."""
    return (query.index, item) if query.direction == "i2t" else (item, query.index)


def viewer_data(
    pretrained: Pretrained,
    pairs: Sequence[Pair],
    *,
    paths: Sequence[str],
    captions: Sequence[str],
    image_of_text: Sequence[int],
    progress: bool,
) -> dict[str, Any]:
    """Plain values: the pairs with their maps, each picture once, the colours."""
    pictures: dict[int, str] = {}
    shown = []
    for image, text in tqdm(pairs, desc="heatmaps", unit="pair", disable=not progress):
        found = explain(pretrained, paths[image], captions[text])
        pictures.setdefault(image, data_uri(found.picture, quality=SEEN_QUALITY))
        shown.append({"image": image, "correct": bool(image_of_text[text] == image), **_plain(found)})
    colours = (colormaps[COLORMAP](np.arange(256))[:, :3] * 255).round().astype(int).tolist()
    return {"pairs": shown, "pictures": pictures, "colours": colours, "alpha": ALPHA, "faint": FAINT}


def _plain(found: Explanation) -> dict[str, Any]:
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
    """Values from `low` to `high` as 0 to 255, those beyond cut off, in the order word, row, column."""
    scaled = ((grids - low) / (high - low)).clip(0, 1) if high > low else np.zeros_like(grids)
    return np.rint(scaled * 255).astype(np.uint8).tobytes()
