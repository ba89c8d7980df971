import doctest
import math

import numpy as np
import pytest
import references
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hacan.retrieval import metrics
from hacan.retrieval.metrics import (
    mean_of_metrics,
    mean_rank,
    median_rank,
    missed,
    ranks_of_first_match,
    recall_at,
    release_ranks,
    retrieval_metrics,
    rsum,
)
from hacan.retrieval.significance import TITLES, paired_test, recall_intervals

INF = math.inf


def test_the_worked_example():
    assert doctest.testmod(metrics, extraglobs={"torch": torch}).failed == 0


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_ranks_are_those_of_sorting(data):
    queries, items = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    value = st.sampled_from([-2.0, -1.0, 0.0, -0.0, 0.5, 1.0, INF, -INF])
    scores = data.draw(st.lists(st.lists(value, min_size=items, max_size=items), min_size=queries, max_size=queries))
    query_images = data.draw(st.lists(st.integers(0, 3), min_size=queries, max_size=queries))
    item_images = data.draw(st.lists(st.integers(0, 3), min_size=items, max_size=items))
    found = ranks_of_first_match(
        torch.tensor(scores), query_images=torch.tensor(query_images), item_images=torch.tensor(item_images)
    )
    for q in range(queries):
        right = [image == query_images[q] for image in item_images]
        order = sorted(range(items), key=lambda g, q=q, right=right: (-scores[q][g], right[g]))
        assert found[q] == references.loop_rank(order, right.__getitem__)


def test_a_tie_with_a_wrong_item_counts_against_the_model_and_with_a_correct_one_does_not():
    scores = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    query = torch.tensor([7])
    assert ranks_of_first_match(scores, query_images=query, item_images=torch.tensor([7, 7, 7, 1])).tolist() == [0]
    assert ranks_of_first_match(scores, query_images=query, item_images=torch.tensor([7, 3, 7, 1])).tolist() == [1]
    assert ranks_of_first_match(scores, query_images=query, item_images=torch.tensor([0, 3, 7, 7])).tolist() == [2]


def test_a_collapsed_scorer_gets_nothing_for_its_ties():
    image_of_text = torch.arange(4).repeat_interleave(5)
    scores = torch.zeros(4, 20)
    i2t = ranks_of_first_match(scores, query_images=torch.arange(4), item_images=image_of_text)
    t2i = ranks_of_first_match(scores.T, query_images=image_of_text, item_images=torch.arange(4))
    assert i2t.tolist() == [15.0] * 4 and t2i.tolist() == [3.0] * 20
    assert recall_at(i2t, 10) == 0


def test_a_query_without_a_correct_item_is_a_miss():
    scores = torch.rand(2, 3)
    ranks = ranks_of_first_match(scores, query_images=torch.tensor([0, 9]), item_images=torch.tensor([0, 0, 0]))
    assert ranks.tolist() == [0, INF]


def test_nan_is_an_error_with_its_position():
    scores = torch.zeros(2, 3)
    scores[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"1 NaN of 6, the first at \[1, 2\]"):
        ranks_of_first_match(scores, query_images=torch.arange(2), item_images=torch.zeros(3))
    with pytest.raises(ValueError, match="NaN or negative"):
        recall_at(torch.tensor([0.0, math.nan]), 1)
    with pytest.raises(ValueError, match="NaN or negative"):
        recall_at(torch.tensor([-1.0]), 1)


def test_metrics_of_hand_made_ranks():
    i2t = torch.tensor([0.0, 4.0, INF, 9.0, 1.0])
    t2i = torch.tensor([0.0, 0.0, 10.0, 5.0])
    assert [recall_at(i2t, k) for k in (1, 5, 10)] == [20.0, 60.0, 80.0]
    assert [recall_at(t2i, k) for k in (1, 5, 10)] == [50.0, 50.0, 75.0]
    assert rsum(i2t, t2i) == 335.0
    assert median_rank(i2t) == 5.0 and mean_rank(i2t) == 4.5 and missed(i2t) == 20.0
    assert median_rank(t2i) == 3.0  # between ranks 1 and 6 (from 1): floor(2.5) + 1
    found = retrieval_metrics(i2t, t2i)
    assert found.rsum == 335.0 and found.r5_i2t == 60.0 and found.r10_t2i == 75.0
    assert found.missed_t2i == 0 and found.mean_t2i == 4.75


def test_median_and_mean_of_misses():
    assert median_rank(torch.tensor([0.0, INF])) == INF  # half of the queries miss
    assert median_rank(torch.tensor([0.0, 1.0, INF])) == 2.0
    assert mean_rank(torch.tensor([INF, INF])) == INF
    assert mean_rank(torch.tensor([INF, 3.0])) == 4.0


def test_no_queries_is_an_error():
    for figure in (median_rank, mean_rank, missed, lambda ranks: recall_at(ranks, 1)):
        with pytest.raises(ValueError, match="at least one query"):
            figure(torch.zeros(0))


def test_recalls_are_exact_percentages():
    assert recall_at(torch.tensor([0.0] * 11 + [9.0] * 9), 5) == 55.0


def test_the_release_rule_gives_a_random_scorer_what_method_says():
    # METHOD section 6: an Rsum of 575 on 1,000 images at K = 50. Shortlists of random scores hold a correct text for
    # about a quarter of the images (5 captions) and the image for a twentieth of the texts, at random places.
    generator = torch.Generator().manual_seed(0)
    place = torch.rand(1000, 5, generator=generator).mul(5000).floor().amin(1).double()
    i2t = torch.where(place < 50, place, torch.tensor(INF, dtype=torch.float64))
    place = torch.rand(5000, generator=generator).mul(1000).floor().double()
    t2i = torch.where(place < 50, place, torch.tensor(INF, dtype=torch.float64))
    assert rsum(i2t, t2i) < 12
    assert rsum(release_ranks(i2t), release_ranks(t2i)) == pytest.approx(575, abs=15)
    assert release_ranks(torch.tensor([3.0, INF])).tolist() == [3.0, 0.0]


def test_mean_over_folds():
    one = retrieval_metrics(torch.tensor([0.0]), torch.tensor([0.0, 9.0]))
    other = retrieval_metrics(torch.tensor([7.0]), torch.tensor([0.0, 0.0]))
    mean = mean_of_metrics([one, other])
    assert mean.r1_i2t == 50.0 and mean.r1_t2i == 75.0 and mean.rsum == (one.rsum + other.rsum) / 2
    with pytest.raises(ValueError, match="at least one fold"):
        mean_of_metrics([])


def test_bootstrap_intervals_are_those_of_drawing_queries():
    ranks = torch.tensor([0.0, 0.0, 3.0, 7.0, INF, 20.0, 1.0, 0.0])
    drawn = references.loop_bootstrap(ranks.tolist(), 5, 3000, np.random.default_rng(1))
    found = recall_intervals([(ranks, ranks)], resamples=20_000, seed=0)
    assert found["r5_i2t"] == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=12.6)  # one query is 12.5
    assert found["r5_i2t"][0] < recall_at(ranks, 5) < found["r5_i2t"][1]
    assert list(found) == list(TITLES)


def test_bootstrap_of_certain_recalls_has_no_width_and_folds_narrow_it():
    sure = torch.zeros(6)
    assert set(recall_intervals([(sure, sure)], resamples=50, seed=0).values()) == {(100.0, 100.0), (600.0, 600.0)}
    ranks = torch.tensor([0.0, 99.0] * 10)
    one = recall_intervals([(ranks, ranks)], resamples=4000, seed=0)["r1_i2t"]
    five = recall_intervals([(ranks, ranks)] * 5, resamples=4000, seed=0)["r1_i2t"]
    assert one == recall_intervals([(ranks, ranks)], resamples=4000, seed=0)["r1_i2t"]
    assert (five[1] - five[0]) == pytest.approx((one[1] - one[0]) / math.sqrt(5), rel=0.15)


def test_the_bootstrap_of_rsum_draws_a_query_once_for_all_its_recalls():
    # All recalls of a direction move together when every rank is either 0 or a miss: the width of Rsum is six times
    # (two directions in quadrature) that of one recall, not the root of six.
    ranks = torch.tensor([0.0, INF] * 200)
    found = recall_intervals([(ranks, ranks)], resamples=20_000, seed=0)
    one = found["r1_i2t"][1] - found["r1_i2t"][0]
    assert found["rsum"][1] - found["rsum"][0] == pytest.approx(3 * math.sqrt(2) * one, rel=0.05)


def test_paired_test_against_flipping_every_query():
    generator = np.random.default_rng(3)
    ours = torch.from_numpy(generator.choice([0.0, 3.0, 8.0, INF], size=30, p=[0.5, 0.2, 0.1, 0.2]))
    theirs = torch.from_numpy(generator.choice([0.0, 3.0, 8.0, INF], size=30, p=[0.2, 0.2, 0.2, 0.4]))
    found = paired_test([(ours, ours)], [(theirs, theirs)], resamples=20_000, seed=0)
    difference = ((ours < 1).int() - (theirs < 1).int()).numpy()
    assert found["r1_i2t"]["difference"] == pytest.approx(100 * difference.mean())
    flips = generator.choice([-1, 1], size=(20_000, 30)) * difference
    p = (np.abs(flips.sum(1)) >= abs(difference.sum())).mean()
    assert found["r1_i2t"]["p"] == pytest.approx(p, abs=0.02)
    assert found["rsum"]["difference"] == pytest.approx(rsum(ours, ours) - rsum(theirs, theirs))
    assert found["rsum"]["low"] < found["rsum"]["difference"] < found["rsum"]["high"]
    turned = paired_test([(theirs, theirs)], [(ours, ours)], resamples=20_000, seed=0)
    assert turned["rsum"]["difference"] == pytest.approx(-found["rsum"]["difference"])


def test_paired_test_of_equals_and_of_extremes():
    ranks = torch.tensor([0.0, 4.0, INF])
    same = paired_test([(ranks, ranks)], [(ranks, ranks)], resamples=100)
    assert all(row == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0} for row in same.values())
    perfect, hopeless = torch.zeros(40), torch.full((40,), INF)
    best = paired_test([(perfect, perfect)], [(hopeless, hopeless)], resamples=1000)["rsum"]
    assert best["difference"] == 600.0 and best["p"] == pytest.approx(1 / 1001)
    with pytest.raises(ValueError, match="ours ranks 3 queries and theirs 40"):
        paired_test([(ranks, ranks)], [(perfect, perfect)])
