"""Device-clean without a GPU: nothing reads values of tensors on a device, and mixed devices are errors.

FakeTensorMode propagates CUDA tensors without a GPU. The backward pass of a CUDA tensor asks for a GPU even there, so
that of the equations runs on fake CPU tensors, and the optimiser's step on CUDA gets its gradients from the test.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hacan.alignment import STREAMS, build_alignment
from hacan.losses import global_loss, hard_negatives, triplet_ranking_loss
from hacan.types import EncodedImages, EncodedTexts, PackedTexts

FORMS = [(name, direction) for name in ("hybrid", "revised") for direction in ("i2t", "t2i", "both")]
CUDA = torch.device("cuda", 0)


def form(name, direction, focal_type="prob", score_memory=256):
    values = {"direction": direction, "lambda_softmax": 9.0, "focal_type": focal_type}
    return build_alignment(name, values, score_memory=score_memory)


def fake_features(images=3, texts=7, high=5, mid=6, words=4, width=8, device=CUDA):
    return (
        EncodedImages(
            torch.randn(images, high, width, device=device),
            torch.randn(images, mid, width, device=device),
            torch.randn(images, width, device=device),
        ),
        EncodedTexts(
            torch.randn(texts, words, width, device=device),
            torch.randn(texts, words, width, device=device),
            torch.ones(texts, words, dtype=torch.bool, device=device),
            torch.randn(texts, width, device=device),
        ),
    )


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("focal_type", ["prob", "equal"])
@pytest.mark.parametrize(("name", "direction"), FORMS)
def test_equations_stay_on_the_device(name, direction, focal_type, batch):
    with FakeTensorMode():
        alignment = form(name, direction, focal_type)
        regions = torch.randn(*batch, 3, 5, 8, device=CUDA)
        tokens = torch.randn(*batch, 7, 4, 8, device=CUDA)
        mask = torch.ones(*batch, 7, 4, dtype=torch.bool, device=CUDA)
        for equation in (alignment.key_semantic_filter, alignment.local_relationship_guidance):
            scores = equation(regions, tokens, mask)
            assert (scores.shape, scores.device) == ((*batch, 3, 7), CUDA)
        for stream in STREAMS:
            assert alignment.attention(regions, tokens, mask, stream).shape == (*batch, 3, 7, 4, 5)
        with pytest.raises(RuntimeError, match="device"):
            alignment.key_semantic_filter(regions, tokens.cpu(), mask)


@pytest.mark.parametrize(("name", "direction"), FORMS)
def test_scoring_of_padded_texts_stays_on_the_device(name, direction):
    with FakeTensorMode():
        scores = form(name, direction)(*fake_features())
        assert (scores.shape, scores.device) == ((3, 7), CUDA)


@pytest.mark.parametrize(("name", "direction"), FORMS)
def test_scoring_of_a_gallery_stays_on_the_device(name, direction):
    offsets = torch.tensor([0, 4, 8, 12])  # lengths are read on the CPU; where they differ, so is the padding
    with FakeTensorMode(allow_non_fake_inputs=True):
        images, texts = fake_features()
        packed = PackedTexts(texts.high.flatten(0, 1)[:12], texts.mid.flatten(0, 1)[:12], offsets, texts.pooled[:3])
        scores = form(name, direction)(images, packed)
        assert (scores.shape, scores.device) == ((3, 3), CUDA)


@pytest.mark.parametrize(("name", "direction"), FORMS)
def test_the_backward_pass_of_the_equations_reads_no_value(name, direction):
    with FakeTensorMode():
        alignment = form(name, direction)
        regions, tokens = torch.randn(3, 5, 8, requires_grad=True), torch.randn(7, 4, 8, requires_grad=True)
        mask = torch.ones(7, 4, dtype=torch.bool)
        for equation in (alignment.key_semantic_filter, alignment.local_relationship_guidance):
            gradients = torch.autograd.grad(equation(regions, tokens, mask).sum(), (regions, tokens))
            assert [gradient.shape for gradient in gradients] == [(3, 5, 8), (7, 4, 8)]


@pytest.mark.parametrize("alignment", ["hybrid", "revised"])
def test_a_training_step_stays_on_the_device(make_model, alignment):
    model = make_model(alignment=alignment, loss="M_HN")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in model.modules():
            for key, value in module._parameters.items():
                if value is not None:
                    module._parameters[key] = torch.nn.Parameter(mode.from_tensor(value.detach()).to(CUDA))
            for key, value in module._buffers.items():
                module._buffers[key] = None if value is None else mode.from_tensor(value).to(CUDA)
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
        assert loss_of_step(model, CUDA).device == CUDA
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimiser.step()
        with pytest.raises(RuntimeError, match="device"):
            model.encode_images(torch.randn(4, 3, 64, 64))


def loss_of_step(model, device):
    images = model.encode_images(torch.randn(4, 3, 64, 64, device=device))
    mask = torch.ones(4, 6, dtype=torch.bool, device=device)
    texts = model.encode_texts(torch.zeros(4, 6, dtype=torch.int64, device=device), mask)
    scores = model.score(images, texts)
    negatives = hard_negatives(scores, torch.arange(4, device=device))
    loss = triplet_ranking_loss(scores, negatives, margin=0.2, reduction="sum")
    for name in ("GCD", "GCD_revised", "F_HN", "M_HN", "InfoNCE"):
        loss = loss + global_loss(name, images.pooled, texts.pooled, negatives, margin=0.2)
    return loss
