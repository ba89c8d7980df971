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
    listed: tuple[int, ...] | None = None  # pairs of each image of a listing; None: a rectangle
    rows: tuple[int, ...] = ()  # tokens of each image's list in a listing

    def layout(self, device: torch.device) -> Rectangle | Listing:
        """How the block's dot products belong to its images."""
        if self.listed is None:
            return Rectangle()
        return Listing(self.rows, torch.repeat_interleave(torch.tensor(self.listed)).to(device))


class _List(NamedTuple):
    """Captions that the same images list, or some of them."""

    images: Tensor  # [n]
    places: Tensor  # [m] ascending
    targets: Tensor  # [n, m]
    tokens: int


def listed_blocks(
    images: Tensor, places: Tensor, order: CaptionOrder, *, most_images: int, rows: Callable[[int], int]
) -> Iterator[ListedBlock]:
    """Pairs (images [P], places [P] of captions) as blocks of at most `rows(N)` tokens beside N images.

    Pairs with place -1 (captions without a token, which score 0) are left out.
    """
    waiting: list[_List] = []  # lists that will share a listing
    tokens, most = 0, rows(1)
    for whole in _shared_lists(images, places, order, most_images):
        for part in _cut(whole, order, rows(len(whole.images))):
            if len(part.images) > 1:
                yield ListedBlock(*part[:3])
                continue
            if waiting and (tokens + part.tokens > most or len(waiting) == most_images):
                yield _listing(waiting)
                waiting, tokens = [], 0
            waiting.append(part)
            tokens += part.tokens
    if waiting:
        yield _listing(waiting)


def _listing(lists: list[_List]) -> ListedBlock:
    if len(lists) == 1:
        return ListedBlock(*lists[0][:3])
    images, places, targets, tokens = zip(*lists, strict=True)
    listed = tuple(len(part) for part in places)
    return ListedBlock(torch.cat(images), torch.cat(places), torch.cat(targets, 1).flatten(), listed, tokens)


def _cut(whole: _List, order: CaptionOrder, rows: int) -> Iterator[_List]:
    if whole.tokens <= rows:
        yield whole
        return
    done = 0
    for places in order.chunks(whole.places, rows):
        targets = whole.targets[:, done : done + len(places)]
        done += len(places)
        yield _List(whole.images, places, targets, int(order.lengths[places].sum()))


def _shared_lists(images: Tensor, places: Tensor, order: CaptionOrder, most: int) -> Iterator[_List]:
    """Consecutive images, `most` of them at most, that list the same captions."""
    listed = (places >= 0).nonzero().flatten()
    listed = listed[torch.argsort(places[listed], stable=True)]
    listed = listed[torch.argsort(images[listed], stable=True)]
    rows, counts = images[listed].unique_consecutive(return_counts=True)
    ends = counts.cumsum(0)
    totals = order.lengths[places[listed]].cumsum(0)[ends - 1]
    tokens = totals.diff(prepend=totals.new_zeros(1)).tolist()
    counts = counts.tolist()
    lists, targets = places[listed].split(counts), listed.split(counts)
    first = 0
    while first < len(rows):
        last = first + 1
        while (
            last < min(len(rows), first + most)
            and (counts[last], tokens[last]) == (counts[first], tokens[first])  # cheaper than the lists themselves
            and torch.equal(lists[last], lists[first])
        ):
            last += 1
        yield _List(rows[first:last], lists[first], torch.stack(targets[first:last]), tokens[first])
        first = last
