import ast
import pickle
from pathlib import Path

import pytest
from bad_json import error_of

import datamodules.records
from datamodules.readers import NAMES, read_records
from datamodules.records import CaptionedImage, of_split
from datamodules.transforms import PHOTOS, SCENES, cropping_of
from hacan.settings import DATASETS

RECORDS = [CaptionedImage(Path(f"{i}.jpg"), ("x",) * i, i, split) for i, split in enumerate(["val", "train", "val"])]


def test_records_of_a_split_keep_their_order():
    assert [record.image_id for record in of_split(RECORDS, "val")] == [0, 2]


def test_an_empty_split_says_which_ones_there_are():
    message = error_of(of_split, RECORDS, "test")
    assert "'test'" in message and "train (1), val (2)" in message
    assert "none at all" in error_of(of_split, [], "val")


def test_records_cannot_be_changed_and_travel_between_processes():
    with pytest.raises(AttributeError):
        RECORDS[0].split = "train"
    assert pickle.loads(pickle.dumps(RECORDS)) == RECORDS


def test_an_unknown_data_set_lists_the_choices(tmp_path):
    message = error_of(read_records, "flickr", tmp_path)
    assert "'flickr'" in message and all(name in message for name in NAMES)


def test_every_data_set_that_settings_accept_has_a_reader(tmp_path):
    assert set(NAMES) == set(DATASETS)
    for name in set(DATASETS) - {"scenes"}:  # which makes what it does not find
        assert str(tmp_path) in error_of(read_records, name, tmp_path)


def test_only_the_demo_is_framed_whole():
    assert {name: cropping_of(name) for name in NAMES} == {**dict.fromkeys(NAMES, PHOTOS), "scenes": SCENES}


def test_records_do_not_import_torch():
    tree = ast.parse(Path(datamodules.records.__file__).read_text())
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not any(name.split(".")[0] in ("torch", "numpy", "cv2") for name in names)
