"""Two gloo processes through run.py: they train as one, wake the backbones, and rank as one."""

import csv
import json

import numpy as np
import pytest
import torch
from tiny_run import TINY_DEMO, run_py

from hacan.callbacks import BEST, LAST

pytestmark = pytest.mark.slow

STILL = (  # no dropout in the text encoder: each process would draw its own
    "hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=32, max_position_embeddings=64, "
    "hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same training by one process of 10 pairs a batch and by two of 5, with backbones that wake up."""
    folder = tmp_path_factory.mktemp("runs")
    arguments = {
        **TINY_DEMO,
        "image_encoder_args": "depths=[1, 1, 1, 1], dims=[8, 12, 16, 20]",
        "text_encoder_args": STILL,
        "freeze_backbone_epochs": 1,
        "global_loss_weight": 0.0,  # the aggregators' dropout is drawn by each process; test_gathering.py has this loss
        "data_root": folder / "data",
    }
    one = run_py(**{**arguments, "log_dir": folder / "one"})
    assert one.returncode == 0, one.stderr
    two = run_py(**{**arguments, "log_dir": folder / "two", "num_gpus": 2, "per_gpu_batchsize": 5})
    assert two.returncode == 0, two.stderr
    return folder, arguments, one, two


def weights(folder, name):
    return torch.load(folder / "demo" / "1" / "checkpoints" / name, weights_only=True)["state_dict"]


def losses(folder):
    with open(folder / "demo" / "1" / "csv" / "metrics.csv", newline="") as file:
        return [float(row["train/total"]) for row in csv.DictReader(file) if row["train/total"]]


def test_two_processes_train_as_one(runs):
    folder, _, _, _ = runs
    one, two = losses(folder / "one"), losses(folder / "two")
    assert len(one) == len(two) > 1
    assert two == pytest.approx(one, rel=1e-3)
    ours, theirs = weights(folder / "one", LAST), weights(folder / "two", LAST)
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], atol=2e-3, rtol=1e-2)  # Adam makes much of rounding


def test_only_the_first_process_records_and_prints(runs):
    folder, _, _, two = runs
    home = folder / "two" / "demo"
    assert not list(home.glob("process-*"))
    assert not (home / "2").exists()
    assert two.stdout.count("\nwrote ") == 1
    assert two.stderr.count("Running command") == 1
    assert not (home / "1" / "features-validation").exists()


def test_frozen_backbones_wake_up_in_every_process(runs):
    """The optimiser has a state only for what has had a gradient: in epoch 1 the backbones too."""
    folder, _, _, _ = runs
    for name in ("one", "two"):
        path = folder / name / "demo" / "1" / "checkpoints"
        states = [torch.load(path / file, weights_only=True) for file in ("previous.ckpt", LAST)]
        moments = [len(state["optimizer_states"][0]["state"]) for state in states]
        assert moments[0] < moments[1]


def test_sharded_evaluation_has_the_ranks_of_one_process(runs, tmp_path):
    folder, arguments, _, _ = runs
    best = folder / "two" / "demo" / "1" / "checkpoints" / BEST
    found = {}
    for processes in (1, 2):
        place = tmp_path / str(processes)
        updates = {**arguments, "log_dir": place, "num_gpus": processes, "per_gpu_batchsize": 4, "batch_size": 8}
        done = run_py(**updates, test_only=True, checkpoint=best)  # 6 pictures: shards of 4 and 2
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\nwrote ") == 1
        found[processes] = (
            np.load(place / "demo" / "1" / "ranks.npz"),
            json.loads((place / "demo" / "1" / "metrics.json").read_text()),
        )
    ranks = [found[processes][0] for processes in (1, 2)]
    assert ranks[0].files == ranks[1].files
    assert all(np.array_equal(ranks[0][name], ranks[1][name]) for name in ranks[0].files)
    assert found[1][1]["hierarchical"] == found[2][1]["hierarchical"]
