"""Checkpoints: ours describe themselves; the public release's, plain ones and broken ones are recognised."""

import argparse
import errno
import hashlib
import logging
import os
import time

import pytest
import torch
from references import original_convnext_state
from safetensors.torch import save_file
from tiny_release import (
    DEPTHS,
    DIMS,
    FIRST_CONFIG,
    LEFTOVERS,
    REVISED_CONFIG,
    WIDTH,
    Release,
    save_as_lightning_1_3,
)

import hacan.checkpoints.checkpoint
from hacan.checkpoints.checkpoint import (
    atomic_save,
    describe_model,
    file_hash,
    model_from_description,
    tokenizer_from_description,
)
from hacan.checkpoints.loading import load_checkpoint, open_checkpoint
from hacan.errors import UserError
from hacan.models.weights import BrokenFileError


def features(model, pixels, captions):
    images, texts = model.encode_images(pixels), model.encode_texts(*captions)
    return [*images, *texts, model.score(images, texts)]


def same(found, expected):
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.fixture
def ours(make_model, make_settings, tokenizer, tmp_path):
    """A model, and its checkpoint as a Lightning training writes it."""
    model = make_model(text_levels=[-2, -1])
    checkpoint = {
        "epoch": 3,
        "state_dict": {f"model.{key}": value for key, value in model.state_dict().items()},
        "optimizer_states": [{"state": {}}],
        "hacan": describe_model(model, make_settings(text_levels=[-2, -1]), tokenizer),
    }
    atomic_save(checkpoint, tmp_path / "best.ckpt")
    return model, tmp_path / "best.ckpt"


# -------------------------------------------------------------------------------------------------------------- ours


def test_ours_comes_back_whole(ours, pixels, captions):
    model, path = ours
    torch.manual_seed(99)  # the rebuilt model's random weights are others
    found = open_checkpoint(path)
    assert (found.kind, found.ignored, len(found.mapped)) == ("hacan", [], len(model.state_dict()))
    assert found.mapped["model.project_text_mid.bias"] == "project_text_mid.bias"
    assert (found.settings.embed_dim, found.settings.text_levels) == (18, (-2, -1))
    same(features(found.model, pixels, captions), features(model, pixels, captions))
    assert not load_checkpoint(path).training


def test_ours_needs_neither_hub_nor_backbone_files(make_model, make_settings, tokenizer, tmp_path, pixels, captions):
    model = make_model()
    settings = make_settings(
        image_encoder="convnext_atto.d2_in1k", image_weights="/gone.pth", text_encoder="bert-base-uncased",
        text_weights="pretrained", text_encoder_args={},
    )  # fmt: skip
    atomic_save(
        {"state_dict": model.state_dict(), "hacan": describe_model(model, settings, tokenizer)}, tmp_path / "a.ckpt"
    )
    same(features(load_checkpoint(tmp_path / "a.ckpt"), pixels, captions), features(model, pixels, captions))


def test_every_backbone_family_is_rebuilt(make_model, make_settings, tokenizer, pixels, captions):
    for updates in (
        {"image_encoder": "tf_efficientnet_lite0", "image_encoder_args": {}},
        {"image_encoder": "vit_tiny_patch16_224", "image_encoder_args": {"depth": 2}},
        {"text_encoder": "distilbert", "text_encoder_args": {"dim": 24, "n_layers": 3, "n_heads": 2, "hidden_dim": 9}},
        {"alignment": "revised", "direction": "i2t", "loss": "GCD_revised"},
    ):
        model = make_model(**updates)
        twin = model_from_description(describe_model(model, make_settings(**updates), tokenizer)).eval()
        twin.load_state_dict(model.state_dict())
        same(features(twin, pixels, captions), features(model, pixels, captions))


def test_the_tokenizer_comes_back(make_model, make_settings, tokenizer):
    description = describe_model(make_model(), make_settings(), tokenizer)
    again = tokenizer_from_description(description)
    caption = "A small DOG sits, on the unknown grass"
    assert again(caption)["input_ids"] == tokenizer(caption)["input_ids"]
    assert (len(again), again.pad_token_id) == (len(tokenizer), tokenizer.pad_token_id)


def test_file_names_in_a_description_stay_in_their_folder(make_model, make_settings, tokenizer, tmp_path, monkeypatch):
    description = describe_model(make_model(), make_settings(), tokenizer)
    description["tokenizer"][f"../{tmp_path.name}-escaped.txt"] = "?"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tokenizer_from_description(description)
    assert not list(tmp_path.rglob("*escaped*")) and not list(tmp_path.parent.glob("*escaped*"))


def test_another_format_is_refused(ours):
    _, path = ours
    content = torch.load(path, weights_only=True)
    content["hacan"]["format"] = 99
    torch.save(content, path)
    with pytest.raises(UserError, match=r"format 99, expected 1"):
        load_checkpoint(path)


def test_a_mismatch_names_file_keys_and_shapes(ours):
    _, path = ours
    content = torch.load(path, weights_only=True)
    wrong = content["state_dict"] | {"model.project_image_mid.weight": torch.zeros(4, 5)}
    torch.save(content | {"state_dict": wrong}, path)
    with pytest.raises(
        UserError, match=r"best.ckpt has 1 tensors of .*project_image_mid.weight is \[4, 5\], expected \[18, 20\]"
    ):
        load_checkpoint(path)
    lacking = {key: value for key, value in content["state_dict"].items() if not key.startswith("model.aggregate_text")}
    torch.save(content | {"state_dict": lacking}, path)
    with pytest.raises(UserError, match=r"best.ckpt lacks 6 of the .*aggregate_text.fc1.weight.* and 3 more"):
        load_checkpoint(path)


# ------------------------------------------------------------------------------------------------------- the release


@pytest.fixture
def release(tmp_path):
    release = Release()
    content = {
        "epoch": 9,
        "state_dict": release.state(),
        "hyper_parameters": {"config": {"direction": "i2t", "seed": 0}},
    }
    torch.save(content, tmp_path / "release.ckpt")
    return release, tmp_path / "release.ckpt"


def test_the_releases_names_are_those_of_the_issue(release):
    names = set(release[0].state())
    assert {
        "text_transformer.embeddings.word_embeddings.weight",
        "convnexts.downsample_layers.0.0.weight",
        "convnexts.stages.2.2.dwconv.weight",
        "convnexts.stages.2.2.norm.bias",
        "convnexts.stages.2.2.pwconv1.weight",
        "convnexts.stages.2.2.pwconv2.weight",
        "convnexts.stages.2.2.gamma",
        "convnexts.norm.weight",
        "convnexts.head.weight",
        "txt_enc.v_fc1.weight",
        "img_enc.v_fc3.bias",
    } <= names


def test_the_releases_features_are_ours(release, pixels, captions):
    theirs, path = release
    found = open_checkpoint(path, image_size=64)
    assert found.kind == "release"
    assert found.settings.image_encoder_args == {"depths": DEPTHS, "dims": DIMS} and found.settings.embed_dim == WIDTH
    images, texts = found.model.encode_images(pixels), found.model.encode_texts(*captions)
    ours = dict(
        zip(
            ("image high", "image mid", "image global", "text high", "text mid", "text global"),
            (images.high, images.mid, images.pooled, texts.high, texts.mid, texts.pooled),
            strict=True,
        )
    )
    for name, expected in theirs.features(pixels, captions).items():
        torch.testing.assert_close(
            ours[name], expected, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_each_of_the_releases_tensors_is_mapped_or_ignored(release, caplog):
    theirs, path = release
    with caplog.at_level(logging.INFO):
        found = open_checkpoint(path)
    idle = {f"{name}.{leaf}" for name in (*LEFTOVERS, "convnexts.head") for leaf in ("weight", "bias")}
    assert set(found.ignored) == idle
    assert set(found.mapped) == set(theirs.state()) - idle
    assert sorted(found.mapped.values()) == sorted(found.model.state_dict())
    assert found.mapped["fc2.weight"] == "project_image_mid.weight"
    assert found.mapped["cross_modal_text_transform.bias"] == "project_text_high.bias"
    assert (
        f"release checkpoint; {len(found.mapped)} tensors mapped (text_transformer.* -> text_encoder.* " in caplog.text
    )
    for part in (
        "convnexts.* -> image_encoder.* ",
        "fc2.* -> project_image_mid.* 2",
        "txt_enc.* -> aggregate_text.* 6",
    ):
        assert part in caplog.text
    assert f", none missing, {len(idle)} ignored (convnexts.head.weight" in caplog.text
    assert all(name in caplog.text for name in idle)


@pytest.mark.parametrize("name", ["plain.pth", "weights.safetensors", "parallel.pt"])
def test_the_releases_names_are_recognised_in_any_file(release, tmp_path, pixels, captions, name):
    theirs, path = release
    state = {key: value.contiguous() for key, value in theirs.state().items()}
    if name == "weights.safetensors":
        save_file(state, tmp_path / name)
    else:
        torch.save(state if name == "plain.pth" else {f"module.{k}": v for k, v in state.items()}, tmp_path / name)
    found = open_checkpoint(tmp_path / name, image_size=64)
    assert found.kind == "release" and len(found.ignored) == 12
    expected = open_checkpoint(path, settings=found.settings, image_size=64).model
    same(features(found.model, pixels, captions), features(expected, pixels, captions))


def test_what_the_releases_tensors_do_not_tell(release, make_settings, caplog):
    _, path = release
    assert open_checkpoint(path).model.alignment.direction == "i2t"  # from the config inside the checkpoint
    given = make_settings(direction="both", alignment="hybrid", focal_type="equal", activation="tanh").model
    model = load_checkpoint(path, settings=given)
    assert (model.alignment.direction, model.alignment.focal_type) == ("both", "equal")
    assert isinstance(model.aggregate_image.activation, torch.nn.Tanh)
    assert model.text_encoder.levels == (2, 4)  # sizes and levels are the release's, not those of the settings
    assert "release.ckpt was written with direction='i2t', here 'both': the config of this run is used" in caplog.text
    assert caplog.text.count("was written with") == 1


@pytest.mark.parametrize(
    ("config", "given", "used", "level", "message"),
    [
        (FIRST_CONFIG, {}, "hybrid", "INFO", "written by the first public code: scored with alignment=hybrid"),
        (REVISED_CONFIG, {}, "revised", "INFO", "written by the revised public code: scored with alignment=revised"),
        (FIRST_CONFIG, {"alignment": "revised", "loss": "GCD_revised"}, "revised", "WARNING", "the first public code"),
        ({}, {}, "hybrid", "WARNING", "alignment=revised for the revised one"),
        (
            {},
            {"alignment": "revised", "loss": "GCD_revised"},
            "revised",
            "WARNING",
            "alignment=hybrid for the first code",
        ),
    ],
)
def test_a_checkpoint_of_lightning_1_3_opens_with_the_alignment_of_its_code(
    release, tmp_path, make_settings, caplog, config, given, used, level, message
):
    theirs, _ = release
    path = tmp_path / "genuine.ckpt"
    save_as_lightning_1_3(path, theirs.state(), config)
    caplog.set_level("INFO")
    found = open_checkpoint(path, settings=make_settings(**given).model)
    assert found.kind == "release" and found.settings.alignment == found.model.alignment.name == used
    (record,) = [record for record in caplog.records if message in record.getMessage()]
    assert record.levelname == level


class CallsTouch:
    """An object whose pickle runs a command when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_other_code_in_a_checkpoint_of_lightning_1_3_is_refused(release, tmp_path):
    path = tmp_path / "genuine.ckpt"
    save_as_lightning_1_3(path, release[0].state(), FIRST_CONFIG, native_amp=CallsTouch(tmp_path / "ran"))
    with pytest.raises(UserError, match=r"genuine.ckpt is a pickle of more than tensors"):
        open_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_a_release_that_lacks_tensors_names_them(release):
    theirs, path = release
    state = {key: value for key, value in theirs.state().items() if not key.startswith("fc3")}
    torch.save({"state_dict": state}, path)
    with pytest.raises(UserError, match=r"release.ckpt lacks 2 of .*project_image_high.weight"):
        load_checkpoint(path)
    torch.save({"state_dict": theirs.state() | {"fc3.weight": torch.zeros(WIDTH, 23)}}, path)
    with pytest.raises(UserError, match=r"project_image_high.weight is \[10, 23\], expected \[10, 24\]"):
        load_checkpoint(path)


# ------------------------------------------------------------------------------------------------------- plain files


@pytest.mark.parametrize("name", ["plain.pth", "wrapped.pt", "file.safetensors"])
def test_plain_weights_in_our_names(make_model, make_settings, tmp_path, pixels, captions, name):
    model, path = make_model(), tmp_path / name
    if name == "file.safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict() if name == "plain.pth" else {"model": model.state_dict()}, path)
    found = open_checkpoint(path, settings=make_settings().model, image_size=64)
    assert (found.kind, found.description) == ("plain", None)
    same(features(found.model, pixels, captions), features(model, pixels, captions))
    with pytest.raises(UserError, match=r"without settings"):
        open_checkpoint(path)


OTHER_ENCODERS = {
    "distilbert": {"dim": 24, "n_layers": 3, "n_heads": 2, "hidden_dim": 9, "max_position_embeddings": 16},
    "roberta": {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40,
                "max_position_embeddings": 24},
}  # fmt: skip


@pytest.mark.parametrize("encoder", OTHER_ENCODERS)
def test_plain_weights_of_text_encoders_that_are_no_bert(
    make_model, make_settings, tokenizer, tmp_path, pixels, captions, encoder
):
    """RoBERTa's tensors have BERT's names, but it counts positions otherwise, from its padding on."""
    updates = {"text_encoder": encoder, "text_encoder_args": OTHER_ENCODERS[encoder]}
    model = make_model(**updates)
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    found = open_checkpoint(
        tmp_path / "x.safetensors",
        settings=make_settings(**updates).model,
        image_size=64,
        load_tokenizer=lambda: tokenizer,
    )
    assert found.kind == "plain" and found.model.text_encoder.backbone.config.model_type == encoder
    same(features(found.model, pixels, captions), features(model, pixels, captions))


def test_a_plain_bert_is_read_where_its_hub_name_is_not_in_the_cache(make_model, make_settings, tmp_path, monkeypatch):
    model = make_model()
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    for name in ("bert-base-uncased", "google-bert/bert-base-uncased"):
        given = make_settings(
            text_encoder=name, text_weights="pretrained"
        ).model  # heads and all sizes in the arguments
        config = open_checkpoint(tmp_path / "x.safetensors", settings=given, image_size=64).model.text_encoder.backbone
        assert (config.config.model_type, config.config.num_attention_heads) == ("bert", 4)
    given = make_settings(text_encoder="roberta-base", text_weights="pretrained").model
    with pytest.raises(UserError, match=r"text_encoder='roberta-base'.*a folder with a config.json"):
        open_checkpoint(tmp_path / "x.safetensors", settings=given, image_size=64)


def test_backbones_alone_are_pointed_to_their_keys(tmp_path):
    torch.save({"model": original_convnext_state(DEPTHS, DIMS, classes=5)}, tmp_path / "image.pth")
    with pytest.raises(UserError, match=r"image.pth holds the weights of an image encoder alone.*image_weights=PATH"):
        load_checkpoint(tmp_path / "image.pth")
    torch.save(Release().text.state_dict(), tmp_path / "text.bin")
    with pytest.raises(UserError, match=r"text.bin holds the weights of a text encoder alone.*text_weights=PATH"):
        load_checkpoint(tmp_path / "text.bin")


def test_unknown_keys_are_named(tmp_path):
    torch.save({"state_dict": {"layer.weight": torch.ones(2)}}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"its keys are layer.weight, .*image_encoder.*convnexts"):
        load_checkpoint(tmp_path / "x.ckpt")
    torch.save({"epoch": 3}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"x.ckpt holds no tensors; its keys are epoch"):
        load_checkpoint(tmp_path / "x.ckpt")
    torch.save([1, 2], tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"x.ckpt holds a list, expected a dict"):
        load_checkpoint(tmp_path / "x.ckpt")


# -------------------------------------------------------------------------------------------- unsafe and broken files


def test_a_pickle_of_more_than_tensors_needs_trust(release, pixels):
    theirs, path = release
    torch.save({"state_dict": theirs.state(), "args": argparse.Namespace(lr=1.0)}, path)
    with pytest.raises(
        UserError,
        match=r"release.ckpt is a pickle of more than tensors \(it needs argparse.Namespace\).*trust_checkpoint=True",
    ):
        load_checkpoint(path)
    assert load_checkpoint(path, trust=True).encode_images(pixels).high.shape == (3, 4, WIDTH)


@pytest.mark.parametrize("damage", ["half", "a few bytes", "empty", "noise"])
def test_a_broken_file_is_named_and_a_whole_one_offered(ours, damage):
    _, good = ours
    content = good.read_bytes()
    last = good.with_name("last.ckpt")
    last.write_bytes(
        {"half": content[: len(content) // 2], "a few bytes": content[:-9], "empty": b"", "noise": b"hello " * 999}[
            damage
        ]
    )
    with pytest.raises(BrokenFileError, match=rf"{last} is broken.*newest readable one beside it is {good}"):
        load_checkpoint(last)


def test_the_newest_whole_file_is_offered(ours):
    _, best = ours
    previous, last = best.with_name("previous.ckpt"), best.with_name("last.ckpt")
    previous.write_bytes(best.read_bytes())
    os.utime(best, (time.time() - 500, time.time() - 500))
    last.write_bytes(best.read_bytes()[:5000])
    with pytest.raises(BrokenFileError, match=rf"readable one beside it is {previous}"):
        load_checkpoint(last)
    previous.write_bytes(b"PK")
    with pytest.raises(BrokenFileError, match=rf"readable one beside it is {best}"):
        load_checkpoint(last)
    best.unlink()
    with pytest.raises(BrokenFileError, match=r"there is no readable one beside it"):
        load_checkpoint(last)


def test_missing_files_and_foreign_folders(tmp_path):
    with pytest.raises(UserError, match=r"nosuch.ckpt is missing"):
        load_checkpoint(tmp_path / "nosuch.ckpt")
    with pytest.raises(UserError, match=r"is a folder without config.json: expected one that scripts/export.py wrote"):
        load_checkpoint(tmp_path)


# ----------------------------------------------------------------------------------------------------------- writing


def test_atomic_save_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "last.ckpt"
    for value in (1, 2):
        atomic_save({"value": torch.tensor(value)}, path)
        assert torch.load(path, weights_only=True)["value"] == value
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file data/0")],
)
def test_a_full_disk_keeps_the_file_that_was_there(tmp_path, monkeypatch, failure):
    path = tmp_path / "last.ckpt"
    atomic_save({"value": torch.tensor(1)}, path)

    def write_half(content, file):
        file.write(b"PK half of it")
        raise failure

    monkeypatch.setattr(hacan.checkpoints.checkpoint.torch, "save", write_half)
    with pytest.raises(UserError, match=r"cannot write .*last.ckpt: .*(No space left|failed writing).*is kept"):
        atomic_save({"value": torch.tensor(2)}, path)
    assert torch.load(path, weights_only=True)["value"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*gone/last.ckpt: No such file or directory\. Free space"):
        atomic_save({}, tmp_path / "gone" / "last.ckpt")


def test_file_hash_is_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    assert file_hash(tmp_path / "a") == hashlib.sha256(b"x" * 3_000_000).hexdigest()
