"""Training on stored outputs of frozen backbones equals training on images and captions."""

import csv
import dataclasses

import pytest
import torch
from tiny_run import settings_of, train_here

from datamodules.datamodule import build_data
from datamodules.tokens import load_tokenizer
from hacan import pipeline
from hacan.checkpoints.loading import open_models
from hacan.errors import UserError

FROZEN = {"freeze_backbone_epochs": 2, "max_epoch": 2, "augmentation": False, "frozen_dropout": False}


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def settings_in(folder, data_root, **updates):
    return settings_of(folder, **{**FROZEN, "data_root": str(data_root), "eval_precision": "32-true", **updates})


def test_stored_features_give_the_losses_of_encoding_in_every_epoch(data_root, tmp_path):
    losses = []
    for cached in (False, True):
        folder = tmp_path / str(cached)
        train_here(settings_in(folder, data_root, cache_features=cached), folder)
        with open(folder / "record" / "csv" / "metrics.csv") as file:
            losses.append([float(row["train/total"]) for row in csv.DictReader(file) if row["train/total"]])
    assert (tmp_path / "True" / "log" / "backbone-features").is_dir()
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_features_of_a_batch_are_those_of_the_backbones(data_root, tmp_path):
    settings = settings_in(tmp_path, data_root, cache_features=True)
    models, tokenizer, settings = open_models(settings, load_tokenizer)
    data, model = build_data(settings, tokenizer), models[0].eval()
    stored = pipeline._train_features(model, settings=settings, data=data)
    (batch, *_) = data.training_loader()
    assert batch.images.shape == (10, 3, 0, 0)
    split = data.eval_split("train")
    pixels = torch.cat([pixels for _, pixels in data.eval_images("train")])[split.image_of_text[batch.caption_ids]]
    with torch.no_grad():
        images, texts = stored.encode(model, batch.caption_ids)
        expected = model.encode_images(pixels), model.encode_texts(batch.token_ids, batch.token_mask)
    assert torch.equal(texts.mask, batch.token_mask)
    for found, wanted in zip((*images, texts.pooled), (*expected[0], expected[1].pooled), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    mask = texts.mask
    torch.testing.assert_close(texts.high[mask], expected[1].high[mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(texts.mid[mask], expected[1].mid[mask], atol=1e-5, rtol=1e-5)


def test_runs_with_the_same_backbones_share_the_features(data_root, tmp_path, monkeypatch):
    settings = settings_in(tmp_path, data_root, cache_features=True)
    models, tokenizer, settings = open_models(settings, load_tokenizer)
    pipeline._train_features(models[0], settings=settings, data=build_data(settings, tokenizer))
    other = dataclasses.replace(settings, model=dataclasses.replace(settings.model, embed_dim=24, direction="i2t"))
    models, _, other = open_models(other, load_tokenizer)

    def forbidden(*_):
        raise AssertionError("encoded again")

    monkeypatch.setattr(models[0].image_encoder, "forward", forbidden)
    monkeypatch.setattr(models[0].text_encoder, "forward", forbidden)
    pipeline._train_features(models[0], settings=other, data=build_data(other, tokenizer))


def test_frozen_dropout_is_off_only_if_asked_for(make_model):
    model = make_model()
    for dropout in (True, False):
        model.freeze_backbones(True, dropout=dropout)
        model.train()
        kinds = [module for module in model.text_encoder.modules() if isinstance(module, torch.nn.Dropout)]
        assert kinds and all(module.training == dropout for module in kinds)
        assert model.aggregate_text.training
    model.freeze_backbones(False, dropout=False)
    assert all(module.training for module in model.text_encoder.modules())


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"freeze_backbone_epochs": 1}, "freeze_backbone_epochs=2"),
        ({"augmentation": True}, "augmentation=False"),
        ({"frozen_dropout": True}, "frozen_dropout=False"),
        ({"on_bad_image": "skip"}, "on_bad_image=error"),
    ],
)
def test_stored_features_that_would_change_the_training_are_refused(tmp_path, changes, remedy):
    with pytest.raises(UserError, match=rf"cache_features=True: .*set {remedy}"):
        settings_in(tmp_path, tmp_path, cache_features=True, **changes)
