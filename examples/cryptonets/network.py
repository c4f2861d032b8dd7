"""A network that can read encrypted digits, and what it costs to run it.

Homomorphic encryption adds and multiplies numbers it cannot see, and nothing else: no ReLU, no max.
So the activation is the square, as in CryptoNets (Gilad-Bachrach et al., ICML 2016).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Square(nn.Module):
    """`x * x`, element by element: an activation that encryption allows."""

    def forward(self, x: Tensor) -> Tensor:
        """Squares a tensor of any shape."""
        return x * x


def cryptonet(*middle: nn.Module) -> nn.Sequential:
    """A network from images `[N, 1, 28, 28]` to logits `[N, 10]`.

    Args:
        middle: Layers from `[N, 5, 13, 13]` to `[N, 100]`.
    """
    first = nn.Conv2d(1, 5, kernel_size=5, stride=2, padding=1)  # -> [N, 5, 13, 13]
    last = nn.Linear(100, 10)  # -> [N, 10]
    return nn.Sequential(first, Square(), *middle, Square(), last)


def with_middle(network: nn.Sequential, *middle: nn.Module) -> nn.Sequential:
    """The same network, which keeps its first and last layer, around another middle."""
    first, square, *_, last_square, last = network
    return nn.Sequential(first, square, *middle, last_square, last)


def describe(network: nn.Sequential) -> str:
    """The layers that compute, in one line."""
    words = []
    for layer in network:
        match layer:
            case nn.Conv2d():
                words.append(f"Conv({layer.in_channels}, {layer.out_channels})")
            case nn.Linear():
                words.append(f"Linear({layer.in_features}, {layer.out_features})")
            case Square():
                words.append("x²")
    return " → ".join(words)


@torch.no_grad()
def multiplications(network: nn.Sequential, image: Tensor) -> int:
    """Multiplications for one image `[1, 28, 28]`, those with padding's zeros included."""
    total = 0
    x = image[None]
    for layer in network:
        x = layer(x)
        match layer:
            case nn.Conv2d():
                total += layer.weight.numel() * x[0, 0].numel()  # each weight at each position
            case nn.Linear():
                total += layer.weight.numel()
            case Square():
                total += x.numel()
    return total


def levels(network: nn.Sequential) -> int:
    """Multiplications in a row, one for each layer that computes."""
    return sum(not isinstance(layer, nn.Flatten) for layer in network)


def parameters(network: nn.Sequential) -> int:
    """Numbers in all weights and biases."""
    return sum(parameter.numel() for parameter in network.parameters())
