"""README and docs: the commands are valid, the files, names and links exist."""

import importlib
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from sacred.arg_parser import get_config_updates

from config import ex
from hacan.settings import Settings

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
# docs/changing-the-method.md has a test of its own, which runs it.
PAGES = [page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name != "changing-the-method.md"]
DOCUMENTS = README + "".join(page.read_text() for page in PAGES)
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", DOCUMENTS, re.DOTALL)
    for line in block.splitlines()
    if line.split("#")[0].strip()
]


def test_the_readme_has_commands_of_each_kind():
    assert any(command.startswith("make ") for command in COMMANDS)
    assert sum(command.startswith("python run.py with") for command in COMMANDS) >= 5


@pytest.mark.parametrize("command", [c for c in COMMANDS if "run.py with" in c])
def test_each_run_is_a_valid_config(command):
    words = shlex.split(command)
    updates, named = get_config_updates(words[words.index("run.py") + 2 :])
    run = ex._create_run("print_config", config_updates=updates, named_configs=named)
    Settings.from_flat(dict(run.config.items()))


def number_of(command, option):
    found = re.search(rf"--{option}=(\d+)", command)
    return int(found[1]) if found else 1


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith(("torchrun ", "srun "))])
def test_launchers_start_as_many_processes_as_the_settings_say(command):
    words = dict(word.split("=") for word in shlex.split(command) if re.match(r"num_(gpus|nodes)=", word))
    assert int(words["num_gpus"]) == number_of(command, "nproc_per_node") * number_of(command, "ntasks-per-node")
    assert int(words.get("num_nodes", 1)) == number_of(command, "nnodes") * number_of(command, "nodes")


def test_both_launchers_are_described():
    assert {command.split()[0] for command in COMMANDS} >= {"torchrun", "srun"}


def test_the_options_of_torchrun_are_its_own():
    from torch.distributed.run import get_args_parser

    for command in (c for c in COMMANDS if c.startswith("torchrun ")):
        options = get_args_parser().parse_args(shlex.split(command)[1:])
        assert options.training_script == "run.py"


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_each_make_target_exists(command):
    assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python scripts/")])
def test_each_script_knows_the_options_it_is_given(command):
    words = shlex.split(command)
    result = subprocess.run([sys.executable, words[1], "--help"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    for option in words[2:]:
        if option.startswith("--"):
            assert option in result.stdout


def test_sacreds_own_commands_work():
    result = subprocess.run(
        [sys.executable, "run.py", "print_config", "with", "coco_config"], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    assert "datasets = 'coco'" in result.stdout
    assert "python run.py print_config with coco_config" in README


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:hacan|datamodules|docs|tests|scripts)/[\w/.]+\.\w+)`", DOCUMENTS)))
)
def test_each_file_that_is_named_exists(path):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize(
    "row", re.findall(r"^\| .*? \| `(hacan/[\w/]+\.py|datamodules/\w+\.py)` \| (`.*`) \|$", README, re.M)
)
def test_each_name_in_the_table_of_the_method_is_where_it_says(row):
    path, names = row
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    for name in re.findall(r"`(\w+)`", names):
        assert hasattr(module, name), f"{path} has no {name}"


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda page: page.name
)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).is_file(), target
