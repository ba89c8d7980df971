"""What a model is beside its weights: two that give other features are never taken for one."""

import torch

from hacan.alignment import RevisedAlignment
from hacan.models.aggregator import ACTIVATIONS
from hacan.retrieval.identity import form_of, settings_of


def test_the_form_sees_what_the_weights_do_not(make_model):
    model = make_model()
    known = form_of(model)
    assert form_of(make_model()) == known
    with torch.no_grad():
        model.project_image_high.weight.add_(1.0)
    assert form_of(model) == known  # weights have their own hash
    model.text_encoder.levels = (model.text_encoder.levels[0] - 1, model.text_encoder.levels[1])
    assert form_of(model) != known
    model = make_model()
    model.image_encoder.levels = (model.image_encoder.levels[0] - 1, model.image_encoder.levels[1])
    assert form_of(model) != known
    model = make_model()
    model.aggregate_text.activation = ACTIVATIONS["tanh"]()
    assert form_of(model) != known
    model = make_model()
    model.text_encoder.backbone.config.layer_norm_eps = 1e-3
    assert form_of(model) != known


def test_models_that_differ_in_alignment_alone_share_their_features(make_model):
    model = make_model()
    known = form_of(model)
    model.alignment = RevisedAlignment(direction="both")
    assert form_of(model) == known


def test_settings_name_levels_activation_and_the_constants_of_the_alignment(make_model):
    model = make_model()
    found = settings_of(model)
    assert found["text_levels"] == list(model.text_encoder.levels)
    assert found["activation"] == "LeakyReLU(negative_slope=0.01)"
    assert (found["lambda_softmax"], found["focal_type"]) == (9.0, "prob")
    model.alignment = RevisedAlignment(direction="both")
    assert "temperature" not in settings_of(model)
