"""Aggregators: from the global vector of a backbone to a global embedding of unit length (METHOD section 1)."""

import torch
from torch import Tensor, nn

ACTIVATIONS = {"leaky_relu": lambda: nn.LeakyReLU(0.01), "tanh": nn.Tanh, "none": nn.Identity}


class Aggregator(nn.Module):
    """Three fully connected ("FL") blocks and L2 normalisation.

    Linear(d, d), activation, dropout, Linear(d, (d + e) // 2), activation, Linear((d + e) // 2, e), activation,
    x / ||x||, where d is the width of the backbone and e the joint width (METHOD section 1).
    """

    def __init__(self, *, in_dim: int, embed_dim: int, activation: str, dropout: float = 0.2) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r}: expected one of {', '.join(ACTIVATIONS)}")
        middle = (in_dim + embed_dim) // 2
        self.fc1 = nn.Linear(in_dim, in_dim)
        self.fc2 = nn.Linear(in_dim, middle)
        self.fc3 = nn.Linear(middle, embed_dim)
        self.activation = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)

    def forward(self, pooled: Tensor) -> Tensor:
        """Return [N, e] float32 of unit length for global vectors [N, d]."""
        hidden = self.dropout(self.activation(self.fc1(pooled)))
        hidden = self.activation(self.fc2(hidden))
        return unit_length(self.activation(self.fc3(hidden)))


def unit_length(vectors: Tensor) -> Tensor:
    """Return x / sqrt(||x||^2 + 1e-12) in float32; the floor inside the root keeps the gradient at zero finite."""
    vectors = vectors.float()
    return vectors * torch.rsqrt(vectors.square().sum(dim=-1, keepdim=True) + 1e-12)
