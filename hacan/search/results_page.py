"""Search results for people: a table for the terminal, and one self-contained HTML file with thumbnails."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2

from hacan.checkpoints.pretrained import Pretrained
from hacan.errors import UserError, printable
from hacan.images.io import read_image
from hacan.report.heatmaps import STREAM_NAMES, explain, overlay
from hacan.report.thumbnails import data_uri, shrink
from hacan.retrieval.provenance import write_atomically
from hacan.search.index import Result

THUMBNAIL, HEATMAP = 360, 128  # pixels of the long side
EXPLAINED = 5  # results with heatmaps; each image is encoded once more
TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("hacan.search"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


class StreamHeatmaps(NamedTuple):
    """Heatmaps of one stream for the page."""

    title: str
    words: list[tuple[str, str]]  # word, data URI of its heatmap


class Card(NamedTuple):
    """One result for the page."""

    result: Result
    name: str
    thumbnail: str  # data URI; empty for a text
    heatmaps: list[StreamHeatmaps]


def format_table(results: Sequence[Result]) -> str:
    """Return one line per result: rank, both scores and the name."""
    lines = [f"{'rank':>4}  {'coarse':>7}  {'fine':>7}  found"]
    for result in results:
        fine = f"{'-':>7}" if result.fine is None else f"{result.fine:7.4f}"
        lines.append(f"{result.rank:4d}  {result.coarse:7.4f}  {fine}  {printable(result.name)}")
    return "\n".join(lines)


def write_page(
    path: Path,
    results: Sequence[Result],
    *,
    text: str = "",
    image: Path | None = None,
    explain_with: Pretrained | None = None,
) -> list[str]:
    """Write the results of a query, a `text` or an `image`; return one line per image that could not be read.

    explain_with: a model, for heatmaps of the words of the first `EXPLAINED` pairs of an image and a text.
    """
    skipped: list[str] = []
    if explain_with is not None and not explain_with.model.alignment.has_attention:
        skipped.append(f"heatmaps: alignment={explain_with.model.alignment.name} defines no attention()")
        explain_with = None
    cards = []
    for result in results:
        finds_texts = image is not None and result.fine is not None
        heatmaps: list[StreamHeatmaps] = []
        try:
            if explain_with is not None and result.fine is not None and result.rank <= EXPLAINED:
                pair = (image, result.name) if finds_texts else (result.name, text)
                heatmaps = _heatmaps(explain_with, *pair)
            thumbnail = "" if finds_texts else _thumbnail(result.name)
        except UserError as error:
            skipped.append(str(error))
            continue
        name = printable(result.name if finds_texts else Path(result.name).name)
        cards.append(Card(result, name, thumbnail, heatmaps))
    page = TEMPLATES.get_template("results.html.jinja").render(
        title=printable(text or f"Results for {Path(image or '').name}"),
        query="" if image is None else _thumbnail(image),
        cards=cards,
    )
    try:
        write_atomically(path, page)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; give another place") from error
    return skipped


def _thumbnail(path: str | Path) -> str:
    return data_uri(shrink(read_image(path), THUMBNAIL))


def _heatmaps(pretrained: Pretrained, image: str | Path, text: str) -> list[StreamHeatmaps]:
    found = explain(pretrained, image, text)
    return [
        StreamHeatmaps(
            f"{STREAM_NAMES[stream.stream]} adds {stream.score:+.4f}; colours: {stream.unit}",
            [
                (word.text, data_uri(shrink(overlay(found.image, grid, *stream.range), HEATMAP)))
                for word, grid in zip(found.words, stream.grids, strict=True)
                if not word.special
            ],
        )
        for stream in found.streams
    ]
