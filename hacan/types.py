"""Containers that modules exchange: NamedTuples of tensors, which Lightning moves between devices.

Score matrices are always [image, text]. Letters: B pairs of a batch, N images, M texts, R regions, W tokens, d joint
width, L tokens of all texts.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class PairBatch(NamedTuple):
    """B image-caption pairs; B is 0 if no image of a batch could be read."""

    images: Tensor  # [B, 3, H, W] float, normalised pixels
    token_ids: Tensor  # [B, W] int64, padded
    token_mask: Tensor  # [B, W] bool, True where a token is real ([CLS] and [SEP] included)
    image_ids: Tensor  # [B] int64: pairs with the same id are not negatives of each other
    caption_ids: Tensor  # [B] int64, index of the caption in its split


class EncodedImages(NamedTuple):
    """Features of N images after encoder and projections."""

    high: Tensor  # [N, R_high, d] regions of the last level (49 for ConvNeXt at 224 pixels)
    mid: Tensor  # [N, R_mid, d] regions of the level before (196)
    pooled: Tensor  # [N, d] global embedding, unit length


class EncodedTexts(NamedTuple):
    """Features of M texts after encoder and projections, padded to one width."""

    high: Tensor  # [M, W, d] tokens of the last layer
    mid: Tensor  # [M, W, d] tokens of the third layer from the end
    mask: Tensor  # [M, W] bool, True where a token is real; padding is never used
    pooled: Tensor  # [M, d] global embedding, unit length


class PackedTexts(NamedTuple):
    """Features of M texts without padding: the tokens of all texts, concatenated."""

    high: Tensor  # [L, d]
    mid: Tensor  # [L, d]
    offsets: Tensor  # [M + 1] int64, on the CPU: text j owns the rows offsets[j]:offsets[j + 1]
    pooled: Tensor  # [M, d] global embedding, unit length


def pack_texts(texts: EncodedTexts) -> PackedTexts:
    """Return the texts without padding: [M, W, d] -> [L, d]; the mask can be True at any positions."""
    mask = texts.mask
    if mask.dtype != torch.bool or texts.high.shape[:2] != mask.shape or texts.mid.shape[:2] != mask.shape:
        raise ValueError(
            f"texts.high is {list(texts.high.shape)}, texts.mid {list(texts.mid.shape)} and texts.mask "
            f"{list(mask.shape)} of {mask.dtype}, expected [M, W, d] twice and [M, W] bool"
        )
    offsets = torch.zeros(len(mask) + 1, dtype=torch.int64)
    offsets[1:] = mask.sum(1).cumsum(0).cpu()
    return PackedTexts(high=texts.high[mask], mid=texts.mid[mask], offsets=offsets, pooled=texts.pooled)


class HardNegatives(NamedTuple):
    """The hardest negative of each pair of a batch by the fine scores; -1 if the batch has no negative."""

    text_of_image: Tensor  # [B] int64: the highest-scoring wrong text of image i
    image_of_text: Tensor  # [B] int64: the highest-scoring wrong image of text j


class Split(NamedTuple):
    """N images and M captions of one split of a data set, numbered in its order.

    image_batches(rows) yields (rows [B], pixels [B, 3, H, W]) of the images asked for, text_batches(rows) yields
    (rows [B], token_ids [B, W], mask [B, W]) of the captions, at most `batch_size` at a time and in any order.
    """

    dataset: str
    name: str  # train, val or test
    ids: Sequence[Any]  # N image ids
    captions: Sequence[str]  # M
    image_of_text: Tensor  # [M] int64
    image_batches: Callable[[Sequence[int]], Iterable[tuple[Tensor, Tensor]]]
    text_batches: Callable[[Sequence[int]], Iterable[tuple[Tensor, Tensor, Tensor]]]
    batch_size: int
    images_hash: str = ""  # of the image files and their preprocessing; required to cache features
    paths: Sequence[str] = ()  # N image files
    left_out: int = 0  # unreadable images, which are not among the N
    coco_ids: tuple[Sequence[int], Sequence[int]] | None = None  # of images and captions, for ECCV Caption and CxC


class Processes(NamedTuple):
    """Place of this process among those that evaluate together; by default there is one."""

    rank: int = 0
    world_size: int = 1
    barrier: Callable[[], None] = lambda: None
    gather: Callable[[Tensor], list[Tensor]] = lambda shard: [shard]  # the tensors of all processes, by rank


class Gallery(NamedTuple):
    """The features of a split."""

    images: EncodedImages
    texts: PackedTexts
    image_of_text: Tensor  # [M] int64: the row in `images` that caption j belongs to


class RetrievalResult(NamedTuple):
    """Ranks of both directions, from 0; `inf`: no correct item in the shortlist."""

    ranks_i2t: Tensor  # [N] float64: rank of the best-ranked caption of image i
    ranks_t2i: Tensor  # [M] float64: rank of the image of caption j
    top_i2t: Tensor  # [N, K] int64: texts of the shortlist of image i, best first
    top_t2i: Tensor  # [M, K] int64: images of the shortlist of text j, best first


class RetrievalMetrics(NamedTuple):
    """Metrics of one ranking: recalls in percent, median and mean rank from 1."""

    r1_i2t: float  # R@1, image to text
    r5_i2t: float
    r10_i2t: float
    r1_t2i: float  # R@1, text to image
    r5_t2i: float
    r10_t2i: float
    rsum: float  # the sum of the six recalls, 0 to 600
    median_i2t: float  # inf if at least half of the queries are misses
    median_t2i: float
    mean_i2t: float  # over the queries that have a rank; inf if there are none
    mean_t2i: float
    missed_i2t: float  # percent of queries without a correct item in the shortlist
    missed_t2i: float
