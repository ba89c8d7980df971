import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from datamodules.readers import read_records
from datamodules.records import of_split
from datamodules.scene_drawing import draw_scene, read_scenes, write_scenes
from datamodules.scenes import (
    COLOURS,
    SHAPES,
    Claim,
    Scene,
    SceneIndex,
    Thing,
    caption_scene,
    full_claim,
    sample_scenes,
    scenes_vocabulary,
)
from datamodules.tokens import load_tokenizer
from hacan.errors import UserError

COUNTS = {"train": 24, "val": 7, "test": 8}
RED, BLUE, STAR = Thing("circle", "red", "small"), Thing("square", "blue", "large"), Thing("star", "green", "small")
ROW = Scene((RED, BLUE, STAR), "row", "white")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, counts=COUNTS, scene_size=48, progress=False)
    return folder


def read(folder, **changes):
    return read_scenes(folder, **{"counts": COUNTS, "scene_size": 48, "progress": False, **changes})


@pytest.mark.parametrize(
    ("claim", "truth"),
    [
        (full_claim(ROW), True),
        (Claim((RED.kind, STAR.kind), (None, None), "row", None), True),  # fewer things than there are
        (Claim((STAR.kind, RED.kind), (None, None), "row", None), False),  # the other way round
        (Claim((RED.kind, BLUE.kind), (None, None), "column", None), False),
        (Claim((RED.kind, BLUE.kind), ("large", None), "row", None), False),
        (Claim((RED.kind, BLUE.kind), (None, "large"), "row", "black"), False),
        (Claim((STAR.kind, BLUE.kind, RED.kind), (None,) * 3, None, "white"), True),  # between, in either order
        (Claim((RED.kind, STAR.kind, BLUE.kind), (None,) * 3, None, None), False),  # another one is in the middle
        (Claim((("red", "star"), BLUE.kind), (None, None), "row", None), False),
    ],
)
def test_what_describes_a_scene(claim, truth):
    assert claim.describes(ROW) is truth


def test_every_caption_describes_one_scene_of_its_split_only():
    counts = {"train": 120, "val": 30, "test": 200}
    for scenes in sample_scenes(counts, seed=3).values():
        index, rng = SceneIndex(scenes), np.random.default_rng(0)
        for scene in scenes:
            captions, claims = caption_scene(scene, index, rng)
            assert len(set(captions)) == 5
            for claim in claims:  # by brute force, not by the index that the captions were made with
                assert [other for other in scenes if claim.describes(other)] == [scene]


def test_no_scene_is_described_by_another_ones_description_in_any_split():
    scenes = [
        scene for split in sample_scenes({"train": 150, "val": 30, "test": 50}, seed=5).values() for scene in split
    ]
    assert len(scenes) == 230
    for scene in scenes:
        assert [other for other in scenes if full_claim(scene).describes(other)] == [scene]


def test_captions_say_what_their_claim_says():
    scenes = sample_scenes({"train": 60}, seed=1)["train"]
    for scene in scenes:
        for caption, claim in zip(*caption_scene(scene, SceneIndex(scenes), np.random.default_rng(2)), strict=True):
            words = caption.lower().rstrip(".").replace(",", "").split()
            assert all(" ".join(kind) in " ".join(words) for kind in claim.kinds)
            assert sum(word in SHAPES for word in words) == len(scene.things)
            assert (claim.background is None) == ("background" not in words and words[0] != "on")
            told = sum(word in ("small", "little", "large", "big") for word in words)
            assert told == sum(size is not None for size in claim.sizes)


def test_too_many_scenes_end_in_one_line(monkeypatch):
    monkeypatch.setattr("datamodules.scenes.COLOURS", ("red",))
    monkeypatch.setattr("datamodules.scenes.SHAPES", ("circle", "square"))
    monkeypatch.setattr("datamodules.scenes.np.random.default_rng", lambda seed: TwoThings(seed))
    with pytest.raises(UserError, match="not 60 different scenes"):
        sample_scenes({"train": 60}, seed=0)


class TwoThings(np.random.Generator):
    def __init__(self, seed):
        super().__init__(np.random.PCG64(seed))

    def random(self):
        return 0.0


@pytest.mark.parametrize("layout", ["row", "column"])
@pytest.mark.parametrize("size", [48, 112])
def test_things_are_drawn_at_their_positions(layout, size):
    things = (Thing("circle", "red", "small"), Thing("square", "green", "large"), Thing("triangle", "blue", "small"))
    picture = draw_scene(Scene(things, layout, "black"), size=size, rng=np.random.default_rng(4)).astype(int)
    centres, areas = [], []
    for channel in (2, 1, 0):  # red, green, blue
        others = np.delete(picture, channel, axis=2).max(axis=2)
        ys, xs = np.nonzero(picture[..., channel] > others + 60)
        centres.append((xs.mean(), ys.mean()))
        areas.append(len(xs))
        margin = 0.106 * size - 1
        assert min(xs.min(), ys.min()) >= margin and max(xs.max(), ys.max()) <= size - 1 - margin
    along = [centre[0 if layout == "row" else 1] for centre in centres]
    assert along[0] < along[1] < along[2]
    assert areas[1] > 1.5 * max(areas[0], areas[2])  # large against small


def test_every_shape_and_colour_can_be_drawn_and_looks_different():
    pictures = [
        draw_scene(Scene((Thing(shape, colour, "large"), RED), "row", "gray"), size=56, rng=np.random.default_rng(1))
        for shape in SHAPES
        for colour in COLOURS
    ]
    for i, one in enumerate(pictures):
        assert all(np.abs(one.astype(int) - other).max() > 40 for other in pictures[:i])
    with pytest.raises(ValueError, match="hexagon"):
        draw_scene(Scene((Thing("hexagon", "red", "large"), RED), "row", "gray"), size=56, rng=np.random.default_rng(1))


def test_records_on_disk(folder):
    records = read(folder)
    assert {split: len(of_split(records, split)) for split in COUNTS} == COUNTS
    assert all(len(record.captions) == 5 and cv2.imread(str(record.path)).shape == (48, 48, 3) for record in records)
    assert len({record.image_id for record in records}) == len(records)


def test_what_is_there_is_read_and_not_made_again(folder, monkeypatch):
    monkeypatch.setattr("datamodules.scene_drawing.write_scenes", lambda *_, **__: pytest.fail("made again"))
    assert len(read(folder)) == sum(COUNTS.values())


def test_the_same_seed_gives_the_same_files_and_another_one_others(folder, tmp_path):
    write_scenes(tmp_path / "again", counts=COUNTS, scene_size=48, progress=False)
    write_scenes(tmp_path / "other", counts=COUNTS, scene_size=48, seed=1, progress=False)
    content = {place: (place / "dataset_scenes.json").read_bytes() for place in (folder, *tmp_path.iterdir())}
    assert content[folder] == content[tmp_path / "again"] != content[tmp_path / "other"]
    for record, again in zip(read(folder), read(tmp_path / "again"), strict=True):
        assert record.path.read_bytes() == again.path.read_bytes()


def test_scenes_are_written_again_for_other_parameters_and_missing_or_damaged_files(tmp_path):
    counts = {"train": 3, "val": 2, "test": 4}
    records = read(tmp_path, counts=counts)
    assert len(read(tmp_path, counts={**counts, "test": 5})) == 10
    assert len(list(tmp_path.glob("images-*"))) == 1  # the old images are gone
    assert read(tmp_path, counts=counts) == records
    records[0].path.unlink()
    assert read(tmp_path, counts=counts) == records and records[0].path.is_file()
    for damage in ("", "[]", "{", json.dumps({"parameters": json.loads(JSON(tmp_path))["parameters"], "images": [1]})):
        (tmp_path / "dataset_scenes.json").write_text(damage)
        assert read(tmp_path, counts=counts) == records
    assert not list(tmp_path.glob(".*"))  # no drafts left


def JSON(folder):
    return (folder / "dataset_scenes.json").read_text()


def test_a_run_that_is_interrupted_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return True

    with monkeypatch.context() as patch:
        patch.setattr("datamodules.scene_drawing.cv2.imwrite", interrupted)
        with pytest.raises(KeyboardInterrupt):
            read(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(read(tmp_path)) == sum(COUNTS.values())


def test_concurrent_processes_can_draw_the_same_scenes(folder):
    records = read(folder)
    before = {record.path: record.path.stat().st_ino for record in records}
    write_scenes(folder, counts=COUNTS, scene_size=48, progress=False)  # the slower one, which saw nothing at first
    assert {record.path: record.path.stat().st_ino for record in read(folder)} == before
    assert not list(folder.glob(".*"))


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        read(tmp_path / "file" / "scenes")
    monkeypatch.setattr("datamodules.scene_drawing.cv2.imwrite", lambda *_: False)  # as on a full disk
    with pytest.raises(UserError, match="could not be written"):
        read(tmp_path)
    assert not (tmp_path / "dataset_scenes.json").exists()


def test_wrong_counts_are_refused(tmp_path):
    for counts in ({"train": 0}, {"dev": 3}):
        with pytest.raises(ValueError, match="counts"):
            write_scenes(tmp_path, counts=counts)


def test_reader_by_name(tmp_path):
    records = read_records("scenes", tmp_path, scenes_pictures=(3, 2, 4))
    assert [record.split for record in records] == ["train"] * 3 + ["val"] * 2 + ["test"] * 4
    assert records[0].path.is_relative_to(Path(tmp_path / "scenes"))


def test_vocabulary_covers_every_caption_without_unknown_or_split_words(folder):
    vocabulary = scenes_vocabulary()
    assert vocabulary[:4] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] and len(set(vocabulary)) == len(vocabulary)
    tokenizer = load_tokenizer("scenes")
    tokens = {token for record in read(folder) for caption in record.captions for token in tokenizer.tokenize(caption)}
    assert "[UNK]" not in tokens and not any(token.startswith("##") for token in tokens)
    assert tokenizer.tokenize("Zebra 7!") == ["z", "##e", "##b", "##r", "##a", "7", "!"]
