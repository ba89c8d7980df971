"""Both forms of the fine alignment against their slow literal references: scores, gradients, identities."""

import pytest
import references
import torch

from hacan.alignment import LEVELS, STREAMS, HybridAlignment, RevisedAlignment, build_alignment
from hacan.errors import UserError
from hacan.types import EncodedImages, EncodedTexts

LAMBDA = 9.0
FORMS = [
    pytest.param("hybrid", "prob", id="hybrid-prob"),
    pytest.param("hybrid", "equal", id="hybrid-equal"),
    pytest.param("revised", "prob", id="revised"),
]
DIRECTIONS = ["i2t", "t2i", "both"]


def features(seed, *, images=3, texts=(4, 1, 6, 2, 3, 5, 4), high=5, mid=7, width=8, dtype=torch.float32, scale=1.0):
    """`images` images and one text for each length in `texts`; padding holds NaN, which must not be read."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    mask = torch.arange(max(max(texts), 1))[None] < torch.tensor(texts)[:, None]
    tokens = [draw(*mask.shape, width).masked_fill(~mask[..., None], torch.nan) for _ in range(2)]
    pooled = torch.zeros(len(texts), width, dtype=dtype)
    return (
        EncodedImages(draw(images, high, width), draw(images, mid, width), pooled[:images]),
        EncodedTexts(*tokens, mask, pooled),
    )


def changed(record, change):
    """The record with its regions or tokens changed."""
    return record._replace(high=change(record.high), mid=change(record.mid))


def form(name, focal_type, direction, lambda_softmax=LAMBDA, score_memory=256):
    values = {"direction": direction, "lambda_softmax": lambda_softmax, "focal_type": focal_type}
    return build_alignment(name, values, score_memory=score_memory)


def reference(name, focal_type, direction, images, texts, lambda_softmax=LAMBDA, **arguments):
    """The reference's scores, of the revised form in float64.

    The hybrid reference has the precision of the features: its filter asks which weight is larger, and with a single
    query all of them are equal in float32 (b = a / (|a| + 1e-8) is 1), where float64 would see the 1e-8.
    """
    if name == "revised":
        images, texts = changed(images, torch.Tensor.double), changed(texts, torch.Tensor.double)
        return references.all_pairs(references.revised_fine, images, texts, direction=direction, **arguments)
    arguments |= {"direction": direction, "temperature": lambda_softmax, "focal_type": focal_type}
    return references.all_pairs(references.hybrid_fine, images, texts, **arguments)


CASES = {
    "random lengths": lambda: features(1),
    "single words": lambda: features(2, texts=(1, 1, 1), images=2),
    "one region": lambda: features(3, high=1, mid=1),
    "one region and one word": lambda: features(4, high=1, mid=1, texts=(1, 3)),
    "no valid token": lambda: features(5, texts=(0, 3, 0)),
    "features of size 1e6": lambda: features(6, scale=1e6),
    "features of size 1e4": lambda: features(7, scale=1e4),
    "features of size 1e-3": lambda: features(8, scale=1e-3),
    "features of size 1e-4": lambda: features(9, scale=1e-4),
    "features of size 1e-6": lambda: features(10, scale=1e-6, images=2, texts=(3, 1, 5)),
    "all features equal": lambda: tuple(changed(x, lambda t: t.nan_to_num() * 0 + 0.3) for x in features(11)),
    # 100 times larger, so that the 1e-8 beside the norms does not separate weights by about as much as rounding does
    "all regions equal, of size 100": lambda: (
        changed(features(12, scale=100)[0], lambda t: t[:, :1].expand_as(t)),
        features(12, scale=100)[1],
    ),
    "all tokens equal": lambda: (features(13)[0], changed(features(13)[1], lambda t: t[:, :1].expand_as(t))),
    "all zero": lambda: tuple(changed(x, lambda t: t.nan_to_num() * 0) for x in features(14)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("name", "focal_type"), FORMS)
def test_scores_equal_the_reference(name, focal_type, direction, case):
    images, texts = CASES[case]()
    scores = form(name, focal_type, direction)(images, texts)
    # The release's gates underflow at large norms, where the reference takes the short form.
    gates = {"gates": False} if name == "revised" and "size" in case else {}
    expected = reference(name, focal_type, direction, images, texts, **gates)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected.to(scores.dtype), atol=1e-5, rtol=0)


def test_both_focal_types_and_directions_differ():
    images, texts = features(1)
    scores = [form(name, *rest)(images, texts) for name, rest in
              [("hybrid", ("prob", "i2t")), ("hybrid", ("equal", "i2t")), ("hybrid", ("prob", "t2i")),
               ("revised", ("prob", "i2t")), ("revised", ("prob", "t2i"))]]  # fmt: skip
    for first in range(len(scores)):
        for second in range(first):
            assert (scores[first] - scores[second]).abs().max() > 1e-3


@pytest.mark.parametrize("lambda_softmax", [0.5, 19.0, 21.0, 300.0])
@pytest.mark.parametrize("direction", ["i2t", "t2i"])
def test_any_softmax_scale(direction, lambda_softmax):
    images, texts = features(20)
    scores = form("hybrid", "prob", direction, lambda_softmax)(images, texts)
    expected = reference("hybrid", "prob", direction, images, texts, lambda_softmax)
    torch.testing.assert_close(scores, expected, atol=1e-4 if lambda_softmax > 100 else 1e-5, rtol=0)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize(("name", "focal_type"), FORMS)
def test_each_stream_alone_equals_its_reference_and_streams_add_up(name, focal_type, stream):
    images, texts = features(21)
    alignment = form(name, focal_type, "both")
    alone = alignment(images, texts, streams=(stream,))
    expected = reference(name, focal_type, "both", images, texts, streams=(stream,))
    torch.testing.assert_close(alone, expected.to(alone.dtype), atol=1e-5, rtol=0)
    total = sum(alignment(images, texts, streams=(each,)) for each in STREAMS)
    torch.testing.assert_close(total, alignment(images, texts), atol=1e-6, rtol=0)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("name", "focal_type"), FORMS)
def test_gradients_equal_the_reference(name, focal_type, direction):
    images, texts = features(22, images=2, texts=(4, 1, 5), high=3, mid=4, width=5, dtype=torch.float64)
    weights = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    leaves = [images.high, images.mid, texts.high.nan_to_num(), texts.mid.nan_to_num()]

    def gradients(score):
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        scores = score(images._replace(high=inputs[0], mid=inputs[1]), texts._replace(high=inputs[2], mid=inputs[3]))
        return torch.autograd.grad((scores * weights).sum(), inputs)

    ours = gradients(form(name, focal_type, direction))
    literal = gradients(lambda *pair: reference(name, focal_type, direction, *pair))
    for mine, expected in zip(ours, literal, strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(mine, expected, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("score_memory", [256, 0.001], ids=["kept", "computed twice"])
@pytest.mark.parametrize("direction", ["i2t", "t2i"])
@pytest.mark.parametrize(("name", "focal_type"), FORMS)
def test_gradcheck(name, focal_type, direction, score_memory):
    images, texts = features(23, images=2, texts=(3, 1), high=2, mid=3, width=3, dtype=torch.float64)
    alignment = form(name, focal_type, direction, score_memory=score_memory)

    def score(high, mid, tokens_high, tokens_mid):
        return alignment(
            images._replace(high=high, mid=mid),
            texts._replace(high=tokens_high, mid=tokens_mid),
        )

    leaves = [images.high, images.mid, texts.high.nan_to_num(), texts.mid.nan_to_num()]
    assert torch.autograd.gradcheck(score, [leaf.requires_grad_() for leaf in leaves], fast_mode=True)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("name", "focal_type"), FORMS)
def test_the_loop_over_captions_is_a_reference_too(name, focal_type, direction):
    # The benchmark times it: the literal references would take hours at real sizes.
    images, texts = features(33, texts=(4, 1, 0, 5))
    found = references.by_caption(name, images, texts, direction, LAMBDA, focal_type)
    expected = reference(name, focal_type, direction, images, texts)
    torch.testing.assert_close(found, expected.to(found.dtype), atol=1e-5, rtol=0)


@pytest.mark.parametrize("what", ["images", "texts", "both", "one region", "one token", "equal"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("name", "focal_type"), FORMS)
def test_gradients_are_finite_at_zero_features(name, focal_type, direction, what):
    images, texts = features(24)
    texts = changed(texts, torch.nan_to_num)
    if what in ("images", "both"):
        images = changed(images, torch.zeros_like)
    if what in ("texts", "both"):
        texts = changed(texts, torch.zeros_like)
    if what == "one region":
        images.high[:, 0], images.mid[:, 0] = 0, 0
    if what == "one token":
        texts.high[:, 0], texts.mid[:, 0] = 0, 0
    if what == "equal":
        images, texts = changed(images, torch.ones_like), changed(texts, torch.ones_like)
    leaves = [leaf.requires_grad_() for leaf in (images.high, images.mid, texts.high, texts.mid)]
    scores = form(name, focal_type, direction)(images, texts)
    gradients = torch.autograd.grad(scores.sum(), leaves)
    assert scores.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)


def test_real_sizes_with_huge_features_stay_finite():
    images, texts = features(25, images=2, texts=(32, 9), high=49, mid=196, width=768, scale=1e6)
    for name in ("hybrid", "revised"):
        small = form(name, "prob", "both")(changed(images, lambda t: t / 1e5), changed(texts, lambda t: t / 1e5))
        large = form(name, "prob", "both")(images, texts)
        torch.testing.assert_close(large, small, atol=1e-4, rtol=0)  # scale-free, but for rounding


def test_the_gates_of_the_revised_form_cancel():
    images, texts = features(26, dtype=torch.float64)
    gated = reference("revised", None, "both", images, texts, gates=True)
    short = reference("revised", None, "both", images, texts, gates=False)
    torch.testing.assert_close(gated, short, atol=1e-12, rtol=0)


def test_the_revised_softmax_is_close_to_a_mean():
    images, texts = features(27, images=2, texts=(6, 7), high=20, mid=20, width=64)
    score = RevisedAlignment(direction="i2t")(images, texts, streams=("lrg_high",))
    words = texts.mid[0, 1:5]
    cosines = torch.nn.functional.cosine_similarity(words[:, None], images.high[0][None], dim=-1)
    variance = cosines.var(1, correction=0)
    assert (score[0, 0] - (cosines.mean() + variance.mean())).abs() < 0.1 * variance.mean()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("name", "focal_type"), FORMS)
def test_permutations(name, focal_type, direction):
    images, texts = features(28)
    texts = changed(texts, torch.nan_to_num)
    alignment = form(name, focal_type, direction)
    scores = alignment(images, texts)
    rows, columns = torch.tensor([2, 0, 1]), torch.tensor([3, 6, 0, 5, 1, 4, 2])
    moved = alignment(EncodedImages(*(x[rows] for x in images)), EncodedTexts(*(x[columns] for x in texts)))
    torch.testing.assert_close(moved, scores[rows][:, columns], atol=2e-6, rtol=0)
    # Regions have no order; nor have words, but for [CLS] and [SEP] at the ends, which the revised form drops.
    regions = images._replace(high=images.high.flip(1), mid=images.mid.flip(1))
    torch.testing.assert_close(alignment(regions, texts), scores, atol=2e-6, rtol=0)
    words = changed(texts, lambda t: torch.stack([torch.cat([x[m].flip(0), x[~m]]) for x, m in zip(t, texts.mask)]))  # noqa: B905
    torch.testing.assert_close(alignment(images, words), scores, atol=2e-6, rtol=0)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("focal_type", ["prob", "equal"])
@pytest.mark.parametrize("stream", STREAMS)
def test_attention_of_the_hybrid_form(stream, focal_type, direction):
    images, texts = features(29, images=2, texts=(4, 2, 3))
    of_image, of_text = LEVELS[stream]
    regions, tokens = getattr(images, of_image), getattr(texts, of_text).nan_to_num()
    alignment = HybridAlignment(direction=direction, lambda_softmax=LAMBDA, focal_type=focal_type)
    found = alignment.attention(regions, tokens, texts.mask, stream)
    assert found.shape == (2, 3, 4, regions.shape[1])
    for i, j in ((0, 0), (1, 1), (0, 2)):
        words = tokens[j][texts.mask[j]]
        queries, sources = (regions[i], words) if direction == "i2t" else (words, regions[i])
        weights = references.hybrid_weights(queries, sources, LAMBDA)
        if stream == "ksf":
            weights = torch.stack([references.hybrid_focal(row, focal_type) for row in weights])
        expected = len(sources) * (weights.T if direction == "i2t" else weights)
        torch.testing.assert_close(found[i, j, : len(words)], expected, atol=1e-5, rtol=0)
        assert found[i, j, len(words) :].isnan().all()


def test_attention_of_the_revised_form():
    images, texts = features(30, images=1, texts=(5,))
    alignment = RevisedAlignment(direction="both")
    guided = alignment.attention(images.mid, texts.high, texts.mask, "lrg_mid")[0, 0]
    cosines = torch.nn.functional.cosine_similarity(texts.high[0][:, None], images.mid[0][None], dim=-1)
    torch.testing.assert_close(guided[1:4], 7 * cosines.softmax(1)[1:4], atol=1e-5, rtol=0)
    filtered = alignment.attention(images.high, texts.high, texts.mask, "ksf")[0, 0]
    assert filtered[[0, 4]].isnan().all() and guided[[0, 4]].isnan().all()  # [CLS] and [SEP]
    score = RevisedAlignment(direction="t2i")(images, texts, streams=("ksf",))
    torch.testing.assert_close(filtered[1:4].amax(1).mean(), score[0, 0], atol=1e-6, rtol=0)


def test_mistakes_name_the_argument():
    with pytest.raises(UserError, match=r"alignment='cross'.* hybrid, revised"):
        form("cross", "prob", "i2t")
    with pytest.raises(ValueError, match=r"direction='up'.* i2t, t2i, both"):
        RevisedAlignment(direction="up")
    with pytest.raises(ValueError, match=r"focal_type='soft'.* prob, equal"):
        HybridAlignment(direction="i2t", lambda_softmax=9.0, focal_type="soft")
    with pytest.raises(ValueError, match=r"lambda_softmax=0.*above 0"):
        HybridAlignment(direction="i2t", lambda_softmax=0.0, focal_type="prob")
    with pytest.raises(ValueError, match="score_memory=0"):
        RevisedAlignment(direction="i2t", score_memory=0)
    images, texts = features(32)
    with pytest.raises(ValueError, match=r"streams=\('low',\).*ksf, lrg_high, lrg_mid"):
        RevisedAlignment(direction="i2t")(images, texts, streams=("low",))
    with pytest.raises(ValueError, match="one width"):
        RevisedAlignment(direction="i2t")(changed(images, lambda t: t[..., :4]), texts)
