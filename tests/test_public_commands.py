"""Commands of the public code's users, as typed, on miniature data in the public layout and a miniature hub cache."""

import json
import os
import shlex
import subprocess
import sys

import cv2
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny_release import FIRST_CONFIG, REVISED_CONFIG, Release, save_as_lightning_1_3
from tiny_run import ROOT
from transformers import BertConfig, BertModel

pytestmark = pytest.mark.slow

SIZES = {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 20]}
# Loaded by Python at start: convnext_base is small, as its weights in the miniature hub are.
SITE = f"""
import timm.models.convnext as convnext
from timm.models import _registry
def convnext_base(pretrained=False, **arguments):
    return convnext._create_convnext("convnext_base", pretrained=pretrained, **{{**{SIZES!r}, **arguments}})
_registry._model_entrypoints["convnext_base"] = convnext_base
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer):
    """A folder with `data` (f30k and coco), `hub` (the cache) and `site` (the small convnext_base)."""
    folder = tmp_path_factory.mktemp("public")
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(SITE)
    torch.manual_seed(0)
    bert = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=40,
    )
    for name in ("bert-base-uncased", "timm--convnext_base.fb_in22k"):
        snapshot = folder / "hub" / f"models--{name}" / "snapshots" / "0123"
        snapshot.mkdir(parents=True)
        (folder / "hub" / f"models--{name}" / "refs").mkdir()
        (folder / "hub" / f"models--{name}" / "refs" / "main").write_text("0123")
        if name.startswith("bert"):
            BertModel(bert).save_pretrained(snapshot)
            tokenizer.save_pretrained(snapshot)
        else:
            model = timm.create_model("convnext_base", num_classes=3, **SIZES)
            save_file(model.state_dict(), snapshot / "model.safetensors")
    write_data(folder / "data", list(tokenizer.get_vocab()))
    return folder


def write_data(root, words):
    """Images of noise with captions of random words: 4 for train, 2 for val, 3 for test, one for restval."""
    random = np.random.default_rng(0)
    for folder, inner, json_name in (
        ("f30k", "flickr30k-images", "dataset_flickr30k.json"),
        ("coco", "val2014", "dataset_coco.json"),
    ):
        images = []
        (root / folder / inner).mkdir(parents=True)
        for number, split in enumerate(["train"] * 4 + ["val"] * 2 + ["test"] * 3 + ["restval"]):
            name = f"COCO_val2014_{number:012d}.jpg"
            cv2.imwrite(str(root / folder / inner / name), random.integers(0, 255, (60, 80, 3), np.uint8))
            sentences = [{"raw": " ".join(random.choice(words[5:], 6))} for _ in range(5 + (folder == "coco"))]
            entry = {"filename": name, "split": split, "imgid": number, "sentences": sentences}
            images.append(entry | ({"filepath": "val2014"} if folder == "coco" else {}))
        (root / folder / json_name).write_text(json.dumps({"images": images}))


def as_typed(world, command, *, timeout=300):
    """Run a command line in the folder `world`, without a network; return what it printed."""
    words = [sys.executable, str(ROOT / "run.py"), *shlex.split(command)[2:]]
    paths = os.pathsep.join([str(world / "site"), str(ROOT)])
    settings = {"HF_HUB_CACHE": str(world / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words, cwd=world, env=os.environ | settings, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("command", "images", "texts"),
    [
        ('python run.py with data_root=data loss="GCD"', 3, 15),
        ('python run.py with coco_config data_root=data loss="GCD"', 3, 15),
    ],
)
def test_the_training_commands(world, command, images, texts):
    printed = as_typed(world, command)
    assert f"whole split: {images} images, {texts} texts" in printed
    assert "Result: {'r1_i2t'" in printed


@pytest.mark.parametrize("named", ["", "coco_config "])
@pytest.mark.parametrize("config", [FIRST_CONFIG, REVISED_CONFIG])
def test_the_evaluation_commands_open_a_checkpoint_of_lightning_1_3(world, named, config, tokenizer):
    save_as_lightning_1_3(world / "public.ckpt", Release(words=len(tokenizer), positions=40).state(), config)
    printed = as_typed(world, f"python run.py with {named}data_root=data test_only=True checkpoint=public.ckpt")
    alignment = "revised" if config is REVISED_CONFIG else "hybrid"
    assert f"{alignment} alignment, direction {'i2t' if named else 't2i'}" in printed
    assert "whole split: 3 images, 15 texts" in printed


@pytest.mark.parametrize("named", ["release_config", "revised_config", "coco_config release_config"])
def test_the_named_configs_of_the_public_codes_train_and_evaluate(world, named):
    printed = as_typed(world, f"python run.py with {named} data_root=data max_epoch=2 exp_name='{named}'")
    assert f"coarse score: {'release' if 'release' in named else 'global'}" in printed
    assert f"{'revised' if 'revised' in named else 'hybrid'} alignment" in printed
    assert "Result: {'r1_i2t'" in printed


def test_a_folder_given_as_tokenizer_is_enough(world):
    (snapshot,) = (world / "hub" / "models--bert-base-uncased" / "snapshots").iterdir()
    printed = as_typed(world, f"python run.py with data_root=data tokenizer={snapshot} max_epoch=1 exp_name=folder")
    assert "Result: {'r1_i2t'" in printed
