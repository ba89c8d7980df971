"""Provenance: the architecture hash and the summary of a model."""

import torch

from hacan.alignment import RevisedAlignment
from hacan.models.aggregator import ACTIVATIONS
from hacan.retrieval.provenance import architecture_hash, model_summary


def test_the_architecture_hash_covers_levels_activation_and_text_config(make_model):
    model = make_model()
    known = architecture_hash(model)
    assert architecture_hash(make_model()) == known
    with torch.no_grad():
        model.project_image_high.weight.add_(1.0)
    assert architecture_hash(model) == known  # weights have their own hash
    model.text_encoder.levels = (model.text_encoder.levels[0] - 1, model.text_encoder.levels[1])
    assert architecture_hash(model) != known
    model = make_model()
    model.image_encoder.levels = (model.image_encoder.levels[0] - 1, model.image_encoder.levels[1])
    assert architecture_hash(model) != known
    model = make_model()
    model.aggregate_text.activation = ACTIVATIONS["tanh"]()
    assert architecture_hash(model) != known
    model = make_model()
    model.text_encoder.backbone.config.layer_norm_eps = 1e-3
    assert architecture_hash(model) != known


def test_the_alignment_is_not_part_of_the_architecture_hash(make_model):
    model = make_model()
    known = architecture_hash(model)
    model.alignment = RevisedAlignment(direction="both")
    assert architecture_hash(model) == known


def test_the_summary_has_levels_activation_and_hyperparameters(make_model):
    model = make_model()
    found = model_summary(model)
    assert found["text_levels"] == list(model.text_encoder.levels)
    assert found["activation"] == "LeakyReLU(negative_slope=0.01)"
    assert (found["lambda_softmax"], found["focal_type"]) == (9.0, "prob")
    model.alignment = RevisedAlignment(direction="both")
    assert "temperature" not in model_summary(model)
