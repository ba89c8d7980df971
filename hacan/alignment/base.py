"""What both forms share: entry points for all pairs and for listed pairs, cut into blocks of bounded memory.

A block is N images x T tokens of m captions without padding. One matrix product per stream makes its dot products
[T, N, R]; everything after that is done while they are in the cache.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hacan.alignment.bank import TokenBank, levels_of
from hacan.alignment.blocks import listed_blocks
from hacan.alignment.call import call_on, prepared_texts
from hacan.alignment.layouts import Listing, Rectangle
from hacan.alignment.packing import pack_texts
from hacan.alignment.plan import saved_bytes, shares_of_cache
from hacan.alignment.scratch import Scratch
from hacan.alignment.segments import Segments
from hacan.alignment.sides import LEVELS, STREAMS, Block, Regions, Tokens, region_features
from hacan.types import EncodedImages, EncodedTexts, PackedTexts

DIRECTIONS = ("i2t", "t2i", "both")


class AttentionMap(NamedTuple):
    """What one stream looks at when one image meets one text."""

    weights: Tensor  # [W, R]; rows of tokens that take no part are 0
    words: Tensor  # [W] bool, on the CPU: which tokens take part
    image_level: str  # "high" or "mid": which regions these are
    text_level: str  # "high" or "mid": which layer's tokens


class FineAlignment(nn.Module):
    """Images x captions -> fine scores [image, text]; a form says what it derives and how one block is scored."""

    drop_ends = False  # whether [CLS] and [SEP] take no part

    def __init__(self, *, direction: str, score_memory: int = 256, product_dtype: torch.dtype | None = None) -> None:
        """`score_memory`: the working set in MiB, beyond features and scores; the scores do not depend on it.

        `product_dtype`: torch.bfloat16 multiplies in that precision, where the hardware is faster at it; everything
        after the products is float32 all the same.
        """
        super().__init__()
        if direction not in DIRECTIONS:
            raise ValueError(f"direction={direction!r}: expected one of {', '.join(DIRECTIONS)}")
        if score_memory <= 0:
            raise ValueError(f"score_memory={score_memory!r}: expected a number of MiB above 0")
        self.direction = direction
        self.score_memory = score_memory
        self.product_dtype = product_dtype

    @property
    def directions(self) -> tuple[str, ...]:
        """The directions whose mean is the score."""
        return ("i2t", "t2i") if self.direction == "both" else (self.direction,)

    def derive_regions(self, features: Tensor, *, filtered: bool) -> Regions:
        """Of [N, R, d]: what is needed once per image; `filtered`: the Key Semantic Filter reads this level."""
        raise NotImplementedError

    def derive_tokens(self, features: Tensor, segments: Segments, *, filtered: bool) -> Tokens:
        """Of [T, d]: what is needed once per caption."""
        raise NotImplementedError

    def score_stream(self, stream: str, block: Block) -> Tensor:
        """Scores of one stream: [m, N] of a rectangle, [m, 1] of a listing."""
        raise NotImplementedError

    def attention_stream(self, stream: str, block: Block) -> Tensor:
        """What one stream of one pair looks at, [T, R]."""
        raise NotImplementedError

    def prepare(self, texts: EncodedTexts | PackedTexts) -> TokenBank:
        """Captions for many calls on one gallery: what is derived of them is computed here, once.

        The result takes the place of the texts in the calls of this alignment, with images on the device of the texts
        (float64 images want float64 texts). It holds these texts, which must not change afterwards; no gradient
        reaches them.
        """
        return prepared_texts(self, texts)

    def forward(
        self,
        images: EncodedImages,
        texts: EncodedTexts | PackedTexts | TokenBank,
        *,
        streams: tuple[str, ...] = STREAMS,
    ) -> Tensor:
        """Fine similarity of all pairs, [N, M] float32 (float64 for float64 features), the sum of `streams`."""
        with call_on(self, images, texts, streams) as (plan, bank, scratch, gradient):
            count, order, levels = len(images.high), bank.order, levels_of(streams)
            scores = images.high.new_zeros(count, len(bank.texts.offsets) - 1, dtype=bank.dtype)
            chunks = order.chunks(torch.arange(len(order)), plan.rows(min(plan.images, max(count, 1))))
            gathered = [{lv: bank.features(lv, at, scratch) for lv in levels} for at in chunks] if gradient else None
            kept = saved_bytes(images, int(order.lengths.sum()), streams, bank.dtype, directions=len(self.directions))
            frugal = gradient and kept > plan.budget
            for first in range(0, count, plan.images):
                rows = torch.arange(first, min(first + plan.images, count))
                regions = self._regions(images, rows, bank.dtype, streams)
                for k, places in enumerate(chunks):
                    tokens, segments = bank.tokens(places, levels, scratch, gathered and gathered[k])
                    captions = order.captions[places].to(scores.device)
                    block = self._block(regions, tokens, segments, Rectangle(), scratch, streams, frugal)
                    scores[first : first + len(rows), captions] = block.T
            return scores

    def pairs(
        self,
        images: EncodedImages,
        texts: EncodedTexts | PackedTexts | TokenBank,
        pairs: Tensor,
        *,
        streams: tuple[str, ...] = STREAMS,
    ) -> Tensor:
        """Fine similarity of listed pairs: `pairs` [P, 2] int64 (image, text) in any order -> scores [P].

        Pairs are scored image by image: its regions are never copied, and the tokens of its list are gathered once.
        Images whose lists are equal share one gather.
        """
        pairs = pairs.cpu()
        with call_on(self, images, texts, streams, pairs) as (plan, bank, scratch, _):
            scores = images.high.new_zeros(len(pairs), dtype=bank.dtype)
            places = bank.order.places_of(pairs[:, 1])
            for block in listed_blocks(pairs[:, 0], places, bank.order, most_images=plan.images, rows=plan.rows):
                regions = self._regions(images, block.images, bank.dtype, streams)
                tokens, segments = bank.tokens(block.places, levels_of(streams), scratch)
                part = self._block(regions, tokens, segments, block.layout(bank.device), scratch, streams)
                scores[block.targets.flatten().to(scores.device)] = part.T.flatten()
            return scores

    @torch.no_grad()
    def attention(
        self, image: EncodedImages, text: EncodedTexts | PackedTexts, *, streams: tuple[str, ...] = STREAMS
    ) -> dict[str, AttentionMap]:
        """What each stream looks at when one image (N = 1) meets one text (M = 1), for heatmaps.

        Rows are the text's real tokens. Hybrid: the attention weights, of KSF the focal ones, which sum to 1 over words
        for each region (i2t) or over regions for each word (t2i). Revised: cosines, of KSF the z of METHOD section 3.
        With direction "both" the map is that of t2i: where each word looks.
        """
        text = text if isinstance(text, PackedTexts) else pack_texts(text)
        if len(image.high) != 1 or len(text.offsets) != 2:
            raise ValueError(
                f"{len(image.high)} images and {len(text.offsets) - 1} texts: expected one of each (slice i : i + 1)"
            )
        with call_on(self, image, text, streams) as (_, bank, scratch, _):
            if not len(bank.order):
                raise ValueError("the text has no real token, so there is nothing to look at")
            place = torch.zeros(1, dtype=torch.int64)
            regions = self._regions(image, place, bank.dtype, streams)
            tokens, segments = bank.tokens(place, levels_of(streams), scratch)
            words = torch.zeros(int(text.offsets[1]), dtype=torch.bool)
            words[bank.order.bank_rows(place)] = True
            maps = {}
            for stream in streams:
                of_image, of_text = LEVELS[stream]
                block = Block(regions[of_image], tokens[of_text], segments, Rectangle(), scratch, self.product_dtype)
                weights = regions[of_image].features.new_zeros(len(words), regions[of_image].features.shape[1])
                weights[words.to(weights.device)] = self.attention_stream(stream, block)
                maps[stream] = AttentionMap(weights, words, of_image, of_text)
            return maps

    def _block(
        self,
        regions: dict[str, Regions],
        tokens: dict[str, Tokens],
        segments: Segments,
        layout: Rectangle | Listing,
        scratch: Scratch,
        streams: tuple[str, ...],
        frugal: bool = False,
    ) -> Tensor:
        """Scores of a block, streams summed; `frugal`: compute it again in the backward pass, keep no inner values."""
        if frugal:
            arguments = (regions, tokens, segments, layout, scratch, streams)
            return checkpoint(self._block, *arguments, use_reentrant=False, preserve_rng_state=False)
        total = None
        for stream in streams:
            of_image, of_text = LEVELS[stream]
            parts = []
            for some in shares_of_cache(regions[of_image], segments.rows, layout):
                parts.append(
                    self.score_stream(
                        stream, Block(some, tokens[of_text], segments, layout, scratch, self.product_dtype)
                    )
                )
            scores = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            total = scores if total is None else total + scores
        return total

    def _regions(
        self, images: EncodedImages, rows: Tensor, dtype: torch.dtype, streams: tuple[str, ...]
    ) -> dict[str, Regions]:
        levels = dict.fromkeys(LEVELS[stream][0] for stream in streams)
        return {
            level: self.derive_regions(
                region_features(images, level, rows, dtype), filtered=level == "high" and "ksf" in streams
            )
            for level in levels
        }
