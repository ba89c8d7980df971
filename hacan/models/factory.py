"""Build the model from settings: names, sizes and pretrained weights are resolved here."""

import dataclasses
from typing import Any

from torch import nn

from hacan.alignment import build_alignment, form_of
from hacan.errors import UserError
from hacan.models.aggregator import Aggregator
from hacan.models.hacan import HACAN
from hacan.models.image_encoder import ImageEncoder, build_image_backbone
from hacan.models.text_encoder import TextEncoder, Vocabulary, build_text_backbone, check_vocabulary
from hacan.settings import ModelSettings


def build_model(
    settings: ModelSettings,
    *,
    image_size: int,
    score_memory: int,
    tokenizer: Vocabulary | None = None,
    load_weights: bool = True,
    text_config: dict[str, Any] | None = None,
    trust: bool = False,
) -> HACAN:
    """Return the model of the settings.

    image_size: side of the images in pixels. score_memory: MiB for fine scoring. tokenizer: gives the vocabulary size
    of a random text encoder, and is compared with the vocabulary of others. load_weights=False: both encoders stay
    random until a checkpoint is loaded; `text_config` is then the stored config of the text encoder. trust: also read
    weights files that are pickles of more than tensors.
    """
    form_of(settings.alignment)  # an unknown name is reported before weights are loaded
    image_backbone = build_image_backbone(settings, image_size=image_size, load_weights=load_weights, trust=trust)
    text_backbone = build_text_backbone(
        settings, tokenizer=tokenizer, load_weights=load_weights, config=text_config, trust=trust
    )
    image = ImageEncoder(backbone=image_backbone, levels=settings.image_levels, name=settings.image_encoder)
    text = TextEncoder(backbone=text_backbone, levels=settings.text_levels, name=settings.text_encoder)
    if tokenizer is not None:
        check_vocabulary(tokenizer, text_backbone, name=f"text_encoder={settings.text_encoder!r}")
    width = settings.embed_dim
    model = HACAN(
        image_encoder=image,
        text_encoder=text,
        project_image_high=nn.Linear(image.high_width, width),
        project_image_mid=nn.Linear(image.mid_width, width),
        project_text_high=_text_projection(text.width, width),
        project_text_mid=_text_projection(text.width, width),
        aggregate_image=Aggregator(in_dim=image.high_width, embed_dim=width, activation=settings.activation),
        aggregate_text=Aggregator(in_dim=text.width, embed_dim=width, activation=settings.activation),
        alignment=build_alignment(settings.alignment, dataclasses.asdict(settings), score_memory=score_memory),
    )
    _check_image_size(model, settings, image_size=image_size)
    return model


def _text_projection(in_dim: int, out_dim: int) -> nn.Linear:
    """Return a Linear with weights Normal(0, 0.02) and zero bias (METHOD section 1)."""
    linear = nn.Linear(in_dim, out_dim)
    nn.init.normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear


def _check_image_size(model: HACAN, settings: ModelSettings, *, image_size: int) -> None:
    """Raise `UserError` if the backbone cannot process images of this size."""
    try:
        model.region_grids(height=image_size, width=image_size)
    except (AssertionError, ValueError, RuntimeError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"image_encoder={settings.image_encoder!r} fails on images of image_size={image_size} pixels: {error}"
        ) from error


def model_settings(flat: dict[str, Any]) -> ModelSettings:
    """Return the model settings of a flat config, as a checkpoint stores it."""
    fields = dataclasses.fields(ModelSettings)
    missing = [field.name for field in fields if field.name not in flat and field.default is dataclasses.MISSING]
    if missing:
        raise UserError(f"the stored settings lack {', '.join(missing)}: another version of this program wrote them")
    stored: dict[str, Any] = {field.name: flat[field.name] for field in fields if field.name in flat}
    values: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in stored.items()}
    return ModelSettings(**values)
