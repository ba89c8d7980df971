import json
import random
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from hacan import pipeline
from hacan.errors import UserError
from hacan.retrieval.eccv_cxc import (
    average_precision_at_r,
    coco_ids,
    eccv_cxc_metrics,
    find_annotations,
    load_matches,
    r_precision,
    recall_at_matches,
)
from hacan.types import RetrievalResult


def test_hand_made_figures():
    matches = frozenset({1, 2, 3, 4})
    ranking = [1, 9, 2, 8, 3, 4]
    assert r_precision(ranking, matches) == 2 / 4
    assert average_precision_at_r(ranking, matches) == pytest.approx((1 + 2 / 3) / 4)
    assert [recall_at_matches([9, 1, 8], matches, k) for k in (1, 2, 3)] == [0, 1, 1]
    assert average_precision_at_r([1, 2, 3, 4], matches) == r_precision([4, 3, 2, 1], matches) == 1


def test_what_a_shortlist_does_not_list_is_missed():
    matches = frozenset({1, 2, 3, 4})
    assert r_precision([1, 2], matches) == 0.5  # the package would say 1.0
    assert average_precision_at_r([1, 2], matches) == 0.5
    assert r_precision([], matches) == average_precision_at_r([], matches) == recall_at_matches([], matches, 5) == 0


def package():
    pytest.importorskip("eccv_caption")
    from eccv_caption import Metrics

    return Metrics()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:failed to import")
def test_the_packages_own_figures_on_full_rankings():
    theirs = package()
    images, captions = list(theirs.coco_gts["i2t"]), list(theirs.coco_gts["t2i"])
    generator = random.Random(0)
    items = {"i2t": captions, "t2i": images}
    rankings, top = {}, {}
    for direction, queries in (("i2t", images), ("t2i", captions)):
        place = {item: index for index, item in enumerate(items[direction])}
        rankings[direction], rows = {}, []
        for query in queries:
            # Some matches of either set and noise, shuffled: figures away from 0 and from 100.
            likely = list(
                dict.fromkeys(theirs.eccv_gts[direction].get(query, []) + theirs.cxc_gts[direction].get(query, []))
            )
            likely = [item for item in likely if item in place][: generator.randint(0, 30)]
            row = likely + [i for i in generator.sample(items[direction], 60) if i not in likely]
            row = row[:60]
            generator.shuffle(row)
            rankings[direction][query] = row
            rows.append([place[item] for item in row])
        top[direction] = torch.tensor(rows)
    result = RetrievalResult(torch.zeros(5000), torch.zeros(25000), top["i2t"], top["t2i"])
    found = eccv_cxc_metrics(result, images, captions)
    expected = theirs.compute_all_metrics(
        rankings["i2t"],
        rankings["t2i"],
        target_metrics=("eccv_r1", "eccv_map_at_r", "eccv_rprecision", "cxc_recalls"),
    )
    assert found.keys() == expected.keys()
    for name, both in expected.items():
        for direction, value in both.items():
            assert found[name][direction] == pytest.approx(100 * value, abs=1e-9)
            assert 0.5 < found[name][direction] < 99.5


def test_the_sizes_are_the_published_ones():
    pytest.importorskip("eccv_caption")
    # The package's README: 1,332 query captions with 11,279 images and 1,261 query images with 22,550 captions.
    eccv = load_matches("eccv")
    assert {direction: len(matches) for direction, matches in eccv.items()} == {"i2t": 1261, "t2i": 1332}
    assert {d: sum(map(len, matches.values())) for d, matches in eccv.items()} == {"i2t": 22550, "t2i": 11279}
    with pytest.raises(ValueError, match="choose from eccv, cxc"):
        load_matches("pm")


def test_without_the_package_its_name_is_given(monkeypatch):
    monkeypatch.setattr("hacan.retrieval.eccv_cxc.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install eccv_caption==0\.1\.0"):
        load_matches("eccv")


def test_another_split_is_refused():
    pytest.importorskip("eccv_caption")
    top = torch.zeros(3, 1, dtype=torch.int64)
    result = RetrievalResult(torch.zeros(3), torch.zeros(3), top, top)
    with pytest.raises(UserError, match=r"1261 of them are not in this split .* all 5,000 images"):
        eccv_cxc_metrics(result, [1, 2, 3], [4, 5, 6])


def write_annotations(tmp_path, entries):
    path = tmp_path / "captions_val2014.json"
    annotations = [{"id": i, "image_id": image, "caption": caption} for i, image, caption in entries]
    path.write_text(json.dumps({"annotations": annotations}))
    return path


def test_ids_are_looked_up_by_image_and_words(tmp_path):
    path = write_annotations(tmp_path, [(70, 5, "A dog.\n"), (71, 9, "A dog."), (72, 5, "A  cat"), (73, 5, "A dog.")])
    pictures = ["x/COCO_val2014_000000000009.jpg", "x/COCO_val2014_000000000005.jpg"]
    images, captions = coco_ids(pictures, ["A dog.", "A cat", "A dog.", "A dog. "], torch.tensor([0, 1, 1, 1]), path)
    assert images == [9, 5] and captions == [71, 72, 70, 73]
    with pytest.raises(UserError, match="no annotation 'A cat' of image 9"):
        coco_ids(pictures, ["A cat"], torch.tensor([0]), path)
    with pytest.raises(UserError, match="does not have a file name of COCO"):
        coco_ids(["x/photo.jpg"], [], torch.tensor([]), path)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"annotations": 3}', '{"annotations": [{"id": 1}]}'])
def test_a_bad_annotation_file_is_one_line(tmp_path, content):
    path = tmp_path / "captions_val2014.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match="is not a COCO annotation file"):
        coco_ids(["COCO_val2014_000000000009.jpg"], ["a"], torch.tensor([0]), path)


PICTURES = ("COCO_val2014_000000000009.jpg", "COCO_val2014_000000000005.jpg")


@pytest.fixture
def coco(tmp_path, monkeypatch):
    """A test split of two images of COCO, all of it judged, with its annotations."""
    judged = {"i2t": {9: frozenset({71, 72})}, "t2i": {72: frozenset({5})}}
    monkeypatch.setattr("hacan.retrieval.eccv_cxc.load_matches", lambda name: judged)
    folder = tmp_path / "coco" / "annotations"
    folder.mkdir(parents=True)
    write_annotations(folder, [(71, 9, "A dog."), (72, 5, "A cat"), (73, 5, "A dog.")])
    part = SimpleNamespace(paths=PICTURES, captions=("A dog.", "A cat"), image_of_text=torch.tensor([0, 1]))
    return SimpleNamespace(eval_split=lambda name: part)


def test_a_run_on_cocos_test_finds_the_ids_under_data_root(coco, make_settings, tmp_path):
    def ids(**updates):
        return pipeline._judged_ids(make_settings(**{"datasets": "coco", "data_root": str(tmp_path)} | updates), coco)

    assert find_annotations(tmp_path) == tmp_path / "coco" / "annotations" / "captions_val2014.json"
    assert ids() == ([9, 5], [71, 72])
    assert ids(judged_matches="off") is None
    assert ids(fold5=True) is None and ids(eval_split="val") is None and ids(datasets="f30k") is None
    path = str(tmp_path / "coco" / "annotations" / "captions_val2014.json")
    assert ids(data_root="elsewhere", judged_matches=path) == ([9, 5], [71, 72])
    with pytest.raises(UserError, match="whole test split"):
        ids(judged_matches=path, fold5=True)


def test_missing_judged_matches_are_logged_and_a_wrong_path_is_an_error(coco, make_settings, tmp_path, caplog):
    settings = partial(make_settings, datasets="coco")
    assert pipeline._judged_ids(settings(data_root=str(tmp_path / "elsewhere")), coco) is None
    assert "not computed: there is no annotations/captions_val2014.json" in caplog.text
    path = write_annotations(tmp_path, [(71, 9, "A dog."), (74, 5, "A cat")])  # 72 is judged, and not among them
    with pytest.raises(UserError, match=r"judged_matches=.*1 of them are not in this split .COCO id 72"):
        pipeline._judged_ids(settings(judged_matches=str(path)), coco)
    (tmp_path / "coco" / "annotations" / "captions_val2014.json").write_text(path.read_text())
    assert pipeline._judged_ids(settings(data_root=str(tmp_path)), coco) is None
    assert "COCO id 72" in caplog.text


def test_the_published_sizes_of_cxc_beside_eccv():
    """The package's README: to the queries that ECCV Caption judges, CxC gives 1,895 images and 8,906 captions."""
    pytest.importorskip("eccv_caption")
    eccv, cxc = load_matches("eccv"), load_matches("cxc")
    sizes = {d: sum(len(cxc[d].get(query, ())) for query in eccv[d]) for d in ("i2t", "t2i")}
    assert sizes == {"i2t": 8906, "t2i": 1895}
