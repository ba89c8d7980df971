"""Queries of the gallery as cards of HTML: what was asked, what was found, what is correct."""

import html
import math
from collections.abc import Sequence
from pathlib import Path

from hacan.images.io import read_image
from hacan.report.gallery import Item, Query
from hacan.report.tables import DIRECTIONS
from hacan.report.thumbnails import data_uri, shrunk
from hacan.report.viewer import Pair, pair_of

THUMBNAIL = 200  # pixels
KIND_NAMES = {
    "best": ("Best", "lowest ranks; equal ranks in random order"),
    "worst": ("Worst", "misses first, then the highest ranks; equal ranks in random order"),
    "random": ("Random", "drawn with the run's seed"),
}


class QueryCards:
    """Queries as cards; each picture is read once."""

    def __init__(self, paths: Sequence[str], captions: Sequence[str], numbers: dict[Pair, int], top_k: int) -> None:
        self._paths, self._captions, self._numbers, self._top_k = paths, captions, numbers, top_k
        self._thumbnails: dict[int, str] = {}

    def gallery(self, queries: Sequence[Query]) -> str:
        """All queries, by direction and kind."""
        parts = []
        for direction, name in DIRECTIONS.items():
            parts.append(f"<h3>{name.capitalize()}</h3>")
            for kind, (title, about) in KIND_NAMES.items():
                cards = [self._card(query) for query in queries if (query.direction, query.kind) == (direction, kind)]
                if cards:
                    parts.append(f"<h4>{title} <small>{about}</small></h4>")
                    parts.append(f'<div class="queries {direction}">{"".join(cards)}</div>')
        return "".join(parts)

    def _card(self, query: Query) -> str:
        if math.isinf(query.rank):
            rank = f'<p class="rank missed">missed: nothing correct among the first {self._top_k}</p>'
        else:
            rank = f'<p class="rank{" first" if query.rank == 1 else ""}">rank {query.rank:,.0f}</p>'
        items = list(query.items)
        if query.best_correct.index not in [item.index for item in items]:
            items.append(query.best_correct)
        listed = "".join(self._item(query, item) for item in items)
        if query.direction == "i2t":
            return (
                f'<article class="query"><div class="asked">{self._picture(query.index)}{rank}</div>'
                f'<ol class="texts">{listed}</ol></article>'
            )
        return (
            f'<article class="query"><p class="asked">“{_caption(self._captions[query.index])}”</p>{rank}'
            f'<ol class="pictures">{listed}</ol></article>'
        )

    def _item(self, query: Query, item: Item) -> str:
        place = "not listed" if item.place is None else f"{item.place:,}"
        mark = (
            '<span class="tick" aria-hidden="true">✓</span><span class="hidden">correct</span>' if item.correct else ""
        )
        button = ""
        number = self._numbers.get(pair_of(query, item.index))
        if number is not None:
            button = f'<button type="button" class="see" data-pair="{number}">heatmap</button>'
        style = " ".join(
            name
            for name, holds in (("hit", item.correct), ("apart", item.place is None or item.place > len(query.items)))
            if holds
        )
        head = f'<span class="place">{place}{mark}</span>'
        if query.direction == "i2t":
            return f'<li class="{style}">{head} <span>{_caption(self._captions[item.index])} {button}</span></li>'
        return f'<li class="{style}">{self._picture(item.index)}<div>{head} {button}</div></li>'

    def _picture(self, image: int) -> str:
        if image not in self._thumbnails:
            self._thumbnails[image] = data_uri(shrunk(read_image(self._paths[image]), THUMBNAIL))
        name = html.escape(Path(self._paths[image]).name)
        return f'<img src="{self._thumbnails[image]}" alt="{name}" title="{name}" loading="lazy">'


def _caption(caption: str) -> str:
    return html.escape(caption) if caption.strip() else "<em>(empty)</em>"
