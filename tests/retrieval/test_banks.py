"""Which encoded features stay on disk: the newest ones that fit, and always those of the present evaluation."""

import os
import time

import pytest

from hacan.retrieval.banks import GRACE, mark_used, prune_banks
from hacan.retrieval.store import MIB

NOW = time.time()


@pytest.fixture
def folder(tmp_path):
    """Banks of 3, 2 and 4 MiB that were last used two days, one day and half a day ago, and a file beside them."""
    for name, size, days in (("oldest", 3, 2.0), ("older", 2, 1.0), ("old", 4, 0.5)):
        mark_used(tmp_path / name)
        (tmp_path / name / "images").mkdir()
        (tmp_path / name / "images" / "high.npy").write_bytes(bytes(size * MIB))
        last_used(tmp_path / name, NOW - days * 86400)
    (tmp_path / "a file").write_text("no bank")
    return tmp_path


def last_used(bank, when):
    for file in bank.rglob("*"):
        os.utime(file, (when, when))


@pytest.mark.parametrize(
    ("budget", "left"),
    [
        (9, {"oldest", "older", "old"}),
        (8, {"older", "old"}),
        (6, {"older", "old"}),
        (5, {"old"}),
        (3, set()),
        (0, set()),
    ],
)
def test_what_was_not_used_for_longest_goes_first(folder, budget, left):
    gone = prune_banks(folder, budget=budget, began=NOW)
    assert {path.name for path in folder.iterdir()} == left | {"a file"}
    assert {path.name for path in gone} == {"oldest", "older", "old"} - left


def test_those_of_this_evaluation_stay_whatever_their_size(folder):
    began = NOW - 3 * GRACE  # they were taken up then, and only read since
    last_used(folder / "oldest", began)
    prune_banks(folder, budget=0, began=began)
    assert {path.name for path in folder.iterdir()} == {"oldest", "a file"}


def test_one_that_another_evaluation_may_be_filling_stays(folder):
    (folder / "older" / "images" / "journal-0.jsonl").touch()
    prune_banks(folder, budget=0, began=time.time() + 60)
    assert {path.name for path in folder.iterdir()} == {"older", "a file"}


def test_taking_a_bank_up_makes_it_the_newest(folder):
    mark_used(folder / "oldest")
    prune_banks(folder, budget=3, began=time.time())
    assert (folder / "oldest").is_dir() and not (folder / "old").exists()
    assert prune_banks(folder / "nowhere", budget=0, began=NOW) == []
