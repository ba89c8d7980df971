"""`run.py` itself, on the embedded demo in miniature: train, checkpoint, resume, evaluate, and mistakes."""

import csv
import json
import shutil

import pytest
import torch
from tiny_release import Release
from tiny_run import TINY_DEMO, run_py

from hacan.training.callbacks import BEST, LAST


def figures(folder):
    return json.loads((folder / "metrics.json").read_text())


def rows_of(folder):
    with open(folder / "csv" / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished training: what it printed, and `home`, the folder of its runs."""
    folder = tmp_path_factory.mktemp("run")
    arguments = {**TINY_DEMO, "data_root": folder / "data", "log_dir": folder / "result"}
    done = run_py(**arguments)
    assert done.returncode == 0, done.stderr
    return done, arguments, folder / "result" / "demo"


def test_a_training_prints_its_table_and_is_recorded(run):
    done, arguments, home = run
    assert "hierarchical K=50" in done.stdout and "wrote" in done.stdout
    config, record = (json.loads((home / "1" / f"{name}.json").read_text()) for name in ("config", "run"))
    assert config["embed_dim"] == arguments["embed_dim"] and config["loss"] == "GCD"
    assert record["status"] == "COMPLETED" and record["experiment"]["dependencies"]
    assert record["result"]["rsum"] == figures(home / "1")["hierarchical"]["rsum"]


def test_metrics_include_the_provenance_record(run):
    _, _, home = run
    found = figures(home / "1")
    receipt = found["receipt"]
    assert (receipt["dataset"], receipt["split"], receipt["images"], receipt["texts"]) == ("scenes", "test", 6, 30)
    assert receipt["members"][0]["checkpoint"].endswith(BEST) and receipt["bootstrap"] == 20
    assert 0 <= found["hierarchical"]["rsum"] <= 600 and found["intervals_95"]
    assert (home / "1" / "ranks.npz").is_file()


def test_logs_hold_each_term_in_each_epoch(run):
    _, _, home = run
    rows = rows_of(home / "1")
    for epoch, term in enumerate(("global_InfoNCE", "global_GCD")):  # one warm-up epoch
        trained = [row for row in rows if row["epoch"] == str(epoch) and row["train/total"]]
        assert trained, rows
        for name in ("triplet", term, "hinge_per_pair", "active_hinges"):
            assert all(float(row[f"train/{name}"]) >= 0 for row in trained)
        assert all(float(row["train/learning_rate"]) == pytest.approx(1e-3) for row in trained)
        validated = [row for row in rows if row["epoch"] == str(epoch) and row["val/rsum"]]
        assert len(validated) == 1
        recalls = [f"val/r{k}_{way}" for k in (1, 5, 10) for way in ("i2t", "t2i")]
        assert float(validated[0]["val/rsum"]) == pytest.approx(sum(float(validated[0][name]) for name in recalls))
    assert list((home / "1" / "tensorboard").glob("events.out.tfevents.*"))


def test_checkpoints_hold_the_model_and_its_description(run):
    _, _, home = run
    for name in (BEST, LAST):
        content = torch.load(home / "1" / "checkpoints" / name, weights_only=True)
        assert content["hacan"]["settings"]["embed_dim"] == 16 and content["hacan"]["tokenizer"]
    assert not (home / "1" / "checkpoints" / ".lock.json").exists()


@pytest.mark.slow
def test_resume_goes_on_in_the_same_folder(run, tmp_path):
    _, arguments, home = run
    shutil.copytree(home, tmp_path / "demo")
    done = run_py(**{**arguments, "log_dir": tmp_path, "max_epoch": 3}, resume_from="last")
    assert done.returncode == 0, done.stderr
    assert f"resuming from {tmp_path}/demo/1/checkpoints/last.ckpt" in done.stderr
    assert torch.load(tmp_path / "demo" / "1" / "checkpoints" / LAST, weights_only=True)["epoch"] == 2
    rows = rows_of(tmp_path / "demo" / "2")
    assert {row["epoch"] for row in rows} == {"2"}
    assert figures(tmp_path / "demo" / "2")["receipt"]["members"][0]["checkpoint"].startswith(str(tmp_path))


@pytest.mark.slow
def test_test_only_repeats_the_figures_and_an_ensemble_has_two_members(run, tmp_path):
    """The architecture of the checkpoint is used where the command does not name another one."""
    _, arguments, home = run
    best, last = (home / "1" / "checkpoints" / name for name in (BEST, LAST))
    updates = {**arguments, "log_dir": tmp_path, "test_only": True}
    refused = run_py(**{**updates, "image_size": 64}, checkpoint=best)
    assert refused.returncode == 2 and "leave image_size out" in refused.stderr
    decided = ("embed_dim", "image_size")  # other values in demo_config
    alone = run_py(**{key: value for key, value in updates.items() if key not in decided}, checkpoint=best)
    assert alone.returncode == 0, alone.stderr
    assert "hacan checkpoint;" in alone.stderr and "none missing, 0 ignored" in alone.stderr
    assert figures(tmp_path / "demo" / "2")["hierarchical"] == figures(home / "1")["hierarchical"]
    assert not (tmp_path / "demo" / "2" / "checkpoints").exists()
    both = run_py(**updates, checkpoint=f"[{best}, {last}]")
    assert both.returncode == 0, both.stderr
    members = figures(tmp_path / "demo" / "3")["receipt"]["members"]
    assert [member["checkpoint"] for member in members] == [str(best), str(last)]


@pytest.mark.slow
def test_test_only_of_the_public_release_lists_what_became_of_its_tensors(run, tmp_path):
    _, arguments, _ = run
    path = tmp_path / "release.ckpt"
    torch.save({"epoch": 9, "state_dict": Release(words=150, positions=64).state()}, path)
    updates = {**arguments, "log_dir": tmp_path, "test_only": True, "checkpoint": path}
    done = run_py(**updates)
    assert done.returncode == 0, done.stderr
    assert "release checkpoint; " in done.stderr and "convnexts.* -> image_encoder.*" in done.stderr
    assert "none missing, 12 ignored (convnexts.head.weight" in done.stderr
    assert "hierarchical K=50" in done.stdout
    found = figures(tmp_path / "demo" / "1")
    assert found["receipt"]["members"][0]["checkpoint"] == str(path)
    assert 0 <= found["hierarchical"]["rsum"] <= 600


@pytest.mark.parametrize(
    ("updates", "words"),
    [
        ({"loss": "hinge"}, ["loss='hinge'", "GCD, GCD_release, GCD_revised, F_HN, M_HN, InfoNCE, none"]),
        ({"lerning_rate": 1}, ["lerning_rate", "learning_rate"]),
        pytest.param({"max_epoch": "many"}, ["max_epoch='many'", "int"], marks=pytest.mark.slow),
        pytest.param({"test_only": True}, ["test_only=True", "checkpoint=PATH"], marks=pytest.mark.slow),
        pytest.param({"datasets": "f30k", "data_root": "/no/where"}, ["/no/where"], marks=pytest.mark.slow),
        pytest.param({"test_only": True, "checkpoint": "/no/x.ckpt"}, ["/no/x.ckpt"], marks=pytest.mark.slow),
    ],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, updates, words):
    done = run_py(**{**TINY_DEMO, "data_root": tmp_path, "log_dir": tmp_path / "result", **updates})
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert all(word in lines[0] for word in words), lines


def test_a_wrong_data_root_leaves_no_run_folder(tmp_path):
    done = run_py(named=None, data_root=tmp_path / "nothing", log_dir=tmp_path / "result")
    assert done.returncode == 2 and "does not exist" in done.stderr
    assert not list((tmp_path / "result").glob("*/*"))


def test_sacreds_own_commands_work():
    done = run_py("print_config", named="coco_config")
    assert done.returncode == 0, done.stderr
    assert "datasets = 'coco'" in done.stdout + done.stderr and "direction = 'i2t'" in done.stdout + done.stderr


@pytest.mark.slow
def test_images_that_cannot_be_read_stop_or_are_skipped(run, tmp_path):
    _, arguments, _ = run
    shutil.copytree(arguments["data_root"], tmp_path / "data")
    pictures = sorted(path for path in (tmp_path / "data").rglob("*.png") if "train" in path.as_posix())
    pictures = pictures or sorted((tmp_path / "data").rglob("*.png"))
    pictures[0].write_bytes(pictures[0].read_bytes()[:100])
    updates = {**arguments, "data_root": tmp_path / "data", "log_dir": tmp_path / "result", "max_epoch": 1}
    stopped = run_py(**updates)
    assert stopped.returncode == 2 and "Traceback" not in stopped.stderr
    assert pictures[0].name in stopped.stderr and "on_bad_image=skip" in stopped.stderr
    skipped = run_py(**updates, on_bad_image="skip")
    assert skipped.returncode == 0, skipped.stderr
    assert "1 unreadable image(s) skipped" in skipped.stderr and pictures[0].name in skipped.stderr
