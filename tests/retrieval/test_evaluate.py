import json
import math
import os
import shutil
import threading
from functools import partial

import numpy as np
import pytest
import references
import torch
import torch.nn.functional as F
from torch import nn

from hacan.alignment import HybridAlignment, RevisedAlignment
from hacan.errors import UserError
from hacan.retrieval import provenance, ranking
from hacan.retrieval.ensemble import build_scorer
from hacan.retrieval.evaluate import evaluate, folds_of
from hacan.retrieval.feature_cache import FeatureStorage
from hacan.retrieval.metrics import mean_of_metrics, retrieval_metrics
from hacan.retrieval.provenance import write_json
from hacan.retrieval.results import Protocol, format_table
from hacan.retrieval.significance import compare_results, load_result
from hacan.retrieval.stage_meter import StageMeter
from hacan.types import EncodedImages, EncodedTexts, PackedTexts, Processes, Split

WIDTH = 8


class ToyModel(nn.Module):
    """A model of two layers with a real alignment; same seed, same weights."""

    def __init__(self, seed, *, direction="t2i", alignment="hybrid"):
        super().__init__()
        torch.manual_seed(seed)
        self.words, self.project = nn.Embedding(50, WIDTH), nn.Linear(6, WIDTH)
        self.dropout = nn.Dropout(0.5)
        self.alignment = (
            HybridAlignment(direction=direction, lambda_softmax=9.0, focal_type="prob")
            if alignment == "hybrid"
            else RevisedAlignment(direction=direction)
        )

    def encode_images(self, pixels):
        regions = self.dropout(self.project(pixels.reshape(len(pixels), 4, 6)))
        return EncodedImages(regions, torch.cat([regions, regions[:, :1]], 1), F.normalize(regions.mean(1), dim=-1))

    def encode_texts(self, token_ids, token_mask):
        tokens = self.dropout(self.words(token_ids))
        return EncodedTexts(tokens, tokens * 2, token_mask, F.normalize(tokens[:, 0], dim=-1))


def make_split(image_of_text, *, images, seed=0, batch_size=4):
    generator = torch.Generator().manual_seed(seed)
    texts = len(image_of_text)
    pixels = torch.randn(images, 3, 2, 4, generator=generator)
    lengths = torch.randint(3, 7, (texts,), generator=generator)
    tokens = torch.randint(1, 50, (texts, 6), generator=generator)

    def image_batches(rows):
        for part in torch.tensor(list(rows)).split(batch_size):
            yield part, pixels[part]

    def text_batches(rows):
        rows = torch.tensor(list(rows))
        for part in rows[lengths[rows].argsort(stable=True)].split(batch_size):
            width = int(lengths[part].max())
            yield part, tokens[part, :width], torch.arange(width) < lengths[part, None]

    split = Split(
        dataset="toy",
        name="test",
        ids=[100 + row for row in range(images)],
        captions=[f"caption {row}" for row in range(texts)],
        image_of_text=torch.tensor(image_of_text),
        image_batches=image_batches,
        text_batches=text_batches,
        batch_size=batch_size,
        images_hash="images",
    )
    return split, pixels, tokens, lengths


IMAGE_OF_TEXT = [0, 0, 1, 2, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9]


def make_scorer(seed=0, **arguments):
    settings = {"direction": "t2i", "alignment": "hybrid", **arguments}
    return build_scorer(ToyModel(seed, **settings), name=f"{seed}.ckpt", device=torch.device("cpu"))


def run(scorers, split, protocol=None, *, folder=None, memory=10, disk=None, processes=None, **changes):
    return evaluate(
        scorers,
        split,
        (protocol or Protocol(top_k=3))._replace(**changes),
        storage=FeatureStorage(folder=folder, memory=memory),
        disk=disk,
        processes=processes,
        progress=False,
    )


def brute_force(member, pixels, tokens, lengths):
    """(global, {stream: scores}) of all pairs, from features rounded as the cache rounds them."""
    images = member.encode_images(pixels)
    rows = zip(tokens, lengths, strict=True)
    texts = [member.encode_texts(t[None, :n], torch.ones(1, n, dtype=torch.bool)) for t, n in rows]
    packed = PackedTexts(
        torch.cat([text.high[0] for text in texts]).half(),
        torch.cat([text.mid[0] for text in texts]).half(),
        torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        torch.cat([text.pooled for text in texts]),
    )
    images = EncodedImages(images.high.half(), images.mid.half(), images.pooled)
    streams = {s: member.score(images, packed, (s,)) for s in ("ksf", "lrg_high", "lrg_mid")}
    return images.pooled @ packed.pooled.T, streams


@pytest.mark.parametrize("alignment", ["hybrid", "revised"])
@pytest.mark.parametrize("coarse", ["global", "release"])
@pytest.mark.parametrize("members", [1, 2])
def test_the_evaluator_is_the_loop_over_brute_force_scores(alignment, coarse, members):
    split, *material = make_split(IMAGE_OF_TEXT, images=10)
    models = [make_scorer(seed, alignment=alignment) for seed in range(members)]
    found = run(models, split, Protocol(top_k=3, coarse=coarse))
    rough, exact = 0, 0
    for member in models:
        pooled, streams = brute_force(member, *material)
        one = pooled if coarse == "global" else 0.2 * pooled + 0.8 * streams["ksf"]
        rough = rough + one / members
        rest = streams["lrg_high"] + streams["lrg_mid"] + (streams["ksf"] if coarse == "global" else one)
        exact = exact + rest / members
    (i2t, top_i2t), (t2i, top_t2i) = references.loop_hierarchical(rough.tolist(), exact.tolist(), IMAGE_OF_TEXT, 3)
    assert found.results[0].ranks_i2t.tolist() == i2t and found.results[0].ranks_t2i.tolist() == t2i
    assert found.results[0].top_i2t.tolist() == top_i2t and found.results[0].top_t2i.tolist() == top_t2i
    (i2t_all, _), (t2i_all, _) = references.loop_hierarchical(rough.tolist(), rough.tolist(), IMAGE_OF_TEXT, 99)
    assert found.coarse_ranks[0][0].tolist() == i2t_all and found.coarse_ranks[0][1].tolist() == t2i_all
    assert found.hierarchical == retrieval_metrics(*found.ranks[0])
    assert found.coarse == retrieval_metrics(*found.coarse_ranks[0])


def test_dropout_is_off_and_the_same_evaluation_gives_the_same_ranks():
    split, *_ = make_split(IMAGE_OF_TEXT, images=10)
    one, other = run([make_scorer()], split), run([make_scorer()], split)
    assert torch.equal(one.ranks[0][0], other.ranks[0][0]) and torch.equal(one.ranks[0][1], other.ranks[0][1])
    assert one.provenance["ids_hash"] == other.provenance["ids_hash"]
    assert one.provenance["members"] == other.provenance["members"]


def test_five_folds_are_five_evaluations_and_their_mean():
    split, *material = make_split(IMAGE_OF_TEXT, images=10)
    found = run([make_scorer()], split, Protocol(top_k=2, fold5=True), bootstrap=100)
    pooled, streams = brute_force(make_scorer(), *material)
    exact = sum(streams.values())
    metrics = []
    for fold in range(5):
        texts = [j for j, image in enumerate(IMAGE_OF_TEXT) if image // 2 == fold]
        part = [IMAGE_OF_TEXT[j] - 2 * fold for j in texts]
        scores = [s[2 * fold : 2 * fold + 2][:, texts].tolist() for s in (pooled, exact)]
        (i2t, _), (t2i, _) = references.loop_hierarchical(*scores, part, 2)
        assert found.ranks[fold][0].tolist() == i2t and found.ranks[fold][1].tolist() == t2i
        metrics.append(retrieval_metrics(torch.tensor(i2t), torch.tensor(t2i)))
    assert found.hierarchical == mean_of_metrics(metrics)
    assert found.provenance["protocol"] == "mean of 5 folds, each ranked on its own"
    low, high = found.intervals["hierarchical"]["rsum"]
    assert low <= found.hierarchical.rsum <= high


def test_folds_are_cut_by_images_and_never_by_captions():
    def split_with(images, image_of_text):
        return make_split(IMAGE_OF_TEXT, images=10)[0]._replace(ids=range(images), image_of_text=image_of_text)

    captions = torch.tensor([0] * 7 + list(range(10)))
    assert folds_of(split_with(10, captions), Protocol(fold5=True)) == [slice(i, i + 2) for i in range(0, 10, 2)]
    assert folds_of(split_with(10, captions), Protocol()) == [slice(0, 10)]
    with pytest.raises(UserError, match="this one has 11 images"):
        folds_of(split_with(11, captions), Protocol(fold5=True))
    with pytest.raises(UserError, match="fold 5 of 5 has no caption"):
        folds_of(split_with(10, captions.clamp(max=7)), Protocol(fold5=True))


def test_a_split_that_cannot_be_cut_is_refused_before_anything_is_encoded():
    split, *_ = make_split(IMAGE_OF_TEXT, images=10)

    def encoded(_):
        raise AssertionError("encoded")

    scorer = make_scorer()._replace(encode_images=encoded, encode_texts=encoded)
    with pytest.raises(UserError, match="this one has 9 images"):
        run([scorer], split._replace(ids=range(9)), Protocol(fold5=True))


def test_an_image_without_captions_is_no_query_but_stays_in_the_gallery():
    split, *_ = make_split([0, 0, 1, 3, 3], images=4)
    found = run([make_scorer()], split, Protocol(top_k=99))
    assert len(found.ranks[0][0]) == 3 and len(found.results[0].ranks_i2t) == 4
    assert (
        found.provenance["queries_i2t"] == 3
        and found.provenance["images"] == 4
        and found.provenance["queries_t2i"] == 5
    )
    assert found.results[0].top_t2i.shape == (5, 4)
    assert found.hierarchical.missed_i2t == 0


def test_the_audit_is_labelled_and_reports_what_the_release_rule_adds():
    split, *_ = make_split(IMAGE_OF_TEXT, images=10)
    found = run([make_scorer()], split, Protocol(top_k=1))
    assert found.hierarchical.missed_t2i > 0
    assert found.release_rule.r1_i2t == pytest.approx(found.hierarchical.r1_i2t + found.hierarchical.missed_i2t)
    assert found.inflation.rsum == pytest.approx(found.release_rule.rsum - found.hierarchical.rsum)
    assert found.inflation.rsum > 0
    content = found.to_json()
    assert content["release_rule"]["metrics"]["rsum"] == found.release_rule.rsum
    assert content["hierarchical"]["rsum"] == found.hierarchical.rsum
    table = format_table(found)
    assert "Audit, not a result" in table and "hierarchical K=1" in table
    row = next(line for line in table.splitlines() if line.startswith("hierarchical"))
    assert f"{found.hierarchical.rsum:.1f}" in row and f"{found.release_rule.rsum:.1f}" not in row


def test_a_shortlist_of_everything_leaves_nothing_to_inflate():
    split, *_ = make_split(IMAGE_OF_TEXT, images=10)
    found = run([make_scorer()], split, Protocol(top_k=15))
    assert set(found.inflation) == {0.0}


def test_the_table_names_an_ensemble_and_its_members():
    split, *_ = make_split(IMAGE_OF_TEXT, images=10)
    alone = run([make_scorer(0)], split)
    both = run([make_scorer(0, direction="i2t"), make_scorer(1)], split, bootstrap=50)
    assert "ENSEMBLE" not in format_table(alone) and not alone.provenance["ensemble"]
    table = format_table(both)
    assert "ENSEMBLE of 2 models" in table and "0.ckpt, 1.ckpt" in table and "i2t + t2i" in table
    assert "95% from" in table and "95% from" not in format_table(alone)
    assert [member["checkpoint"] for member in both.provenance["members"]] == ["0.ckpt", "1.ckpt"]
    assert both.provenance["members"][0]["hash"] != both.provenance["members"][1]["hash"]
    assert max(map(len, table.splitlines())) <= 120


def test_provenance_describes_the_evaluation(tmp_path):
    split, *_ = make_split(IMAGE_OF_TEXT, images=10)
    member = make_scorer()._replace(settings={"lambda_softmax": 9.0})
    found = run([member], split, Protocol(top_k=4), bootstrap=20, seed=7)
    found.save(tmp_path)
    text = (tmp_path / "metrics.json").read_text()
    content = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    record = content["receipt"]
    expected = {"dataset": "toy", "split": "test", "images": 10, "texts": 15, "top_k": 4, "coarse": "global", "seed": 7}
    assert expected.items() <= record.items()
    assert record["alignment"] == "hybrid" and record["direction"] == "t2i" and record["precision"] == "32-true"
    assert record["features"] == "float16" and len(record["ids_hash"]) == 64
    described = {"checkpoint": "0.ckpt", "hash": member.checkpoint_hash, "alignment": "hybrid", "direction": "t2i"}
    assert record["members"] == [described | {"lambda_softmax": 9.0}] and not record["ensemble"]
    assert {"torch", "python", "transformers", "timm", "numpy"} <= record["versions"].keys()
    for stage in ("encode images", "encode texts", "coarse", "fine", "rank"):
        assert record["stages"][stage]["seconds"] > 0 and record["stages"][stage]["host_peak_mib"] > 10
    assert len(content["intervals_95"]["hierarchical"]) == 7
    with np.load(tmp_path / "ranks.npz") as ranks:
        assert torch.equal(torch.from_numpy(ranks["hierarchical_t2i_0"]), found.ranks[0][1])
        assert set(ranks) == {f"{s}_{d}_0" for s in ("coarse", "hierarchical") for d in ("i2t", "t2i")}


def test_the_hash_of_ids_sees_every_id_caption_and_their_order():
    split, *_ = make_split(IMAGE_OF_TEXT, images=10)
    changed = [
        split,
        split._replace(ids=split.ids[::-1]),
        split._replace(captions=[*split.captions[:-1], "another"]),
        split._replace(image_of_text=torch.tensor([*IMAGE_OF_TEXT[:-1], 8])),
    ]
    assert len({run([make_scorer()], one).provenance["ids_hash"] for one in changed}) == 4


def test_infinite_numbers_are_null_in_json(tmp_path):
    write_json(tmp_path / "x.json", {"a": math.inf, "b": [1.5, -math.inf, math.nan], "c": (2, "x", None, True)})
    found = json.loads((tmp_path / "x.json").read_text())
    assert found == {"a": None, "b": [1.5, None, None], "c": [2, "x", None, True]}


def test_cached_features_are_used_for_other_protocols_but_not_other_models(tmp_path):
    split, *_ = make_split(IMAGE_OF_TEXT, images=10)
    encoded = []

    def counted(member):
        def encode_images(pixels):
            encoded.append(len(pixels))
            return member.encode_images(pixels)

        return member._replace(encode_images=encode_images)

    first = run([counted(make_scorer())], split, folder=tmp_path)
    assert sum(encoded) == 10
    again = run([counted(make_scorer())], split, Protocol(top_k=3), folder=tmp_path)
    assert sum(encoded) == 10 and torch.equal(first.ranks[0][0], again.ranks[0][0])
    run([counted(make_scorer(1))], split, folder=tmp_path)
    assert sum(encoded) == 20
    run([counted(make_scorer())], split._replace(images_hash="other images"), folder=tmp_path)
    assert sum(encoded) == 30
    run([counted(make_scorer()._replace(precision="bf16-mixed"))], split, folder=tmp_path)
    assert sum(encoded) == 40
    run([counted(make_scorer()._replace(architecture_hash="other levels of the same weights"))], split, folder=tmp_path)
    assert sum(encoded) == 50
    assert len(list(tmp_path.iterdir())) == 5


def test_features_of_other_evaluations_are_pruned(tmp_path):
    split, *_ = make_split(IMAGE_OF_TEXT, images=10)
    run([make_scorer(0)], split, folder=tmp_path)
    first = list(tmp_path.iterdir())
    for file in first[0].rglob("*"):
        os.utime(file, (1e9, 1e9))
    run([make_scorer(1)], split, folder=tmp_path, disk=1000)
    assert len(list(tmp_path.iterdir())) == 2
    run([make_scorer(2), make_scorer(3)], split, folder=tmp_path, disk=0)
    assert not first[0].exists() and len(list(tmp_path.iterdir())) == 3  # that of 1 may still be filled


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("fold5", [False, True])
def test_sharded_evaluation_gives_exactly_the_ranks_of_one_process(tmp_path, monkeypatch, world_size, fold5):
    monkeypatch.setattr(ranking, "FINE_IMAGES", 3)
    split, *_ = make_split(IMAGE_OF_TEXT, images=10)
    protocol = Protocol(top_k=3, fold5=fold5)
    expected = run([make_scorer()], split, protocol)
    barrier, shards, found = threading.Barrier(world_size), {}, [None] * world_size

    def gather(shard, rank):
        barrier.wait(30)
        shards[rank] = shard
        barrier.wait(30)
        return [shards[other] for other in range(world_size)]

    members = [make_scorer() for _ in range(world_size)]

    def process(rank):
        processes = Processes(rank, world_size, lambda: barrier.wait(30), partial(gather, rank=rank))
        found[rank] = run([members[rank]], split, protocol, folder=tmp_path, processes=processes)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in found:
        for mine, theirs in zip(one.results, expected.results, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        assert one.hierarchical == expected.hierarchical


@pytest.mark.parametrize("coarse", ["global", "release"])
def test_the_curve_ends_at_the_full_ranking_and_passes_through_k(tmp_path, coarse):
    split, *_ = make_split(IMAGE_OF_TEXT, images=10)
    models = [make_scorer(0), make_scorer(1)]
    found = run(models, split, Protocol(top_k=3, coarse=coarse), curve=True)
    assert found.curve.rsum[2] == pytest.approx(found.hierarchical.rsum)
    full = run(models, split, Protocol(top_k=15, coarse=coarse))
    assert found.curve.rsum[-1] == pytest.approx(full.hierarchical.rsum)
    assert found.curve.coarse_rsum == pytest.approx(found.coarse.rsum)
    found.save(tmp_path)
    assert {"curve.csv", "curve.png", "metrics.json", "ranks.npz"} == {path.name for path in tmp_path.iterdir()}
    assert json.loads((tmp_path / "metrics.json").read_text())["curve"]["suggested_k"] == found.curve.suggested_k


def test_a_model_that_gives_nan_is_an_error_and_never_a_rank():
    split, *_ = make_split(IMAGE_OF_TEXT, images=10)
    model = ToyModel(0)
    with torch.no_grad():
        model.project.weight[0, 0] = math.nan
    member = build_scorer(model, name="x", device=torch.device("cpu"))
    with pytest.raises(UserError, match="non-finite features"):
        run([member], split)
    broken = make_scorer()._replace(score_pairs=lambda *arguments: torch.full((len(arguments[2]),), math.nan))
    with pytest.raises(ValueError, match="fine holds"):
        run([broken], split)


def test_wrong_arguments_are_named(tmp_path):
    split, *_ = make_split(IMAGE_OF_TEXT, images=10)
    with pytest.raises(ValueError, match="images_hash is empty"):
        run([make_scorer()], split._replace(images_hash=""), folder=tmp_path)
    with pytest.raises(ValueError, match="scorers is empty"):
        run([], split)
    with pytest.raises(ValueError, match="coarse_kind is 'cosine'"):
        run([make_scorer()], split, Protocol(coarse="cosine"))
    with pytest.raises(ValueError, match="precision is '16'"):
        build_scorer(ToyModel(0), name="", device=torch.device("cpu"), precision="16")


def test_the_meter_adds_up_seconds_and_keeps_the_highest_memory():
    meter = StageMeter(torch.device("cpu"))
    with meter.stage("work"):
        held = torch.ones(20 * 2**20)  # 80 MiB
        held += 1
    first = dict(meter.stages["work"])
    del held
    with meter.stage("work"):
        pass
    with meter.stage("rest"):
        pass
    assert meter.stages["work"]["seconds"] > first["seconds"]
    assert meter.stages["work"]["host_peak_mib"] >= first["host_peak_mib"]
    assert meter.stages["work"]["host_peak_mib"] > meter.stages["rest"]["host_peak_mib"] + 60
    with pytest.raises(RuntimeError), meter.stage("failing"):
        raise RuntimeError
    assert meter.stages["failing"]["seconds"] >= 0


def test_the_source_hash_covers_what_makes_features(tmp_path):
    copy = tmp_path / "hacan"
    shutil.copytree(provenance.PACKAGE, copy)
    known = provenance.code_hash()
    assert len(known) == 32 and provenance.code_hash(copy) == known
    for name in ("models/text_encoder.py", "images/io.py", "models/hacan.py", "types.py", "retrieval/feature_cache.py"):
        (copy / name).write_text((copy / name).read_text() + "# changed")
        assert provenance.code_hash(copy) != known, name
        known = provenance.code_hash(copy)
    (copy / "losses.py").write_text("")
    assert provenance.code_hash(copy) == known


def test_coco_ids_bring_the_judged_matches(monkeypatch, tmp_path):
    split, *_ = make_split(IMAGE_OF_TEXT, images=10)
    texts = [1000 + j for j in range(15)]
    judged = {"i2t": {100: frozenset(texts)}, "t2i": {1000: frozenset({100}), 1001: frozenset({109})}}
    monkeypatch.setattr("hacan.retrieval.eccv_cxc.load_matches", lambda name: judged)
    found = run([make_scorer()], split._replace(coco_ids=(split.ids, texts)), Protocol(top_k=15))
    assert found.extended["eccv_map_at_r"]["i2t"] == pytest.approx(100)
    assert found.extended["cxc_r10"]["t2i"] == pytest.approx(100)
    table = format_table(found)
    assert "ECCV Caption mAP@R" in table and "CxC R@10" in table
    assert found.to_json()["extended"] == found.extended
    assert run([make_scorer()], split).extended is None
    assert run([make_scorer()], split._replace(coco_ids=(split.ids, texts)), Protocol(fold5=True)).extended is None


@pytest.mark.parametrize(
    ("stream", "coarse"), [("key_semantic_filter", "release"), ("local_relationship_guidance", "global")]
)
def test_scores_that_are_not_finite_name_the_form_and_the_stream(stream, coarse, monkeypatch):
    split, *_ = make_split([0, 0, 1, 2], images=3)
    member = make_scorer()
    equation = getattr(HybridAlignment, stream)
    monkeypatch.setattr(HybridAlignment, stream, lambda *arguments: equation(*arguments) / 0)
    expected = "ksf" if stream == "key_semantic_filter" else "lrg_high, lrg_mid"
    with pytest.raises(
        UserError, match=f"alignment=hybrid: scores of {expected} are not finite, although all features"
    ):
        run([member], split, Protocol(coarse=coarse))


def test_the_provenance_differs_for_another_hyperparameter(tmp_path):
    split, *_ = make_split([0, 0, 1, 2], images=3)
    for name, scale in (("one", 9.0), ("other", 4.0)):
        model = ToyModel(0)
        model.alignment.lambda_softmax = scale
        member = build_scorer(model, name=name, device=torch.device("cpu"), settings=model.alignment.hyperparameters)
        run([member], split).save(tmp_path / name)
    one, other = (load_result(tmp_path / name) for name in ("one", "other"))
    printed = compare_results(one, other, resamples=10)
    assert (
        "lambda_softmax=9.0" in printed
        and "lambda_softmax=4.0" in printed
        and "all recorded fields are equal" not in printed
    )
