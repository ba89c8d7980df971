import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from bad_json import ANY_JSON, LEAVES, damaged, error_of, nested, records_or_user_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datamodules.karpathy import COCO, FLICKR8K, FLICKR30K, parse_karpathy, read_karpathy
from datamodules.readers import read_records
from datamodules.records import CaptionedImage

IMAGES = [  # three images, with 2, 3 and 1 captions
    {"filename": "a.jpg", "split": "train", "imgid": 4, "sentences": [{"raw": "A dog ."}, {"raw": "Ein Hund"}]},
    {
        "filename": "b ü.jpg",
        "split": "val",
        "imgid": 7,
        "sentences": [{"raw": "x"}, {"raw": ""}, {"raw": "\U0001f600"}],
    },
    {"filename": "c.jpg", "split": "test", "imgid": 9, "sentences": [{"raw": "last"}]},
]


FOLDER = Path("/pictures")


def write_picture(path, height=6, width=9):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imencode(".png", np.full((height, width, 3), 90, np.uint8))[1].tofile(path)


def make_flickr(root, folder="f8k", pictures="images", name="dataset_flickr8k.json", images=IMAGES):
    for image in images:
        write_picture(root / folder / pictures / image["filename"])
    (root / folder / name).write_text(json.dumps({"dataset": "x", "images": images}), encoding="utf-8")
    return root / folder


@pytest.mark.parametrize("folder", ["f30k", "flickr30k"])
@pytest.mark.parametrize("pictures", ["images", "flickr30k-images"])
def test_flickr30k_in_each_layout(tmp_path, folder, pictures):
    make_flickr(tmp_path, folder, pictures, "dataset_flickr30k.json")
    records = read_records("f30k", tmp_path)
    assert records == read_karpathy(tmp_path, FLICKR30K, use_restval=True)
    assert records[1] == CaptionedImage(
        tmp_path / folder / pictures / "b ü.jpg", ("x", "", "\U0001f600"), image_id=7, split="val"
    )
    assert [record.split for record in records] == ["train", "val", "test"]
    assert all(record.path.is_file() for record in records)


@pytest.mark.parametrize("folder", ["f8k", "flickr8k"])
def test_flickr8k_in_each_layout(tmp_path, folder):
    make_flickr(tmp_path, folder)
    assert [record.image_id for record in read_records("f8k", tmp_path)] == [4, 7, 9]


@pytest.mark.parametrize("inner", ["images", "."])
def test_coco_restval_joins_train_or_stays_out(tmp_path, inner):
    images = [
        {**image, "filepath": part, "split": split}
        for image, part, split in zip(
            IMAGES, ["train2014", "val2014", "val2014"], ["train", "restval", "test"], strict=True
        )
    ]
    for image in images:
        write_picture(tmp_path / "coco" / inner / image["filepath"] / image["filename"])
    (tmp_path / "coco" / "dataset_coco.json").write_text(json.dumps({"images": images}))
    assert [record.split for record in read_records("coco", tmp_path)] == ["train", "train", "test"]
    assert [record.image_id for record in read_records("coco", tmp_path, use_restval=False)] == [4, 9]
    assert read_records("coco", tmp_path)[1].path == tmp_path / "coco" / inner / "val2014" / "b ü.jpg"


def test_halves_of_emoji_are_joined_or_replaced():
    image = {"filename": "a.jpg", "split": "val", "sentences": [{"raw": "\ud83d\ude00 \ud83d"}]}
    (record,) = parse_karpathy({"images": [image]}, FOLDER, where="x.json", use_restval=True)
    assert record.captions == ("\U0001f600 �",)


def test_each_missing_thing_is_named(tmp_path):
    missing_root = tmp_path / "nowhere"
    assert str(missing_root) in error_of(read_records, "f8k", missing_root)
    (tmp_path / "file").write_text("")
    assert "is not a folder" in error_of(read_records, "f8k", tmp_path / "file")
    message = error_of(read_records, "f8k", tmp_path)
    assert str(tmp_path / "f8k") in message and str(tmp_path / "flickr8k") in message
    (tmp_path / "f8k").mkdir()
    assert str(tmp_path / "f8k" / "dataset_flickr8k.json") in error_of(read_records, "f8k", tmp_path)
    (tmp_path / "f8k" / "dataset_flickr8k.json").write_text('{"images": []}')
    assert str(tmp_path / "f8k" / "images") in error_of(read_records, "f8k", tmp_path)
    (tmp_path / "f8k" / "images").mkdir()
    assert "lists no images" in error_of(read_records, "f8k", tmp_path)
    assert "f8k" in error_of(read_records, "f8k", tmp_path / "f8k")  # one folder too deep: says which one to give


def test_missing_images_are_counted(tmp_path):
    folder = make_flickr(tmp_path)
    (folder / "images" / "b ü.jpg").unlink()
    message = error_of(read_records, "f8k", tmp_path)
    assert "b ü.jpg" in message and " more" not in message
    (folder / "images" / "c.jpg").unlink()
    (folder / "images" / "a.jpg").unlink()
    message = error_of(read_records, "f8k", tmp_path)
    assert "a.jpg and 2 more" in message
    assert len(read_records("f8k", tmp_path, check_files=False)) == 3


def test_a_folder_named_like_a_image_is_no_image(tmp_path):
    folder = make_flickr(tmp_path)
    (folder / "images" / "a.jpg").unlink()
    (folder / "images" / "a.jpg").mkdir()
    assert "a.jpg" in error_of(read_records, "f8k", tmp_path)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (b'{"images": [\n  1,, 2]}', "line 2, column 5"),
        (b"", "line 1, column 1"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"[" * 100_000, "cannot be read"),
        (b'{"images": ' + b"9" * 5000 + b"}", "cannot be read"),
    ],
)
def test_broken_json_says_where(tmp_path, text, part):
    folder = make_flickr(tmp_path)
    (folder / "dataset_flickr8k.json").write_bytes(text)
    message = error_of(read_records, "f8k", tmp_path)
    assert "dataset_flickr8k.json" in message and part in message


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "x.json is nothing (null): expected an object"),
        ([], "expected an object"),
        ({}, "lacks the key 'images'"),
        ({"images": {}}, "expected a list"),
        ({"images": [3]}, "images[0] is 3: expected an object"),
        ({"images": [{"filename": 3}]}, "'filename' is 3: expected a text"),
        ({"images": [{"filename": "a", "split": None}]}, "'split' is nothing"),
        (
            {"images": [{"filename": "a", "split": "exam", "sentences": []}]},
            "expected one of train, restval, val, test",
        ),
        ({"images": [{"filename": "a", "split": "val"}]}, "lacks the key 'sentences'"),
        ({"images": [{"filename": "a", "split": "val", "sentences": "ab"}]}, "expected a list"),
        ({"images": [{"filename": "a", "split": "val", "sentences": ["ab"]}]}, "sentences[0] is 'ab'"),
        ({"images": [{"filename": "a", "split": "val", "sentences": [{"raw": 1}]}]}, "'raw' is 1"),
        ({"images": [{"filename": "a", "split": "val", "sentences": [], "imgid": True}]}, "whole number"),
        ({"images": [{"filename": "a", "split": "val", "sentences": [], "imgid": 2**70}]}, "64 bits"),
        ({"images": [{"filename": "a\0", "split": "val", "sentences": []}]}, "name of an image file"),
        ({"images": [{"filename": "", "split": "val", "sentences": []}]}, "name of an image file"),
        ({"images": [{"filename": "a", "split": "val", "sentences": [], "filepath": 1}]}, "'filepath' is 1"),
        ({"images": [{**IMAGES[0]}, {**IMAGES[1], "imgid": 4}]}, "'imgid' 4 is that of 'a.jpg' too"),
    ],
)
def test_wrong_types_say_where(content, part):
    message = error_of(parse_karpathy, content, FOLDER, where="x.json", use_restval=True)
    assert "x.json" in message and part in message


@settings(max_examples=150, deadline=None)
@given(content=ANY_JSON | damaged({"images": IMAGES}) | st.builds(nested, st.integers(1, 12), LEAVES))
def test_any_json_gives_records_or_one_line(content):
    records_or_user_error(lambda: parse_karpathy(content, FOLDER, where="x.json", use_restval=True))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60) | ANY_JSON.map(lambda value: json.dumps(value).encode()))
def test_any_file_gives_records_or_one_line(tmp_path, content):
    folder = tmp_path / "f8k"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "dataset_flickr8k.json").write_bytes(content)
    records_or_user_error(lambda: read_karpathy(tmp_path, FLICKR8K, use_restval=True))


def test_coco_says_which_folders_it_looked_for(tmp_path):
    (tmp_path / "coco" / "images").mkdir(parents=True)
    (tmp_path / "coco" / "dataset_coco.json").write_text('{"images": []}')
    message = error_of(read_karpathy, tmp_path, COCO, use_restval=True)
    assert str(tmp_path / "coco" / "images" / "train2014") in message and str(tmp_path / "coco" / "val2014") in message


def test_the_first_five_captions_of_an_image_are_used(tmp_path):
    (tmp_path / "f8k" / "images").mkdir(parents=True)
    images = []
    for number, count in enumerate((3, 4, 5, 6)):
        (tmp_path / "f8k" / "images" / f"{number}.png").touch()
        sentences = [{"raw": f"{number} {i}"} for i in range(count)]
        images.append({"filename": f"{number}.png", "split": "train", "imgid": number, "sentences": sentences})
    (tmp_path / "f8k" / "dataset_flickr8k.json").write_text(json.dumps({"images": images}))
    for wanted, expected in ((None, [3, 4, 5, 5]), (0, [3, 4, 5, 6]), (2, [2, 2, 2, 2])):
        records = read_records("f8k", tmp_path, captions_per_image=wanted)
        assert [len(record.captions) for record in records] == expected
        assert all(record.captions[i] == f"{record.image_id} {i}" for record in records for i in range(2))


def test_an_image_in_two_splits_is_an_error_and_dev_is_val():
    def parse(*images):
        listed = [
            {"filename": name, "split": split, "imgid": number, "sentences": [{"raw": "x"}]}
            for number, (name, split) in enumerate(images)
        ]
        return parse_karpathy({"images": listed}, Path("images"), where="x.json", use_restval=True)

    names = [record.split for record in parse(("a", "dev"), ("b", "valid"), ("c", "validation"), ("d", "val"))]
    assert names == ["val"] * 4
    assert len(parse(("a", "train"), ("a", "restval"))) == 2  # both are train
    for other in ("a", "./a", "b/../a"):
        text = error_of(parse, ("a", "train"), (other, "test"))
        assert "x.json, images[1]" in text and ("belongs to one split" in text or "within images" in text)


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/secret.jpg", "a/../../secret.jpg"])
def test_a_path_out_of_the_folder_is_refused(name):
    content = {"images": [{"filename": name, "split": "train", "sentences": []}]}
    assert "expected a path within images" in error_of(
        parse_karpathy, content, Path("images"), where="x.json", use_restval=True
    )
