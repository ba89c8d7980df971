"""Configs are plain data, and a run starts without git or a user name."""

import json
import os
import pickle
import subprocess
import sys

import pytest
from tiny_run import ROOT, environment

from hacan.errors import UserError
from hacan.sacred_setup import RunRecord, plain

CODE = {"py/reduce": [{"py/function": "os.mkdir"}, {"py/tuple": ["HARMED"]}]}


def print_config(*words, cwd, **more):
    command = [sys.executable, str(ROOT / "run.py"), "print_config", "with", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment(**more), capture_output=True, text=True, check=False)


def refused(result, folder, *parts):
    assert not (folder / "HARMED").exists()
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert all(part in result.stderr for part in parts), result.stderr


class MakesFolder:
    def __reduce__(self):
        return os.mkdir, ("HARMED",)


def test_the_attacks_work_where_nothing_refuses_them(tmp_path, monkeypatch):
    import jsonpickle

    monkeypatch.chdir(tmp_path)
    jsonpickle.decode(json.dumps(CODE))
    assert (tmp_path / "HARMED").is_dir()
    (tmp_path / "HARMED").rmdir()
    pickle.loads(pickle.dumps(MakesFolder()))
    assert (tmp_path / "HARMED").is_dir()


@pytest.mark.parametrize("content", [{"seed": CODE}, {"image_encoder_args": {"a": [CODE]}}, {"py/object": "os.mkdir"}])
def test_a_json_config_cannot_run_code(tmp_path, content):
    (tmp_path / "shared.json").write_text(json.dumps(content))
    refused(print_config("shared.json", cwd=tmp_path), tmp_path, "py/", "code")


def test_a_value_cannot_run_code(tmp_path):
    refused(print_config(f"seed={CODE}", cwd=tmp_path), tmp_path, "py/reduce", "code")


def test_a_pickled_config_is_refused(tmp_path):
    (tmp_path / "shared.pickle").write_bytes(pickle.dumps(MakesFolder()))
    refused(print_config("shared.pickle", cwd=tmp_path), tmp_path, "shared.pickle", ".json")


def test_a_yaml_config_cannot_run_code(tmp_path):
    (tmp_path / "shared.yaml").write_text("seed: !!python/object/apply:os.mkdir [HARMED]")
    refused(print_config("shared.yaml", cwd=tmp_path), tmp_path, "shared.yaml")


def test_broken_json_is_one_line(tmp_path):
    (tmp_path / "shared.json").write_text("{")
    refused(print_config("shared.json", cwd=tmp_path), tmp_path, "shared.json", "JSON")


def test_the_config_of_a_run_can_be_used_again(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"seed": 7, "image_levels": {"py/tuple": [-3, -1]}}))
    result = print_config("config.json", "margin=0.3", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "seed = 7" in result.stdout and "image_levels = [-3, -1]" in result.stdout


def test_plain_values_stay_as_they_are():
    value = {"a": [1, 2.5, None, True], "b": {"c": "py/object"}}
    assert plain(value) == value
    with pytest.raises(UserError, match="py/id"):
        plain([{"py/id": 1}])


def test_a_run_starts_without_a_git_executable(tmp_path):
    result = print_config("seed=3", cwd=tmp_path, PATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "no git commit" in result.stderr


@pytest.mark.parametrize("state", ["no commits", "another owner"])
def test_a_run_starts_in_a_repository_that_git_cannot_read(tmp_path, state):
    """A folder of links to the working tree, outside of the repository."""
    for entry in ("run.py", "config.py", "hacan", "datamodules"):
        source = ROOT / entry
        subprocess.run(["cp", "-r", str(source), str(tmp_path / entry)], check=True)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    more = {"PYTHONPATH": str(tmp_path)}
    if state == "another owner":
        more["GIT_TEST_ASSUME_DIFFERENT_OWNER"] = "1"
    result = subprocess.run(
        [sys.executable, "run.py", "print_config"],
        cwd=tmp_path,
        env=environment(**more),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "no git commit" in result.stderr


def test_importing_hacan_sets_a_user_name_where_the_system_has_none():
    code = (
        "import os, pwd\n"
        "def unknown(uid): raise KeyError(f'getpwuid(): uid not found: {uid}')\n"
        "pwd.getpwuid = unknown\n"
        "import hacan, getpass, torch\n"
        "print(getpass.getuser() == str(os.getuid()))"
    )
    named = ("LOGNAME", "USER", "LNAME", "USERNAME")
    nameless = {key: value for key, value in environment().items() if key not in named}
    result = subprocess.run([sys.executable, "-c", code], env=nameless, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "True", result.stderr


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("-m db", "No module named 'pymongo'"),
        ("-S nowhere", "Valid bucket specification not found"),
        ("--loglevel NOPE", "Unknown level: 'NOPE'"),
        ("with nothing.yaml", '"nothing.yaml" not found'),
        ("with no_config", 'Named config not found: "no_config"'),
    ],
)
def test_a_command_line_that_sacred_cannot_follow_is_one_line(tmp_path, words, named):
    command = [sys.executable, str(ROOT / "run.py"), "print_config", *words.split()]
    result = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 2 and named in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert sum(line.startswith("error: ") for line in result.stderr.splitlines()) == 1


def test_a_run_number_that_was_used_before_is_one_line(tmp_path, capsys):
    (tmp_path / "7").mkdir()
    with pytest.raises(SystemExit):
        RunRecord(tmp_path).started_event({"base_dir": ".", "sources": []}, "main", {}, None, {}, {}, "7")
    assert "7 exists: --id was used before" in capsys.readouterr().err
