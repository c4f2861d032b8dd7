"""The modules that torch lacks for a merged layer: a bias per position, and a scale and shift."""

from __future__ import annotations

from torch import Tensor, nn


class BiasMap(nn.Module):
    """A layer and a bias for each element of a sample behind it.

    What remains of the bias of a layer in front of a padded convolution: away from the rim every
    position sees all of it, at the rim it does not.

    Attributes:
        layer: The layer, without a bias of its own.
        bias_map: `[C_out, *out]`, for inputs of one size.

    Examples:
        >>> import torch
        >>> layer = BiasMap(nn.Conv2d(1, 2, 3, padding=1, bias=False), torch.ones(2, 5, 4))
        >>> layer(torch.zeros(7, 1, 5, 4)).shape
        torch.Size([7, 2, 5, 4])
    """

    def __init__(self, layer: nn.Module, bias_map: Tensor) -> None:
        """Takes both as they are."""
        super().__init__()
        self.layer = layer
        self.bias_map = nn.Parameter(bias_map)

    def forward(self, x: Tensor) -> Tensor:
        """`layer(x) + bias_map`."""
        y: Tensor = self.layer(x) + self.bias_map
        return y


class ScaleShift(nn.Module):
    """A scale, and a shift if there is one, of the elements of a sample.

    Attributes:
        scale: Broadcasts to a sample.
        shift: Likewise; None for none.

    Examples:
        >>> import torch
        >>> ScaleShift(torch.tensor([2.0]), torch.tensor([1.0]))(torch.ones(2, 3))
        tensor([[3., 3., 3.],
                [3., 3., 3.]], grad_fn=<AddBackward0>)
    """

    def __init__(self, scale: Tensor, shift: Tensor | None) -> None:
        """Takes both as they are."""
        super().__init__()
        self.scale = nn.Parameter(scale)
        self.shift = None if shift is None else nn.Parameter(shift)

    def forward(self, x: Tensor) -> Tensor:
        """`x * scale + shift`."""
        y = x * self.scale
        return y if self.shift is None else y + self.shift
