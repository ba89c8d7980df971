"""scripts/reproduce.py: study files, commands, interrupted studies, tables."""

import csv
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from sacred.arg_parser import get_config_updates
from tiny_run import ROOT, TINY_DEMO, environment

from config import ex
from hacan.errors import UserError
from hacan.settings import Settings
from scripts.reproduce import main
from scripts.reproduction import summary
from scripts.reproduction.execute import Execution, finished_folder
from scripts.reproduction.plan import STUDIES, Run, load_study

SCRIPT = ROOT / "scripts" / "reproduce.py"


@pytest.fixture
def study_file(tmp_path):
    """A study of the demo in miniature: two rows, an evaluation and an ensemble."""
    content = {
        "about": "miniature",
        "named": ["demo_config"],
        "reference": "full",
        "keys": {**TINY_DEMO, "data_root": str(tmp_path / "data"), "max_epoch": 1},
        "rows": {"full": {"about": "all"}, "no_lrg": {"claim": "a", "keys": {"streams": ["ksf"]}}},
        "evaluations": {"curve": {"rows": ["full"], "keys": {"curve": True}}},
        "ensembles": {"pair": {"members": ["full", "no_lrg"]}},
    }
    path = tmp_path / "mini.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("name", sorted(path.stem for path in STUDIES.glob("*.yaml")))
def test_every_run_of_the_studies_has_valid_settings(name, tmp_path):
    study = load_study(name)
    for run in study.runs(rows=[], seeds=2, out=tmp_path, keys={"data_root": "/data"}):
        updates, named = get_config_updates(shlex.split(run.shell())[3:])
        config = ex._create_run("print_config", config_updates=updates, named_configs=named).config
        settings = Settings.from_flat(dict(config.items()))
        assert settings.run.exp_name == run.name and settings.run.seed == run.seed
        assert settings.run.test_only == bool(run.needs)


def test_the_rows_of_a_study_and_their_commands(study_file, tmp_path):
    runs = {run.name: run for run in load_study(str(study_file)).runs(rows=[], seeds=2, out=tmp_path / "out", keys={})}
    assert list(runs) == [
        *("full-seed0", "no_lrg-seed0", "full-seed1", "no_lrg-seed1"),
        *("full-seed0-curve", "pair-seed0", "full-seed1-curve", "pair-seed1"),
    ]
    assert "streams=['ksf']" in shlex.split(runs["no_lrg-seed1"].shell()) and "seed=1" in runs["no_lrg-seed1"].words
    paths = {name: tmp_path / f"{name}.ckpt" for name in ("full-seed1", "no_lrg-seed1")}
    words = runs["pair-seed1"].command(paths)
    assert f"checkpoint=[{paths['full-seed1']}, {paths['no_lrg-seed1']}]" in words and "test_only=True" in words
    assert [run.name for run in load_study(str(study_file)).runs(rows=["pair"], seeds=1, out=tmp_path, keys={})] == [
        *("full-seed0", "no_lrg-seed0", "full-seed0-curve", "pair-seed0")
    ]


def test_a_dry_run_prints_commands_and_an_estimate(study_file, tmp_path, capsys):
    content = yaml.safe_load(study_file.read_text()) | {"seconds_per_run": 1800}
    study_file.write_text(yaml.safe_dump(content))
    assert main([str(study_file), "--dry-run", "--out", str(tmp_path / "out"), "--seeds", "2", "--jobs", "2"]) == 0
    out = capsys.readouterr().out
    assert "8 runs, 4 trainings to do" in out and "about 1.0 h" in out and not (tmp_path / "out").exists()
    assert out.count("python run.py with demo_config") == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": {"full": {"key": 1}}}, "rows, full: unknown key 'key'"),
        ({"reference": "none"}, "reference='none' is not one of the rows"),
        ({"ensembles": {"pair": {"members": ["other"]}}}, "there is no row 'other'"),
        ({"rows": [1]}, "rows: expected a mapping, found list"),
    ],
)
def test_a_wrong_study_is_one_line(study_file, capsys, change, message):
    study_file.write_text(yaml.safe_dump(yaml.safe_load(study_file.read_text()) | change))
    assert main([str(study_file), "--dry-run"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "there is no study 'nothing': give one of coco, demo, f30k, f8k"),
        (["demo", "--rows", "fll"], "--rows fll: the study demo has the rows full"),
        (["demo", "--set", "seed"], "--set seed: expected KEY=VALUE"),
        (["demo", "--seeds", "0"], "--seeds 0"),
    ],
)
def test_wrong_arguments_are_one_line(capsys, arguments, message):
    assert main([*arguments, "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_of_another_study_is_refused(study_file, tmp_path, capsys):
    out = tmp_path / "out"
    (out / "commands").mkdir(parents=True)
    (out / "commands" / "full-seed0.txt").write_text("python run.py with other\n")
    assert main([str(study_file), "--out", str(out)]) == 2
    assert "full-seed0.txt has another command" in capsys.readouterr().err


def test_a_failed_run_is_reported_and_the_others_go_on(tmp_path):
    lines = []
    runs = [Run("bad", "bad", 0, "", ("demo_config", "no_such_key=1")), Run("x", "x", 0, "", (), ("bad",))]
    execution = Execution(runs, out=tmp_path, jobs=1, report=lines.append)
    execution.run_all()
    assert execution.failed == ["bad", "x"]
    assert "no_such_key" in (tmp_path / "logs" / "bad.log").read_text()
    assert "x: not evaluated, because bad has no checkpoint" in lines


def ranks(seed, shift):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 12, (400,), generator=generator).double()
    return (values[:100] - shift).clamp_min(0), (values[100:] - shift).clamp_min(0)


@pytest.mark.parametrize(("shift", "verdict"), [(3, "higher"), (-3, "lower"), (0, "inside the noise")])
def test_the_verdict_on_a_difference(monkeypatch, shift, verdict):
    class Saved:
        def __init__(self, folder):
            row, seed = folder
            self.ranks = {"hierarchical": [ranks(seed, shift if row == "row" else 0)]}

    monkeypatch.setattr(summary, "load_result", Saved)
    ours, theirs = (
        [summary.Result(Run(row, row, seed, "", ()), (row, seed), {}) for seed in range(3)] for row in ("row", "full")
    )
    found = summary.difference(ours, theirs)
    assert found.verdict == verdict and found.low <= found.mean <= found.high and len(found.by_seed) == 3
    values = [one["difference"] for one in found.by_seed]
    half = 4.303 * math.sqrt(sum((value - found.mean) ** 2 for value in values) / 2 / 3)
    assert found.high - found.mean == pytest.approx(half, abs=1e-6)
    assert summary.difference(ours[:1], theirs[:1]).verdict == "inside the noise"


@pytest.mark.slow
def test_a_killed_study_goes_on_and_a_command_gives_the_numbers_of_its_row(study_file, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, str(SCRIPT), str(study_file), "--out", str(out), "--seeds", "2"]
    # As a shell starts a background process: SIGINT is ignored there.
    ignored = ["env", "--ignore-signal=INT", *command]
    process = subprocess.Popen(ignored, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    first = out / "runs" / "full-seed0"
    deadline = time.monotonic() + 200
    while not list(first.glob("*/metrics.json")) and time.monotonic() < deadline:
        time.sleep(0.5)
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=100)
    assert "interrupted; the same command continues" in printed and process.returncode == 1
    (before,) = first.glob("*/metrics.json")
    stamp = before.stat().st_mtime_ns

    settings = {"cwd": ROOT, "env": environment(), "timeout": 400}
    done = subprocess.run(command, **settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert before.stat().st_mtime_ns == stamp and "runs left" in done.stdout
    with open(out / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and {row["evaluation"] for row in rows} == {"", "curve"}
    tables = (out / "tables.md").read_text()
    assert "| no_lrg | " in tables and "## Differences in Rsum to full" in tables and "## curve" in tables
    for name in ("differences.png", "training.png", "trade_off.png"):
        assert (out / name).stat().st_size > 5000

    run = load_study(str(study_file)).runs(rows=["no_lrg"], seeds=1, out=out, keys={})[0]
    words = [*shlex.split(run.shell())[2:], f"log_dir={tmp_path / 'again'}"]
    subprocess.run([sys.executable, str(ROOT / "run.py"), *words], **settings, check=True)
    (again,) = (tmp_path / "again" / run.name).glob("*/metrics.json")
    expected = json.loads((finished_folder(run, out) / "metrics.json").read_text())
    assert json.loads(again.read_text())["hierarchical"] == expected["hierarchical"]


def test_a_path_in_a_set_option_is_made_absolute(study_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    assert main([str(study_file), "--dry-run", "--set", "tokenizer=./weights", "--rows", "full", "--seeds", "1"]) == 0
    assert f"tokenizer={os.path.abspath('weights')}" in capsys.readouterr().out


def test_an_unreadable_study_is_one_line(tmp_path):
    (tmp_path / "x.yaml").write_text("rows: [")
    with pytest.raises(UserError, match="cannot be read as YAML"):
        load_study(str(tmp_path / "x.yaml"))
