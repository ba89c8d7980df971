import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hacan.errors import UserError
from hacan.retrieval.metrics import release_ranks, retrieval_metrics
from hacan.retrieval.provenance import DATA_FIELDS, MISS_RULE, RULE_FIELDS, SYSTEM_FIELDS, TIE_RULE
from hacan.retrieval.results import Evaluation
from hacan.retrieval.significance import compare_results, load_result
from scripts.compare_results import main

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_results.py"
PROVENANCE = {
    "dataset": "f30k",
    "split": "test",
    "protocol": "whole split",
    "images": 4,
    "texts": 6,
    "queries_i2t": 4,
    "queries_t2i": 6,
    "ids_hash": "0a",
    "top_k": 50,
    "coarse": "global",
    "tie_rule": TIE_RULE,
    "miss_rule": MISS_RULE,
    "alignment": "hybrid",
    "direction": "t2i",
    "precision": "16-mixed",
    "features": "float16",
    "members": [{"checkpoint": "best.ckpt", "hash": "123456789abc", "alignment": "hybrid", "direction": "t2i"}],
}


def save(folder, *, i2t=(0, 1, math.inf, 0), t2i=(0, 0, 3, 7, math.inf, 0), folds=1, **fields):
    ranks = [(torch.tensor(i2t, dtype=torch.float64), torch.tensor(t2i, dtype=torch.float64))] * folds
    metrics = retrieval_metrics(*ranks[0])
    Evaluation(
        provenance={**PROVENANCE, **fields},
        coarse=metrics,
        hierarchical=metrics,
        release_rule=retrieval_metrics(*map(release_ranks, ranks[0])),
        intervals={},
        coarse_ranks=ranks,
        ranks=ranks,
        results=[],
    ).save(folder)
    return folder


def test_equal_provenance_is_compared_query_by_query(tmp_path):
    one = load_result(save(tmp_path / "a"))
    other = load_result(save(tmp_path / "b", i2t=(0, 0, 0, 0)) / "metrics.json")
    text = compare_results(one, other, resamples=500)
    assert "measured twice" in text and "4 image and 6 text queries" in text
    rsum = next(line for line in text.splitlines() if "Rsum" in line).split()
    difference = one.metrics["hierarchical"]["rsum"] - other.metrics["hierarchical"]["rsum"]
    assert float(rsum[3]) == pytest.approx(difference, abs=0.01)
    assert 0 < float(rsum[-1]) <= 1
    unmoved = next(line for line in text.splitlines() if "t2i R@1 " in line)
    assert unmoved.endswith("1.0000") and "+0.00" in unmoved


@pytest.mark.parametrize("field", [*DATA_FIELDS, *RULE_FIELDS])
def test_results_that_measure_different_things_are_refused_naming_the_field(tmp_path, field):
    one = load_result(save(tmp_path / "a"))
    other = load_result(save(tmp_path / "b", **{field: "something else"}))
    with pytest.raises(UserError, match=f"different things: {field} is .* in the first and 'something else'"):
        compare_results(one, other)


@pytest.mark.parametrize("field", SYSTEM_FIELDS)
def test_different_systems_are_compared_and_named(tmp_path, field):
    value = "another" if field != "members" else [{"checkpoint": "x.ckpt", "hash": "ffffffffff"}]
    one, other = load_result(save(tmp_path / "a")), load_result(save(tmp_path / "b", **{field: value}))
    assert f"they differ in {field}: " in compare_results(one, other, resamples=10)


def test_the_architecture_hash_differs_for_other_settings(tmp_path):
    member = PROVENANCE["members"][0]
    one = load_result(save(tmp_path / "a", members=[member | {"text_levels": [-3, -1], "embed_dim": 8}]))
    other = load_result(save(tmp_path / "b", members=[member | {"text_levels": [-2, -1], "embed_dim": 8}]))
    line = next(line for line in compare_results(one, other, resamples=9).splitlines() if "members" in line)
    assert "(12345678, text_levels=[-3, -1]) | best.ckpt (12345678, text_levels=[-2, -1])" in line
    assert "embed_dim" not in line


def test_rules_may_differ_with_across_but_data_never(tmp_path):
    one, other = load_result(save(tmp_path / "a")), load_result(save(tmp_path / "b", top_k=100))
    assert "they differ in top_k: 50 | 100" in compare_results(one, other, across=("top_k",), resamples=10)
    with pytest.raises(UserError, match="--across top_k"):
        compare_results(one, other, across=("coarse",))
    with pytest.raises(UserError, match="across ids_hash: a paired test needs the same queries"):
        compare_results(one, other, across=("ids_hash",))


def test_folds_are_compared_fold_by_fold(tmp_path):
    one, other = load_result(save(tmp_path / "a", folds=5)), load_result(save(tmp_path / "b", folds=5, direction="i2t"))
    assert len(one.ranks["hierarchical"]) == 5
    assert "they differ in direction: t2i | i2t" in compare_results(one, other, resamples=10)


def test_bad_files_are_user_errors(tmp_path):
    with pytest.raises(UserError, match=r"nowhere cannot be read \(No such file"):
        load_result(tmp_path / "nowhere")
    folder = save(tmp_path / "a")
    (folder / "ranks.npz").write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(UserError, match=r"ranks\.npz holds no ranks"):
        load_result(folder)
    (folder / "ranks.npz").unlink()
    with pytest.raises(UserError, match=r"ranks\.npz holds no ranks"):
        load_result(folder)
    empty = '{"receipt": {}, "coarse": {}, "hierarchical": {}}'
    for content in ("{", "[]", "3", "{}", empty, '{"receipt": 1, "coarse": 2}'):
        (folder / "metrics.json").write_text(content)
        with pytest.raises(UserError, match="not a complete"):
            load_result(folder)
    (folder / "metrics.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a complete"):
        load_result(folder)


def test_the_script(tmp_path, capsys):
    save(tmp_path / "a")
    save(tmp_path / "b", split="val")
    assert main([str(tmp_path / "a"), str(tmp_path / "a"), "--resamples", "20"]) == 0
    assert "hierarchical" in capsys.readouterr().out
    bad = subprocess.run([sys.executable, SCRIPT, tmp_path / "a", tmp_path / "b"], capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and "split is 'test'" in bad.stderr


def test_misses_are_null_in_the_file(tmp_path):
    folder = save(tmp_path / "a", t2i=(math.inf,) * 6)
    content = json.loads((folder / "metrics.json").read_text())
    assert content["hierarchical"]["median_t2i"] is None and content["hierarchical"]["missed_t2i"] == 100.0


def test_a_setting_that_was_renamed_is_not_a_difference(tmp_path):
    """metrics.json of older versions names the inverse temperature of the hybrid form `temperature`."""
    for name, key in (("old", "temperature"), ("new", "lambda_softmax")):
        save(tmp_path / name, members=[{"checkpoint": "a.ckpt", "hash": "0" * 64, key: 9.0}])
    old, new = (load_result(tmp_path / name) for name in ("old", "new"))
    assert "they differ" not in compare_results(old, new, resamples=10)
    save(tmp_path / "new", members=[{"checkpoint": "a.ckpt", "hash": "0" * 64, "lambda_softmax": 4.0}])
    assert "lambda_softmax=9.0" in compare_results(old, load_result(tmp_path / "new"), resamples=10)
