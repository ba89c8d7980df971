"""The HTML report of an evaluation: one self-contained file with metrics, audit, curves, queries and heatmaps.

Styles, script and images are embedded; a content security policy forbids the page to load anything.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup
from torch import Tensor

from hacan.checkpoints.pretrained import Pretrained
from hacan.images.io import read_image
from hacan.report.charts import inline_svg
from hacan.report.heatmap_data import Pair, heatmap_data, pair_of, pairs_to_explain
from hacan.report.query_selection import Item, Query, select_queries
from hacan.report.thumbnails import data_uri, shrink
from hacan.report.training_log import find_training_log, training_charts
from hacan.retrieval.curve import draw_curve
from hacan.retrieval.eccv_cxc import TITLES
from hacan.retrieval.metrics import RECALLS
from hacan.retrieval.provenance import alignment_title
from hacan.retrieval.results import Evaluation

THUMBNAIL = 200  # pixels of the long side
DIRECTIONS = {"i2t": "image to text", "t2i": "text to image"}
KINDS = {
    "best": ("Best", "lowest ranks; equal ranks in random order"),
    "worst": ("Worst", "misses first, then the highest ranks; equal ranks in random order"),
    "random": ("Random", "drawn with the run's seed"),
}


def write_report(
    path: Path,
    evaluation: Evaluation,
    *,
    paths: Sequence[str],
    captions: Sequence[str],
    image_of_text: Tensor,
    pretrained: Pretrained | None = None,
    queries: int = 4,
    shown: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Write the report of an evaluation of N images (`paths`) and M `captions`; return `path`.

    pretrained: the model whose heatmaps are shown (the first member of an ensemble), None: no heatmaps. queries: per
    kind and direction. shown: items per ranking. Training curves come from the folder of `path` if the run trained, or
    from the checkpoint's run.
    """
    record = evaluation.provenance
    checkpoints = [member["checkpoint"] for member in record["members"]]
    selected = select_queries(
        evaluation.results, image_of_text, images=len(paths), count=queries, shown=shown, seed=seed
    )
    viewer, pair_numbers = None, {}
    if pretrained is not None and pretrained.model.alignment.has_attention:
        pairs = pairs_to_explain(selected)
        pair_numbers = {pair: number for number, pair in enumerate(pairs)}
        viewer = heatmap_data(
            pretrained, pairs, paths=paths, captions=captions, image_of_text=image_of_text.tolist(), progress=progress
        )
    no_heatmaps = ""
    if viewer is None:
        no_heatmaps = "this report was made without a model"
        if pretrained is not None:
            no_heatmaps = f"alignment={pretrained.model.alignment.name} defines no attention()"
    log = find_training_log(path.parent, checkpoints)
    curve = evaluation.curve
    page = (
        _environment(_Images(paths), pair_numbers)
        .get_template("report.html.jinja")
        .render(
            evaluation=evaluation,
            record=record,
            model=alignment_title(record),
            captions=captions,
            queries=selected,
            viewer=viewer,
            no_heatmaps=no_heatmaps,
            log=log,
            training=[
                inline_svg(chart, label=chart.axes[0].get_title()) for chart in (training_charts(log) if log else [])
            ],
            curve=None if curve is None else inline_svg(draw_curve(curve, stacked=True), label="Metrics over K"),
        )
    )
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(page, encoding="utf-8", errors="replace")  # captions can hold lone surrogates
    temporary.replace(path)
    return path


class _Images:
    """Thumbnails of the split's images; each is read once."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths
        self._thumbnails: dict[int, str] = {}

    def name(self, image: int) -> str:
        return Path(self._paths[image]).name

    def thumbnail(self, image: int) -> str:
        if image not in self._thumbnails:
            self._thumbnails[image] = data_uri(shrink(read_image(self._paths[image]), THUMBNAIL))
        return self._thumbnails[image]


def _environment(images: _Images, pair_numbers: Mapping[Pair, int]) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hacan.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def pair_number(query: Query, item: int) -> int | None:
        return pair_numbers.get(pair_of(query, item))

    def listed_items(query: Query) -> list[Item]:
        known = any(item.index == query.best_correct.index for item in query.items)
        return query.items if known else [*query.items, query.best_correct]

    def asset(name: str) -> Markup:
        return Markup((Path(__file__).parent / "templates" / name).read_text(encoding="utf-8"))

    environment.filters["number"] = number
    environment.globals.update(
        directions=DIRECTIONS,
        kinds=KINDS,
        recalls=RECALLS,
        judged_titles=TITLES,
        images=images,
        pair_number=pair_number,
        listed_items=listed_items,
        asset=asset,
        is_inf=math.isinf,
        to_json=lambda value: json.dumps(value, ensure_ascii=False),
    )
    return environment


def number(value: float, sign: str = "", digits: int = 1) -> str:
    """Return a number with thousands separators, or a dash if it is not finite.

    >>> number(1234.56)
    '1,234.6'
    """
    return f"{value:{sign},.{digits}f}" if math.isfinite(value) else "–"
