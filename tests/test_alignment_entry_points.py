"""All pairs, listed pairs, packing, budgets, precisions: the two entry points of the alignment agree."""

import pytest
import torch
from test_alignment import DIRECTIONS, FORMS, changed, features, form

from hacan.alignment import HybridAlignment, RevisedAlignment, build_alignment, pack_texts
from hacan.alignment.blocks import listed_blocks
from hacan.alignment.packing import CaptionOrder
from hacan.alignment.scratch import Scratch
from hacan.alignment.segments import Segments
from hacan.types import EncodedImages, EncodedTexts, PackedTexts

SHUFFLED = torch.tensor([[2, 3], [0, 6], [2, 0], [1, 2], [0, 6], [2, 5], [0, 1], [1, 1], [2, 6]])


@pytest.mark.usefixtures("way")
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


@pytest.mark.usefixtures("way")
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


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("name", "focal_type"), FORMS)
def test_gallery_order_and_company_change_nothing(name, focal_type):
    images, texts = features(44)
    alignment = form(name, focal_type, "both")
    scores = alignment(images, texts)
    for j in range(7):
        one = alignment(EncodedImages(*(x[1:2] for x in images)), EncodedTexts(*(x[j : j + 1] for x in texts)))
        torch.testing.assert_close(one[0, 0], scores[1, j], atol=2e-6, rtol=0)


@pytest.mark.usefixtures("way")
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


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("name", "focal_type"), FORMS)
def test_prepared_texts_score_the_same_and_are_derived_from_once(name, focal_type, direction, monkeypatch):
    images, texts = features(29, texts=(4, 1, 6, 0, 3, 5, 4))
    alignment = form(name, focal_type, direction)
    expected = alignment(images, texts)
    filtered = alignment(images, texts, streams=("ksf",))
    derived, derive = [], type(alignment).derive_tokens
    monkeypatch.setattr(
        type(alignment), "derive_tokens", lambda *a, **named: (derived.append(a), derive(*a, **named))[1]
    )
    prepared = alignment.prepare(texts)
    assert len(derived) == 2  # both levels
    torch.testing.assert_close(alignment(images, prepared), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(alignment(images, prepared, streams=("ksf",)), filtered, atol=1e-6, rtol=0)
    listed = alignment.pairs(images, prepared, SHUFFLED)
    torch.testing.assert_close(listed, expected[SHUFFLED[:, 0], SHUFFLED[:, 1]], atol=1e-6, rtol=0)
    assert len(derived) == 2
    with pytest.raises(ValueError, match="outside of 3 images and 7 texts"):
        alignment.pairs(images, prepared, torch.tensor([[0, 7]]))


def test_prepared_texts_ask_for_their_alignment_and_their_type():
    images, texts = features(30)
    prepared = form("hybrid", "prob", "i2t").prepare(texts)
    with pytest.raises(ValueError, match="this very alignment prepared"):
        form("hybrid", "prob", "i2t")(images, prepared)
    alignment = form("hybrid", "prob", "i2t")
    with pytest.raises(ValueError, match=r"prepared in torch\.float32 on cpu, and images are torch\.float64"):
        alignment(changed(images, torch.Tensor.double), alignment.prepare(texts))


def test_prepared_texts_get_no_gradient_and_images_do():
    images, texts = features(31)
    texts = texts._replace(high=texts.high.nan_to_num().requires_grad_())
    regions = images.high.clone().requires_grad_()
    alignment = form("hybrid", "prob", "both")
    scores = alignment(images._replace(high=regions), alignment.prepare(texts))
    expected = alignment(images._replace(high=regions), texts._replace(high=texts.high.detach()))
    for found, right in zip(*(torch.autograd.grad(each.sum(), regions) for each in (scores, expected)), strict=True):
        torch.testing.assert_close(found, right)
    assert not alignment.prepare(texts).texts.high.requires_grad


def test_packing_takes_any_mask():
    high = torch.arange(24.0).view(2, 4, 3)
    mask = torch.tensor([[True, False, True, True], [False, True, False, False]])
    packed = pack_texts(EncodedTexts(high, -high, mask, torch.ones(2, 3)))
    assert packed.offsets.tolist() == [0, 3, 4]
    assert packed.high[:, 0].tolist() == [0, 6, 9, 15]
    assert packed.mid[:, 0].tolist() == [0, -6, -9, -15]
    with pytest.raises(ValueError, match=r"mask \[2, 4\] of torch.int64"):
        pack_texts(EncodedTexts(high, high, mask.long(), torch.ones(2, 3)))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "focal_type"), FORMS)
def test_half_precision_banks_are_read_in_float32(name, focal_type, half):
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


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("name", "focal_type"), FORMS[::2])
def test_products_in_bfloat16_are_close_and_scores_stay_float32(name, focal_type):
    images, texts = features(51, width=64)
    alignment = build_alignment(
        name, direction="both", temperature=9.0, focal_type=focal_type, product_dtype=torch.bfloat16
    )
    for streams in (("lrg_high", "lrg_mid"), ("ksf",)):
        exact = form(name, focal_type, "both")(images, texts, streams=streams)
        scores = alignment(images, texts, streams=streams)
        assert scores.dtype == torch.float32
        assert (scores - exact).abs().max() > 0
        assert (scores - exact).abs().mean() < 0.02  # the filters are steps: single entries may move further
    listed = alignment.pairs(images, texts, SHUFFLED)
    torch.testing.assert_close(listed, alignment(images, texts)[SHUFFLED[:, 0], SHUFFLED[:, 1]], atol=2e-2, rtol=0)


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
    assert HybridAlignment(direction="i2t", temperature=9.0, focal_type="prob")(images, texts).dtype == torch.float64
    assert RevisedAlignment(direction="t2i").pairs(images, texts, SHUFFLED).dtype == torch.float64


@pytest.mark.usefixtures("way")
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


def test_segments_reduce_each_caption():
    lengths = torch.tensor([3, 1, 2, 3, 1])
    values = torch.randn(10, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    segments = Segments(lengths, "cpu")
    fresh = Scratch(torch.device("cpu"), torch.float64, active=False)
    parts = values.split(lengths.tolist())
    torch.testing.assert_close(segments.sum(values), torch.stack([part.sum(0) for part in parts]))
    torch.testing.assert_close(segments.mean(values), torch.stack([part.mean(0) for part in parts]))
    torch.testing.assert_close(segments.max(values, scratch=fresh), torch.stack([part.amax(0) for part in parts]))
    spread = segments.spread(segments.max(values, scratch=fresh))
    torch.testing.assert_close(spread, torch.cat([part.amax(0, keepdim=True).expand_as(part) for part in parts]))
    assert segments.runs == [(4, 5)]  # unsorted: of lengths rounded up
    values.requires_grad_()
    for reduce in (
        segments.sum,
        segments.mean,
        lambda x: segments.max(x, scratch=fresh),
        lambda x: segments.spread(segments.sum(x)).square(),
    ):
        assert torch.autograd.gradcheck(reduce, (values,))
    assert torch.autograd.gradgradcheck(lambda x: segments.sum(x).square(), (values,))


def test_listed_blocks_cover_every_pair_once_and_keep_their_size():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 9, (40,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    tokens = torch.zeros(int(offsets[-1]), 2)
    order = CaptionOrder(PackedTexts(tokens, tokens, offsets, tokens), torch.arange(40), drop_ends=False)
    images = torch.randint(0, 12, (300,), generator=generator)
    captions = torch.randint(0, 40, (300,), generator=generator)
    images = torch.cat([images, torch.full((40,), 12), torch.full((40,), 13)])  # two images share the whole gallery
    captions = torch.cat([captions, torch.arange(40), torch.arange(40)])
    seen = []
    for block in listed_blocks(images, order.places_of(captions), order, most_images=4, rows=lambda n: 60 // n):
        rows = int(order.lengths[block.places].sum())
        assert rows <= 60 or len(block.places) == 1
        assert len(block.images) <= 4
        targets = block.targets if block.listed is None else block.targets[None]
        assert torch.equal(captions[targets], order.captions[block.places].expand_as(targets))
        owners = block.images if block.listed is None else block.images.repeat_interleave(torch.tensor(block.listed))
        assert torch.equal(images[targets.flatten()], owners.repeat_interleave(targets.numel() // len(owners)))
        seen.append(targets.flatten())
    expected = (lengths[captions] > 0).nonzero().flatten()
    assert torch.equal(torch.cat(seen).sort().values, expected)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("name", "focal_type"), FORMS)
def test_calls_share_scratch_but_never_an_answer(name, focal_type):
    # a search scores in inference mode, its heatmaps do not: memory of the one must not be written by the other
    images, texts = features(44)
    one, other = (
        (EncodedImages(*(x[i : i + 1] for x in images)), EncodedTexts(*(x[i : i + 1] for x in texts))) for i in (0, 1)
    )
    alignment = form(name, focal_type, "both")
    with torch.inference_mode():
        first = alignment.pairs(images, texts, SHUFFLED)
        kept = first.clone()
        alignment(*features(45))
    weights = alignment.attention(*one)["ksf"].weights
    kept_weights = weights.clone()
    alignment.attention(*other)
    alignment(images, texts)
    assert torch.equal(first, kept)
    assert torch.equal(weights, kept_weights)
    with torch.no_grad():
        torch.testing.assert_close(alignment.pairs(images, texts, SHUFFLED), kept)
