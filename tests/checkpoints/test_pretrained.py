"""Export and inference: the same scores from the folder, without Lightning and Sacred; ONNX agrees with PyTorch."""

import errno
import json
import os
import pathlib
import runpy
import shutil
import struct
import subprocess
import sys
from unittest import mock

import cv2
import numpy as np
import onnxruntime
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError

import hacan
from hacan.checkpoints.checkpoint import atomic_save, describe_model
from hacan.checkpoints.loading import open_checkpoint
from hacan.checkpoints.pretrained import Pretrained, export
from hacan.errors import UserError
from hacan.images.preprocessing import preprocess_image
from hacan.retrieval.provenance import hash_of_tensors
from scripts.onnx_export import export_onnx

ROOT = pathlib.Path(__file__).parents[2]
CAPTIONS = ["a dog runs", "a small red cat sits on the grass by a big blue dog", "the cat", "dog", "a cat by a cat"]


def metrics_of(model, **receipt):
    """A metrics.json as the evaluation writes it, in miniature."""
    figures = {f"r{k}_{direction}": 10.0 * k for k in (1, 5, 10) for direction in ("i2t", "t2i")} | {"rsum": 321.0}
    return {
        "receipt": {
            "dataset": "f8k", "split": "test", "protocol": "whole split", "images": 1000, "texts": 5000, "top_k": 50,
            "coarse": "global", "tie_rule": "against us", "miss_rule": "a miss", "ensemble": False,
            "members": [{"checkpoint": "best.ckpt", "hash": hash_of_tensors(model.state_dict())}],
        } | receipt,
        "coarse": figures | {"r1_i2t": 8.25},
        "hierarchical": figures,
    }  # fmt: skip


@pytest.fixture
def trained(make_model, make_settings, tokenizer, tmp_path):
    """A model and its checkpoint in a run's folder."""
    model = make_model(text_levels=[-2, -1])
    secret = tmp_path / "private" / "convnext_weights.pth"
    settings = make_settings(text_levels=[-2, -1], data_root="/secret/data", image_weights=str(secret))
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    path = tmp_path / "run" / "checkpoints" / "best.ckpt"
    atomic_save({"state_dict": state, "hacan": describe_model(model, settings, tokenizer)}, path)
    return model, path


@pytest.fixture
def pictures():
    """3 images of different sizes."""
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((50, 80), (90, 70), (64, 64))]


@torch.no_grad()
def scores_of(model, tokenizer, pictures):
    pixels = torch.stack([preprocess_image(picture, image_size=64) for picture in pictures])
    tokens = tokenizer(CAPTIONS, truncation=True, max_length=12, padding=True, return_tensors="pt")
    texts = model.encode_texts(tokens["input_ids"], tokens["attention_mask"].bool())
    return model.score(model.encode_images(pixels), texts)


def test_the_exported_folder_scores_as_the_model_did(trained, pictures, tokenizer, tmp_path):
    model, path = trained
    files = export(path, tmp_path / "out")
    assert {file.name for file in files} == {
        "model.safetensors", "config.json", "README.md", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    assert all(file.is_file() for file in files) and len(files) == len(list((tmp_path / "out").iterdir()))
    loaded = hacan.load_pretrained(tmp_path / "out")
    scores = loaded.score(loaded.encode_images(pictures), loaded.encode_texts(CAPTIONS))
    assert torch.equal(scores, scores_of(model, tokenizer, pictures))
    same = hacan.load_pretrained(path)  # a training's checkpoint will do as well
    assert torch.equal(same.score(same.encode_images(pictures), same.encode_texts(CAPTIONS)), scores)


def test_every_file_may_be_read_as_the_umask_allows(trained, tmp_path):
    files = export(trained[1], tmp_path / "out")
    assert {path.stat().st_mode for path in files} == {(tmp_path / "out" / "config.json").stat().st_mode}


def test_paths_and_arrays_and_batches_give_the_same(trained, pictures, tmp_path):
    loaded = hacan.load_pretrained(trained[1])
    for i, picture in enumerate(pictures):
        cv2.imwrite(str(tmp_path / f"{i}.png"), picture[..., ::-1])
    arrays = loaded.encode_images(pictures)
    for batch_size in (1, 2):
        files = loaded.encode_images([str(tmp_path / "0.png"), tmp_path / "1.png", pictures[2]], batch_size=batch_size)
        for one, other in zip(files, arrays, strict=True):
            torch.testing.assert_close(one, other)
    texts = loaded.encode_texts(CAPTIONS)
    few = loaded.encode_texts(CAPTIONS, batch_size=2)
    assert torch.equal(few.mask, texts.mask) and texts.mask.sum(dim=1).tolist() == [5, 12, 4, 3, 7]
    torch.testing.assert_close(few.pooled, texts.pooled)
    torch.testing.assert_close(loaded.score(arrays, few), loaded.score(arrays, texts))
    assert loaded.global_similarity(arrays, texts).shape == (3, 5)


def test_single_items_and_empty_lists_are_refused(trained, pictures):
    loaded = hacan.load_pretrained(trained[1])
    for bad in ("a.jpg", pictures[0], []):
        with pytest.raises(
            ValueError, match=r"(images|captions) is (one (str|ndarray)|an empty list), expected a list"
        ):
            loaded.encode_images(bad)
    for bad in ("a dog", []):
        with pytest.raises(ValueError, match=r"captions is (one str|an empty list), expected a list"):
            loaded.encode_texts(bad)
    with pytest.raises(ValueError, match=r"captions\[1\] is None of type NoneType, expected str"):
        loaded.encode_texts(["a dog", None])
    with pytest.raises(ValueError, match=r"images\[0\] is 3 of type int, expected str or Path or ndarray"):
        loaded.encode_images([3])


def test_bad_images_and_bombs_are_one_line(trained, tmp_path):
    loaded = hacan.load_pretrained(trained[1])
    bomb, page = tmp_path / "bomb.png", tmp_path / "page.jpg"
    bomb.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", 60_000, 50_000) + bytes(99))
    page.write_bytes(b"<html>404</html>")
    for path, words in (
        ("nosuch.jpg", "cannot be read: there is no such file"),
        (bomb, "cannot be decoded"),
        (page, "cannot be decoded"),
    ):
        with pytest.raises(UserError, match=f"image {path} {words}") as error:
            loaded.encode_images([path])
        assert "\n" not in str(error.value)


def test_odd_captions_are_captions(trained):
    """Long captions are truncated, empty ones are [CLS] [SEP]; emoji, lone surrogates and NUL do not affect others."""
    loaded = hacan.load_pretrained(trained[1])
    odd = ["a dog " * 5000, "", " \n\t", "\U0001f415 dog", "\ud83d", "\0", "a\0dog", "a dog"]
    texts = loaded.encode_texts(odd)
    assert texts.mask.sum(dim=1).tolist()[:3] == [12, 2, 2]
    assert all(torch.isfinite(values).all() for values in (texts.high[texts.mask], texts.pooled))
    torch.testing.assert_close(texts.pooled[-1:], loaded.encode_texts(["a dog"]).pooled)


def test_the_demos_images_are_squeezed_not_cropped(make_model, make_settings, tokenizer, tmp_path):
    model = make_model()
    for datasets in ("scenes", "f8k"):
        description = describe_model(model, make_settings(datasets=datasets), tokenizer)
        atomic_save({"state_dict": model.state_dict(), "hacan": description}, tmp_path / "a.ckpt")
        assert hacan.load_pretrained(tmp_path / "a.ckpt").centre_crop == (datasets != "scenes")


def test_inference_needs_neither_lightning_nor_sacred(trained, tmp_path):
    export(trained[1], tmp_path / "out")
    cv2.imwrite(str(tmp_path / "a.png"), np.full((40, 50, 3), 99, np.uint8))
    program = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pytorch_lightning", "lightning", "sacred", "torchmetrics"):
            raise ImportError(name + " at inference")

sys.meta_path.insert(0, Refuse())
import hacan
model = hacan.load_pretrained({str(tmp_path / "out")!r})
scores = model.score(model.encode_images([{str(tmp_path / "a.png")!r}]), model.encode_texts(["a dog", "a cat"]))
assert scores.shape == (1, 2), scores
print(sorted(set(sys.modules) & {{"pytorch_lightning", "lightning", "sacred", "config", "datamodules"}}))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------- card, receipt, paths


def test_nothing_of_the_training_machine_is_exported(trained, tmp_path):
    export(trained[1], tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        content = file.read_bytes()
        assert b"/secret" not in content and str(tmp_path).encode() not in content, file.name
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`convnext_weights.pth`" in card  # the file's name alone
    assert "not evaluated" in card and not (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.parametrize("place", ["run", "run/checkpoints"])
def test_the_card_quotes_the_results(trained, tmp_path, place):
    model, path = trained
    (tmp_path / place / "metrics.json").write_text(json.dumps(metrics_of(model)))
    export(path, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "f8k test, whole split: 1,000 images, 5,000 texts; shortlist K = 50, coarse score: global." in card
    rows = (
        "\n|---|---|---|---|---|---|---|---|\n"
        "| coarse | 8.2 | 50.0 | 100.0 | 10.0 | 50.0 | 100.0 | 321.0 |\n"
        "| hierarchical | 10.0 | 50.0 | 100.0 | 10.0 | 50.0 | 100.0 | 321.0 |\n\n"
    )
    assert rows in card  # a blank line between the rows would end the Markdown table
    assert "hash in the provenance record is that of these weights" in card
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics_of(model)


def test_the_card_says_if_the_results_are_of_other_weights(trained, tmp_path):
    model, path = trained
    for receipt in ({"members": [{"hash": "0123"}]}, {"ensemble": True}):
        (tmp_path / "run" / "metrics.json").write_text(json.dumps(metrics_of(model, **receipt)))
        export(path, tmp_path / "out")
        assert "provenance record is of other weights" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("content", ["{", "[1]", '{"receipt": {}}', '{"receipt": 3, "coarse": 1, "hierarchical": 2}'])
def test_broken_metrics_are_named(trained, tmp_path, content):
    (tmp_path / "run" / "metrics.json").write_text(content)
    with pytest.raises(UserError, match=r"metrics.json"):
        export(trained[1], tmp_path / "out")


def test_an_exported_folder_is_a_checkpoint_too(trained, tmp_path, pixels, captions):
    model, path = trained
    export(path, tmp_path / "out")
    for place in (tmp_path / "out", tmp_path / "out" / "model.safetensors"):
        found = open_checkpoint(place)
        assert (found.kind, found.ignored) == ("hacan", [])
        expected = model.score(model.encode_images(pixels), model.encode_texts(*captions))
        assert torch.equal(
            found.model.score(found.model.encode_images(pixels), found.model.encode_texts(*captions)), expected
        )
    export(tmp_path / "out", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


def test_damaged_exports_are_named(trained, tmp_path):
    folder = tmp_path / "out"
    export(trained[1], folder)
    (folder / "tokenizer.json").rename(folder / "kept.json")
    with pytest.raises(UserError, match=r"out lacks the tokenizer's tokenizer.json: export the checkpoint again"):
        hacan.load_pretrained(folder)
    (folder / "kept.json").rename(folder / "tokenizer.json")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config[:50])
    with pytest.raises(UserError, match=r"config.json is broken"):
        hacan.load_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=r"config.json does not describe a HACAN"):
        hacan.load_pretrained(folder)
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model.safetensors is missing"):
        hacan.load_pretrained(folder)


# -------------------------------------------------------------------------------------------------------------- ONNX


def pretrained_of(model, tokenizer):
    return Pretrained(model=model, tokenizer=tokenizer, image_size=64, centre_crop=True, max_text_len=12)


@pytest.mark.parametrize(
    "updates",
    [
        {},
        {"image_encoder": "vit_tiny_patch16_224", "image_encoder_args": {"depth": 2}, "text_encoder": "distilbert",
         "text_encoder_args": {"dim": 24, "n_layers": 2, "n_heads": 2, "hidden_dim": 9}},
        {"image_encoder": "tf_efficientnet_lite0", "image_encoder_args": {}},
    ],
    ids=["convnext-bert", "vit-distilbert", "efficientnet-bert"],
)  # fmt: skip
def test_onnx_gives_the_features_of_pytorch(make_model, tokenizer, tmp_path, pixels, captions, updates):
    model = make_model(**updates)
    with torch.no_grad():  # away from the start, where ConvNeXt's branches weigh nothing
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    images, texts = export_onnx(pretrained_of(model, tokenizer), tmp_path)
    assert max(images.difference, texts.difference) < 1e-4
    session = onnxruntime.InferenceSession(str(images.path), providers=["CPUExecutionProvider"])
    expected = model.encode_images(pixels)
    found = session.run(["high", "mid", "pooled"], {"pixels": pixels.numpy()})
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(one), other.detach(), rtol=1e-3, atol=1e-3)
    session = onnxruntime.InferenceSession(str(texts.path), providers=["CPUExecutionProvider"])
    ids, mask = captions
    expected = model.encode_texts(ids, mask)
    high, mid, pooled = session.run(["high", "mid", "pooled"], {"token_ids": ids.numpy(), "token_mask": mask.numpy()})
    torch.testing.assert_close(torch.from_numpy(high)[mask], expected.high[mask].detach(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(mid)[mask], expected.mid[mask].detach(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(pooled), expected.pooled.detach(), rtol=1e-3, atol=1e-4)


def test_onnx_that_disagrees_is_not_left_behind(make_model, tokenizer, tmp_path):
    model = make_model()
    model.aggregate_image.dropout = NoisyWhenAsked()
    with pytest.raises(UserError, match=r"image_encoder.onnx differs from PyTorch .* was removed"):
        export_onnx(pretrained_of(model, tokenizer), tmp_path)
    assert not (tmp_path / "image_encoder.onnx").exists()


class NoisyWhenAsked(torch.nn.Module):
    """A module that cannot be traced: it adds its number of calls."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return x * (1.0 + self.calls * torch.arange(x.shape[1]))


# ------------------------------------------------------------------------------------------------------------ script


@pytest.mark.parametrize("fails", ["weights", "card"])
def test_a_full_disk_keeps_the_export_that_was_there(trained, tmp_path, monkeypatch, fails):
    export(trained[1], tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if fails == "weights":  # safetensors has an error of its own

        def save_half(tensors, path, metadata):
            path.write_bytes(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

        monkeypatch.setattr("hacan.checkpoints.pretrained.save_file", save_half)
    else:
        monkeypatch.setattr("hacan.checkpoints.pretrained._model_card", mock.Mock(side_effect=full))
    with pytest.raises(UserError, match=r"cannot write to .*out: .*No space left on device.*; what was there is kept"):
        export(trained[1], tmp_path / "out")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_the_script_writes_names_and_exits(trained, tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "export.py"), str(trained[1]), str(tmp_path / "out"), "--onnx"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert result.returncode == 0, result.stderr
    named = {line.split(" (")[0] for line in result.stdout.splitlines()}
    assert named == {str(file) for file in (tmp_path / "out").iterdir()}
    assert {"image_encoder.onnx", "text_encoder.onnx"} <= {file.name for file in (tmp_path / "out").iterdir()}
    assert "`text_encoder.onnx`: ONNX; largest relative difference" in (tmp_path / "out" / "README.md").read_text()


def test_the_scripts_mistakes_are_one_line(tmp_path, capsys):
    main = runpy.run_path(str(ROOT / "scripts" / "export.py"))["main"]
    assert main([str(tmp_path / "nosuch.ckpt"), str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: weights file") and message.endswith("nosuch.ckpt is missing\n")
    assert message.count("\n") == 1 and not (tmp_path / "out").exists()


def test_what_cannot_be_exported(make_model, tmp_path, trained):
    torch.save(make_model().state_dict(), tmp_path / "plain.pth")
    with pytest.raises(UserError, match=r"plain.pth holds weights without settings"):
        export(tmp_path / "plain.pth", tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*file"):
        export(trained[1], tmp_path / "file")


# --------------------------------------------------------------------------------------------------- the hub's methods


@pytest.fixture
def no_network(monkeypatch):
    """Replace huggingface_hub's API at its boundary; return the arguments of the calls."""
    calls = {}

    class Api:
        def __init__(self, token=None):
            calls["token"] = token

        def create_repo(self, repo_id, **options):
            calls["create"] = (repo_id, options)
            return mock.Mock(repo_id=f"user/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path, **options):
            shutil.copytree(folder_path, calls["hub"] / repo_id)
            calls["upload"] = (repo_id, options)
            return mock.Mock(commit_url=f"https://hub/{repo_id}")

    def snapshot_download(repo_id, **options):
        calls["download"] = (repo_id, options)
        if not (calls["hub"] / repo_id).is_dir():
            raise LocalEntryNotFoundError(f"cannot find {repo_id}")
        return str(calls["hub"] / repo_id)

    monkeypatch.setattr("hacan.checkpoints.pretrained.HfApi", Api)
    monkeypatch.setattr("hacan.checkpoints.pretrained.snapshot_download", snapshot_download)
    return calls


def test_push_to_hub_and_from_pretrained(trained, pictures, tokenizer, tmp_path, no_network):
    no_network["hub"] = tmp_path / "hub"
    model, checkpoint = trained
    loaded = Pretrained.from_pretrained(checkpoint)
    assert loaded.push_to_hub("hacan-tiny", token="secret", private=True) == "https://hub/user/hacan-tiny"
    assert no_network["token"] == "secret" and no_network["create"] == (
        "hacan-tiny",
        {"private": True, "exist_ok": True},
    )
    again = Pretrained.from_pretrained("user/hacan-tiny", revision="v1", local_files_only=True)
    assert no_network["download"] == ("user/hacan-tiny", {"revision": "v1", "local_files_only": True})
    scores = again.score(again.encode_images(pictures), again.encode_texts(CAPTIONS))
    torch.testing.assert_close(scores, scores_of(model, tokenizer, pictures), atol=1e-5, rtol=1e-5)


def test_save_pretrained_writes_what_export_writes(trained, tmp_path):
    export(trained[1], tmp_path / "exported")
    written = Pretrained.from_pretrained(trained[1]).save_pretrained(tmp_path / "saved")
    assert {path.name for path in written} == {path.name for path in (tmp_path / "exported").iterdir()}
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "exported" / name).read_bytes()
    again = Pretrained.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "again")
    assert {path.name for path in again} == {path.name for path in written}


def test_save_pretrained_keeps_the_results_of_an_exported_folder(trained, tmp_path):
    model, path = trained
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(metrics_of(model)))
    export(path, tmp_path / "exported")
    Pretrained.from_pretrained(tmp_path / "exported").save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "metrics.json").read_text()) == metrics_of(model)
    assert "hash in the provenance record is that of these weights" in (tmp_path / "saved" / "README.md").read_text()


def test_a_name_that_the_hub_does_not_have_is_one_line(tmp_path, no_network):
    no_network["hub"] = tmp_path
    with pytest.raises(UserError, match=r"user/nothing is neither a file nor a folder.*scripts/export.py") as error:
        Pretrained.from_pretrained("user/nothing")
    assert "\n" not in str(error.value)


def test_a_model_without_a_description_is_not_saved(make_model, tokenizer, tmp_path):
    built = Pretrained(model=make_model(), tokenizer=tokenizer, image_size=64, centre_crop=True, max_text_len=12)
    with pytest.raises(ValueError, match="no description"):
        built.save_pretrained(tmp_path / "out")
