"""What a block of scores is made of: the regions of some images and the tokens of some captions."""

from typing import NamedTuple

import torch
from torch import Tensor

from hacan.alignment.layouts import Listing, Rectangle
from hacan.alignment.scratch import Scratch
from hacan.alignment.segments import Segments
from hacan.types import EncodedImages

STREAMS = ("ksf", "lrg_high", "lrg_mid")
LEVELS = {"ksf": ("high", "high"), "lrg_high": ("high", "mid"), "lrg_mid": ("mid", "high")}  # of image, of text


class Regions(NamedTuple):
    """Regions of N images at one level, and what a form derives from them once per image."""

    features: Tensor  # [N, R, d] (revised: of unit length)
    inverse_norms: Tensor | None = None  # [N, R]
    grams: Tensor | None = None  # [N, R, R]
    residuals: Tensor | None = None  # [N, R, d] unit length or zero


class Tokens(NamedTuple):
    """Tokens of m captions at one level, and what a form derives from them once per caption."""

    features: Tensor  # [T, d]
    inverse_norms: Tensor | None = None  # [T]
    grams: tuple[Tensor, ...] | None = None  # [count, length, length] for each run of captions of one length
    inverse_residual_norms: Tensor | None = None  # [T]


class Block(NamedTuple):
    """One stream of a block: the regions of N images meet the T tokens of m captions, as the layout says."""

    regions: Regions
    tokens: Tokens
    segments: Segments
    layout: Rectangle | Listing
    scratch: Scratch
    product_dtype: torch.dtype | None = None  # precision of the products' factors; None: that of the features

    def product(self, *, tokens: Tensor | None = None, regions: Tensor | None = None) -> Tensor:
        """Dot products [T, N, R] of the features, or of what stands in for them."""
        tokens = self.tokens.features if tokens is None else tokens
        regions = self.regions.features if regions is None else regions
        if self.product_dtype is None:
            return self.layout.product(tokens, regions, scratch=self.scratch)
        dots = self.layout.product(tokens.to(self.product_dtype), regions.to(self.product_dtype), scratch=self.scratch)
        wide = self.scratch("dots", *dots.shape)
        return dots.to(self.scratch.dtype) if wide is None else wide.copy_(dots)


def inverse_norms(features: Tensor) -> Tensor:
    """Of [..., d], 1 / max(||x||, 1e-8): [...]. Its gradient at 0 is 0."""
    return torch.linalg.vector_norm(features, dim=-1).clamp_min(1e-8).reciprocal()


def residuals(sources: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Residual sources x - mean [..., d], and the inverse of their norms [...]: 0 where the residual is 0.

    A residual within rounding of the mean (32 epsilon of ||x||) counts as zero: sources that are all equal, a single
    one among them, have no direction left, and rounding must not invent one.
    """
    rest = sources - mean
    sizes = torch.linalg.vector_norm(rest.detach(), dim=-1), torch.linalg.vector_norm(sources.detach(), dim=-1)
    return rest, inverse_norms(rest) * (sizes[0] > 32 * torch.finfo(sources.dtype).eps * sizes[1])


def region_features(images: EncodedImages, level: str, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Regions [N, R, d] of some images (ascending rows), a view where they stand together and need no upcast."""
    bank = getattr(images, level)
    if bool((rows.diff() == 1).all()):
        return bank[int(rows[0]) : int(rows[-1]) + 1].to(dtype)
    return bank.index_select(0, rows.to(bank.device)).to(dtype)
