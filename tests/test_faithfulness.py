"""The tables of docs/faithfulness.md: each row names a key that a named config sets, or a place in the code."""

import re

import pytest
from tiny_run import ROOT

from config import ex

DOCUMENT = (ROOT / "docs" / "faithfulness.md").read_text()
CONFIGS = ("release_config", "revised_config")


def flat(*named):
    return dict(ex._create_run("print_config", named_configs=list(named)).config.items())


def rows_of(heading):
    section = DOCUMENT.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def settings_of(cell):
    """Pairs (named config, key, value) of a cell such as "`release_config` `val_metric=release`, ..."."""
    found, named = [], None
    for token in re.findall(r"`([^`]+)`", cell):
        if token in CONFIGS:
            named = token
        else:
            found.append((named, *token.split("=")))
    return found


REMOVED = rows_of("Differences that a named config removes")
REMAINING = rows_of("Differences that remain")


@pytest.mark.parametrize("row", REMOVED, ids=lambda row: row[0])
def test_the_named_config_sets_the_key(row):
    settings = settings_of(row[-1])
    assert settings
    for named, key, value in settings:
        assert str(flat(named)[key]) == value, (named, key)
    assert any(str(flat()[key]) != value for _, key, value in settings), "not a difference to the default"


@pytest.mark.parametrize("named", CONFIGS)
def test_the_table_has_all_keys_of_the_named_config(named):
    default = flat()
    changed = {key for key, value in flat(named).items() if value != default[key]}
    listed = {key for row in REMOVED for config, key, _ in settings_of(row[-1]) if config == named}
    assert changed <= listed


@pytest.mark.parametrize("row", REMAINING, ids=lambda row: row[0])
def test_the_place_of_a_remaining_difference_exists(row):
    path, name = re.fullmatch(r"`([^:]+): (.+)`", row[-1]).groups()
    assert re.search(rf"\b{re.escape(name)}\b", (ROOT / path).read_text())
