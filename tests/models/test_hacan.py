"""HACAN: shapes, projections, freezing, and what it refuses."""

import pytest
import torch

from hacan.types import EncodedImages, EncodedTexts


def test_shapes_and_kinds(make_model, pixels, captions):
    model = make_model()
    images, texts = model.encode_images(pixels), model.encode_texts(*captions)
    assert isinstance(images, EncodedImages) and isinstance(texts, EncodedTexts)
    assert images.high.shape == (3, 4, 18) and images.mid.shape == (3, 16, 18) and images.pooled.shape == (3, 18)
    assert texts.high.shape == texts.mid.shape == (7, 6, 18) and texts.pooled.shape == (7, 18)
    assert texts.mask is captions[1]
    assert model.score(images, texts).shape == model.global_similarity(images, texts).shape == (3, 7)


def test_global_similarity_is_the_cosine(make_model, pixels, captions):
    model = make_model()
    images, texts = model.encode_images(pixels), model.encode_texts(*captions)
    found = model.global_similarity(images, texts)
    for i in range(3):
        for j in range(7):
            expected = torch.cosine_similarity(images.pooled[i], texts.pooled[j], dim=0)
            torch.testing.assert_close(found[i, j], expected)


def test_each_level_has_its_own_projection(make_model, pixels, captions):
    model = make_model()
    features = model.image_encoder(pixels)
    images = model.encode_images(pixels)
    torch.testing.assert_close(images.high, model.project_image_high(features.high))
    torch.testing.assert_close(images.mid, model.project_image_mid(features.mid))
    torch.testing.assert_close(images.pooled, model.aggregate_image(features.pooled))
    features = model.text_encoder(*captions)
    texts = model.encode_texts(*captions)
    torch.testing.assert_close(texts.high, model.project_text_high(features.high))
    torch.testing.assert_close(texts.mid, model.project_text_mid(features.mid))
    torch.testing.assert_close(texts.pooled, model.aggregate_text(features.pooled))


def test_batch_of_one_and_padding_change_no_score(make_model, pixels, captions):
    model = make_model()
    ids, mask = captions
    scores = model.score(model.encode_images(pixels), model.encode_texts(ids, mask))
    more = torch.nn.functional.pad(ids, (0, 5)), torch.nn.functional.pad(mask, (0, 5))
    torch.testing.assert_close(model.score(model.encode_images(pixels), model.encode_texts(*more)), scores)
    for i in range(3):
        for j in range(7):
            one = model.score(
                model.encode_images(pixels[i : i + 1]), model.encode_texts(ids[j : j + 1], mask[j : j + 1])
            )
            torch.testing.assert_close(one[0, 0], scores[i, j])


def step(model, pixels, captions, rate=0.5):
    """One step of gradient descent on all parameters."""
    images, texts = model.encode_images(pixels), model.encode_texts(*captions)
    (model.score(images, texts).square().sum() + model.global_similarity(images, texts).sum()).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad
    return images, texts


def backbones(model):
    parts = {"image": model.image_encoder, "text": model.text_encoder}
    return {
        f"{part}.{key}": value.clone() for part, module in parts.items() for key, value in module.state_dict().items()
    }


@pytest.mark.parametrize("updates", [{}, {"image_encoder": "tf_efficientnet_lite0", "image_encoder_args": {}}])
def test_frozen_backbones_stay_and_thawed_ones_learn(make_model, pixels, captions, updates):
    model = make_model(**updates).train()
    model.freeze_backbones(True)
    before, head = backbones(model), model.project_text_mid.weight.clone()
    step(model, pixels, captions)
    after = backbones(model)
    assert [key for key in before if not torch.equal(before[key], after[key])] == []  # BatchNorm's statistics too
    assert not torch.equal(model.project_text_mid.weight, head)
    model.freeze_backbones(False)
    step(model, pixels, captions)
    for part in (model.image_encoder, model.text_encoder):
        assert [key for key, parameter in part.named_parameters() if parameter.grad is None] == []
    thawed = backbones(model)
    changed = [key for key in before if not torch.equal(before[key], thawed[key])]
    assert any(key.startswith("image.") for key in changed) and any(key.startswith("text.") for key in changed)


def test_frozen_backbones_build_no_graph(make_model, pixels, captions):
    model = make_model().train()
    seen = {}
    model.image_encoder.register_forward_hook(lambda module, inputs, output: seen.update(image=output))
    model.text_encoder.register_forward_hook(lambda module, inputs, output: seen.update(text=output))
    for frozen in (True, False):
        model.freeze_backbones(frozen)
        images, texts = model.encode_images(pixels), model.encode_texts(*captions)
        assert [seen[part].high.requires_grad for part in ("image", "text")] == [not frozen] * 2
        assert images.high.requires_grad and texts.pooled.requires_grad  # the projections learn all the same
    with torch.no_grad():
        assert not model.encode_images(pixels).high.requires_grad


def test_dropout_of_a_frozen_bert_stays_active_in_training_only(make_model, captions):
    model = make_model()
    model.freeze_backbones(True)
    model.train()
    assert not torch.equal(model.text_encoder(*captions).high, model.text_encoder(*captions).high)
    model.eval()
    assert torch.equal(model.text_encoder(*captions).high, model.text_encoder(*captions).high)


def test_batchnorm_of_a_frozen_backbone_keeps_its_statistics(make_model):
    model = make_model(image_encoder="tf_efficientnet_lite0", image_encoder_args={})
    norms = [module for module in model.image_encoder.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    model.train()
    assert all(norm.training for norm in norms)
    model.freeze_backbones(True)
    assert not any(norm.training for norm in norms)
    model.eval()
    model.train()
    assert not any(norm.training for norm in norms)
    model.freeze_backbones(False)
    assert all(norm.training for norm in norms)


def test_region_grids_leave_the_model_as_it_was(make_model, pixels):
    model = make_model(image_encoder="tf_efficientnet_lite0", image_encoder_args={}).train()
    before = backbones(model)
    assert model.region_grids(height=64, width=96) == ((4, 6), (2, 3))
    assert model.training and all(torch.equal(before[key], value) for key, value in backbones(model).items())


def test_text_projections_start_small_and_without_bias(make_model):
    model = make_model(embed_dim=700)
    for linear in (model.project_text_high, model.project_text_mid):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05) and (linear.bias == 0).all()
    bound = model.project_image_high.in_features**-0.5  # the Linear default: uniform up to 1 / sqrt(in)
    assert model.project_image_high.weight.abs().max().item() == pytest.approx(bound, rel=0.01)


@pytest.mark.parametrize("shape", [(3, 64, 64), (3, 64, 64, 3), (3, 1, 64, 64)])
def test_wrong_pixels_are_named(make_model, shape):
    with pytest.raises(ValueError, match=r"pixels is \[.*expected \[N, 3, H, W\]"):
        make_model().encode_images(torch.zeros(shape))


def test_wrong_tokens_are_named(make_model, captions):
    ids, mask = captions
    model = make_model()
    for bad in [(ids[0], mask[0]), (ids, mask[:, :4]), (ids, mask.long())]:
        with pytest.raises(ValueError, match=r"token_ids is \[.*token_mask \[.*expected \[M, W\]"):
            model.encode_texts(*bad)
    with pytest.raises(ValueError, match="pixels"):
        model.encode_images(torch.zeros(3, 3, 64, 64, dtype=torch.uint8))


def test_scores_are_float32_under_autocast(make_model, pixels, captions):
    model = make_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images, texts = model.encode_images(pixels), model.encode_texts(*captions)
        assert model.score(images, texts).dtype == model.global_similarity(images, texts).dtype == torch.float32
    torch.testing.assert_close(images.pooled.norm(dim=1), torch.ones(3))
