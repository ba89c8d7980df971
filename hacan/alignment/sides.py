"""What a block of scores is made of: the regions of some images and the tokens of some captions."""

from typing import NamedTuple

import torch
from torch import Tensor

from hacan.alignment.layouts import Listing, Rectangle
from hacan.alignment.packing import CaptionOrder
from hacan.alignment.scratch import Scratch
from hacan.alignment.segments import Segments, run_lengths
from hacan.types import EncodedImages, PackedTexts

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


class TokenBank:
    """Serves the tokens of captions, gathered and upcast on demand; what is small is computed once and kept."""

    def __init__(self, texts: PackedTexts, order: CaptionOrder, levels: set[str], scratch: Scratch) -> None:
        self.order, self.scratch = order, scratch
        self.device, self.dtype = scratch.device, scratch.dtype
        self.levels = sorted(levels)
        self._banks = {level: getattr(texts, level) for level in self.levels}
        self._derived: dict[str, Tokens] = {}
        self._grams: dict[str, dict[int, Tensor]] = {}

    def derive(self, form, filtered: set[str], rows: int) -> None:  # noqa: ANN001
        """Let a form compute its statistics of all captions, `rows` tokens at a time."""
        everything = torch.arange(len(self.order))
        for level in self.levels:
            parts, grams = [], {}
            for places in self.order.chunks(everything, rows):
                segments = self.order.segments(places, self.device)
                part = form.derive_tokens(self.features(level, places), segments, filtered=level in filtered)
                for (length, _), gram in zip(segments.runs, part.grams or (), strict=False):
                    longest = run_lengths(length)
                    padding = (0, longest - length) * 2  # zeros, for the tokens that stand in add nothing
                    grams.setdefault(longest, []).append(torch.nn.functional.pad(gram, padding))
                parts.append(part._replace(features=None, grams=None))
            columns = zip(*(parts or [Tokens(None)]), strict=True)
            self._derived[level] = Tokens(*(None if column[0] is None else torch.cat(column) for column in columns))
            self._grams[level] = {length: torch.cat(pieces) for length, pieces in grams.items()}

    def features(self, level: str, places: Tensor) -> Tensor:
        """Tokens [T, d] of the captions at these places of the order.

        Without gradients the next call for this level may overwrite them.
        """
        bank, rows = self._banks[level], self.order.bank_rows(places)
        if bool((rows.diff() == 1).all()):
            picked = bank[int(rows[0]) : int(rows[-1]) + 1]
        else:
            shape = (len(rows), bank.shape[1])
            out = self.scratch(f"tokens {level}", *shape, dtype=bank.dtype) if bank.device == self.device else None
            picked = torch.index_select(bank, 0, rows.to(bank.device), out=out)
        if picked.dtype == self.dtype and picked.device == self.device:
            return picked
        wide = self.scratch(f"tokens {level}", *picked.shape)
        return picked.to(device=self.device, dtype=self.dtype) if wide is None else wide.copy_(picked)

    def tokens(self, places: Tensor, features: dict[str, Tensor] | None = None) -> tuple[dict[str, Tokens], Segments]:
        """All levels of the captions at these places; `features` where they are already gathered."""
        segments = self.order.segments(places, self.device)
        rows = self.order.rows(places).to(self.device)
        counts = [count for _, count in segments.runs]
        in_run = self.order.places_in_run(places[segments.by_length]).to(self.device).split(counts)
        sides = {}
        for level in self.levels:
            derived, grams = self._derived[level], self._grams[level]
            sides[level] = Tokens(
                features=self.features(level, places) if features is None else features[level],
                inverse_norms=_take(derived.inverse_norms, rows),
                inverse_residual_norms=_take(derived.inverse_residual_norms, rows),
                grams=tuple(
                    _some_grams(grams, length, at) for (length, _), at in zip(segments.runs, in_run, strict=True)
                )
                if grams
                else None,
            )
        return sides, segments


def region_features(images: EncodedImages, level: str, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Regions [N, R, d] of some images (ascending rows), a view where they stand together and need no upcast."""
    bank = getattr(images, level)
    if bool((rows.diff() == 1).all()):
        return bank[int(rows[0]) : int(rows[-1]) + 1].to(dtype)
    return bank.index_select(0, rows.to(bank.device)).to(dtype)


def _take(values: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if values is None else values.index_select(0, rows)


def _some_grams(grams: dict[int, Tensor], length: int, places: Tensor) -> Tensor:
    """[count, length, length] of the captions at these places of their run."""
    return grams[run_lengths(length)].index_select(0, places)[:, :length, :length]
