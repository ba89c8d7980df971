"""Structure of the code base: import levels, line budgets, file names."""

import ast
import pathlib
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parent.parent
# From the bottom up; a module may import from its own level and the levels before it.
LEVELS = [
    [
        "hacan.errors",
        "hacan.public_config",
        "hacan.sacred_setup",
        "hacan.lock",
        "hacan.csv_file",
        "hacan.types",
        "hacan.settings",
    ],
    ["hacan.images"],
    ["hacan.alignment", "hacan.losses"],
    ["hacan.models"],
    ["hacan.training", "hacan.checkpoints", "hacan.retrieval"],
    ["hacan.report"],
    ["hacan.search"],
    ["hacan.pipeline"],
]
MODULES = sorted((ROOT / "hacan").rglob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def level(name):
    for index, places in enumerate(LEVELS):
        if any(name == place or name.startswith(place + ".") for place in places):
            return index
    return None


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    name = module_name(path)
    if name == "hacan":  # the front door: load_pretrained, looked up on demand
        return
    here = level(name)
    assert here is not None, f"{name} is on no level; add it to LEVELS"
    for imported in imports(path):
        top = imported.split(".")[0]
        assert top not in ("datamodules", "config", "run", "scripts"), f"{name} imports {imported}"
        if top == "hacan" and level(imported) is not None:
            assert level(imported) <= here, f"{name} imports {imported}, which is on a higher level"


@pytest.mark.parametrize("path", sorted((ROOT / "datamodules").glob("*.py")), ids=lambda path: path.name)
def test_data_modules_import_only_types_errors_and_images(path):
    for imported in imports(path):
        if imported.split(".")[0] == "hacan":
            allowed = ("hacan", "hacan.types", "hacan.errors", "hacan.csv_file", "hacan.images")
            assert imported in allowed or imported.startswith(tuple(f"{name}." for name in allowed[1:]))


def test_settings_and_errors_use_the_standard_library_only():
    for path in (ROOT / "hacan" / "settings.py", ROOT / "hacan" / "errors.py"):
        outside = {name.split(".")[0] for name in imports(path)} - {"hacan"}
        assert not outside & {"torch", "numpy", "sacred", "transformers", "timm"}, path


def test_no_hard_coded_device_or_home_folder():
    for path in [*MODULES, *(ROOT / "datamodules").glob("*.py")]:
        text = path.read_text()
        assert ".cuda()" not in text, path
        assert "/root/" not in text and "/home/" not in text, path


def test_run_is_short():
    assert len((ROOT / "run.py").read_text().splitlines()) < 100


def test_the_alignment_stays_small_and_scoring_knows_no_form():
    folder = ROOT / "hacan" / "alignment"
    assert sum(len(path.read_text().splitlines()) for path in folder.iterdir() if path.is_file()) <= 580
    imported = set(imports(folder / "scoring.py"))
    assert not {"hacan.alignment.hybrid", "hacan.alignment.revised"} & imported
    assert {path.suffix for path in folder.iterdir() if path.is_file()} == {".py"}


# Lines of code, without blank lines, comments and docstrings. The targets of the style guide are 520 for checkpoints,
# 520 for training, 620 for models and 1,400 for retrieval.
BUDGETS = {
    "hacan": 7000,
    "hacan/models": 695,
    "hacan/alignment": 500,
    "hacan/training": 530,
    "hacan/checkpoints": 680,
    "hacan/images": 140,
    "hacan/retrieval": 1575,
    "hacan/report": 700,
    "hacan/search": 940,
    "datamodules": 1700,
}
# File names that were replaced by the terms of the field.
OLD_NAMES = (
    "call plan sides banks members receipt extended shelf following rows words sheet cards opening foreign pictures"
)


def lines_of_code(path):
    text, documentation = path.read_text(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            documentation |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(text.splitlines(), start=1)
    return sum(bool(line.strip()) and line.strip()[0] != "#" and n not in documentation for n, line in lines)


@pytest.mark.parametrize("folder", BUDGETS)
def test_line_budgets(folder):
    assert sum(map(lines_of_code, (ROOT / folder).rglob("*.py"))) <= BUDGETS[folder]


def test_the_package_has_at_most_ten_entries_besides_folders():
    entries = [path for path in (ROOT / "hacan").iterdir() if path.is_file()]
    assert len(entries) <= 10, sorted(path.name for path in entries)


def test_file_names():
    names = {path.stem for folder in ("hacan", "datamodules") for path in (ROOT / folder).rglob("*.py")}
    assert not names & {"utils", *OLD_NAMES.split()}


def test_tests_mirror_the_package():
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and list(path.glob("test_*.py"))}
    rooms = {path.name for path in (ROOT / "hacan").iterdir() if (path / "__init__.py").is_file()}
    assert folders == rooms | {"datamodules"}


def test_benchmarks_are_in_their_folder():
    assert not list((ROOT / "scripts").glob("*bench*.py"))
    assert len(list((ROOT / "scripts" / "benchmarks").glob("*.py"))) >= 5


def test_the_pinned_versions_are_within_the_ranges_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = [
        *project["dependencies"],
        *project["optional-dependencies"]["onnx"],
        *project["optional-dependencies"]["coco"],
    ]
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    pins = {canonicalize_name(pin.name): pin for pin in map(Requirement, filter(None, lines))}
    for wanted in map(Requirement, ranges):
        pin = pins.get(canonicalize_name(wanted.name))
        assert pin is not None, f"{wanted.name} of pyproject.toml has no pin in requirements.txt"
        (version,) = pin.specifier
        assert version.operator == "==" and wanted.specifier.contains(version.version), (str(wanted), str(pin))
