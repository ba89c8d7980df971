"""The captions of a call, or of many calls on one gallery: what a form derives of them is computed once and kept."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hacan.alignment.packing import CaptionOrder
from hacan.alignment.scratch import Scratch
from hacan.alignment.segments import Segments, run_lengths
from hacan.alignment.sides import LEVELS, Tokens
from hacan.types import PackedTexts


class TokenBank:
    """Serves the tokens of captions, gathered and upcast on demand, with what is derived of them.

    Beside the tokens it keeps a few numbers a token, and for the hybrid form's i2t a Gram matrix a caption and level
    (1 KiB for 16 tokens).
    """

    def __init__(
        self,
        texts: PackedTexts,
        order: CaptionOrder,
        derive: Callable[..., Tokens],
        *,
        streams: tuple[str, ...],
        device: torch.device,
        dtype: torch.dtype,
        scratch: Scratch,
        rows: int,
    ) -> None:
        """`texts` as they came, `order` those of them that are scored.

        `derive`: FineAlignment.derive_tokens, called with `rows` tokens at a time.
        """
        self.texts, self.order, self.derive, self.device, self.dtype = texts, order, derive, device, dtype
        self._derived: dict[str, Tokens] = {}
        self._grams: dict[str, dict[int, Tensor]] = {}
        for level in levels_of(streams):
            self._derive(level, filtered=level == "high" and "ksf" in streams, scratch=scratch, rows=rows)

    def _derive(self, level: str, *, filtered: bool, scratch: Scratch, rows: int) -> None:
        parts, grams = [], {}
        for places in self.order.chunks(torch.arange(len(self.order)), rows):
            segments = self.order.segments(places, self.device)
            part = self.derive(self.features(level, places, scratch), segments, filtered=filtered)
            for (length, _), gram in zip(segments.runs, part.grams or (), strict=False):
                longest = run_lengths(length)
                padding = (0, longest - length) * 2  # zeros, for the tokens that stand in add nothing
                grams.setdefault(longest, []).append(F.pad(gram, padding))
            parts.append(part._replace(features=None, grams=None))
        columns = zip(*(parts or [Tokens(None)]), strict=True)
        self._derived[level] = Tokens(*(None if column[0] is None else torch.cat(column) for column in columns))
        self._grams[level] = {length: torch.cat(pieces) for length, pieces in grams.items()}

    def features(self, level: str, places: Tensor, scratch: Scratch) -> Tensor:
        """Tokens [T, d] of the captions at these places of the order.

        Without gradients the next call for this level may overwrite them.
        """
        bank, rows = getattr(self.texts, level), self.order.bank_rows(places)
        if bool((rows.diff() == 1).all()):
            picked = bank[int(rows[0]) : int(rows[-1]) + 1]
        else:
            shape = (len(rows), bank.shape[1])
            out = scratch(f"tokens {level}", *shape, dtype=bank.dtype) if bank.device == self.device else None
            picked = torch.index_select(bank, 0, rows.to(bank.device), out=out)
        if picked.dtype == self.dtype and picked.device == self.device:
            return picked
        wide = scratch(f"tokens {level}", *picked.shape)
        return picked.to(device=self.device, dtype=self.dtype) if wide is None else wide.copy_(picked)

    def tokens(
        self, places: Tensor, levels: list[str], scratch: Scratch, features: dict[str, Tensor] | None = None
    ) -> tuple[dict[str, Tokens], Segments]:
        """These levels of the captions at these places; `features` where they are already gathered."""
        segments = self.order.segments(places, self.device)
        rows = self.order.rows(places).to(self.device)
        counts = [count for _, count in segments.runs]
        in_run = self.order.places_in_run(places[segments.by_length]).to(self.device).split(counts)
        sides = {}
        for level in levels:
            derived, grams = self._derived[level], self._grams[level]
            sides[level] = Tokens(
                features=self.features(level, places, scratch) if features is None else features[level],
                inverse_norms=_take(derived.inverse_norms, rows),
                inverse_residual_norms=_take(derived.inverse_residual_norms, rows),
                grams=tuple(
                    _some_grams(grams, length, at) for (length, _), at in zip(segments.runs, in_run, strict=True)
                )
                if grams
                else None,
            )
        return sides, segments


def levels_of(streams: tuple[str, ...]) -> list[str]:
    """The levels of tokens that streams read."""
    return sorted({LEVELS[stream][1] for stream in streams})


def _take(values: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if values is None else values.index_select(0, rows)


def _some_grams(grams: dict[int, Tensor], length: int, places: Tensor) -> Tensor:
    """[count, length, length] of the captions at these places of their run."""
    return grams[run_lengths(length)].index_select(0, places)[:, :length, :length]
