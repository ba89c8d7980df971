"""The image backbone of the settings: a timm model with the weights of its hub or of a file of any naming."""

import difflib
import logging
import sys

import timm
import torch
from torch import nn

from hacan.errors import UserError
from hacan.foreign import names_of_convnext
from hacan.settings import ModelSettings
from hacan.weights import load_exactly, no_hub_weights, weights_at

log = logging.getLogger(__name__)


def build_image_backbone(settings: ModelSettings, *, image_size: int, load_weights: bool, trust: bool) -> nn.Module:
    """A timm model for pictures of that size, with the weights of `image_weights`."""
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
    """The state dict as timm fits it to the model (older namings, position embeddings of another picture size)."""
    own = backbone.state_dict()
    for key, value in own.items():  # a Linear and a 1 x 1 convolution hold the same numbers
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
        log.debug("timm does not know these weights (%s): taken as they are, and checked", error)
        return state
