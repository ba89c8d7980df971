"""The embedded demo in miniature: as `run.py` in a process of its own, or its training within the test's process."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from config import ex
from datamodules.datamodule import build_data
from datamodules.tokens import load_tokenizer
from hacan import pipeline
from hacan.checkpoints.loading import open_models
from hacan.settings import Settings

ROOT = Path(__file__).parents[1]
TINY_DEMO = {
    "scenes_pictures": [12, 4, 6],
    "image_size": 32,
    "image_encoder_args": "depths=[1, 1, 1, 1], dims=[8, 12, 16, 20], drop_path_rate=0.2",
    "text_encoder_args": (
        "hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=32, max_position_embeddings=64"
    ),
    "embed_dim": 16,
    "batch_size": 20,
    "per_gpu_batchsize": 10,
    "max_epoch": 2,
    "warmup_epochs": 1,
    "all_negatives_epochs": 1,
    "bootstrap": 20,
}


def settings_of(folder, **updates):
    """The tiny demo's settings, its files in `folder`, one epoch."""
    defaults = dict(ex._create_run("print_config", named_configs=["demo_config"]).config.items())
    places = {"data_root": str(folder), "log_dir": str(folder / "log"), "save_path": str(folder / "checkpoints")}
    return Settings.from_flat({**defaults, **TINY_DEMO, **places, "max_epoch": 1, "warmup_epochs": 0, **updates})


def command_of(*words, named="demo_config", script="run.py", launcher=(sys.executable,), **updates):
    """Return the words of `python run.py with ...`, or of another launcher."""
    assigned = [
        f"{key}={value!r}" if isinstance(value, str) and "=" in value else f"{key}={value}"
        for key, value in updates.items()
    ]
    return [*map(str, launcher), str(script), *words, "with", *([named] if named else []), *assigned]


def environment(**more):
    """Return the environment of a run: no network, one thread per process."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def run_py(*words, timeout=300, **rest):
    """`python run.py with ...`, finished: `.returncode`, `.stdout`, `.stderr`."""
    return subprocess.run(
        command_of(*words, **rest),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def train_here(settings, folder):
    """`pipeline.train` as `run.py` calls it, in this process; returns the best checkpoint, or None if interrupted."""
    models, tokenizer, settings = open_models(settings, load_tokenizer)
    data = build_data(settings, tokenizer)
    return pipeline.train(settings, models[0], tokenizer, data, run_folder=folder / "record", home=folder)


def assert_same(one, other, where=""):
    """Equal down to the last bit: nested dicts, lists, tensors and numbers."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for place, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}/{place}")
    else:
        assert one == other, where
