"""Score galleries with any form: blocks of bounded memory, listed pairs, recomputation in the backward pass.

Captions are sorted by length, so that blocks have little padding. Everything that depends on lengths or lists is
computed on the CPU before the first block, so that no block synchronises with a GPU.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hacan.settings import STREAMS
from hacan.types import EncodedImages, EncodedTexts, PackedTexts

Texts = EncodedTexts | PackedTexts
LEVELS = {"ksf": ("high", "high"), "lrg_high": ("high", "mid"), "lrg_mid": ("mid", "high")}  # level of image, of text

# Block sizes on a CPU, measured by scripts/benchmarks/alignment.py. A cell is a dot product of a region and a token.
CPU_CELLS, CPU_TOKENS = 800_000, 1024
LIVE_TENSORS, SAVED_TENSORS = 8, 8  # tensors of a block's size: alive at once, and saved for backward
ROUNDING, FEWEST_TOKENS = 4, 256  # lengths are rounded up; smallest size of a bucket, in tokens


def score_all_pairs(form: nn.Module, images: EncodedImages, texts: Texts, streams: tuple[str, ...]) -> Tensor:
    """Return the scores [N, M] of all pairs, the sum of `streams`."""
    scorer = BlockScorer(form, images, texts, streams)
    count, lengths = len(images.high), scorer.lengths
    if not count or not any(lengths):
        return images.high.new_zeros(count, len(lengths), dtype=scorer.dtype)
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    buckets = length_buckets([lengths[j] for j in order], tokens=scorer.tokens_per_block)
    parts = [order[bucket] for bucket in buckets]
    blocks = [scorer.block(torch.tensor(part), lengths[part[0]], lengths[part[-1]]) for part in parts]
    columns = []
    for block in blocks:
        tokens, terms = scorer.tokens(block), []
        for stream, regions in scorer.regions.items():
            share = max(1, scorer.cells_per_block // (block.rows.numel() * regions.shape[1]))
            terms.append(torch.cat([scorer.score(stream, some, tokens, block) for some in regions.split(share)]))
        columns.append(sum(terms[1:], terms[0]))
    scores = torch.cat(columns, 1)[:, torch.tensor(order).argsort().to(scorer.device)]
    return scores.masked_fill(scorer.empty, 0)


def score_listed_pairs(
    form: nn.Module, images: EncodedImages, texts: Texts, pairs: Tensor, streams: tuple[str, ...]
) -> Tensor:
    """Return the scores [P] of listed pairs [P, 2] (image, text), the sum of `streams`.

    A block is a batch of G images, N = 1 each, with captions of their own lists: [G, 1, R, d] and [G, m, L, d].
    """
    scorer, pairs = BlockScorer(form, images, texts, streams), pairs.cpu()
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64:
        raise ValueError(f"pairs is {list(pairs.shape)} of {pairs.dtype}, expected [P, 2] of torch.int64")
    if len(pairs) and not ((pairs >= 0) & (pairs < torch.tensor([len(images.high), len(scorer.lengths)]))).all():
        raise ValueError(f"pairs holds an index outside of {len(images.high)} images and {len(scorer.lengths)} texts")
    lengths = torch.tensor(scorer.lengths)[pairs[:, 1]]
    if not lengths.any():
        return images.high.new_zeros(len(pairs), dtype=scorer.dtype)
    order = lengths.argsort(stable=True)
    order = order[pairs[order, 0].argsort(stable=True)]  # by image, and by length within a list
    tokens_per_block = max(1, scorer.cells_per_block // max(images.high.shape[1], images.mid.shape[1]))
    blocks, places = [], []
    for group in groups_of_images(pairs[order, 0], lengths[order], tokens=tokens_per_block):
        rows = pairs[order[group[:, -1]], 0]
        together = int(rows[-1] - rows[0]) == len(rows) - 1  # consecutive images: a view instead of a copy
        where = slice(int(rows[0]), int(rows[-1]) + 1) if together else rows.to(scorer.device)
        longest = lengths[order[group]].masked_fill(group < 0, 0).amax(0).tolist()
        for bucket in length_buckets(longest, tokens=tokens_per_block // len(group)):
            listed = group[:, bucket]
            captions = pairs[order[listed], 1].masked_fill(listed < 0, -1)
            blocks.append((where, scorer.block(captions, 0, longest[bucket][-1])))
            places.append(listed.flatten())
    scores = []
    for where, block in blocks:
        tokens = scorer.tokens(block)
        regions = {stream: values[where].unsqueeze(-3) for stream, values in scorer.regions.items()}  # N = 1
        terms = [scorer.score(stream, values, tokens, block) for stream, values in regions.items()]
        scores.append(sum(terms[1:], terms[0]).flatten())
    listed = torch.cat(places)
    position = torch.empty_like(order)
    position[order[listed[listed >= 0]]] = (listed >= 0).nonzero().flatten()
    return torch.cat(scores)[position.to(scorer.device)].masked_fill(scorer.empty[pairs[:, 1].to(scorer.device)], 0)


def length_buckets(lengths: list[int], *, tokens: int) -> list[slice]:
    """Return slices of captions sorted by length, each of similar lengths and at most `tokens` padded tokens."""
    buckets, first = [], 0
    for place, length in enumerate(lengths):
        width, before = rounded(length), rounded(lengths[place - 1])
        least = min((place - first) * before, (len(lengths) - place) * width)  # tokens on either side of this cut
        if place > first and ((width > before and least >= FEWEST_TOKENS) or (place - first + 1) * width > tokens):
            buckets.append(slice(first, place))
            first = place
    return [*buckets, slice(first, len(lengths))]


def rounded(length: int) -> int:
    """Return the padded length of a caption; a CPU multiplies matrices of such sizes up to three times as fast."""
    return -(-length // ROUNDING) * ROUNDING


def groups_of_images(images: Tensor, lengths: Tensor, *, tokens: int) -> Iterator[Tensor]:
    """Yield groups of G images as positions [G, m] of their pairs, right-aligned and padded with -1.

    `images` [P] and `lengths` [P] of pairs sorted by both; `tokens`: limit of a group of more than one image.
    """
    counts = images.unique_consecutive(return_counts=True)[1]
    ends = counts.cumsum(0)
    largest = int(lengths.cumsum(0)[ends - 1].diff(prepend=ends.new_zeros(1)).max())
    for some in torch.arange(len(counts)).split(max(1, tokens // max(1, largest))):
        group = torch.arange(-int(counts[some].max()), 0) + ends[some, None]
        yield group.masked_fill(group < (ends - counts)[some, None], -1)


class Block(NamedTuple):
    """Captions that are scored together."""

    rows: Tensor  # [*, m, L] int64: rows of the token tables
    padding: Tensor | None  # [P] int64: flat positions of padding in `rows`
    mask: Tensor  # [*, m, L] bool: real tokens; the first one (a zero) if there are none


class BlockScorer:
    """Features and block sizes of one call, and the scoring of a block."""

    def __init__(self, form: nn.Module, images: EncodedImages, texts: Texts, streams: tuple[str, ...]) -> None:
        if not streams or len(set(streams) & set(STREAMS)) < len(streams):
            raise ValueError(f"streams={streams!r}: expected some of {', '.join(STREAMS)}")
        widths = [features.shape[-1] for features in (images.high, images.mid, texts.high, texts.mid)]
        if len(set(widths)) > 1:
            raise ValueError(f"high and mid features of images and texts are {widths} wide: expected one width d")
        self.form, self.device = form, images.high.device
        self.regions = {stream: getattr(images, LEVELS[stream][0]) for stream in streams}
        self.dtype = torch.promote_types(torch.promote_types(images.high.dtype, texts.high.dtype), torch.float32)
        self.tables = {level: getattr(texts, level) for level in {LEVELS[stream][1] for stream in streams}}
        if isinstance(texts, PackedTexts):
            self.real, bounds = None, texts.offsets.tolist()
            starts, self.lengths = bounds[:-1], [end - start for start, end in pairwise(bounds)]
            self.empty = torch.tensor([not length for length in self.lengths], dtype=torch.bool).to(self.device)
        else:
            self.real, (count, width) = F.pad(texts.mask, (0, ROUNDING)), texts.mask.shape
            for level, table in self.tables.items():
                self.tables[level] = table.masked_fill(~texts.mask[..., None], 0).flatten(0, 1)
            starts, self.lengths = [j * width for j in range(count)], [width] * count
            if width and self.real.device.type == "cpu":  # on a GPU all have the full width, to avoid a synchronisation
                self.lengths = (texts.mask * torch.arange(1, width + 1)).amax(1).tolist()
            self.empty = ~self.real.any(1).to(self.device)
        self._starts, self._lengths = torch.tensor(starts), torch.tensor(self.lengths)
        on_cpu, budget = self.device.type == "cpu", int(form.score_memory * 2**20) // self.dtype.itemsize
        cells, tokens = budget // LIVE_TENSORS, budget // LIVE_TENSORS // images.high.shape[-1]
        self.cells_per_block = max(1, min(cells, CPU_CELLS) if on_cpu else cells)
        self.tokens_per_block = max(1, min(tokens, CPU_TOKENS) if on_cpu else tokens)
        self._graph = budget // SAVED_TENSORS if torch.is_grad_enabled() else math.inf  # cells left to save

    def block(self, captions: Tensor, shortest: int, longest: int) -> Block:
        """Return the block of captions [*, m] (int64, on the CPU); -1: no caption, its score is not used."""
        places = torch.arange(max(1, rounded(longest) if self.device.type == "cpu" else longest))
        beyond = places >= self._lengths[captions].masked_fill(captions < 0, 0)[..., None]
        rows = (self._starts[captions][..., None] + places).masked_fill(beyond, 0)
        real = ~beyond.to(self.device)
        if self.real is not None:
            real = real & self.real[captions.to(self.real.device)][..., : len(places)]
        mask = torch.cat([real[..., :1] | ~real.any(-1, keepdim=True), real[..., 1:]], -1)
        device = next(iter(self.tables.values())).device
        padding = beyond.flatten().nonzero().flatten().to(device) if shortest < len(places) else None
        return Block(rows.to(device), padding, mask)

    def tokens(self, block: Block) -> dict[str, Tensor]:
        """Return the tokens [*, m, L, d] of a block by level, with zeros as padding."""
        found = {}
        for level, table in self.tables.items():
            tokens = table.index_select(0, block.rows.flatten())
            if block.padding is not None:
                tokens = tokens.index_fill_(0, block.padding, 0)
            found[level] = tokens.to(device=self.device, dtype=self.dtype).unflatten(0, block.rows.shape)
        return found

    def score(self, stream: str, regions: Tensor, tokens: dict[str, Tensor], block: Block) -> Tensor:
        """Return the scores [*, n, m] of a stream; recomputed in backward once saved graphs fill the budget."""
        form = self.form.key_semantic_filter if stream == "ksf" else self.form.local_relationship_guidance

        def equation(regions: Tensor, tokens: Tensor) -> Tensor:
            with torch.autocast(self.device.type, enabled=False):
                scores = form(regions.to(self.dtype), tokens, block.mask)
            expected = (*regions.shape[:-2], block.mask.shape[-2])
            if scores.shape != expected:
                raise ValueError(f"{form.__qualname__} gave {list(scores.shape)}, expected [*, N, M] {list(expected)}")
            return scores.to(self.dtype)

        arguments = regions, tokens[LEVELS[stream][1]]
        self._graph -= regions[..., 0].numel() * block.rows.numel() // (len(regions) if regions.ndim > 3 else 1)
        return equation(*arguments) if self._graph >= 0 else checkpoint(equation, *arguments, use_reentrant=False)
