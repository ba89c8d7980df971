"""scripts/explain.py from a image and a caption to a PNG."""

import pathlib
import runpy

import cv2
import numpy as np
import pytest

from hacan.checkpoints.checkpoint import atomic_save, describe_model

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "explain.py"
main = runpy.run_path(str(SCRIPT))["main"]


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "a dog.jpg"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    return path


@pytest.fixture
def checkpoint(make_model, make_settings, tokenizer, tmp_path):
    model = make_model()
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    path = tmp_path / "best.ckpt"
    atomic_save({"state_dict": state, "hacan": describe_model(model, make_settings(), tokenizer)}, path)
    return path


def test_it_writes_a_png_and_names_the_score(picture, checkpoint, tmp_path, capsys, monkeypatch):
    out = tmp_path / "new folder" / "out.png"
    assert main([str(picture), "a dog runs", "--checkpoint", str(checkpoint), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("fine similarity ")
    assert f"wrote {out}" in printed
    total, *parts = (
        float(word) for word in printed.split("\n")[0].split() if word.lstrip("-").replace(".", "").isdigit()
    )
    assert total == pytest.approx(sum(parts), abs=3e-4)
    assert len(parts) == 3
    drawn = cv2.imread(str(out))
    assert min(drawn.shape[:2]) > 300
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 1000  # colours of maps, not a blank sheet
    monkeypatch.chdir(tmp_path)
    assert main([str(picture), "a dog runs", "--checkpoint", str(checkpoint)]) == 0
    assert (tmp_path / "a dog.heatmaps.png").is_file()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"image": "missing.jpg"}, "image missing.jpg cannot be read"),
        ({"caption": " "}, "the caption is empty: give a sentence"),
        ({"--checkpoint": "missing.ckpt"}, "missing.ckpt"),
        ({"--alpha": "2"}, "--alpha 2: expected a number from 0 to 1"),
        ({"--out": "out.doc"}, "out.doc has no known image suffix: use .png"),
    ],
)
def test_mistakes_are_one_line(picture, checkpoint, changes, expected, capsys):
    given = {"image": str(picture), "caption": "a dog", "--checkpoint": str(checkpoint)} | changes
    options = [part for name, value in given.items() if name.startswith("--") for part in (name, value)]
    assert main([given["image"], given["caption"], *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert expected in error
    assert error.count("\n") == 1
