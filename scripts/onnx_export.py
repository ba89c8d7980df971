"""Export both encoders as ONNX files, each compared with PyTorch in onnxruntime."""

import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hacan.checkpoints.pretrained import Pretrained
from hacan.errors import UserError
from hacan.models.hacan import HACAN

OUTPUTS = ("high", "mid", "pooled")
OPSET = 18
TOLERANCE = 1e-3  # relative to the largest feature; float32 sums in another order


class OnnxFile(NamedTuple):
    """An exported encoder and its difference to PyTorch."""

    path: Path
    difference: float  # largest difference of any output, relative to that output's largest value


class _Images(nn.Module):
    """Pixels [N, 3, S, S] to the fields of EncodedImages."""

    def __init__(self, model: HACAN) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.encode_images(pixels))


class _Texts(nn.Module):
    """Token ids and mask [M, W] to the fields of EncodedTexts without the mask."""

    def __init__(self, model: HACAN) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_ids: Tensor, token_mask: Tensor) -> tuple[Tensor, ...]:
        texts = self.model.encode_texts(token_ids, token_mask)
        return texts.high, texts.mid, texts.pooled


def export_onnx(pretrained: Pretrained, folder: Path) -> list[OnnxFile]:
    """Write image_encoder.onnx and text_encoder.onnx, with dynamic numbers of images, texts and tokens."""
    model, image_size, max_text_len = pretrained.model, pretrained.image_size, pretrained.max_text_len
    was_training = model.training
    model.eval()
    words = model.text_encoder.backbone.config.vocab_size
    try:
        images = _export(
            _Images(model).eval(),
            folder / "image_encoder.onnx",
            inputs={"pixels": {0: "images"}},
            example=(torch.randn(2, 3, image_size, image_size),),
            check=(torch.randn(3, 3, image_size, image_size),),
        )
        texts = _export(
            _Texts(model).eval(),
            folder / "text_encoder.onnx",
            inputs={"token_ids": {0: "texts", 1: "tokens"}, "token_mask": {0: "texts", 1: "tokens"}},
            example=_captions(words, lengths=[min(length, max_text_len) for length in (5, 9, 3)]),
            check=_captions(words, lengths=[min(length, max_text_len) for length in (2, max_text_len, 4, 7)]),
        )
    finally:
        model.train(was_training)
    return [images, texts]


def _captions(words: int, *, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Return token ids and mask of random captions of these lengths."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.randint(words, mask.shape) * mask, mask


def _export(
    module: nn.Module,
    path: Path,
    *,
    inputs: dict[str, dict[int, str]],
    example: tuple[Tensor, ...],
    check: tuple[Tensor, ...],
) -> OnnxFile:
    """Trace `module` on `example`, then compare onnxruntime with PyTorch on `check`, which has other sizes."""
    first = next(iter(inputs.values()))[0]
    outputs = {name: {0: first} for name in OUTPUTS}
    if "token_ids" in inputs:
        outputs["high"], outputs["mid"] = {0: first, 1: "tokens"}, {0: first, 1: "tokens"}
    # The tracing exporter (dynamo=False) is faster, and the other one also needs onnxscript. It warns of shapes that
    # it may have made constant; the comparison below checks that.
    with warnings.catch_warnings():
        for kind in (torch.jit.TracerWarning, DeprecationWarning, UserWarning):
            warnings.simplefilter("ignore", kind)
        torch.onnx.export(
            module,
            example,
            path,
            dynamo=False,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(OUTPUTS),
            dynamic_axes={**inputs, **outputs},
        )
    found = OnnxFile(path, _difference(module, path, names=list(inputs), check=check))
    if not found.difference <= TOLERANCE:
        path.unlink()
        raise UserError(
            f"{path.name} differs from PyTorch (relative difference {found.difference:.2g}, allowed "
            f"{TOLERANCE:g}) and was removed: this encoder cannot be exported to ONNX"
        )
    return found


@torch.no_grad()
def _difference(module: nn.Module, path: Path, *, names: list[str], check: tuple[Tensor, ...]) -> float:
    """Return the largest relative difference between onnxruntime and PyTorch, except at padding."""
    import onnxruntime  # optional dependency

    expected = module(*check)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {name: value.numpy() for name, value in zip(names, check, strict=True)})
    worst = 0.0
    for ours, theirs in zip(expected, map(torch.from_numpy, found), strict=True):
        if ours.shape != theirs.shape:
            raise UserError(f"{path.name} gives {list(theirs.shape)} where PyTorch gives {list(ours.shape)}")
        if len(check) == 2 and ours.ndim == 3:
            ours, theirs = ours[check[1]], theirs[check[1]]
        worst = max(worst, ((ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-12)).item())
    return worst
