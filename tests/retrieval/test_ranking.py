import math
from types import SimpleNamespace

import pytest
import references
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hacan.retrieval
from hacan.retrieval import curve as curves
from hacan.retrieval import ranking
from hacan.retrieval.curve import COLUMNS, Curve, mean_curve, recalls_by_k, trade_off
from hacan.retrieval.metrics import ranks_of_first_match, retrieval_metrics
from hacan.retrieval.ranking import (
    coarse_ranks,
    fine_shard,
    listed_pairs,
    merge_shards,
    rank_pairs,
    rank_shortlists,
    retrieve,
    shortlists,
)
from hacan.retrieval.stage_meter import StageMeter

INF = math.inf


@st.composite
def galleries(draw):
    """(coarse, fine, image_of_text, top_k) with many ties; images without captions among them."""
    images, texts = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    levels = draw(st.sampled_from([1, 2, 3, 50]))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    coarse, fine = torch.randint(-levels, levels, (2, images, texts), generator=generator).double().div(7)
    image_of_text = torch.randint(0, images, (texts,), generator=generator)
    return coarse, fine, image_of_text, draw(st.integers(1, 12))


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that every gallery here takes several."""
    monkeypatch.setattr(ranking, "COARSE_IMAGES", 2)
    monkeypatch.setattr(ranking, "FINE_IMAGES", 2)
    monkeypatch.setattr(ranking, "TEXTS", 3)
    monkeypatch.setattr(curves, "ENTRIES", 8)


def retrieved(coarse, fine, image_of_text, top_k, **arguments):
    return retrieve(
        lambda rows: coarse[rows],
        lambda pairs: fine[pairs[:, 0], pairs[:, 1]],
        image_of_text,
        images=len(coarse),
        top_k=top_k,
        progress=False,
        **arguments,
    )


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_rank_shortlists_is_public():
    assert hacan.retrieval.rank_shortlists is rank_shortlists


@given(galleries())
@settings(deadline=None, max_examples=80)
def test_rank_shortlists_is_the_loop(gallery):
    coarse, fine, image_of_text, top_k = gallery
    found = rank_shortlists(coarse, fine, image_of_text, top_k=top_k)
    (ranks_i2t, top_i2t), (ranks_t2i, top_t2i) = references.loop_hierarchical(
        coarse.tolist(), fine.tolist(), image_of_text.tolist(), top_k
    )
    assert found.ranks_i2t.tolist() == ranks_i2t and found.ranks_t2i.tolist() == ranks_t2i
    assert found.top_i2t.tolist() == top_i2t and found.top_t2i.tolist() == top_t2i
    assert found.ranks_i2t.dtype == found.ranks_t2i.dtype == torch.float64


@given(galleries())
@settings(deadline=None, max_examples=40)
def test_a_shortlist_as_long_as_the_gallery_is_brute_force(gallery):
    coarse, fine, image_of_text, _ = gallery
    found = rank_shortlists(coarse, fine, image_of_text, top_k=max(coarse.shape))
    rows = torch.arange(len(fine))
    i2t = ranks_of_first_match(fine, query_images=rows, item_images=image_of_text)
    t2i = ranks_of_first_match(fine.T, query_images=image_of_text, item_images=rows)
    assert torch.equal(found.ranks_i2t, i2t) and torch.equal(found.ranks_t2i, t2i)
    assert equal(found, rank_shortlists(coarse, fine, image_of_text, top_k=10**9))


@given(gallery=galleries(), world_size=st.integers(1, 5))
@settings(deadline=None, max_examples=60)
def test_blocks_and_shards_change_nothing(gallery, world_size):
    coarse, fine, image_of_text, top_k = gallery
    expected = rank_shortlists(coarse, fine, image_of_text, top_k=top_k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "COARSE_IMAGES", 1)
        patch.setattr(ranking, "FINE_IMAGES", 2)
        patch.setattr(ranking, "TEXTS", 4)
        assert equal(expected, retrieved(coarse, fine, image_of_text, top_k))
        lists = shortlists(lambda rows: coarse[rows], image_of_text, images=len(coarse), top_k=top_k, progress=False)
        pairs = listed_pairs(lists)
        shards = [
            fine_shard(
                lambda some: fine[some[:, 0], some[:, 1]], pairs, rank=rank, world_size=world_size, progress=False
            )
            for rank in range(world_size)
        ]
        assert sum(map(len, shards)) == len(pairs)
        assert equal(expected, rank_pairs(lists, pairs, merge_shards(pairs, shards), image_of_text))


@given(galleries())
@settings(deadline=None, max_examples=40)
def test_coarse_ranks_are_those_of_the_whole_gallery(gallery):
    coarse, _, image_of_text, _ = gallery
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "COARSE_IMAGES", 2)
        i2t, t2i = coarse_ranks(lambda rows: coarse[rows], image_of_text, images=len(coarse))
    everything = rank_shortlists(coarse, coarse, image_of_text, top_k=10**9)
    assert torch.equal(i2t, everything.ranks_i2t) and torch.equal(t2i, everything.ranks_t2i)


@given(gallery=galleries(), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=40)
def test_a_permuted_gallery_changes_no_rank(gallery, seed):
    coarse, fine, image_of_text, top_k = gallery
    # Without exact ties at the border of a shortlist, where only the order can decide.
    generator = torch.Generator().manual_seed(seed)
    coarse = coarse + torch.rand(coarse.shape, generator=generator, dtype=torch.float64) / 100
    expected = rank_shortlists(coarse, fine, image_of_text, top_k=top_k)
    images = torch.randperm(len(coarse), generator=generator)
    texts = torch.randperm(coarse.shape[1], generator=generator)
    found = rank_shortlists(
        coarse[images][:, texts], fine[images][:, texts], images.argsort()[image_of_text[texts]], top_k=top_k
    )
    assert torch.equal(found.ranks_i2t, expected.ranks_i2t[images])
    assert torch.equal(found.ranks_t2i, expected.ranks_t2i[texts])


def test_a_miss_has_no_rank_and_a_hit_behind_a_wrong_item_has_its_own():
    coarse = torch.tensor([[0.1, 0.9, 0.8, 0.7]])
    image_of_text = torch.tensor([0, 0, 0, 0])
    image_of_text[1:] = 1
    coarse = torch.cat([coarse, torch.zeros(1, 4)])
    fine = torch.tensor([[9.0, 1.0, 2.0, 3.0], [0.0, 5.0, 5.0, 5.0]])
    assert rank_shortlists(coarse, fine, image_of_text, top_k=3).ranks_i2t[0] == INF
    assert rank_shortlists(coarse, fine, image_of_text, top_k=4).ranks_i2t[0] == 0


def test_a_tie_at_the_border_leaves_the_correct_item_outside():
    coarse = torch.zeros(3, 4)  # everything ties
    fine = torch.zeros(3, 4)
    image_of_text = torch.tensor([0, 1, 2, 0])
    found = rank_shortlists(coarse, fine, image_of_text, top_k=2)
    assert found.ranks_i2t.tolist() == [INF] * 3  # two or three wrong texts fill two places
    assert found.ranks_t2i.tolist() == [INF] * 4
    found = rank_shortlists(coarse, fine, image_of_text, top_k=3)
    assert found.ranks_i2t.tolist() == [2, INF, INF]
    assert found.ranks_t2i.tolist() == [2] * 4


def test_an_image_without_captions_has_no_rank_but_distracts():
    coarse = torch.tensor([[0.5, 0.2], [0.9, 0.1]])
    found = rank_shortlists(coarse, coarse, torch.tensor([0, 0]), top_k=2)
    assert found.ranks_i2t.tolist() == [0, INF]
    assert found.ranks_t2i.tolist() == [1, 0]


def test_float32_scores_are_not_rounded_to_a_tie():
    coarse = torch.tensor([[1.0, 1.0 + 2**-23]])
    coarse = torch.cat([coarse, coarse])
    found = rank_shortlists(coarse, coarse, torch.tensor([0, 1]), top_k=1)
    assert found.top_i2t.tolist() == [[1], [1]]
    double = torch.tensor([[1.0, 1.0 + 2**-50]] * 2, dtype=torch.float64)
    assert rank_shortlists(double, double, torch.tensor([0, 1]), top_k=1).top_i2t.tolist() == [[1], [1]]


def test_every_listed_pair_is_scored_once(small_blocks):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(7, 11, generator=generator)
    seen = []

    def score_pairs(pairs):
        assert (pairs[:, 0].diff() >= 0).all()
        seen.extend(map(tuple, pairs.tolist()))
        return coarse[pairs[:, 0], pairs[:, 1]]

    image_of_text = torch.arange(11) % 7
    found = retrieve(lambda rows: coarse[rows], score_pairs, image_of_text, images=7, top_k=3, progress=False)
    assert len(seen) == len(set(seen)) < 7 * 3 + 11 * 3
    assert {(i, j) for i in range(7) for j in found.top_i2t[i].tolist()} <= set(seen)
    assert {(i, j) for j in range(11) for i in found.top_t2i[j].tolist()} <= set(seen)


def test_the_coarse_matrix_is_never_requested_whole(small_blocks):
    asked = []
    coarse = torch.rand(7, 11)

    def blocks(rows):
        asked.append((rows.start, rows.stop))
        return coarse[rows]

    shortlists(blocks, torch.arange(11) % 7, images=7, top_k=2, progress=False)
    assert asked == [(0, 2), (2, 4), (4, 6), (6, 7)]


def test_release_coarse_is_added_to_the_fine_score():
    generator = torch.Generator().manual_seed(2)
    coarse, rest = torch.rand(2, 5, 8, generator=generator)
    image_of_text = torch.arange(8) % 5
    found = retrieved(coarse, rest, image_of_text, 3, add_coarse=True)
    assert equal(found, rank_shortlists(coarse, coarse + rest, image_of_text, top_k=3))
    assert not equal(found, rank_shortlists(coarse, rest, image_of_text, top_k=3))


@pytest.mark.parametrize("where", ["coarse", "fine"])
def test_nan_is_an_error(where):
    scores = {"coarse": torch.rand(3, 4), "fine": torch.rand(3, 4)}
    scores[where][2, 1] = math.nan
    image_of_text = torch.tensor([0, 1, 2, 0])
    with pytest.raises(ValueError, match=f"{where} holds 1 NaN"):
        rank_shortlists(scores["coarse"], scores["fine"], image_of_text, top_k=2)
    with pytest.raises(ValueError, match="NaN"):
        retrieved(scores["coarse"], scores["fine"], image_of_text, 4)


def test_wrong_arguments_are_named():
    scores = torch.rand(3, 4)
    good = torch.tensor([0, 1, 2, 0])
    with pytest.raises(ValueError, match=r"image_of_text has 3 entries but scores are \(3, 4\)"):
        rank_shortlists(scores, scores, good[:3], top_k=2)
    with pytest.raises(ValueError, match=r"fine is \(4, 3\) and coarse \(3, 4\)"):
        rank_shortlists(scores, scores.T, good, top_k=2)
    with pytest.raises(ValueError, match="holds 0 to 3 for 3 images"):
        rank_shortlists(scores, scores, torch.tensor([0, 1, 3, 0]), top_k=2)
    with pytest.raises(ValueError, match="top_k is 0"):
        rank_shortlists(scores, scores, good, top_k=0)
    with pytest.raises(ValueError, match="0 images and 0 texts"):
        rank_shortlists(scores[:0, :0], scores[:0, :0], good[:0], top_k=1)
    with pytest.raises(ValueError, match=r"coarse gave \(1, 4\) for images 0:3"):
        shortlists(lambda rows: scores[:1], good, images=3, top_k=2, progress=False)

    def one_score(pairs):
        return scores[:1, 0]

    with pytest.raises(ValueError, match=r"score_pairs gave \(1,\)"):
        retrieve(lambda rows: scores[rows], one_score, good, images=3, top_k=2, progress=False)
    pairs = listed_pairs(shortlists(lambda rows: scores[rows], good, images=3, top_k=2, progress=False))
    with pytest.raises(ValueError, match="rank is 2 of world_size 2"):
        fine_shard(one_score, pairs, rank=2, world_size=2)
    with pytest.raises(ValueError, match=r"shard 0 of 2 holds 1 scores"):
        merge_shards(pairs, [torch.zeros(1), torch.zeros(0)])


@given(galleries())
@settings(deadline=None, max_examples=30)
def test_the_curve_equals_ranking_with_every_k(gallery):
    coarse, fine, image_of_text, _ = gallery
    asked = torch.bincount(image_of_text, minlength=len(coarse)) > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "ENTRIES", 5)
        values, coarse_rsum = recalls_by_k(coarse, fine, image_of_text)
    assert len(values) == max(coarse.shape)
    for k, figures in enumerate(values.tolist(), start=1):
        row = dict(zip(COLUMNS, figures, strict=True))
        found = rank_shortlists(coarse, fine, image_of_text, top_k=k)
        expected = retrieval_metrics(found.ranks_i2t[asked], found.ranks_t2i)
        for name in ("r1_i2t", "r5_i2t", "r10_i2t", "r1_t2i", "r5_t2i", "r10_t2i", "rsum"):
            assert row[name] == pytest.approx(getattr(expected, name))
        assert row["ceiling_i2t"] == pytest.approx(100 - expected.missed_i2t)
        assert row["ceiling_t2i"] == pytest.approx(100 - expected.missed_t2i)
        lists = shortlists(lambda rows: coarse[rows], image_of_text, images=len(coarse), top_k=k, progress=False)
        assert row["pairs"] == len(listed_pairs(lists))
    everything = rank_shortlists(coarse, coarse, image_of_text, top_k=10**9)
    assert coarse_rsum == pytest.approx(retrieval_metrics(everything.ranks_i2t[asked], everything.ranks_t2i).rsum)


def test_the_curve_suggests_the_smallest_k_that_is_close_to_the_full_ranking(tmp_path):
    def of(rsums):
        values = torch.zeros(len(rsums), len(COLUMNS)).double().numpy()
        values[:, COLUMNS.index("rsum")] = rsums
        return Curve(values, {1: 0.5, len(rsums): 2.0}, {1: 10.0, len(rsums): 11.0}, 3.0, 100.0)

    assert of([200.0, 399.8, 399.9, 400.0]).suggested_k == 3
    assert of([200.0, 410.0, 395.0, 400.0]).suggested_k == 2  # better than the full ranking is good enough
    assert of([400.0]).suggested_k == 1
    assert "K=3 is enough" in of([200.0, 399.8, 399.9, 400.0]).summary()
    mean = mean_curve([of([200.0, 400.0]), of([300.0, 400.0, 500.0])])
    assert mean.rsum.tolist() == [250.0, 400.0, 450.0]
    mean.save(tmp_path)
    lines = (tmp_path / "curve.csv").read_text().splitlines()
    assert (
        lines[0].startswith("k,ceiling_i2t") and len(lines) == 4 and lines[1].split(",")[-2:] == ["0.5000", "10.0000"]
    )
    assert lines[2].split(",")[-2:] == ["", ""]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("add_coarse", [False, True])
def test_the_curve_of_callables(add_coarse, small_blocks):
    generator = torch.Generator().manual_seed(4)
    coarse, fine = torch.rand(2, 6, 13, generator=generator)
    image_of_text = torch.arange(13) % 6
    complete = coarse + fine if add_coarse else fine
    scores = SimpleNamespace(
        coarse=lambda rows: coarse[rows],
        fine=lambda rows: complete[rows],
        pairs=lambda pairs: fine[pairs[:, 0], pairs[:, 1]],
        image_of_text=image_of_text,
        images=6,
        adds_coarse=add_coarse,
    )
    found = trade_off(scores, meter=StageMeter(torch.device("cpu")), progress=False)
    values, _ = recalls_by_k(coarse, complete, image_of_text)
    assert (found.values == values).all()
    assert list(found.seconds) == [1, 2, 5, 10, 13] == list(found.host_peak_mib)
