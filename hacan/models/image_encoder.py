"""Image encoder: a timm backbone with two feature levels and a global vector (METHOD section 1), and its weights."""

import difflib
import logging
import re
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import LayerNorm2d, RmsNorm, RmsNorm2d
from torch import Tensor, nn

from hacan.errors import UserError
from hacan.models.weights import load_exactly, no_hub_weights, weights_at
from hacan.settings import ModelSettings

log = logging.getLogger(__name__)

# The original ConvNeXt naming -> timm's, applied in this order.
CONVNEXT_NAMES = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv(\d)\.", r".mlp.fc\1."),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


# Where timm's families keep the norm of their final features: ConvNeXt, ViTs that average their tokens, other ViTs.
FINAL_NORMS = ("head.norm", "fc_norm", "norm")


class ImageFeatures(NamedTuple):
    """Features of N images; regions are in row-major order: region r is row r // w, column r % w of its grid."""

    high: Tensor  # [N, R_high, C_high] regions of the high level
    mid: Tensor  # [N, R_mid, C_mid] regions of the mid level
    pooled: Tensor  # [N, C_high] mean over the high level's positions, after the backbone's own final norm
    high_grid: tuple[int, int]  # rows, columns of the high level
    mid_grid: tuple[int, int]  # rows, columns of the mid level


class ImageEncoder(nn.Module):
    """A timm backbone without its head, with two feature levels and a global vector in one forward pass.

    Levels are indices into timm's `feature_info`: stages of a hierarchical backbone, or blocks of a ViT (without prefix
    tokens such as [CLS]); negative indices count from the end. The global vector is the mean over the positions of the
    high level, followed by the backbone's final LayerNorm (`final_norm`) if it has one (METHOD section 1).
    """

    def __init__(self, *, backbone: Any, levels: tuple[int, ...], name: str = "") -> None:
        """backbone: a new timm model, which is changed in place. name: for error messages."""
        super().__init__()
        self.name = name or type(backbone).__name__
        if not hasattr(backbone, "forward_intermediates") or not hasattr(backbone, "prune_intermediate_layers"):
            raise UserError(
                f"image_encoder={self.name!r} ({type(backbone).__name__}) has no feature levels in timm "
                "(no forward_intermediates): use another, such as a ConvNeXt, EfficientNet, ResNet, Swin or ViT"
            )
        self.levels = self._positions(levels, len(backbone.feature_info))
        self.mid_width, self.high_width = (backbone.feature_info[level]["num_chs"] for level in self.levels)
        self.final_norm = _final_norm(backbone, width=self.high_width)
        backbone.prune_intermediate_layers(list(self.levels), prune_norm=True, prune_head=True)
        self.backbone = backbone

    def _positions(self, levels: tuple[int, ...], count: int) -> tuple[int, int]:
        """Return both levels as indices from 0."""
        mid, high = (level + count if level < 0 else level for level in levels)
        if not 0 <= mid < high < count:
            raise UserError(
                f"image_levels={list(levels)}: expected the mid and the high one of the {count} feature levels of "
                f"image_encoder={self.name!r}, such as [-2, -1]"
            )
        return mid, high

    def forward(self, pixels: Tensor) -> ImageFeatures:
        """Return both levels of regions and the global vector of normalised pixels [N, 3, H, W]."""
        mid, high = self.backbone.forward_intermediates(
            pixels, indices=list(self.levels), norm=False, output_fmt="NCHW", intermediates_only=True
        )
        for level, found, expected in (("mid", mid, self.mid_width), ("high", high, self.high_width)):
            if found.ndim != 4 or found.shape[1] != expected:
                raise UserError(
                    f"image_encoder={self.name!r} gives its {level} level as {list(found.shape)}, expected "
                    f"[N, {expected}, h, w] by its feature_info: this backbone cannot be used"
                )
        pooled = high.mean(dim=(2, 3))
        if isinstance(self.final_norm, (LayerNorm2d, RmsNorm2d)):
            pooled = self.final_norm(pooled[:, :, None, None])[:, :, 0, 0]
        elif self.final_norm is not None:
            pooled = self.final_norm(pooled)
        return ImageFeatures(
            high=high.flatten(2).transpose(1, 2),
            mid=mid.flatten(2).transpose(1, 2),
            pooled=pooled,
            high_grid=(high.shape[2], high.shape[3]),
            mid_grid=(mid.shape[2], mid.shape[3]),
        )


def _final_norm(backbone: nn.Module, *, width: int) -> nn.Module | None:
    """Return the backbone's final LayerNorm or RMSNorm of this width, or None."""
    for path in FINAL_NORMS:
        module: Any = backbone
        for part in path.split("."):
            module = getattr(module, part, None)
        if isinstance(module, (nn.LayerNorm, RmsNorm, RmsNorm2d)) and tuple(module.normalized_shape) == (width,):
            return module
    return None


def build_image_backbone(settings: ModelSettings, *, image_size: int, load_weights: bool, trust: bool) -> nn.Module:
    """Return a timm model for images of this size, with the weights of `image_weights`."""
    name, weights = settings.image_encoder, settings.image_weights
    from_hub = load_weights and weights == "pretrained"
    if not timm.is_model(name):
        close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3) or timm.list_models()[:3]
        raise UserError(f"image_encoder={name!r}: timm has no such model; did you mean {' or '.join(close)}?")
    try:
        hub_id = getattr(timm.get_pretrained_cfg(name, allow_unregistered=True), "hf_hub_id", None) or name
    except RuntimeError as error:
        tags = ", ".join(timm.list_pretrained(f"{name.split('.')[0]}.*")) or "none"
        raise UserError(
            f"image_encoder={name!r}: timm has no such weights; the names with weights are {tags}"
        ) from error
    try:
        backbone = timm.create_model(name, pretrained=from_hub, num_classes=0, **settings.image_encoder_args)
    except (TypeError, AssertionError) as error:
        raise UserError(
            f"image_encoder_args={settings.image_encoder_args}: image_encoder={name!r} does not take them: {error}"
        ) from error
    except (OSError, RuntimeError) as error:
        if not from_hub:
            raise UserError(f"image_encoder={name!r} cannot be built: {error}") from error
        raise UserError(no_hub_weights("image", name, hub_id, error)) from error
    if load_weights and weights not in ("pretrained", "random"):
        state = names_of_convnext(weights_at("image_weights", weights, trust=trust))
        load_exactly(backbone, _fitted(state, backbone), source=f"image_weights={weights}")
    patches = getattr(backbone, "patch_embed", None)
    if hasattr(backbone, "set_input_size") and getattr(patches, "img_size", None) not in (None, (image_size,) * 2):
        try:
            backbone.set_input_size(img_size=(image_size, image_size))
        except (AssertionError, ValueError, RuntimeError) as error:
            raise UserError(f"image_size={image_size}: image_encoder={name!r} cannot take it: {error}") from error
    return backbone


def _fitted(state: dict[str, torch.Tensor], backbone: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state dict converted by timm: older names, position embeddings of another image size."""
    own = backbone.state_dict()
    for key, value in own.items():  # a Linear and a 1 x 1 convolution have the same weights
        if (
            key in state
            and {state[key].ndim, value.ndim} == {2, 4}
            and state[key].squeeze().shape == value.squeeze().shape
        ):
            state[key] = state[key].reshape(value.shape)
    convert = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    if convert is None or all(key in state and state[key].shape == value.shape for key, value in own.items()):
        return state
    try:
        return convert(dict(state), backbone)
    except (KeyError, IndexError, AttributeError, AssertionError, RuntimeError) as error:
        log.debug("timm cannot convert these weights (%s): used as they are, and checked", error)
        return state


def names_of_convnext(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with original ConvNeXt names in timm's names; others are returned unchanged."""
    if "downsample_layers.0.0.weight" not in state:
        return dict(state)
    return {name_of_convnext(key): value for key, value in state.items()}


def name_of_convnext(key: str) -> str:
    """Return timm's name of an original ConvNeXt name: `stages.2.26.gamma` is `stages.2.blocks.26.gamma`."""
    for pattern, replacement in CONVNEXT_NAMES:
        key = re.sub(pattern, replacement, key)
    return key


def convnext_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return depths and widths of a ConvNeXt from its tensors (timm's names), as arguments of timm."""
    depths: list[int] = []
    dims: list[int] = []
    while (block := f"stages.{len(depths)}.blocks.0.conv_dw.weight") in state:
        pattern = re.compile(rf"stages\.{len(depths)}\.blocks\.(\d+)\.")
        depths.append(1 + max(int(match[1]) for key in state if (match := pattern.match(key))))
        dims.append(state[block].shape[0])
    return {"depths": depths, "dims": dims}
