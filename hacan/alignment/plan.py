"""How large blocks of scores may be: the budget in bytes, and what fits a processor's cache."""

from typing import NamedTuple

import torch

from hacan.alignment.layouts import Listing, Rectangle
from hacan.alignment.sides import LEVELS, Regions
from hacan.types import EncodedImages

# Dot products of a block on a CPU: a few MiB, so that the passes over them stay in the cache, and matrix products are
# still large enough to run at full speed (measured by scripts/benchmark_alignment.py).
CPU_BLOCK, CPU_LISTING, CPU_IMAGES, CPU_SHARE = 800_000, 1_000_000, 16, 4
ACCELERATOR_IMAGES = 128
SAVED_PER_ELEMENT = 6  # tensors of the size of the dot products that autograd keeps, for each direction
ROWS_PER_TOKEN = 6  # tensors of the size of a block's tokens alive at once
PASSES_PER_BLOCK = 10  # tensors of the size of the dot products alive at once, without autograd


class Plan(NamedTuple):
    """Sizes of blocks."""

    images: int  # of a block at most
    budget: int  # bytes
    row_bytes: int  # of one token, images apart
    cell_bytes: int  # of one token beside one image
    cells: int  # tokens x images at most
    listed_cells: int  # tokens of a listing at most

    def rows(self, images: int) -> int:
        """Tokens of a block of so many images."""
        fitting = self.budget // 2 // (self.row_bytes + images * self.cell_bytes)
        return max(1, min(fitting, self.cells // min(images, CPU_SHARE) if images > 1 else self.listed_cells))


def make_plan(images: EncodedImages, device: torch.device, dtype: torch.dtype, *, score_memory: int) -> Plan:
    """Blocks for images of this size; `score_memory` in MiB."""
    itemsize, width = dtype.itemsize, images.high.shape[-1]
    places = [images.high.shape[1], images.mid.shape[1]]
    image_bytes = itemsize * (2 * width * sum(places) + sum(r * r for r in places))
    budget = int(score_memory * 2**20)
    on_cpu = device.type == "cpu"
    most = CPU_IMAGES if on_cpu else ACCELERATOR_IMAGES
    return Plan(
        images=max(1, min(most, budget // 4 // image_bytes)),
        budget=budget,
        row_bytes=_row_bytes(width, dtype),
        cell_bytes=itemsize * max(places) * PASSES_PER_BLOCK,
        cells=CPU_BLOCK // max(places) if on_cpu else budget,
        listed_cells=CPU_LISTING // max(places) if on_cpu else budget,
    )


def derived_rows(width: int, dtype: torch.dtype, *, score_memory: int) -> int:
    """Tokens of which something is derived at a time."""
    return max(1, int(score_memory * 2**20) // 4 // _row_bytes(width, dtype))


def _row_bytes(width: int, dtype: torch.dtype) -> int:
    return dtype.itemsize * width * ROWS_PER_TOKEN


def saved_bytes(
    images: EncodedImages, tokens: int, streams: tuple[str, ...], dtype: torch.dtype, *, directions: int
) -> int:
    """What autograd would keep of all images and `tokens` tokens, were no block computed twice."""
    places = sum(getattr(images, LEVELS[stream][0]).shape[1] for stream in streams)
    return tokens * len(images.high) * places * SAVED_PER_ELEMENT * directions * dtype.itemsize


def shares_of_cache(regions: Regions, rows: int, layout: Rectangle | Listing) -> list[Regions]:
    """The images of a rectangle in shares whose dot products with `rows` tokens fit the cache; a listing as it is."""
    images, places, _ = regions.features.shape
    if regions.features.device.type != "cpu" or isinstance(layout, Listing):
        return [regions]
    share = max(1, CPU_BLOCK // (rows * places))
    parts = [None if field is None else field.split(share) for field in regions]
    return [Regions(*(part and part[k] for part in parts)) for k in range(-(-images // share))]
