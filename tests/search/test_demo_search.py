"""How `make demo` ends: an index of its test images, one question, a contact sheet that is named."""

import json
import os
import pathlib
import re
import runpy

import cv2
import numpy as np
import pytest

from hacan.checkpoints.checkpoint import atomic_save, describe_model
from hacan.search import Index

ROOT = pathlib.Path(__file__).parents[2]
SPLITS = ["train", "test", "val", "test", "test", "train", "test"]


@pytest.fixture
def demo(make_model, make_settings, tokenizer, tmp_path):
    """The folders that a demo leaves: 7 images, 4 of them for testing, and two runs, the newer one not the last."""
    images = []
    for number, split in enumerate(SPLITS):
        path = tmp_path / "data" / "scenes" / "images" / f"scene_{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        cv2.imwrite(str(path), cv2.resize(pixels, (50, 40)))
        sentences = [{"raw": f"a red dog by cat {number}"}, {"raw": "a cat"}]
        images.append({"filepath": "images", "filename": path.name, "split": split, "sentences": sentences})
    (tmp_path / "data" / "scenes" / "dataset_scenes.json").write_text(json.dumps({"images": images}))
    for run, age in (("9", 1000), ("10", 2000), ("2", 0)):
        model = make_model()
        checkpoint = tmp_path / "runs" / run / "checkpoints" / "best.ckpt"
        checkpoint.parent.mkdir(parents=True)
        description = describe_model(model, make_settings(datasets="scenes"), tokenizer)
        atomic_save({"state_dict": model.state_dict(), "hacan": description}, checkpoint)
        os.utime(checkpoint, (2e9 - age, 2e9 - age))
    return tmp_path


def test_the_end_of_the_demo(demo, capsys):
    main = runpy.run_path(str(ROOT / "scripts" / "demo_search.py"))["main"]
    arguments = ["--runs", str(demo / "runs"), "--data", str(demo / "data")]
    for _ in range(2):  # the demo may be run again
        assert main(arguments) == 0
        printed = capsys.readouterr().out
        assert '"a red dog by cat 1" among 4 images:' in printed  # a caption of the first test image
        found = {int(number) for number in re.findall(r"scene_(\d)\.png", printed)}
        assert found == {number for number, split in enumerate(SPLITS) if split == "test"}
        (sheet,) = re.findall(r"^Results with word heatmaps: (/.*\.html)$", printed, re.MULTILINE)
        assert pathlib.Path(sheet).is_relative_to(demo / "runs" / "2")  # the newest checkpoint
        page = pathlib.Path(sheet).read_text()
        assert "a red dog by cat 1" in page and page.count("<li") == 4 and "LRG mid" in page
        (place,) = re.findall(r"serve\.py (\S+)$", printed, re.MULTILINE)
    with Index.open(place) as index:  # the commands that it proposes find an index
        assert index.count() == 4 and index.search("a cat", top=2)


def test_a_demo_that_was_not_trained_is_named(demo, tmp_path, capsys):
    main = runpy.run_path(str(ROOT / "scripts" / "demo_search.py"))["main"]
    assert main(["--runs", str(tmp_path / "nowhere"), "--data", str(demo / "data")]) == 2
    assert main(["--runs", str(demo / "runs"), "--data", str(tmp_path / "nowhere")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all("train the demo first" in line for line in errors)


def test_make_demo_ends_with_it():
    recipe = re.search(r"^demo:.*\n((?:\t.*\n?)+)", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1)
    assert recipe.rstrip().endswith("scripts/demo_search.py")
