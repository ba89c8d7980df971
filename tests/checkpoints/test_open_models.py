"""What a run begins with: models of checkpoints of every kind on the user's way, or a new one."""

import logging

import pytest
import torch
from safetensors.torch import save_file
from tiny_release import DEPTHS, DIMS, WIDTH, Release
from transformers import BertTokenizerFast

from hacan.checkpoints.checkpoint import atomic_save, describe_model
from hacan.checkpoints.loading import open_models
from hacan.errors import UserError


def never(name):
    raise AssertionError(f"the tokenizer {name} is asked for, but the checkpoint has its own")


@pytest.fixture
def written(make_model, make_settings, tokenizer, tmp_path):
    """Write a checkpoint of ours with changed settings; return its path."""

    def write(name="best.ckpt", vocabulary=tokenizer, **updates):
        model = make_model()
        description = describe_model(model, make_settings(**updates), vocabulary)
        atomic_save({"state_dict": model.state_dict(), "hacan": description}, tmp_path / name)
        return str(tmp_path / name)

    return write


def features(model, pixels, captions):
    images, texts = model.encode_images(pixels), model.encode_texts(*captions)
    return [images.high, images.mid, images.pooled, texts.high, texts.mid, texts.pooled]


def test_a_checkpoint_of_ours_brings_its_model_tokenizer_and_sizes(written, make_settings, make_model, pixels):
    path = written(image_size=64, max_text_len=9)
    given = make_settings(checkpoint=path, test_only=True, embed_dim=99, image_size=96, max_text_len=30, seed=5)
    (model,), tokenizer, settings = open_models(given, never)
    assert (settings.model.embed_dim, settings.data.image_size, settings.data.max_text_len) == (18, 64, 9)
    assert settings.run == given.run and settings.eval == given.eval
    assert tokenizer("a red dog")["input_ids"] == [2, 5, 8, 6, 3]
    assert torch.equal(model.encode_images(pixels).high, make_model().encode_images(pixels).high)


@pytest.mark.parametrize("name", ["release.ckpt", "release.safetensors", "release.pth"])
def test_the_release_comes_as_it_was(make_settings, tokenizer, tmp_path, pixels, captions, caplog, name):
    """Opened as a user does: equal features, and lists of mapped and ignored tensors."""
    release, path = Release(), str(tmp_path / name)
    state = {key: value.contiguous() for key, value in release.state().items()}
    if name.endswith(".safetensors"):
        save_file(state, path)
    else:
        torch.save({"epoch": 9, "state_dict": state} if name.endswith(".ckpt") else state, path)
    given = make_settings(checkpoint=path, test_only=True, tokenizer="vocab.txt", datasets="f8k")
    with caplog.at_level(logging.INFO):
        (model,), found, settings = open_models(given, {"vocab.txt": tokenizer}.get)
    assert found is tokenizer and settings.data == given.data
    assert settings.model.image_encoder_args == {"depths": DEPTHS, "dims": DIMS}
    assert (settings.model.embed_dim, settings.model.direction) == (WIDTH, given.model.direction)
    before = release.features(pixels, captions)
    order = ("image high", "image mid", "image global", "text high", "text mid", "text global")
    for ours, part in zip(features(model, pixels, captions), order, strict=True):
        torch.testing.assert_close(ours, before[part], rtol=1e-4, atol=1e-4)
    assert f"{path}: release checkpoint; " in caplog.text
    assert "convnexts.* -> image_encoder.*" in caplog.text and "none missing, 12 ignored" in caplog.text


@pytest.mark.parametrize("name", ["plain.pth", "plain.safetensors"])
def test_plain_weights_take_the_config_of_the_run(
    make_settings, make_model, tokenizer, tmp_path, pixels, captions, caplog, name
):
    updates = {
        "text_encoder": "distilbert",
        "text_encoder_args": {"dim": 24, "n_layers": 3, "n_heads": 2, "hidden_dim": 9, "max_position_embeddings": 16},
        "direction": "i2t",
    }
    model = make_model(**updates)
    if name.endswith(".pth"):
        torch.save(model.state_dict() | {"epoch_scale": torch.ones(1)}, tmp_path / name)
    else:
        save_file(model.state_dict() | {"epoch_scale": torch.ones(1)}, tmp_path / name)
    given = make_settings(checkpoint=str(tmp_path / name), test_only=True, tokenizer="here", **updates)
    with caplog.at_level(logging.INFO):
        (found,), _, settings = open_models(given, {"here": tokenizer}.get)
    assert settings == given and found.alignment.direction == "i2t" and not found.training
    for ours, expected in zip(features(found, pixels, captions), features(model, pixels, captions), strict=True):
        assert torch.equal(ours, expected)
    assert "plain checkpoint" in caplog.text and "none missing, 1 ignored (epoch_scale)" in caplog.text


def test_a_tokenizer_with_more_words_than_the_release_is_named(make_settings, tmp_path):
    torch.save({"state_dict": Release().state()}, tmp_path / "release.ckpt")
    large = BertTokenizerFast(vocab={word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *"0123456789"
                                                                       "abcdefghijklmnopqrstuvwxyz"))})  # fmt: skip
    given = make_settings(checkpoint=str(tmp_path / "release.ckpt"), test_only=True)
    with pytest.raises(UserError, match=r"the tokenizer has 41 tokens, but .*release.ckpt only 30: set tokenizer"):
        open_models(given, lambda _: large)


@pytest.mark.parametrize("key", ["image_size", "max_text_len", "tokenizer"])
def test_members_of_an_ensemble_need_equal_preprocessing(written, make_settings, key):
    other = {"vocabulary": BertTokenizerFast(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "dog": 4})}
    updates = other if key == "tokenizer" else {key: {"image_size": 96, "max_text_len": 9}[key]}
    paths = [written("a.ckpt"), written("b.ckpt", **updates)]
    given = make_settings(checkpoint=paths, test_only=True)
    with pytest.raises(UserError, match=rf"members of the ensemble differ in {key} \(.*a.ckpt: .*b.ckpt: "):
        open_models(given, never)
    given = make_settings(checkpoint=[paths[0], written("c.ckpt", direction="i2t")], test_only=True)
    assert [model.alignment.direction for model in open_models(given, never)[0]] == ["t2i", "i2t"]


def test_a_new_model_is_a_function_of_the_seed(make_settings, tokenizer):
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(99)
        (model,), found, _ = open_models(make_settings(seed=seed), lambda _: tokenizer)
        assert found is tokenizer
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


@pytest.mark.parametrize(
    ("key", "value"),
    [("direction", "i2t"), ("image_size", 96), ("embed_dim", 99), ("streams", ("ksf",)), ("ksf", "plain")],
)
def test_a_typed_key_that_contradicts_the_checkpoint_is_refused(written, make_settings, key, value):
    path = written(image_size=64, direction="t2i")
    given = make_settings(checkpoint=path, test_only=True, **{key: value})
    with pytest.raises(UserError, match=rf"{key}=.* best.ckpt is of a model with {key}=|{key}=.*leave {key} out"):
        open_models(given, never, typed=["seed", key])
    open_models(given, never, typed=["seed"])  # a default or a named config: the checkpoint decides
    same = make_settings(checkpoint=path, test_only=True, image_size=64, direction="t2i")
    open_models(same, never, typed=["image_size", "direction"])
