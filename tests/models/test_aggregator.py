"""The aggregators: three FL blocks against their literal form, unit length, finite gradients at zero."""

import math

import pytest
import torch
from torch.nn import functional

from hacan.models.aggregator import Aggregator, unit_length

ACTIVATIONS = {
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "tanh": torch.tanh,
    "none": lambda x: x,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_is_the_method_literally(activation):
    aggregator = Aggregator(in_dim=10, embed_dim=6, activation=activation).eval()
    assert [tuple(layer.weight.shape) for layer in (aggregator.fc1, aggregator.fc2, aggregator.fc3)] == [
        (10, 10),
        (8, 10),
        (6, 8),
    ]
    x, act = torch.randn(3, 10), ACTIVATIONS[activation]
    h = act(x @ aggregator.fc1.weight.T + aggregator.fc1.bias)
    h = act(h @ aggregator.fc2.weight.T + aggregator.fc2.bias)
    h = act(h @ aggregator.fc3.weight.T + aggregator.fc3.bias)
    torch.testing.assert_close(aggregator(x), h / h.norm(dim=1, keepdim=True))


def test_drops_a_fifth_after_the_first_block_only():
    aggregator = Aggregator(in_dim=8, embed_dim=8, activation="none").train()
    with torch.no_grad():
        for layer in (aggregator.fc1, aggregator.fc2, aggregator.fc3):
            layer.weight.copy_(torch.eye(8))
            layer.bias.zero_()
    torch.manual_seed(0)
    kept = aggregator(torch.ones(4000, 8)) > 0
    # a second dropout anywhere would drop 36%
    assert kept.float().mean().item() == pytest.approx(0.8, abs=0.01)
    assert aggregator.eval()(torch.ones(1, 8)).tolist() == [pytest.approx([1 / math.sqrt(8)] * 8)]


def test_output_is_of_unit_length_in_float32_under_autocast():
    aggregator = Aggregator(in_dim=10, embed_dim=6, activation="leaky_relu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = aggregator(100 * torch.randn(3, 10))
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled.norm(dim=1), torch.ones(3))


def test_unit_length_is_normalisation_with_a_finite_slope_at_zero():
    x = torch.randn(5, 4)
    torch.testing.assert_close(unit_length(x), functional.normalize(x, dim=1))
    zero = torch.zeros(2, 4, requires_grad=True)
    unit_length(zero).sum().backward()
    assert torch.isfinite(zero.grad).all() and (unit_length(zero) == 0).all()


def test_unknown_activation_names_the_choices():
    with pytest.raises(ValueError, match=r"activation='relu'.*leaky_relu, tanh, none"):
        Aggregator(in_dim=4, embed_dim=4, activation="relu")
