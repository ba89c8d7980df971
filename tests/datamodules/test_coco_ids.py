import json
from pathlib import Path

import numpy as np
import pytest
from bad_json import ANY_JSON, LEAVES, damaged, error_of, nested, records_or_user_error
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.coco_ids import parse_annotations, read_coco_ids
from datamodules.readers import read_records
from datamodules.records import CaptionedImage

YEARS = {
    "train2014": {
        "images": [{"id": 10, "file_name": "COCO_train2014_10.jpg"}, {"id": 11, "file_name": "COCO_train2014_11.jpg"}],
        "annotations": [
            {"id": 100, "image_id": 10, "caption": "first"},
            {"id": 101, "image_id": 11, "caption": "second"},
            {"id": 102, "image_id": 10, "caption": "third\n"},
        ],
    },
    "val2014": {
        "images": [{"id": 20 + i, "file_name": f"COCO_val2014_{20 + i}.jpg"} for i in range(3)],
        "annotations": [{"id": 200 + i, "image_id": 20 + i % 3, "caption": f"v{i}"} for i in range(7)],
    },
}
IDS = {"train": [102, 100, 101], "dev": [200, 203], "test": [201], "restval": [202, 205]}


@pytest.fixture
def root(tmp_path):
    annotations = tmp_path / "coco" / "annotations"
    annotations.mkdir(parents=True)
    for year, content in YEARS.items():
        (annotations / f"captions_{year}.json").write_text(json.dumps(content))
        folder = tmp_path / "coco" / "images" / year
        folder.mkdir(parents=True)
        for image in content["images"]:
            (folder / image["file_name"]).write_bytes(b"-")
    for name, ids in IDS.items():
        np.save(annotations / f"coco_{name}_ids.npy", np.array(ids))
    return tmp_path


def test_captions_are_those_listed_in_the_order_of_the_list(root):
    images = root / "coco" / "images"
    assert read_records("coco", root) == [
        CaptionedImage(images / "train2014" / "COCO_train2014_10.jpg", ("third\n", "first"), 10, "train"),
        CaptionedImage(images / "train2014" / "COCO_train2014_11.jpg", ("second",), 11, "train"),
        CaptionedImage(images / "val2014" / "COCO_val2014_22.jpg", ("v2", "v5"), 22, "train"),
        CaptionedImage(images / "val2014" / "COCO_val2014_20.jpg", ("v0", "v3"), 20, "val"),
        CaptionedImage(images / "val2014" / "COCO_val2014_21.jpg", ("v1",), 21, "test"),
    ]
    assert [record.image_id for record in read_records("coco", root, use_restval=False)] == [10, 11, 20, 21]


def test_annotations_may_lie_directly_under_data_root(root):
    (root / "coco" / "annotations").rename(root / "annotations")
    assert len(read_records("coco", root)) == 5


def test_a_karpathy_file_needs_no_id_files(root):
    image = {"filename": "COCO_val2014_21.jpg", "filepath": "val2014", "split": "test", "sentences": [{"raw": "k"}]}
    (root / "coco" / "dataset_coco.json").write_text(json.dumps({"images": [image]}))
    for path in (root / "coco" / "annotations").glob("*.npy"):
        path.unlink()
    (record,) = read_records("coco", root)
    assert record.captions == ("k",)


def test_each_missing_thing_is_named(root):
    annotations = root / "coco" / "annotations"
    (root / "coco" / "images" / "val2014" / "COCO_val2014_20.jpg").unlink()
    (root / "coco" / "images" / "val2014" / "COCO_val2014_21.jpg").unlink()
    assert "COCO_val2014_20.jpg and 1 more" in error_of(read_records, "coco", root)
    (annotations / "coco_dev_ids.npy").unlink()
    assert str(annotations / "coco_dev_ids.npy") in error_of(read_records, "coco", root)
    (annotations / "captions_val2014.json").unlink()
    assert str(annotations / "captions_val2014.json") in error_of(read_records, "coco", root)
    for path in annotations.iterdir():
        path.unlink()
    annotations.rmdir()
    assert str(root / "coco" / "dataset_coco.json") in error_of(read_records, "coco", root)
    assert str(annotations) in error_of(read_coco_ids, root, use_restval=True)


@pytest.mark.parametrize(
    ("ids", "part"),
    [
        (np.array([[200]]), "one-dimensional array of integers"),
        (np.array([200.0]), "float64"),
        (np.array([], np.int64), "non-empty"),
        (np.array(7), "one-dimensional"),
        (np.array([999]), "annotation 999"),
        (np.array([100]), "image 10 is in train as well"),
        (np.array([{"a": 1}], dtype=object), "not an array of ids"),
    ],
)
def test_bad_id_files(root, ids, part):
    np.save(root / "coco" / "annotations" / "coco_dev_ids.npy", ids, allow_pickle=True)
    message = error_of(read_records, "coco", root)
    assert "coco_dev_ids.npy" in message and part in message


@pytest.mark.parametrize(
    "content", [b"", b"junk", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x01\x00\x04\x00{a b", b"PK\x03\x04"]
)
def test_files_that_are_no_arrays(root, content):
    (root / "coco" / "annotations" / "coco_dev_ids.npy").write_bytes(content)
    assert "coco_dev_ids.npy" in error_of(read_records, "coco", root)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"annotations": 5}, "'annotations' is 5"),
        ({"annotations": [{"id": 1, "image_id": 77, "caption": ""}]}, "no such image"),
        ({"annotations": [{"id": 1, "image_id": 10, "caption": None}]}, "'caption' is nothing"),
        ({"annotations": [{"id": 1.5, "image_id": 10, "caption": ""}]}, "'id' is 1.5"),
        ({"images": [{"id": "10", "file_name": "a"}]}, "'id' is '10'"),
        ({"images": [{"id": 10}]}, "lacks the key 'file_name'"),
        ({"images": [{"id": 2**64, "file_name": "a"}]}, "64 bits"),
    ],
)
def test_wrong_types_say_where(tmp_path, change, part):
    message = error_of(parse_annotations, {**YEARS["train2014"], **change}, tmp_path, where="x.json")
    assert "x.json" in message and part in message


@settings(max_examples=100, deadline=None)
@given(content=ANY_JSON | damaged(YEARS["train2014"]) | st.builds(nested, st.integers(1, 12), LEAVES))
def test_any_json_gives_annotations_or_one_line(content):
    def read():
        found = parse_annotations(content, YEARS_FOLDER, where="x.json")
        return [CaptionedImage(one.path, (one.caption,), number, "val") for number, one in found.items()] or [WHATEVER]

    records_or_user_error(read)


YEARS_FOLDER = Path("/pictures")
WHATEVER = CaptionedImage(YEARS_FOLDER, (), 0, "val")  # no annotations at all are no error here


def test_without_the_restval_ids_the_error_names_the_setting(root):
    (root / "coco" / "annotations" / "coco_restval_ids.npy").unlink()
    assert "use_restval=False" in error_of(read_records, "coco", root)
    assert len(read_records("coco", root, use_restval=False)) == 4
    (root / "coco" / "annotations" / "coco_test_ids.npy").unlink()
    assert "use_restval" not in error_of(read_records, "coco", root, use_restval=False)


def test_the_first_five_captions_of_the_list_are_used(root):
    annotations = root / "coco" / "annotations"
    content = json.loads((annotations / "captions_val2014.json").read_text())
    content["annotations"] += [{"id": 300 + i, "image_id": 21, "caption": f"w{i}"} for i in range(6)]
    (annotations / "captions_val2014.json").write_text(json.dumps(content))
    np.save(annotations / "coco_test_ids.npy", np.array([305, 201, 300, 301, 302, 303, 304]))
    (record,) = [record for record in read_records("coco", root) if record.split == "test"]
    assert record.captions == ("w5", "v1", "w0", "w1", "w2")
    (record,) = [record for record in read_records("coco", root, captions_per_image=0) if record.split == "test"]
    assert len(record.captions) == 7
