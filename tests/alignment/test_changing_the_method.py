"""docs/changing-the-method.md, run as it stands on the demo in miniature: its form, its config key, its commands."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from tiny_run import ROOT, TINY_DEMO, environment

DOCUMENT = (ROOT / "docs" / "changing-the-method.md").read_text()


def blocks_of(language):
    return re.findall(rf"```{re.escape(language)}\n(.*?)```", DOCUMENT, re.DOTALL)


def insert_after(path, line, addition):
    text = path.read_text()
    assert text.count(line) == 1
    path.write_text(text.replace(line, line + addition))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of this repository with the form and the key of the document."""
    folder = tmp_path_factory.mktemp("checkout")
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in names.stdout.split():
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (form,), (key,), (setting,) = (blocks_of(name) for name in ("python", "config.py", "settings.py"))
    assert len(form.splitlines()) < 60
    (folder / "hacan" / "alignment" / "cosine.py").write_text(form)
    insert_after(folder / "config.py", '    focal_type = "prob"\n', key)
    line = next(line for line in (ROOT / "hacan/settings.py").read_text().splitlines() if "    focal_type: str" in line)
    insert_after(folder / "hacan" / "settings.py", line + "\n", setting)
    return folder


@pytest.mark.slow
def test_the_document_runs_as_written(checkout):
    environ = environment(PYTHONPATH=str(checkout))
    printed = {}
    for command in blocks_of("bash")[0].splitlines():
        assert command.startswith("python ")
        line = command.replace("python", shlex.quote(sys.executable), 1)
        if "run.py" in command:
            line += "".join(" " + shlex.quote(f"{key}={value}") for key, value in TINY_DEMO.items())
        done = subprocess.run(
            ["bash", "-c", line], cwd=checkout, env=environ, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        printed[command] = done.stdout
    receipts = [
        json.loads((checkout / f"result/{name}/metrics.json").read_text())["receipt"]
        for name in ("cosine/1", "steeper/1", "cosine/2")
    ]
    assert [receipt["alignment"] for receipt in receipts] == ["cosine"] * 3
    assert [receipt["members"][0]["initial_scale"] for receipt in receipts] == [10.0, 30.0, 10.0]
    comparison = next(text for command, text in printed.items() if "compare_results" in command)
    assert "initial_scale=10.0" in comparison and "initial_scale=30.0" in comparison
    trained, again = (
        json.loads((checkout / f"result/cosine/{run}/metrics.json").read_text())["hierarchical"] for run in (1, 2)
    )
    assert trained == again
    assert "`cosine`: initial_scale `10.0`" in (checkout / "result/exported/README.md").read_text()
    assert (checkout / "result/heatmaps.png").is_file() and (checkout / "result/found.html").is_file()


@pytest.mark.slow
def test_settings_stored_before_the_key_existed_are_read(checkout):
    program = """
from config import ex
from hacan.models.factory import model_settings
from hacan.settings import Settings

stored = Settings.from_flat({**ex._create_run("print_config").config, "data_root": "unused"}).to_flat()
assert stored.pop("initial_scale") == 10.0
assert model_settings(stored).initial_scale == 10.0
"""
    environ = environment(PYTHONPATH=str(checkout))
    done = subprocess.run([sys.executable, "-c", program], cwd=checkout, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
