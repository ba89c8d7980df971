import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from datamodules.inspection import LOOKED_FOR, OFFICIAL, inspect_data_set, present_data_sets
from datamodules.readers import NAMES
from datamodules.scene_drawing import write_scenes

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_data.py"


@pytest.fixture(scope="module")
def check_data():
    spec = importlib.util.spec_from_file_location("check_data", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.main


@pytest.fixture
def root(tmp_path):
    """A complete f8k of 3, 2 and 1 images, with one empty caption and one image without any."""
    folder = tmp_path / "f8k" / "images"
    folder.mkdir(parents=True)
    images = []
    for number, split in enumerate(["train", "train", "train", "val", "val", "test"]):
        name = f"{number}.png"
        cv2.imwrite(str(folder / name), np.full((6, 9, 3), number, np.uint8))
        sentences = [{"raw": f"caption {i}"} for i in range(number + 1)]
        images.append({"filename": name, "split": split, "imgid": number, "sentences": sentences})
    images[1]["sentences"][0]["raw"] = " "
    images[2]["sentences"] = []
    write(tmp_path, images)
    return tmp_path


def write(root, images):
    (root / "f8k" / "dataset_flickr8k.json").write_text(json.dumps({"images": images}))


def images_of(root):
    return json.loads((root / "f8k" / "dataset_flickr8k.json").read_text())["images"]


def row(text, split):
    (line,) = [line for line in text.splitlines() if line.split()[:1] == [split]]
    return line.split()[1:5]


def test_a_complete_root(root, check_data, capsys):
    assert check_data([str(root)]) == 0
    out = capsys.readouterr().out
    assert "f8k: complete" in out
    assert row(out, "train") == ["3", "3", "0", "-"]
    assert "1 caption(s) beyond the first 5 of an image" in out and "captions_per_image=0" in out
    assert row(out, "val") == ["2", "9", "0", "-"] and row(out, "test") == ["1", "5", "0", "-"]
    assert "1 images without a caption" in out and "1 empty captions" in out
    assert "published split has 6000" in out


def test_missing_images_are_listed_split_by_split(root, check_data, capsys):
    for name in ("0.png", "4.png", "2.png"):
        (root / "f8k" / "images" / name).unlink()
    assert check_data([str(root), "--datasets", "f8k"]) == 1
    out = capsys.readouterr().out
    assert "f8k: INCOMPLETE" in out
    assert [row(out, split)[2] for split in ("train", "val", "test")] == ["2", "1", "0"]
    assert all(f"missing: {root / 'f8k' / 'images' / name}" in out for name in ("0.png", "2.png", "4.png"))


def test_only_the_first_names_unless_all_are_asked_for(root, check_data, capsys):
    write(root, images_of(root) + [{**images_of(root)[0], "filename": f"x{i}", "imgid": 10 + i} for i in range(13)])
    assert check_data([str(root)]) == 1
    out = capsys.readouterr().out
    assert out.count("missing: ") == 10 and "... and 3 more" in out
    assert check_data([str(root), "--all"]) == 1
    assert capsys.readouterr().out.count("missing: ") == 13


def test_decoding_finds_files_that_are_not_images(root, check_data, capsys):
    (root / "f8k" / "images" / "3.png").write_bytes(b"<html>")
    (root / "f8k" / "images" / "5.png").unlink()
    assert check_data([str(root)]) == 1
    assert "3.png" not in capsys.readouterr().out
    assert check_data([str(root), "--decode"]) == 1
    captured = capsys.readouterr()
    assert [row(captured.out, split)[3] for split in ("train", "val", "test")] == ["0", "1", "0"]
    assert "3.png cannot be decoded" in captured.out
    assert "5/5" in captured.err  # the progress bar
    write(root, images_of(root)[:3])
    for image in (root / "f8k" / "images").iterdir():
        image.unlink()
    assert check_data([str(root), "--decode"]) == 1  # nothing left to decode


def test_empty_splits_are_incomplete(root, check_data, capsys):
    write(root, images_of(root)[:3])
    assert check_data([str(root)]) == 1
    out = capsys.readouterr().out
    assert out.count("EMPTY: no images") == 2
    images = images_of(root)
    others = [
        {**images[0], "filename": f"{i}.png", "split": split, "imgid": i} for i, split in ((3, "val"), (5, "test"))
    ]
    write(root, [*images, *others, {**images[0], "imgid": 7}, {**images[0], "imgid": 8}])
    assert check_data([str(root)]) == 0
    assert "2 image(s) are listed more than once" in capsys.readouterr().out
    write(root, [*images, {**images[0], "split": "test", "imgid": 8}])
    assert check_data([str(root)]) == 1
    assert "an image belongs to one split" in capsys.readouterr().out


def test_check_data_reports_unreadable_data_sets_and_checks_the_others(root, check_data, capsys):
    (root / "coco").mkdir()
    (root / "captions.jsonl").write_text('{"image": 3}')
    assert check_data([str(root)]) == 1
    out = capsys.readouterr().out
    assert "f8k: complete" in out and "dataset_coco.json" in out and "captions.jsonl, line 1" in out


def test_coco_and_own_captions(root, check_data, capsys):
    folder = root / "coco" / "images" / "val2014"
    folder.mkdir(parents=True)
    images = []
    for number, split in enumerate(["train", "restval", "restval", "val", "test"]):
        (folder / f"{number}.jpg").write_bytes(b"-")
        sentences = [{"raw": "x"}]
        images.append({"filename": f"{number}.jpg", "filepath": "val2014", "split": split, "sentences": sentences})
    (root / "coco" / "dataset_coco.json").write_text(json.dumps({"images": images}))
    rows = "".join(f"f8k/images/{i}.png,x,{split}\n" for i, split in enumerate(["train", "val", "test"]))
    (root / "captions.csv").write_text("image,caption,split\n" + rows)
    assert check_data([str(root)]) == 0
    tables = capsys.readouterr().out.split("coco: ")[1].split("captions: ")
    assert row(tables[0], "train")[:1] == ["3"] and row(tables[1], "train")[:1] == ["1"]
    assert check_data([str(root), "--datasets", "coco", "--no-restval"]) == 0
    assert row(capsys.readouterr().out, "train")[:1] == ["1"]


def test_the_demo_is_looked_at_and_never_drawn(tmp_path, check_data, capsys):
    (tmp_path / "scenes").mkdir()
    assert check_data([str(tmp_path)]) == 1
    assert not list((tmp_path / "scenes").iterdir())
    write_scenes(tmp_path / "scenes", counts={"train": 4, "val": 2, "test": 3}, scene_size=32, progress=False)
    capsys.readouterr()
    assert check_data([str(tmp_path), "--decode"]) == 0
    out = capsys.readouterr().out
    assert [row(out, split)[:2] for split in ("train", "val", "test")] == [["4", "20"], ["2", "10"], ["3", "15"]]


def test_nothing_found_says_what_was_looked_for(tmp_path, check_data, capsys):
    assert check_data([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    for places in LOOKED_FOR.values():
        assert all(str(tmp_path / place) in out for place in places)
    assert check_data([str(tmp_path / "nowhere")]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert check_data([str(SCRIPT)]) == 1
    assert "is not a folder" in capsys.readouterr().err


def test_every_data_set_is_looked_for(root):
    assert set(LOOKED_FOR) == set(NAMES) and set(OFFICIAL) < set(NAMES)
    assert present_data_sets(root) == ["f8k"]
    for name in NAMES:
        assert inspect_data_set(name, root, progress=False).complete == (name == "f8k")


def test_as_a_command(root):
    command = [sys.executable, str(SCRIPT), str(root), "--datasets", "f8k"]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert found.returncode == 0 and "f8k: complete" in found.stdout and not found.stderr
