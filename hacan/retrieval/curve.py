"""Metrics, time and memory over the length K of the shortlist, up to the full fine ranking.

All K are computed exactly from one matrix of coarse scores and one of fine scores.
"""

import csv
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hacan.retrieval.cached_scores import CachedScores
from hacan.retrieval.ensemble import GalleryScores
from hacan.retrieval.metrics import RECALLS, check_scores
from hacan.retrieval.ranking import (
    COARSE_IMAGES,
    FINE_IMAGES,
    best_places,
    fine_shard,
    listed_pairs,
    rank_pairs,
    shortlists,
)
from hacan.retrieval.stage_meter import StageMeter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENTRIES = 2**22  # scores ranked at a time
TIMED_PAIRS = 20_000  # per measured K; more pairs are timed on a share of the images and scaled
MISS = 2**62  # larger than any rank
CLOSE = 0.1  # difference in Rsum that counts as equal to the full fine ranking
COLUMNS = ("ceiling_i2t", "ceiling_t2i", *(f"r{k}_{d}" for d in ("i2t", "t2i") for k in RECALLS), "rsum", "pairs")


class Curve(NamedTuple):
    """Metrics for K = 1, ..., max(images, texts); the last row is the full fine ranking."""

    values: np.ndarray  # [K, len(COLUMNS)]: ceilings, recalls and Rsum in percent, listed pairs (a count)
    seconds: dict[int, float]  # at some K: coarse and fine stage together
    host_peak_mib: dict[int, float]
    full_seconds: float  # scoring all pairs
    coarse_rsum: float

    @property
    def rsum(self) -> np.ndarray:
        """Rsum for every K, [K]."""
        return self.values[:, COLUMNS.index("rsum")]

    @property
    def suggested_k(self) -> int:
        """The smallest K whose Rsum is at least that of the full fine ranking minus 0.1."""
        return int(np.argmax(self.rsum >= self.rsum[-1] - CLOSE)) + 1

    def summary(self) -> str:
        """Return one line for the terminal."""
        k = self.suggested_k
        return (
            f"K={k} is enough: Rsum {self.rsum[k - 1]:.1f}, the full fine ranking of all pairs has "
            f"{self.rsum[-1]:.1f} and the coarse score alone {self.coarse_rsum:.1f}"
        )

    def save(self, folder: Path) -> None:
        """Write curve.csv, one row per K, and curve.png."""
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "curve.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["k", *COLUMNS, "seconds", "host_peak_mib"])
            for k, row in enumerate(self.values.tolist(), start=1):
                figures = [f"{value:.4f}" for value in row[:-1]] + [f"{row[-1]:.0f}"]
                costs = [f"{costs[k]:.4f}" if k in costs else "" for costs in (self.seconds, self.host_peak_mib)]
                writer.writerow([k, *figures, *costs])
        draw_curve(self).savefig(folder / "curve.png", dpi=110)


def trade_off(scores: GalleryScores, *, meter: StageMeter, progress: bool = True) -> Curve:
    """Return the curve of one gallery."""
    image_of_text, images, texts = scores.image_of_text, scores.images, len(scores.image_of_text)
    cached = [CachedScores(stage, images=images, texts=texts) for stage in (scores.coarse, scores.fine)]
    times = []
    for name, stage in zip(("curve coarse", "curve fine"), cached, strict=True):
        start = time.perf_counter()
        with meter.stage(name):
            blocks = range(0, images, COARSE_IMAGES)
            for first in tqdm(blocks, desc=name, unit="block of images", delay=2, disable=not progress):
                check_scores(name, stage(slice(first, min(first + COARSE_IMAGES, images))))
        times.append(time.perf_counter() - start)
    with meter.stage("curve rank"):
        matrices = [stage(slice(0, images)) for stage in cached]
        values, coarse_rsum = recalls_by_k(matrices[0], matrices[1], image_of_text, progress=progress)
    seconds, peaks = {}, {}
    lengths = _some_lengths(max(images, texts))
    for k in tqdm(lengths, desc="seconds and memory of some K", unit="K", delay=2, disable=not progress):
        name = f"curve K={k}"
        with meter.stage(name):
            seconds[k] = times[0] + _timed(cached[0], scores, top_k=k)
        peaks[k] = meter.stages.pop(name)["host_peak_mib"]
    return Curve(values, seconds, peaks, full_seconds=times[1], coarse_rsum=coarse_rsum)


def recalls_by_k(
    coarse: Tensor, fine: Tensor, image_of_text: Tensor, *, progress: bool = False
) -> tuple[np.ndarray, float]:
    """Return the values of COLUMNS for every K = 1, ..., max(N, M), and the Rsum of the coarse scores alone.

    coarse, fine [N, M]. Row K - 1 equals the metrics of `rank_shortlists` with top_k=K.
    """
    images, texts = coarse.shape
    length = max(images, texts)
    asked = torch.bincount(image_of_text, minlength=images) > 0
    listed = torch.empty(images, texts, dtype=torch.int32)  # place of the pair in the shortlist of either direction
    recalls, ceilings, coarse_rsum = [], [], 0.0
    directions = (
        (coarse, fine, torch.arange(images), image_of_text, listed),
        (coarse.T, fine.T, image_of_text, torch.arange(images), listed.T),
    )
    for number, (rough, exact, owners, items, places) in enumerate(directions):
        queries, gallery = rough.shape
        hits, found = torch.zeros(len(RECALLS), gallery, dtype=torch.int64), torch.zeros(gallery, dtype=torch.int64)
        parts = torch.arange(queries).split(max(1, ENTRIES // gallery))
        for rows in tqdm(parts, desc="ranks of every K", unit="block", delay=2, disable=not progress):
            block = slice(int(rows[0]), int(rows[-1]) + 1)
            correct = owners[block, None] == items[None, :]
            order = best_places(rough[block].contiguous(), correct, gallery)
            place = torch.empty_like(order, dtype=torch.int32)
            place.scatter_(1, order, torch.arange(gallery, dtype=torch.int32).expand(len(rows), -1))
            places[block] = place if number == 0 else torch.minimum(places[block], place)
            first, ranks = _ranks_by_k(exact[block].contiguous().gather(1, order), correct.gather(1, order))
            found += (ranks < MISS).sum(0)
            for index, k in enumerate(RECALLS):
                hits[index] += (ranks < k).sum(0)
                coarse_rsum += 100.0 * int((first < k).sum()) / (int(asked.sum()) if number == 0 else texts)
        count = int(asked.sum()) if number == 0 else texts
        whole = np.minimum(np.arange(length), gallery - 1)  # beyond the gallery: the gallery
        recalls += [100.0 * hit.numpy()[whole] / count for hit in hits]
        ceilings.append(100.0 * found.numpy()[whole] / count)
    pairs = np.bincount(listed.flatten().numpy(), minlength=length).cumsum()
    return np.stack([*ceilings, *recalls, sum(recalls), pairs[:length]], 1), coarse_rsum


def _ranks_by_k(fine: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    """Return the place of the first correct item [q] and the rank at every K [q, G]; fine [q, G] is in coarse order.

    The rank at K is the number of wrong items among the first K whose fine score is at least that of the best correct
    one among them; MISS if there is none.
    """
    number = correct.cumsum(1)  # correct items so far
    best = fine.masked_fill(~correct, -torch.inf).cummax(1).values
    ranks = torch.full(fine.shape, MISS)
    for many in range(1, int(number[:, -1].max()) + 1):
        here = number == many
        bar = best.masked_fill(~here, torch.inf).amin(1, keepdim=True)  # constant where `many` are in the shortlist
        beaten_by = ((fine >= bar) & ~correct).cumsum(1)
        ranks = torch.where(here, beaten_by, ranks)
    first = torch.where(correct.any(1), correct.to(torch.uint8).argmax(1), MISS)
    return first, ranks


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Return the mean over folds, also of times and pairs; a fold with a smaller gallery repeats its last row."""
    length = max(len(curve.values) for curve in curves)
    values = [curve.values[np.minimum(np.arange(length), len(curve.values) - 1)] for curve in curves]
    common = set.intersection(*(set(curve.seconds) for curve in curves))
    return Curve(
        values=np.mean(values, 0),
        seconds={k: float(np.mean([curve.seconds[k] for curve in curves])) for k in sorted(common)},
        host_peak_mib={k: max(curve.host_peak_mib[k] for curve in curves) for k in sorted(common)},
        full_seconds=float(np.mean([curve.full_seconds for curve in curves])),
        coarse_rsum=float(np.mean([curve.coarse_rsum for curve in curves])),
    )


def draw_curve(curve: Curve, *, stacked: bool = False) -> "Figure":
    """Return a figure of Rsum with the ceilings, seconds, and memory over K; `stacked`: one below the other."""
    from matplotlib.figure import Figure  # an evaluation without a curve does not need matplotlib

    figure = Figure(figsize=(7, 10) if stacked else (15, 4.4), layout="constrained")
    if stacked:
        quality, cost, memory = figure.subplots(3, 1, height_ratios=(1.5, 1, 1))
    else:
        quality, cost, memory = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    k = np.arange(1, len(curve.values) + 1)
    chosen = curve.suggested_k
    quality.plot(k, curve.rsum, color="#1f5a99", linewidth=2, label="hierarchical")
    quality.axhline(curve.rsum[-1], color="#1f5a99", linestyle="--", linewidth=1, label="all pairs, fine")
    quality.axhline(curve.coarse_rsum, color="#777777", linestyle=":", linewidth=1.5, label="coarse only")
    quality.plot([chosen], [curve.rsum[chosen - 1]], "o", color="#c23b22", label=f"suggested: K = {chosen}")
    quality.set(ylabel="Rsum")
    ceiling = quality.twinx()
    ceiling.plot(k, curve.values[:, 0], color="#d98b1f", linewidth=1, label="ceiling, image to text")
    ceiling.plot(k, curve.values[:, 1], color="#6a9f3a", linewidth=1, label="ceiling, text to image")
    ceiling.set(ylim=(0, 102), ylabel="correct item in the shortlist, % of queries")
    handles = [handle for axes in (quality, ceiling) for handle in axes.get_legend_handles_labels()[0]]
    quality.legend(handles=handles, loc="lower right", fontsize=8, framealpha=0.9)
    cost.plot(list(curve.seconds), list(curve.seconds.values()), "o-", color="#1f5a99", label="hierarchical, measured")
    cost.axhline(curve.full_seconds, color="#1f5a99", linestyle="--", linewidth=1, label="all pairs, fine")
    cost.set(ylabel="seconds, both directions", ylim=(0, 1.15 * max(curve.full_seconds, *curve.seconds.values())))
    memory.plot(list(curve.host_peak_mib), list(curve.host_peak_mib.values()), "o-", color="#1f5a99", label="measured")
    memory.set(ylabel="peak resident memory of the process, MiB", ylim=(0, 1.3 * max(curve.host_peak_mib.values())))
    ticks = [some for some in _some_lengths(len(k)) if some == len(k) or 1.6 * some < len(k)]  # labels must not overlap
    if len(ticks) > 12:
        ticks = [some for some in ticks if str(some)[0] == "1" or some == len(k)]
    for axes in (quality, cost, memory):
        axes.set(xscale="log", xlabel="K, length of the shortlist")
        axes.set_xticks(ticks, minor=False)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.tick_params(axis="x", rotation=45)
        axes.minorticks_off()
        axes.grid(alpha=0.25)
    for axes in (cost, memory):
        axes.axvline(chosen, color="#c23b22", linewidth=1, label=f"suggested: K = {chosen}")
        axes.legend(loc="best", fontsize=8)
    return figure


def _some_lengths(longest: int) -> list[int]:
    """Return 1, 2, 5, 10, 20, 50, ... below `longest`, and `longest`."""
    steps = [digit * 10**power for power in range(len(str(longest))) for digit in (1, 2, 5)]
    return [*(k for k in steps if k < longest), longest]


def _timed(coarse: CachedScores, scores: GalleryScores, *, top_k: int) -> float:
    """Return the seconds of shortlists, fine scores and ranks; many fine scores are timed on a share of the images."""
    start = time.perf_counter()
    lists = shortlists(coarse, scores.image_of_text, images=scores.images, top_k=top_k, progress=False)
    pairs = listed_pairs(lists)
    listing = time.perf_counter() - start
    share = min(-(-len(pairs) // TIMED_PAIRS), -(-scores.images // FINE_IMAGES))
    start = time.perf_counter()
    scored = len(fine_shard(scores.pairs, pairs, rank=0, world_size=share, progress=False))
    scoring = (time.perf_counter() - start) * len(pairs) / scored
    start = time.perf_counter()
    rank_pairs(lists, pairs, torch.zeros(len(pairs)), scores.image_of_text, add_coarse=scores.adds_coarse)
    return listing + scoring + time.perf_counter() - start
