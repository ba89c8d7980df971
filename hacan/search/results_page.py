"""What a search found, for a person: a table of lines, and a contact sheet in one HTML file."""

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hacan.checkpoints.pretrained import Pretrained
from hacan.errors import UserError
from hacan.images.io import read_image
from hacan.report.heatmaps import STREAM_NAMES, explain, overlay
from hacan.report.thumbnails import data_uri, shrunk
from hacan.retrieval.provenance import write_atomically
from hacan.search.index import Result

THUMBNAIL, MAP = 360, 128  # pixels, long side
EXPLAINED = 5  # results with heatmaps: each is encoded once more
STYLE = """
body { font: 16px/1.4 system-ui, sans-serif; margin: 1.5rem auto; max-width: 80rem; padding: 0 1rem; color: #1b1b1f;
  background: #fff }
h1 { font-size: 1.4rem } .query { max-height: 14rem; max-width: 100% }
ol { list-style: none; padding: 0; display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)) }
li.wide { grid-column: 1 / -1; display: grid; gap: 0 1.5rem; grid-template-columns: minmax(0, 1fr) }
@media (min-width: 50rem) { li.wide:has(> figure > img) { grid-template-columns: 15rem minmax(0, 1fr) } }
figure { margin: 0 } figure > img { width: 100%; height: 13rem; object-fit: contain;
  background: #eee } figcaption { overflow-wrap: anywhere; font-size: .85rem } .words { display: flex; flex-wrap: wrap;
  gap: .5rem; margin: .5rem 0 } .words figure { width: min(8rem, calc((100% - 1rem) / 3)); text-align: center }
.words img { height: auto; aspect-ratio: 1 } p { margin: .3rem 0 }
"""


def table(results: Sequence[Result]) -> str:
    """Rank, both scores and the name, a line a result."""
    lines = [f"{'rank':>4}  {'coarse':>7}  {'fine':>7}  found"]
    for result in results:
        fine = f"{'-':>7}" if result.fine is None else f"{result.fine:7.4f}"
        lines.append(f"{result.rank:4d}  {result.coarse:7.4f}  {fine}  {result.name}")
    return "\n".join(lines)


def write_sheet(
    path: Path,
    results: Sequence[Result],
    *,
    text: str = "",
    image: Path | None = None,
    explain_with: Pretrained | None = None,
) -> list[str]:
    """Write the contact sheet; the pictures that could not be read are returned, a line each.

    explain_with: a model, for heatmaps of the words of the first EXPLAINED pairs of a picture and a text.
    """
    skipped, cards = [], []
    if explain_with is not None and not explain_with.model.alignment.has_attention:
        skipped.append(f"heatmaps: alignment={explain_with.model.alignment.name} defines no attention()")
        explain_with = None
    query = "" if image is None else f'<img class="query" src="{_thumbnail(image)}" alt="query">'
    for result in results:
        of_texts = image is not None and result.fine is not None
        maps = ""
        try:
            if explain_with is not None and result.fine is not None and result.rank <= EXPLAINED:
                pair = (image, result.name) if of_texts else (result.name, text)
                maps = _maps(explain_with, *pair)
            shown = "" if of_texts else f'<img src="{_thumbnail(result.name)}" alt="">'
        except UserError as error:
            skipped.append(str(error))
            continue
        fine = "" if result.fine is None else f" · fine {result.fine:.4f}"
        name = result.name if of_texts else Path(result.name).name
        cards.append(
            f"<li{' class=wide' if maps else ''}><figure>{shown}<figcaption><b>{result.rank}.</b> {html.escape(name)}"
            f"<p>coarse {result.coarse:.4f}{fine}</p></figcaption></figure>{maps and f'<div>{maps}</div>'}</li>"
        )
    title = html.escape(text or f"what {Path(image).name} finds")
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1>{query}<ol>{''.join(cards)}</ol></html>\n"
    )
    try:
        write_atomically(path, page)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; give another place") from error
    return skipped


def _thumbnail(path: str | Path) -> str:
    return data_uri(shrunk(read_image(path), THUMBNAIL))


def _maps(pretrained: Pretrained, picture: str | Path | np.ndarray, text: str) -> str:
    """A line of small heatmaps, a word each, for every stream."""
    found = explain(pretrained, picture, text)
    lines = []
    for stream in found.streams:
        shown = [
            f'<figure><img src="{data_uri(shrunk(overlay(found.picture, grid, *stream.range), MAP))}" alt="">'
            f"<figcaption>{html.escape(word.text)}</figcaption></figure>"
            for word, grid in zip(found.words, stream.grids, strict=True)
            if not word.special
        ]
        lines.append(
            f"<p>{STREAM_NAMES[stream.stream]} adds {stream.score:+.4f}; colours: {html.escape(stream.unit)}</p>"
            f'<div class="words">{"".join(shown)}</div>'
        )
    return "".join(lines)
