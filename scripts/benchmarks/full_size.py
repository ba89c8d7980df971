"""The model whose sizes the benchmarks measure: ConvNeXt-Base and BERT-base as METHOD has them, with random weights."""

from hacan.settings import ModelSettings

HIGH, MID = 49, 196  # regions of ConvNeXt at 224 pixels
WIDTH = 768  # of the joint space


def full_size_settings(*, alignment: str = "hybrid", direction: str = "i2t") -> ModelSettings:
    """The hybrid column's sizes and constants; nothing is loaded."""
    return ModelSettings(
        image_encoder="convnext_base",
        image_weights="random",
        image_encoder_args={},
        image_levels=(-2, -1),
        text_encoder="bert",
        text_weights="random",
        text_encoder_args={},
        text_levels=(-3, -1),
        embed_dim=WIDTH,
        activation="leaky_relu",
        alignment=alignment,
        direction=direction,
        lambda_softmax=9.0,
        focal_type="prob",
    )
