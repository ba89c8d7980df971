import math

import pytest
import references
import torch
import torch.nn.functional as F

from hacan.losses import (
    HARD_NEGATIVE_LOSSES,
    global_loss,
    hard_negatives,
    info_nce,
    share_of_active_hinges,
    triplet_ranking_loss,
    triplet_ranking_loss_all,
)
from hacan.types import HardNegatives

NAMES = [*HARD_NEGATIVE_LOSSES, "InfoNCE"]
IDS = {
    "all different": [4, 2, 9, 1, 7],
    "some images twice": [4, 2, 4, 1, 2],
    "all of one image": [3, 3, 3, 3, 3],
    "one pair": [8],
}


def batch(ids, *, seed=0, width=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    count = len(ids)
    scores = torch.randn(count, count, generator=generator, dtype=dtype)
    embeddings = F.normalize(torch.randn(2, count, width, generator=generator, dtype=dtype), dim=-1)
    return scores, embeddings[0], embeddings[1], torch.tensor(ids)


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_hard_negatives_are_those_of_the_loop(ids):
    for seed in range(20):
        scores, _, _, image_ids = batch(ids, seed=seed)
        found = hard_negatives(scores, image_ids)
        text_of_image, image_of_text = references.loop_hard_negatives(scores.tolist(), ids)
        assert found.text_of_image.tolist() == text_of_image
        assert found.image_of_text.tolist() == image_of_text
        assert found.text_of_image.dtype == found.image_of_text.dtype == torch.int64


def test_hard_negatives_look_at_scores_and_not_at_clamped_costs():
    # Every hinge is satisfied: the argmax of the costs would be 0, the positive of pair 0 itself.
    scores = torch.tensor([[9.0, -3.0, -2.0], [-4.0, 9.0, -1.0], [-5.0, -6.0, 9.0]])
    found = hard_negatives(scores, torch.arange(3))
    assert found.text_of_image.tolist() == [2, 2, 0]
    assert found.image_of_text.tolist() == [1, 0, 1]


def test_rows_and_columns_are_not_swapped():
    scores = torch.tensor([[0.0, 5.0, 1.0], [2.0, 0.0, 3.0], [4.0, 0.5, 0.0]])
    found = hard_negatives(scores, torch.arange(3))
    assert found.text_of_image.tolist() == [1, 2, 0]
    assert found.image_of_text.tolist() == [2, 0, 1]


def test_tied_negatives_are_negatives_all_the_same():
    scores = torch.ones(4, 4)
    ids = torch.tensor([0, 1, 1, 2])
    found = hard_negatives(scores, ids)
    for pair in range(4):
        assert ids[found.text_of_image[pair]] != ids[pair]
        assert ids[found.image_of_text[pair]] != ids[pair]
    assert triplet_ranking_loss(scores, found, margin=0.2, reduction="mean").item() == pytest.approx(0.4)


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_triplet_losses_are_those_of_the_loop(ids):
    for seed in range(10):
        scores, _, _, image_ids = batch(ids, seed=seed)
        negatives = hard_negatives(scores, image_ids)
        expected = references.loop_triplet(scores.tolist(), *(n.tolist() for n in negatives), 0.2)
        total = triplet_ranking_loss(scores, negatives, margin=0.2, reduction="sum")
        assert total.item() == pytest.approx(expected, abs=1e-12)
        mean = triplet_ranking_loss(scores, negatives, margin=0.2, reduction="mean")
        assert mean.item() == pytest.approx(expected / len(ids), abs=1e-12)
        everything = triplet_ranking_loss_all(scores, image_ids, margin=0.2, reduction="sum")
        assert everything.item() == pytest.approx(references.loop_triplet_all(scores.tolist(), ids, 0.2), abs=1e-12)
        assert triplet_ranking_loss_all(scores, image_ids, margin=0.2, reduction="mean").item() == pytest.approx(
            everything.item() / len(ids), abs=1e-12
        )


@pytest.mark.parametrize("name", HARD_NEGATIVE_LOSSES)
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_global_losses_are_those_of_the_loop(name, ids):
    for seed in range(10):
        scores, images, texts, image_ids = batch(ids, seed=seed)
        negatives = hard_negatives(scores, image_ids)
        found = global_loss(name, images, texts, negatives, margin=0.2)
        lists = images.tolist(), texts.tolist(), *(n.tolist() for n in negatives)
        assert found.item() == pytest.approx(references.loop_global_loss(name, *lists, 0.2), abs=1e-12)


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_info_nce_is_that_of_the_loop(ids):
    _, images, texts, image_ids = batch(ids)
    found = global_loss("InfoNCE", images, texts, None, margin=0.2, temperature=0.05, image_ids=image_ids)
    expected = references.loop_info_nce(images.tolist(), texts.tolist(), ids, 0.05)
    assert found.item() == pytest.approx(expected, abs=1e-10)


def test_info_nce_without_image_ids_takes_all_images_for_different():
    _, images, texts, _ = batch([1, 1, 2])
    assert info_nce(images, texts, temperature=0.1) == info_nce(
        images, texts, temperature=0.1, image_ids=torch.arange(3)
    )
    assert info_nce(images, texts, temperature=0.1) > info_nce(
        images, texts, temperature=0.1, image_ids=torch.tensor([1, 1, 2])
    )


def test_the_flag_of_equal_negatives_is_element_wise():
    # Pair 0 has two different negatives, pairs 1 and 2 the same one twice. The release's broadcast would multiply the
    # mean of the flags by the mean of the hinges.
    text, image = torch.tensor([1, 2, 0]), torch.tensor([2, 2, 0])
    _, images, texts, _ = batch([0, 1, 2], seed=3)
    positive = (images * texts).sum(1)

    def hinge(a, b):
        return (0.2 + (a * b).sum(1) - positive).clamp(min=0)

    rest = hinge(images, texts[text]) + hinge(images[image], texts)
    rest = rest + hinge(images[image], images) + hinge(texts[text], texts)
    mixed = hinge(images[image], texts[text])
    flag = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    found = global_loss("F_HN", images, texts, HardNegatives(text, image), margin=0.2).item()
    assert found == pytest.approx((rest.mean() + (flag * mixed).mean()).item(), abs=1e-12)
    assert found != pytest.approx((rest.mean() + (flag * mixed[:, None]).mean()).item(), abs=1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_gradients_of_global_losses(name, ids):
    scores, images, texts, image_ids = batch(ids, seed=1)
    negatives = hard_negatives(scores, image_ids)

    def loss(a, b):
        return global_loss(name, a, b, negatives, margin=0.2, image_ids=image_ids)

    assert torch.autograd.gradcheck(loss, (images.requires_grad_(), texts.requires_grad_()))


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_gradients_of_triplet_losses(ids):
    scores, _, _, image_ids = batch(ids, seed=2)
    negatives = hard_negatives(scores, image_ids)
    scores.requires_grad_()
    for reduction in ("sum", "mean"):
        assert torch.autograd.gradcheck(
            lambda s, r=reduction: triplet_ranking_loss(s, negatives, margin=0.2, reduction=r), (scores,)
        )
        assert torch.autograd.gradcheck(
            lambda s, r=reduction: triplet_ranking_loss_all(s, image_ids, margin=0.2, reduction=r), (scores,)
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_losses_and_gradients_are_finite_on_zeros_and_on_equals(name, ids):
    for value in (0.0, 1.0):
        images = torch.full((len(ids), 6), value, requires_grad=True)
        texts = torch.full((len(ids), 6), value, requires_grad=True)
        image_ids = torch.tensor(ids)
        scores = images @ texts.T
        negatives = hard_negatives(scores, image_ids)
        loss = global_loss(name, images, texts, negatives, margin=0.2, image_ids=image_ids)
        loss = loss + triplet_ranking_loss(scores, negatives, margin=0.2, reduction="sum")
        loss = loss + triplet_ranking_loss_all(scores, image_ids, margin=0.2, reduction="sum")
        loss.backward()
        assert math.isfinite(loss.item())
        assert torch.isfinite(images.grad).all() and torch.isfinite(texts.grad).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ids", [IDS["all of one image"], IDS["one pair"]], ids=["all of one image", "one pair"])
def test_without_a_negative_the_losses_are_zero_and_move_nothing(name, ids):
    scores, images, texts, image_ids = batch(ids)
    images.requires_grad_(), scores.requires_grad_()
    negatives = hard_negatives(scores, image_ids)
    assert negatives.text_of_image.tolist() == [-1] * len(ids) == negatives.image_of_text.tolist()
    loss = global_loss(name, images, texts, negatives, margin=0.2, image_ids=image_ids)
    triplet = triplet_ranking_loss(scores, negatives, margin=0.2, reduction="mean")
    (loss + triplet).backward()
    assert loss.item() == pytest.approx(0, abs=1e-12) and triplet.item() == 0
    assert images.grad.abs().max() < 1e-12 and scores.grad.abs().max() == 0
    assert share_of_active_hinges(scores, negatives, margin=0.2).item() == 0


def test_a_pair_without_negative_beside_pairs_with_one():
    # The caller may hand in such negatives: image 0 has none, image 1 and 2 have each other.
    negatives = HardNegatives(torch.tensor([-1, 2, 1]), torch.tensor([-1, 2, 1]))
    scores, images, texts, _ = batch([0, 1, 2])
    for name in HARD_NEGATIVE_LOSSES:
        found = global_loss(name, images, texts, negatives, margin=0.2)
        lists = images.tolist(), texts.tolist(), [-1, 2, 1], [-1, 2, 1]
        assert found.item() == pytest.approx(references.loop_global_loss(name, *lists, 0.2), abs=1e-12)
    expected = references.loop_triplet(scores.tolist(), [-1, 2, 1], [-1, 2, 1], 0.2)
    assert triplet_ranking_loss(scores, negatives, margin=0.2, reduction="sum").item() == pytest.approx(expected)


def test_share_of_active_hinges_counts_both_directions():
    scores = torch.tensor([[1.0, 0.9, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    negatives = hard_negatives(scores, torch.arange(3))
    # Active: image 0 against text 1, text 1 against image 0; six hinges in all.
    assert share_of_active_hinges(scores, negatives, margin=0.2).item() == pytest.approx(2 / 6)
    assert share_of_active_hinges(scores, negatives, margin=0.0).item() == 0
    assert share_of_active_hinges(scores, negatives, margin=2.0).item() == 1


def test_half_precision_is_summed_in_float32():
    scores, images, texts, image_ids = batch([0, 1, 2, 3])
    for dtype in (torch.float16, torch.bfloat16):
        negatives = hard_negatives(scores.to(dtype), image_ids)
        assert triplet_ranking_loss(scores.to(dtype), negatives, margin=0.2, reduction="sum").dtype == torch.float32
        for name in NAMES:
            found = global_loss(name, images.to(dtype), texts.to(dtype), negatives, margin=0.2)
            exact = global_loss(name, images.to(dtype).float(), texts.to(dtype).float(), negatives, margin=0.2)
            assert found.dtype == torch.float32 and found == exact


def test_the_batch_order_does_not_matter():
    scores, images, texts, image_ids = batch(IDS["some images twice"], seed=5)
    order = torch.tensor([3, 0, 4, 2, 1])
    for name in NAMES:
        values = []
        for rows in (torch.arange(5), order):
            part = scores[rows][:, rows]
            negatives = hard_negatives(part, image_ids[rows])
            values.append(
                global_loss(name, images[rows], texts[rows], negatives, margin=0.2, image_ids=image_ids[rows])
                + triplet_ranking_loss(part, negatives, margin=0.2, reduction="mean")
            )
        assert values[0].item() == pytest.approx(values[1].item(), abs=1e-12)


def test_wrong_arguments_are_named():
    scores, images, texts, image_ids = batch([0, 1, 2])
    negatives = hard_negatives(scores, image_ids)
    with pytest.raises(ValueError, match=r"unknown global loss 'gcd'.*GCD_revised.*InfoNCE"):
        global_loss("gcd", images, texts, negatives, margin=0.2)
    with pytest.raises(ValueError, match="unknown reduction 'max'"):
        triplet_ranking_loss(scores, negatives, margin=0.2, reduction="max")
    with pytest.raises(ValueError, match=r"scores are \(3, 2\)"):
        hard_negatives(scores[:, :2], image_ids)
    with pytest.raises(ValueError, match=r"scores are \(3, 3\) with \(2,\)"):
        hard_negatives(scores, image_ids[:2])
    with pytest.raises(ValueError, match="2 entries for 3 pairs"):
        global_loss("GCD", images, texts, hard_negatives(scores[:2, :2], image_ids[:2]), margin=0.2)
    with pytest.raises(ValueError, match="None for 3 pairs"):
        global_loss("M_HN", images, texts, None, margin=0.2)
    with pytest.raises(ValueError, match=r"\(3, 6\) and texts \(3, 5\)"):
        global_loss("GCD", images, texts[:, :5], negatives, margin=0.2)
