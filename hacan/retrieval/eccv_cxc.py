"""ECCV Caption and CxC: additional judged matches for COCO's test split.

COCO has one correct image per caption, although others fit as well. CxC (Parekh et al. 2021) and ECCV Caption (Chun et
al. 2022) add judged matches to the same 5,000 images and 25,000 captions. Their data files come with the package
`eccv_caption`. The metrics are computed here, because those of the package assume full rankings; here an item that is
not in the shortlist is a miss.
"""

import json
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from hacan.errors import UserError
from hacan.types import RetrievalResult

ANNOTATIONS = "captions_val2014.json"
SETS = ("eccv", "cxc")
DIRECTIONS = ("i2t", "t2i")
TITLES = {
    "eccv_map_at_r": "ECCV Caption mAP@R",
    "eccv_rprecision": "ECCV Caption R-Precision",
    "eccv_r1": "ECCV Caption R@1",
    "cxc_r1": "CxC R@1",
    "cxc_r5": "CxC R@5",
    "cxc_r10": "CxC R@10",
}
_FILES = {"i2t": "{}_image_to_caption.json", "t2i": "{}_caption_to_image.json"}

Matches = dict[int, frozenset[int]]  # query id -> ids of the items that match it


def load_matches(name: str) -> dict[str, Matches]:
    """Return the judged matches of "eccv" or "cxc" by direction, with COCO's image and annotation ids."""
    if name not in SETS:
        raise ValueError(f"unknown ground truth {name!r}; choose from {', '.join(SETS)}")
    package = find_spec("eccv_caption")  # not imported: only its data files are used
    if package is None or not package.origin:
        raise UserError(
            "ECCV Caption and CxC need their data files: pip install eccv_caption==0.1.0 (pure Python, 0.8 MB)"
        )
    folder = Path(package.origin).parent / "data"
    found = {}
    for direction in DIRECTIONS:
        content = json.loads((folder / _FILES[direction].format(name)).read_text())
        found[direction] = {int(query): frozenset(map(int, items)) for query, items in content.items()}
    return found


def recall_at_matches(ranking: Sequence[int], matches: frozenset[int], k: int) -> float:
    """Return 1 if one of the first K items matches, else 0."""
    return float(any(item in matches for item in ranking[:k]))


def r_precision(ranking: Sequence[int], matches: frozenset[int]) -> float:
    """Return the share of the R matches among the first R items, 0 to 1; unlisted matches are misses."""
    return sum(item in matches for item in ranking[: len(matches)]) / len(matches)


def average_precision_at_r(ranking: Sequence[int], matches: frozenset[int]) -> float:
    """Return mAP@R of a query with R matches: the mean over r = 1..R of (item r matches) * (precision at r)."""
    hits, total = 0, 0.0
    for place, item in enumerate(ranking[: len(matches)], start=1):
        if item in matches:
            hits += 1
            total += hits / place
    return total / len(matches)


def eccv_cxc_metrics(
    result: RetrievalResult, image_ids: Sequence[int], caption_ids: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Return the metrics of both sets in percent: {"eccv_map_at_r": {"i2t": ..., "t2i": ...}, ...}.

    result: ranks of the whole test split. image_ids [N] and caption_ids [M] are COCO's, and include all judged queries.
    """
    check_judged_queries(image_ids, caption_ids)
    images, captions = list(map(int, image_ids)), list(map(int, caption_ids))
    rankings = {
        "i2t": _rankings(result.top_i2t, images, captions),
        "t2i": _rankings(result.top_t2i, captions, images),
    }
    metrics: dict[str, dict[str, float]] = {}
    for name in SETS:
        for direction, matches in load_matches(name).items():
            for metric, value in _of_set(name, rankings[direction], matches).items():
                metrics.setdefault(f"{name}_{metric}", {})[direction] = value
    return metrics


def check_judged_queries(image_ids: Sequence[int], caption_ids: Sequence[int]) -> None:
    """Raise `UserError` if a judged query is not among the COCO ids of the images [N] and captions [M]."""
    queries = {"i2t": set(map(int, image_ids)), "t2i": set(map(int, caption_ids))}
    for name in SETS:
        for direction, matches in load_matches(name).items():
            absent = [query for query in matches if query not in queries[direction]]
            if absent:
                raise UserError(
                    f"{name} judges {len(matches)} queries {direction}, and {len(absent)} of them are not in this "
                    f"split (COCO id {absent[0]}, for example): all 5,000 images and 25,000 captions of COCO's test "
                    "split are needed"
                )


def find_annotations(data_root: Path) -> Path | None:
    """Return the path of COCO's captions_val2014.json below `data_root`, or None."""
    folders = [data_root / "coco" / "annotations", data_root / "annotations", data_root / "coco"]
    return next((folder / ANNOTATIONS for folder in folders if (folder / ANNOTATIONS).is_file()), None)


def coco_ids(
    paths: Sequence[str], captions: Sequence[str], image_of_text: Tensor, annotations: Path
) -> tuple[list[int], list[int]]:
    """Return COCO's ids of images (from file names) and of captions (by image and words in `annotations`).

    paths [N], captions [M], image_of_text [M]; white space in captions is ignored.
    """
    numbers = [re.search(r"(\d+)$", Path(path).stem) for path in paths]
    unnamed = [path for path, number in zip(paths, numbers, strict=True) if number is None]
    if unnamed:
        raise UserError(f"{unnamed[0]} does not have a file name of COCO (COCO_val2014_000000391895.jpg)")
    images = [int(number.group(1)) for number in numbers if number is not None]
    known = _annotations_by_words(annotations)
    found = []
    for caption, owner in zip(captions, image_of_text.tolist(), strict=True):
        candidates = known.get((images[owner], _words(caption)), [])
        if not candidates:
            raise UserError(
                f"{annotations} has no annotation {caption!r} of image {images[owner]}: give the "
                "captions_val2014.json that belongs to this split"
            )
        found.append(candidates.pop(0))  # an image can have the same caption twice
    return images, found


def _annotations_by_words(path: Path) -> dict[tuple[int, str], list[int]]:
    known: dict[tuple[int, str], list[int]] = {}
    try:
        for entry in json.loads(path.read_text(encoding="utf-8"))["annotations"]:
            known.setdefault((int(entry["image_id"]), _words(entry["caption"])), []).append(int(entry["id"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a COCO annotation file ({error!r}); ECCV Caption and CxC need captions_val2014.json"
        ) from error
    return known


def _words(caption: str) -> str:
    return " ".join(caption.split())


def _rankings(top: Tensor, queries: Sequence[int], items: Sequence[int]) -> dict[int, list[int]]:
    return {query: [items[place] for place in row] for query, row in zip(queries, top.tolist(), strict=True)}


def _of_set(name: str, rankings: Mapping[int, list[int]], matches: Matches) -> dict[str, float]:
    """Return the reported metrics of a set in percent."""
    judged = [(rankings[query], right) for query, right in matches.items()]
    if name == "cxc":
        values = {f"r{k}": [recall_at_matches(*pair, k) for pair in judged] for k in (1, 5, 10)}
    else:
        values = {
            "map_at_r": [average_precision_at_r(*pair) for pair in judged],
            "rprecision": [r_precision(*pair) for pair in judged],
            "r1": [recall_at_matches(*pair, 1) for pair in judged],
        }
    return {metric: 100.0 * sum(column) / len(column) for metric, column in values.items()}
