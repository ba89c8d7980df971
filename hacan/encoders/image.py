"""Any timm backbone with two feature levels: mid regions, high regions and a global vector in one pass (METHOD 1)."""

from typing import NamedTuple

from timm.layers import LayerNorm2d, RmsNorm, RmsNorm2d
from torch import Tensor, nn

from hacan.errors import UserError

# Where timm's families keep the norm of their final features: ConvNeXt, ViTs that average their tokens, other ViTs.
FINAL_NORMS = ("head.norm", "fc_norm", "norm")


class ImageFeatures(NamedTuple):
    """N pictures after the backbone; regions in row-major order: region r is row r // w, column r % w of its grid."""

    high: Tensor  # [N, R_high, C_high] regions of the high level
    mid: Tensor  # [N, R_mid, C_mid] regions of the mid level
    pooled: Tensor  # [N, C_high] mean over the high level's positions, after the backbone's own final norm
    high_grid: tuple[int, int]  # rows, columns of the high level
    mid_grid: tuple[int, int]  # rows, columns of the mid level


class ImageEncoder(nn.Module):
    """A timm backbone, its head cut off, that gives two levels and a global vector in one forward pass.

    Levels count as in timm's `feature_info`: stages of a hierarchical backbone, blocks of a ViT (whose prefix tokens,
    [CLS] among them, are dropped); negative ones from the end. The global vector is the mean over the high level's
    positions, then the backbone's own final LayerNorm (`final_norm`); a backbone without one (EfficientNet, ResNet:
    they end in BatchNorm) has the mean as it is. METHOD section 1.
    """

    def __init__(self, *, backbone: nn.Module, levels: tuple[int, int], name: str = "") -> None:
        """`backbone`: a fresh timm model, which is changed in place; `name`: what error messages call it."""
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

    def _positions(self, levels: tuple[int, int], count: int) -> tuple[int, int]:
        """The two levels counted from 0."""
        mid, high = (level + count if level < 0 else level for level in levels)
        if not 0 <= mid < high < count:
            raise UserError(
                f"image_levels={list(levels)}: expected the mid and the high one of the {count} feature levels of "
                f"image_encoder={self.name!r}, such as [-2, -1]"
            )
        return mid, high

    def forward(self, pixels: Tensor) -> ImageFeatures:
        """[N, 3, H, W] normalised pixels -> two levels of regions, and the global vector."""
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
    """The backbone's own final LayerNorm (or RMSNorm) of that width, or None where it has none."""
    for path in FINAL_NORMS:
        module = backbone
        for part in path.split("."):
            module = getattr(module, part, None)
        if isinstance(module, (nn.LayerNorm, RmsNorm, RmsNorm2d)) and tuple(module.normalized_shape) == (width,):
            return module
    return None
