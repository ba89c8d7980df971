"""Two gloo processes through run.py: they train as one, rank as one, and are started by torchrun and SLURM as well."""

import csv
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import ROOT, TINY_DEMO, assert_same, command_of, environment, run_py

from datamodules.sampling import TrainingOrder
from hacan.training.callbacks import BEST, LAST

pytestmark = pytest.mark.slow

STILL = (  # no dropout in the text encoder: each process would draw its own
    "hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=32, max_position_embeddings=64, "
    "hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same training by one process with 10 pairs a batch and two with 5, with backbones that are unfrozen."""
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
        done = run_py(**updates, test_only=True, checkpoint=best)  # 6 images: shards of 4 and 2
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


# ------------------------------------------------------------------------------------------------- unreadable images


def test_a_process_without_readable_images_takes_part_in_the_step(runs, tmp_path):
    """Two processes of one pair a batch train as one process of two, whichever of the images cannot be read."""
    _, arguments, _, _ = runs
    shutil.copytree(arguments["data_root"], tmp_path / "data")
    listed = json.loads((tmp_path / "data" / "scenes" / "dataset_scenes.json").read_text())["images"]
    train = [image for image in listed if image["split"] == "train"]
    bad = {2, 5, 6, 9}
    for number in bad:
        (picture,) = (tmp_path / "data").rglob(train[number]["filename"])
        picture.write_bytes(b"no image")
    updates = {**arguments, "data_root": tmp_path / "data", "on_bad_image": "skip", "max_epoch": 1, "warmup_epochs": 0}
    owner = [number for number, image in enumerate(train) for _ in image["sentences"]]
    order = TrainingOrder(n_pairs=len(owner), batch_size=20, per_gpu_batchsize=2, seed=0)
    unreadable = [sum(owner[pair] in bad for _, pair in batch) for batch in order]
    assert {0, 1, 2} == set(unreadable)  # nobody's, one process's and everybody's batches are empty
    one = run_py(**{**updates, "log_dir": tmp_path / "one", "per_gpu_batchsize": 2})
    updates |= {"per_gpu_batchsize": 1, "num_gpus": 2}
    two = run_py(**updates, log_dir=tmp_path / "two")
    alone = run_py(**updates, log_dir=tmp_path / "x", gather_negatives=False)
    for done in (one, two, alone):
        assert done.returncode == 0, done.stderr
        assert "unreadable image(s) skipped" in done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3, abs=1e-4)
    ours, theirs = weights(tmp_path / "one", LAST), weights(tmp_path / "two", LAST)
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], atol=2e-3, rtol=1e-2)


# ----------------------------------------------------------------------------------------------------- other launchers


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def same_as_started_by_run_py(folder, runs):
    """The run of `runs` with two processes, repeated by another launcher: the same weights, one record, one table."""
    assert_same(weights(folder, LAST), weights(runs[0] / "two", LAST))
    assert not list((folder / "demo").glob("process-*")) and not (folder / "demo" / "2").exists()
    assert json.loads((folder / "demo" / "1" / "run.json").read_text())["status"] == "COMPLETED"


def test_torchrun_starts_the_same_run(runs, tmp_path):
    torchrun = [Path(sys.executable).with_name("torchrun"), "--nproc_per_node=2", f"--master_port={free_port()}"]
    updates = {**runs[1], "log_dir": tmp_path, "num_gpus": 2, "per_gpu_batchsize": 5}
    command = command_of(launcher=torchrun, **updates)
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nwrote ") == 1
    same_as_started_by_run_py(tmp_path, runs)


def slurm(folder, **updates):
    """Two processes as srun would start them: srun itself is not on this machine, its variables are what is tested."""
    job = {
        "SLURM_JOB_ID": "4242", "SLURM_JOB_NAME": "hacan", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost",
        "SLURM_JOB_NODELIST": "localhost", "MASTER_PORT": free_port(),
    }  # fmt: skip
    command = command_of(**updates, log_dir=folder, num_gpus=2, per_gpu_batchsize=5)
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(**job, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def ended(processes):
    """Return what both printed; no process is left running."""
    try:
        return [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()


def arguments_of(runs):
    return {key: value for key, value in runs[1].items() if key not in ("log_dir", "num_gpus", "per_gpu_batchsize")}


def test_slurms_variables_start_the_same_run(runs, tmp_path):
    processes = slurm(tmp_path, **arguments_of(runs))
    printed = ended(processes)
    assert [process.returncode for process in processes] == [0, 0], printed
    assert [out.count("\nwrote ") for out, _ in printed] == [1, 0]
    same_as_started_by_run_py(tmp_path, runs)


def test_slurms_notice_to_one_process_saves_and_ends_both_and_the_job_goes_on(runs, tmp_path):
    last = tmp_path / "demo" / "1" / "checkpoints" / LAST
    processes = slurm(tmp_path, **{**arguments_of(runs), "max_epoch": 2000})
    try:
        while not last.is_file() and all(process.poll() is None for process in processes):
            time.sleep(0.1)
        processes[1].send_signal(signal.SIGTERM)
    finally:
        printed = ended(processes)
    assert [process.returncode for process in processes] == [0, 0], printed
    assert "continue with resume_from=last" in printed[0][1]
    epoch = torch.load(last, weights_only=True)["epoch"]
    processes = slurm(tmp_path, **{**arguments_of(runs), "max_epoch": epoch + 1, "resume_from": "last"})
    printed = ended(processes)
    assert [process.returncode for process in processes] == [0, 0], printed
    assert f"resuming from {last}" in printed[0][1]
    assert torch.load(last, weights_only=True)["epoch"] == epoch
