"""One self-contained HTML file about an evaluation: figures, audit, curves, a gallery of queries, heatmaps.

Styles, script and pictures stand in the file; a content security policy forbids it to fetch anything.
"""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from hacan.checkpoints.pretrained import Pretrained
from hacan.report.gallery import build_gallery
from hacan.report.query_cards import QueryCards
from hacan.report.tables import (
    audit_tables,
    curve_charts,
    headline,
    judged_table,
    receipt_list,
    results_tables,
    stages_table,
)
from hacan.report.training_log import find_training_log, training_charts
from hacan.report.viewer import Pair, pairs_to_explain, viewer_data
from hacan.retrieval.provenance import alignment_title
from hacan.retrieval.results import Evaluation

HERE = Path(__file__).parent
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
PARTS = {
    "results": "Results",
    "audit": "Audit",
    "training": "Training",
    "curve": "Shortlist",
    "gallery": "Queries",
    "heatmaps": "Heatmaps",
    "receipt": "Receipt",
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
    """Write the report of an evaluation of N pictures (`paths`) and M `captions` to `path`; returns `path`.

    pretrained: the model whose heatmaps are shown (of an ensemble, its first member); None: no heatmaps. queries: of
    each kind and direction; shown: items of a ranking. Training curves come from the
    folder of `path` when it trained, or from the checkpoint's run.
    """
    members = [member["checkpoint"] for member in evaluation.provenance["members"]]
    gallery = build_gallery(evaluation.results, image_of_text, images=len(paths), count=queries, shown=shown, seed=seed)
    viewer: dict[str, Any] | None = None
    numbers: dict[Pair, int] = {}
    if pretrained is not None and pretrained.model.alignment.has_attention:
        pairs = pairs_to_explain(gallery)
        numbers = {pair: number for number, pair in enumerate(pairs)}
        viewer = viewer_data(
            pretrained, pairs, paths=paths, captions=captions, image_of_text=image_of_text.tolist(), progress=progress
        )
    cards = QueryCards(paths, captions, numbers, evaluation.provenance["top_k"])
    sections = [
        _section("results", "Results", _results(evaluation)),
        _section("audit", "Audit, not a result", _audit(evaluation), style="audit"),
        _training(path.parent, members),
        _curve(evaluation),
        _section("gallery", "Queries", cards.gallery(gallery)),
        _heatmaps(viewer, members, _without_heatmaps(pretrained)),
        _section(
            "receipt", "Receipt", stages_table(evaluation.provenance) + receipt_list(evaluation.provenance), folded=True
        ),
    ]
    page = _page(evaluation, [section for section in sections if section], viewer)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(page, encoding="utf-8", errors="replace")  # a caption may hold half an emoji
    temporary.replace(path)
    return path


def _page(evaluation: Evaluation, sections: Sequence[str], viewer: dict[str, Any] | None) -> str:
    receipt = evaluation.provenance
    title = f"{receipt['dataset']} {receipt['split']}: HACAN evaluation"
    members = receipt["members"]
    model = alignment_title(receipt)
    if receipt["ensemble"]:
        model = f"<strong>ensemble of {len(members)} models, scores averaged</strong>: {html.escape(model)}"
    else:
        model = html.escape(model)
    names = ", ".join(f"<code>{html.escape(member['checkpoint'] or 'untrained model')}</code>" for member in members)
    # "<" cannot end the element, whatever a caption says
    data = "" if viewer is None else json.dumps(viewer, ensure_ascii=False).replace("<", "\\u003c")
    links = [
        f'<a href="#{name}">{title}</a>'
        for name, title in PARTS.items()
        if any(section.startswith(f'<section id="{name}"') for section in sections)
    ]
    script = "" if viewer is None else f"<script>{_asset('page.js')}</script>"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_asset('page.css')}</style></head><body>"
        f"<header><h1>{html.escape(title)}</h1><p>{receipt['images']:,} images, {receipt['texts']:,} texts; "
        f"{html.escape(receipt['protocol'])}; coarse score: {html.escape(receipt['coarse'])}.<br>{model}<br>{names}</p>"
        f'<nav aria-label="Parts of this page">{" ".join(links)}</nav></header>'
        f"<main>{''.join(sections)}</main>"
        + (f'<script type="application/json" id="data">{data}</script>' if data else "")
        + f"{script}</body></html>\n"
    )


def _asset(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _section(name: str, title: str, body: str, *, style: str = "", folded: bool = False) -> str:
    if folded:
        body = f"<details><summary>show</summary>{body}</details>"
    return f'<section id="{name}" class="{style}"><h2>{title}</h2>{body}</section>'


def _results(evaluation: Evaluation) -> str:
    return headline(evaluation) + results_tables(evaluation) + judged_table(evaluation) + _notes(evaluation)


def _notes(evaluation: Evaluation) -> str:
    resamples = evaluation.provenance["bootstrap"]
    notes = [
        f"Small figures are 95% bootstrap intervals over queries ({resamples:,} resamples)."
        if resamples
        else "No intervals: this evaluation was made with bootstrap=0.",
        f"A query without a correct item in its shortlist (K = {evaluation.provenance['top_k']}) is a miss at every K.",
        "Ranks count from 1; the mean rank is over the queries that have one.",
    ]
    return f'<p class="note">{" ".join(notes)}</p>'


def _audit(evaluation: Evaluation) -> str:
    return (
        "<p>What the first public code would have printed for the same rankings: it counts a query whose shortlist "
        "misses as rank 0, a hit. Do not quote these figures.</p>" + audit_tables(evaluation)
    )


def _training(run_folder: Path, members: Sequence[str]) -> str:
    log = find_training_log(run_folder, members)
    charts = training_charts(log) if log is not None else []
    if not charts:
        return ""
    body = f'<div class="charts">{"".join(charts)}</div><p class="note">From <code>{html.escape(str(log))}</code>.</p>'
    return _section("training", "Training", body)


def _curve(evaluation: Evaluation) -> str:
    if evaluation.curve is None:
        return ""
    charts = "".join(curve_charts(evaluation.curve))
    note = html.escape(evaluation.curve.summary())
    return _section("curve", "Length of the shortlist", f'<p>{note}.</p><div class="charts">{charts}</div>')


def _without_heatmaps(pretrained: Pretrained | None) -> str:
    if pretrained is None:
        return "this report was made without a model at hand"
    return f"alignment={pretrained.model.alignment.name} defines no attention()"


def _heatmaps(viewer: dict[str, Any] | None, members: Sequence[str], why_none: str) -> str:
    if viewer is None:
        body = f'<p class="note">None: {html.escape(why_none)}.</p>'
    else:
        whose = ""
        if len(members) > 1:
            whose = f" Of the ensemble, this is its first member, <code>{html.escape(members[0])}</code>."
        body = (
            "<p>Where each word looks in the picture, as the model sees it (resized and cut). Choose a pair here or "
            f"with a <em>heatmap</em> button above, then a word.{whose}</p>"
            '<noscript><p class="note">The heatmaps are drawn by a script, which is switched off here.</p></noscript>'
            '<div id="viewer" hidden></div>'
        )
    return _section("heatmaps", "Heatmaps, word by region", body)
