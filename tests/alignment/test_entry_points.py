"""All pairs, listed pairs, packing, budgets, precisions: the two entry points of the alignment agree."""

import pytest
import torch
from test_alignment import DIRECTIONS, FORMS, changed, features, form

from hacan.alignment import (
    HybridAlignment,
    RevisedAlignment,
    base,
    build_alignment,
    hyperparameters_of,
    pack_texts,
    register,
)
from hacan.alignment.scoring import groups_of_images, length_buckets, rounded
from hacan.errors import UserError
from hacan.types import EncodedImages, EncodedTexts, PackedTexts

SHUFFLED = torch.tensor([[2, 3], [0, 6], [2, 0], [1, 2], [0, 6], [2, 5], [0, 1], [1, 1], [2, 6]])


@pytest.mark.parametrize("score_memory", [256, 0.001])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("name", "focal_type"), FORMS)
def test_listed_pairs_are_entries_of_all_pairs(name, focal_type, direction, score_memory):
    images, texts = features(40, texts=(4, 1, 6, 0, 3, 5, 4))  # text 3 has no valid token
    scores = form(name, focal_type, direction)(images, texts)
    whole = torch.cartesian_prod(torch.arange(3), torch.arange(7))
    lists = {
        "shuffled, one pair twice": SHUFFLED,
        "one pair": torch.tensor([[1, 4]]),
        "whole gallery": whole,
        "whole gallery, mixed order": whole[torch.randperm(21, generator=torch.Generator().manual_seed(0))],
        "images 0 and 2 only": torch.tensor([[0, 1], [0, 2], [2, 0], [2, 1], [2, 6]]),
        "only a text without tokens": torch.tensor([[0, 3], [2, 3]]),
        "none": torch.zeros(0, 2, dtype=torch.int64),
    }
    alignment = form(name, focal_type, direction, score_memory=score_memory)
    for pairs in lists.values():
        found = alignment.pairs(images, texts, pairs)
        torch.testing.assert_close(found, scores[pairs[:, 0], pairs[:, 1]], atol=2e-6, rtol=0)


@pytest.mark.parametrize(("name", "focal_type"), FORMS)
def test_listed_pairs_of_one_stream(name, focal_type):
    images, texts = features(41)
    alignment = form(name, focal_type, "both")
    expected = alignment(images, texts, streams=("ksf",))[SHUFFLED[:, 0], SHUFFLED[:, 1]]
    found = alignment.pairs(images, texts, SHUFFLED, streams=("ksf",))
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("direction", ["i2t", "t2i"])
@pytest.mark.parametrize(("name", "focal_type"), FORMS)
def test_listed_pairs_have_the_gradients_of_all_pairs(name, focal_type, direction):
    images, texts = features(42, dtype=torch.float64)
    texts = changed(texts, torch.nan_to_num)
    leaves = [leaf.requires_grad_() for leaf in (images.high, images.mid, texts.high, texts.mid)]
    alignment = form(name, focal_type, direction)
    weights = torch.arange(1.0, len(SHUFFLED) + 1, dtype=torch.float64)
    listed = torch.autograd.grad((alignment.pairs(images, texts, SHUFFLED) * weights).sum(), leaves)
    matrix = alignment(images, texts)[SHUFFLED[:, 0], SHUFFLED[:, 1]]
    for found, expected in zip(listed, torch.autograd.grad((matrix * weights).sum(), leaves), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("name", "focal_type"), FORMS)
def test_scores_and_gradients_do_not_depend_on_the_budget(name, focal_type, direction):
    images, texts = features(43)
    texts = changed(texts, torch.nan_to_num)
    leaves = [leaf.requires_grad_() for leaf in (images.high, images.mid, texts.high, texts.mid)]
    results = []
    for score_memory in (0.001, 0.02, 1, 256):  # the smallest: one image, one caption, computed twice
        scores = form(name, focal_type, direction, score_memory=score_memory)(images, texts)
        results.append((scores, *torch.autograd.grad(scores.square().sum(), leaves)))
    for other in results[:-1]:
        for found, expected in zip(other, results[-1], strict=True):
            torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize(("name", "focal_type"), FORMS)
def test_gallery_order_and_company_change_nothing(name, focal_type):
    images, texts = features(44)
    alignment = form(name, focal_type, "both")
    scores = alignment(images, texts)
    for j in range(7):
        one = alignment(EncodedImages(*(x[1:2] for x in images)), EncodedTexts(*(x[j : j + 1] for x in texts)))
        torch.testing.assert_close(one[0, 0], scores[1, j], atol=2e-6, rtol=0)


@pytest.mark.parametrize(("name", "focal_type"), FORMS)
def test_packed_and_padded_texts_score_the_same(name, focal_type):
    images, texts = features(45)
    wide = texts._replace(
        high=torch.nn.functional.pad(texts.high, (0, 0, 0, 5), value=torch.nan),
        mid=torch.nn.functional.pad(texts.mid, (0, 0, 0, 5), value=torch.inf),
        mask=torch.nn.functional.pad(texts.mask, (0, 5)),
    )
    left = texts._replace(high=texts.high.flip(1), mid=texts.mid.flip(1), mask=texts.mask.flip(1))  # padding first
    left = changed(left, lambda t: torch.stack([_reversed(x, m) for x, m in zip(t, left.mask, strict=True)]))
    alignment = form(name, focal_type, "both")
    scores = alignment(images, texts)
    for same in (wide, left, pack_texts(texts), pack_texts(wide)):
        torch.testing.assert_close(alignment(images, same), scores, atol=2e-6, rtol=0)


def _reversed(tokens, mask):
    tokens = tokens.clone()
    tokens[mask] = tokens[mask].flip(0)
    return tokens


def test_packing_takes_any_mask():
    high = torch.arange(24.0).view(2, 4, 3)
    mask = torch.tensor([[True, False, True, True], [False, True, False, False]])
    packed = pack_texts(EncodedTexts(high, -high, mask, torch.ones(2, 3)))
    assert packed.offsets.tolist() == [0, 3, 4]
    assert packed.high[:, 0].tolist() == [0, 6, 9, 15]
    assert packed.mid[:, 0].tolist() == [0, -6, -9, -15]
    with pytest.raises(ValueError, match=r"mask \[2, 4\] of torch.int64"):
        pack_texts(EncodedTexts(high, high, mask.long(), torch.ones(2, 3)))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "focal_type"), FORMS)
def test_half_precision_features_are_scored_in_float32(name, focal_type, half):
    images, texts = features(46)
    texts = pack_texts(texts)
    images, texts = changed(images, lambda t: t.to(half)), changed(texts, lambda t: t.to(half))
    alignment = form(name, focal_type, "both")
    expected = alignment(changed(images, torch.Tensor.float), changed(texts, torch.Tensor.float))
    with torch.autocast("cpu", torch.bfloat16):
        scores = alignment(images, texts)
        listed = alignment.pairs(images, texts, SHUFFLED)
    assert scores.dtype == listed.dtype == torch.float32
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(listed, expected[SHUFFLED[:, 0], SHUFFLED[:, 1]], atol=2e-6, rtol=0)


@pytest.mark.parametrize(("name", "focal_type"), FORMS)
def test_autocast_does_not_reach_the_alignment(name, focal_type):
    images, texts = features(47)
    alignment = form(name, focal_type, "both", score_memory=0.001)
    images.high.requires_grad_()
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            scores = alignment(images, texts)
        results.append((scores, *torch.autograd.grad(scores.sum(), images.high)))
    for plain, inside in zip(*results, strict=True):
        torch.testing.assert_close(inside, plain, atol=0, rtol=0)


def test_float64_stays_float64():
    images, texts = features(48, dtype=torch.float64)
    assert HybridAlignment(direction="i2t", lambda_softmax=9.0, focal_type="prob")(images, texts).dtype == torch.float64
    assert RevisedAlignment(direction="t2i").pairs(images, texts, SHUFFLED).dtype == torch.float64


@pytest.mark.parametrize(("name", "focal_type"), FORMS)
def test_no_texts_and_no_valid_token_at_all(name, focal_type):
    images, texts = features(49, texts=(0, 0))
    alignment = form(name, focal_type, "both")
    assert torch.equal(alignment(images, texts), torch.zeros(3, 2))
    none = PackedTexts(torch.zeros(0, 8), torch.zeros(0, 8), torch.zeros(1, dtype=torch.int64), torch.zeros(0, 8))
    assert alignment(images, none).shape == (3, 0)
    empty = EncodedImages(*(x[:0] for x in images))
    assert alignment(empty, features(49)[1]).shape == (0, 7)


def test_pairs_out_of_the_gallery_are_named():
    images, texts = features(50)
    alignment = RevisedAlignment(direction="i2t")
    with pytest.raises(ValueError, match="outside of 3 images and 7 texts"):
        alignment.pairs(images, texts, torch.tensor([[6, 2]]))
    with pytest.raises(ValueError, match=r"\[2, 3\] of torch.int64, expected \[P, 2\]"):
        alignment.pairs(images, texts, torch.zeros(2, 3, dtype=torch.int64))


def test_length_buckets_cover_sorted_captions_with_little_padding():
    lengths = sorted(torch.randint(1, 30, (500,), generator=torch.Generator().manual_seed(0)).tolist())
    buckets = length_buckets(lengths, tokens=1000)
    assert [place for bucket in buckets for place in range(500)[bucket]] == list(range(500))
    padded = [(bucket.stop - bucket.start) * rounded(lengths[bucket][-1]) for bucket in buckets]
    assert max(padded) <= 1000
    assert sum(padded) < 1.15 * sum(lengths)
    assert length_buckets([7], tokens=1) == [slice(0, 1)]  # a single caption is never cut


def test_groups_of_images_cover_every_pair_once():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 12, (300,), generator=generator).sort().values
    lengths = torch.randint(1, 9, (300,), generator=generator)
    groups = list(groups_of_images(images, lengths, tokens=400))
    assert max(len(group) for group in groups) > 1
    assert torch.cat([group[group >= 0] for group in groups]).sort().values.tolist() == list(range(300))
    for group in groups:
        for row in group:
            assert len(images[row[row >= 0]].unique()) == 1  # a row is the list of one image
            assert row.tolist() == sorted(row.tolist())  # right-aligned


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("name", "focal_type"), FORMS)
def test_equations_take_batch_dimensions_as_matmul_does(name, focal_type, direction):
    images, texts = features(53, images=6, texts=(4, 1, 6, 2, 3, 5, 4, 2))
    alignment = form(name, focal_type, direction)
    tokens, mask = texts.high.nan_to_num(), texts.mask
    for equation in (alignment.key_semantic_filter, alignment.local_relationship_guidance):
        regions = images.high.view(3, 2, *images.high.shape[1:])
        batched = equation(regions, tokens.view(1, 8, *tokens.shape[1:]).expand(3, -1, -1, -1), mask.expand(3, -1, -1))
        assert batched.shape == (3, 2, 8)
        torch.testing.assert_close(batched.flatten(0, 1), equation(images.high, tokens, mask), atol=1e-6, rtol=0)
        own = equation(images.high[:4, None], tokens.view(4, 2, *tokens.shape[1:]), mask.view(4, 2, -1))
        whole = equation(images.high[:4], tokens, mask).view(4, 4, 2)
        torch.testing.assert_close(own[:, 0], whole[torch.arange(4), torch.arange(4)], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("name", "focal_type"), FORMS)
def test_later_calls_do_not_change_earlier_scores(name, focal_type):
    images, texts = features(44)
    alignment = form(name, focal_type, "both")
    with torch.inference_mode():
        first = alignment.pairs(images, texts, SHUFFLED)
        kept = first.clone()
        alignment(*features(45))
    assert torch.equal(first, kept)
    with torch.no_grad():
        torch.testing.assert_close(alignment.pairs(images, texts, SHUFFLED), kept)


# ------------------------------------------------------------------------------------- a researcher's first experiments


def test_an_edited_equation_changes_training_and_evaluation_alike(monkeypatch):
    images, texts = features(60)
    alignment, slope = form("hybrid", "prob", "both"), torch.nn.functional.leaky_relu
    before = alignment(images, texts)
    monkeypatch.setattr(torch.nn.functional, "leaky_relu", lambda x, _: slope(x, 0.5))
    texts = changed(texts, lambda t: t.nan_to_num().requires_grad_())
    trained = alignment(images, texts)
    assert trained.requires_grad and (trained - before).abs().max() > 1e-3
    with torch.inference_mode():
        torch.testing.assert_close(alignment(images, texts), trained.detach())
        listed = alignment.pairs(images, texts, SHUFFLED)
    torch.testing.assert_close(listed, trained.detach()[SHUFFLED[:, 0], SHUFFLED[:, 1]], atol=2e-6, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_a_plain_softmax_without_the_norm_over_queries_is_finite(scale):
    class PlainSoftmax(HybridAlignment):
        def weights(self, dots, s_mask, focal):
            logits = self.lambda_softmax * dots
            if s_mask is not None:
                logits = logits.masked_fill(~s_mask[..., None, None], -torch.inf)
            w = logits.softmax(-3)
            return self.focal_weights(w, s_mask) if focal else w

    images, texts = features(61, scale=scale)
    images.high.requires_grad_()
    scores = PlainSoftmax(direction="both", lambda_softmax=9.0, focal_type="prob")(images, texts)
    assert scores.isfinite().all()
    assert torch.autograd.grad(scores.sum(), images.high)[0].isfinite().all()


def test_hyperparameters_are_those_of_the_constructor_and_of_its_parents():
    class Scaled(HybridAlignment):
        def __init__(self, *, extra, depth=2, **rest):
            super().__init__(**rest)
            self.extra, self.depth = extra, depth

    assert list(hyperparameters_of(RevisedAlignment)) == ["direction"]
    assert set(hyperparameters_of(Scaled)) == {"direction", "lambda_softmax", "focal_type", "ksf", "extra", "depth"}
    values = {"direction": "t2i", "lambda_softmax": 3.0, "focal_type": "equal", "extra": "x"}
    assert Scaled(**values).hyperparameters == values | {"depth": 2, "ksf": "focal"}


def test_forms_are_built_from_the_registry(monkeypatch):
    monkeypatch.setattr(base, "FORMS", dict(base.FORMS))

    @register("unlike")
    class Unlike(RevisedAlignment):
        def __init__(self, *, width, **rest):
            super().__init__(**rest)
            self.width = width

    values = {"direction": "t2i", "focal_type": "prob"}
    with pytest.raises(UserError, match=r"alignment=unlike needs the config key width"):
        build_alignment("unlike", values)
    built = build_alignment("unlike", values | {"width": 3}, score_memory=7)
    assert (type(built), built.name, built.hyperparameters) == (Unlike, "unlike", {"width": 3, "direction": "t2i"})
    assert built.score_memory == 7
    with pytest.raises(ValueError, match="is registered as 'unlike': choose another name"):
        register("unlike")(HybridAlignment)

    @register("forgetful")
    class Forgetful(RevisedAlignment):
        def __init__(self, width=3, **rest):
            super().__init__(**rest)

    with pytest.raises(UserError, match=r"Forgetful does not keep its argument width as self\.width"):
        build_alignment("forgetful", values)


@pytest.mark.parametrize(
    "change", [lambda scores: scores[:1], lambda scores: scores.mT, lambda scores: scores[..., None]]
)
def test_an_equation_that_gives_another_shape_is_named(change):
    class Wrong(RevisedAlignment):
        def local_relationship_guidance(self, regions, tokens, mask):
            return change(super().local_relationship_guidance(regions, tokens, mask))

    with pytest.raises(ValueError, match=r"Wrong.local_relationship_guidance gave .* expected \[\*, N, M\] \[3, "):
        Wrong(direction="i2t")(*features(62))
