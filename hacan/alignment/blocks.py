"""Listed pairs cut into blocks: rectangles where images share a list, listings of several images where they do not."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hacan.alignment.layouts import Listing, Rectangle
from hacan.alignment.packing import CaptionOrder


class ListedBlock(NamedTuple):
    """Some of the listed pairs. A listing holds its images' lists one after the other."""

    images: Tensor  # [N] rows of the gallery, ascending
    places: Tensor  # [m] of the captions, in a CaptionOrder
    targets: Tensor  # [N, m], or [m] of a listing: which pairs these are
    listed: tuple[int, ...] | None  # pairs of each image of a listing; None: a rectangle

    def layout(self, order: CaptionOrder, device: torch.device) -> Rectangle | Listing:
        """How the block's dot products belong to its images."""
        if self.listed is None:
            return Rectangle()
        rows = [int(part.sum()) for part in order.lengths[self.places].split(self.listed)]
        return Listing(rows, torch.repeat_interleave(torch.tensor(self.listed)).to(device))


def listed_blocks(
    images: Tensor, places: Tensor, order: CaptionOrder, *, most_images: int, rows: Callable[[int], int]
) -> Iterator[ListedBlock]:
    """Pairs (images [P], places [P] of captions) as blocks of at most `rows(N)` tokens beside N images.

    Pairs with place -1 (captions without a token, which score 0) are left out.
    """
    waiting: list[tuple[Tensor, Tensor, Tensor]] = []  # lists that will share a listing: image, places, targets
    tokens = 0
    for group, members, targets in _shared_lists(images, places, most_images):
        done = 0
        for part in order.chunks(members, rows(len(group))):
            here = targets[:, done : done + len(part)]
            done += len(part)
            if len(group) > 1:
                yield ListedBlock(group, part, here, None)
                continue
            size = int(order.lengths[part].sum())
            if waiting and (tokens + size > rows(1) or len(waiting) == most_images):
                yield _listing(waiting)
                waiting, tokens = [], 0
            waiting.append((group, part, here[0]))
            tokens += size
    if waiting:
        yield _listing(waiting)


def _listing(lists: list[tuple[Tensor, Tensor, Tensor]]) -> ListedBlock:
    if len(lists) == 1:
        image, places, targets = lists[0]
        return ListedBlock(image, places, targets[None], None)
    images, places, targets = (torch.cat(parts) for parts in zip(*lists, strict=True))
    return ListedBlock(images, places, targets, tuple(len(part) for _, part, _ in lists))


def _shared_lists(images: Tensor, places: Tensor, most: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Consecutive images [n] that share one list, its places [m] ascending, and which pairs they are [n, m]."""
    listed = (places >= 0).nonzero().flatten()
    listed = listed[torch.argsort(places[listed], stable=True)]
    listed = listed[torch.argsort(images[listed], stable=True)]
    rows, counts = images[listed].unique_consecutive(return_counts=True)
    lists = places[listed].split(counts.tolist())
    targets = listed.split(counts.tolist())
    first = 0
    while first < len(rows):
        last = first + 1
        while last < len(rows) and last - first < most and torch.equal(lists[last], lists[first]):
            last += 1
        yield rows[first:last], lists[first], torch.stack(targets[first:last])
        first = last
