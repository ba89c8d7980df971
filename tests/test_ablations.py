"""Config keys that switch parts of the method off."""

import pytest
import torch

from hacan.alignment import STREAMS, build_alignment
from hacan.errors import UserError
from hacan.losses import HACANLoss
from hacan.report.attention import pair_attention
from hacan.retrieval.ensemble import GalleryScores, build_scorer
from hacan.retrieval.provenance import model_summary
from hacan.types import Gallery, pack_texts

VALUES = {"direction": "t2i", "lambda_softmax": 9.0, "focal_type": "prob", "ksf": "focal"}


@pytest.fixture
def features(make_model, pixels, captions):
    model = make_model()
    with torch.no_grad():
        return model.encode_images(pixels), model.encode_texts(*captions)


@pytest.mark.parametrize("streams", [["lrg_mid", "ksf"], ["lrg_high"], list(STREAMS)])
@pytest.mark.parametrize("name", ["hybrid", "revised"])
def test_the_score_is_the_sum_of_the_streams(features, name, streams):
    images, texts = features
    whole, part = build_alignment(name, VALUES), build_alignment(name, VALUES | {"streams": streams})
    expected = sum(whole(images, texts, streams=(stream,)) for stream in streams)
    torch.testing.assert_close(part(images, texts), expected)
    pairs = torch.tensor([[1, 3], [0, 2], [1, 0]])
    torch.testing.assert_close(part.pairs(images, texts, pairs), expected[pairs[:, 0], pairs[:, 1]])


def test_without_streams_the_score_is_the_global_similarity(features):
    images, texts = features
    alignment = build_alignment("hybrid", VALUES | {"streams": []})
    expected = images.pooled @ texts.pooled.T
    torch.testing.assert_close(alignment(images, texts), expected)
    pairs = torch.tensor([[1, 3], [0, 2]])
    torch.testing.assert_close(alignment.pairs(images, texts, pairs), expected[pairs[:, 0], pairs[:, 1]])
    one = type(images)(*(values[:1] for values in images)), type(texts)(*(values[:1] for values in texts))
    with pytest.raises(UserError, match=r"streams=\[\]"):
        pair_attention(alignment, *one)


def test_heatmaps_are_those_of_the_streams(features):
    images, texts = features
    one = type(images)(*(values[:1] for values in images)), type(texts)(*(values[:1] for values in texts))
    assert list(pair_attention(build_alignment("hybrid", VALUES | {"streams": ["lrg_mid"]}), *one)) == ["lrg_mid"]


@pytest.mark.parametrize("streams", [["lrg_mid"], []])
def test_an_evaluation_and_its_record_use_the_streams(make_model, pixels, captions, streams):
    model = make_model(streams=streams)
    with torch.no_grad():
        images, texts = model.encode_images(pixels), model.encode_texts(*captions)
        expected = model.score(images, texts)
    scorer = build_scorer(model, name="x", device=torch.device("cpu"))
    gallery = Gallery(images, pack_texts(texts), torch.zeros(len(texts.mask), dtype=torch.int64))
    scores = GalleryScores([scorer], [gallery], coarse_kind="global")
    torch.testing.assert_close(scores.fine(slice(0, len(pixels))), expected)
    torch.testing.assert_close(scores.pairs(torch.tensor([[0, 1], [1, 2]])), expected[[0, 1], [1, 2]])
    assert model_summary(model)["streams"] == streams and "streams" not in model_summary(make_model())


def test_plain_ksf_is_cross_attention(features):
    images, texts = features
    plain = build_alignment("hybrid", VALUES | {"ksf": "plain"})
    regions, tokens = images.high, texts.high.masked_fill(~texts.mask[..., None], 0)
    expected = plain.local_relationship_guidance(regions, tokens, texts.mask)
    torch.testing.assert_close(plain(images, texts, streams=("ksf",)), expected)
    focal = build_alignment("hybrid", VALUES)
    assert not torch.allclose(focal(images, texts, streams=("ksf",)), expected)
    with pytest.raises(UserError, match="ksf=plain: alignment=revised"):
        build_alignment("revised", VALUES | {"ksf": "plain"})


def test_loss_none_is_the_triplet_loss_alone(make_settings):
    scores = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    embeddings = torch.nn.functional.normalize(torch.randn(2, 5, 4), dim=-1)
    _, terms = HACANLoss(make_settings(loss="none").loss)(scores, *embeddings, torch.arange(5), epoch=0)
    assert terms["global_none"] == 0 and terms["triplet"] == pytest.approx(terms["total"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"streams": ["ksf", "lrg"]}, r"streams=\['ksf', 'lrg'\]: expected some of ksf, lrg_high, lrg_mid"),
        ({"streams": ["ksf", "ksf"]}, "each once"),
        ({"streams": ["ksf"], "coarse": "release"}, "coarse=release needs all streams"),
    ],
)
def test_wrong_streams_are_one_line(make_settings, changes, message):
    with pytest.raises(UserError, match=message):
        make_settings(**changes)


def test_streams_can_be_typed_without_quotes(make_settings):
    assert make_settings(streams="[ksf, lrg_mid]").model.streams == ("ksf", "lrg_mid")
    assert make_settings(streams=[]).model.streams == ()
