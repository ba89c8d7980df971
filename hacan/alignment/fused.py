"""The hybrid form's attention by the compiled functions of attention.c: dot products -> scores, without gradients."""

import ctypes

import torch
from torch import Tensor

from hacan.alignment.native import attention_library
from hacan.alignment.sides import Block

FOCAL = {None: 0, "prob": 1, "equal": 2}  # as attention.c counts them


def library_for(block: Block) -> ctypes.CDLL | None:
    """The compiled functions, if they can score this block: on a CPU, in float32, without gradients."""
    return attention_library() if block.scratch.readable and block.scratch.dtype == torch.float32 else None


def attention_score(
    library: ctypes.CDLL, block: Block, directions: tuple[str, ...], temperature: float, focal_type: str | None
) -> Tensor:
    """Scores [m, N] of one stream, the mean over `directions`; `focal_type` is KSF's, None of LRG."""
    dots = block.product().contiguous()
    sides = {"i2t": _regions_ask, "t2i": _words_ask}
    scores = [sides[each](library, block, dots, temperature, FOCAL[focal_type]) for each in directions]
    return scores[0] if len(scores) == 1 else (scores[0] + scores[1]) / 2


def _regions_ask(library: ctypes.CDLL, block: Block, dots: Tensor, temperature: float, focal: int) -> Tensor:
    segments, threads, (_, images, regions) = block.segments, torch.get_num_threads(), dots.shape
    captions = len(segments.bounds) - 1
    scores = dots.new_empty(captions, images)
    grams, gram_strides = _addresses(block)
    inverse_norms = block.layout.at_pairs(block.regions.inverse_norms).contiguous()  # [N, R], or [m, 1, R] of a listing
    longest = segments.runs[-1][0]
    work = block.scratch("work", threads * library.work_i2t(longest, regions))
    library.score_i2t(
        dots.data_ptr(), captions, images, regions, segments.bounds.data_ptr(), temperature, focal,
        grams.data_ptr(), gram_strides.data_ptr(), inverse_norms.data_ptr(), regions if inverse_norms.ndim == 3 else 0,
        scores.data_ptr(), work.data_ptr(), longest, threads,
    )  # fmt: skip
    return scores


def _words_ask(library: ctypes.CDLL, block: Block, dots: Tensor, temperature: float, focal: int) -> Tensor:
    scratch, threads, (tokens, images, regions) = block.scratch, torch.get_num_threads(), dots.shape
    captions, bounds = len(block.segments.bounds) - 1, block.segments.bounds.data_ptr()
    scores = dots.new_empty(captions, images)
    weights, work = scratch("weights", *dots.shape), scratch("work", threads, regions)
    along, floors = scratch("along", tokens, images), scratch("floors", tokens, images)
    inverse_norms = block.tokens.inverse_norms.contiguous()
    library.weigh_t2i(
        dots.data_ptr(), captions, images, regions, bounds, temperature, focal,
        weights.data_ptr(), along.data_ptr(), floors.data_ptr(), work.data_ptr(), threads,
    )  # fmt: skip
    half = block.layout.times(weights, block.regions.grams, scratch=scratch)
    library.score_t2i(
        weights.data_ptr(), half.data_ptr(), half.stride(0), half.stride(1), along.data_ptr(), floors.data_ptr(),
        inverse_norms.data_ptr(), captions, images, regions, bounds, scores.data_ptr(), threads,
    )  # fmt: skip
    return scores


def _addresses(block: Block) -> tuple[Tensor, Tensor]:
    """Where each caption's Gram matrix is, and how many numbers its rows are apart, [m] both."""
    grams, segments = block.tokens.grams, block.segments
    places = [gram.data_ptr() + gram.element_size() * gram.stride(0) * torch.arange(len(gram)) for gram in grams]
    strides = [torch.full((len(gram),), gram.stride(1)) for gram in grams]
    return segments.join(places), segments.join(strides)
