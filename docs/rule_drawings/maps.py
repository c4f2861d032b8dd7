"""What the drawings compute: layers with known values, and how far a merge is from two layers."""

from __future__ import annotations

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from .strip import ERRORS, MUTED, Strip, cells

MERGED_LESS_BOTH = "merged \N{MINUS SIGN} two layers"


def layer(kernel: int, seed: int, bias: bool = False, **settings: object) -> nn.Conv2d:
    """A convolution of one channel in float64 whose values depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    conv = nn.Conv2d(1, 1, kernel, bias=bias, dtype=torch.float64, **settings)
    for parameter in conv.parameters():
        parameter.data = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) - 0.4
        parameter.requires_grad_(False)
    return conv


def image(size: int, seed: int = 1) -> Tensor:
    """`[1, 1, size, size]` between 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, 1, size, size, generator=generator, dtype=torch.float64)


def without_padding(conv: nn.Conv2d) -> nn.Conv2d:
    """The same layer, but for its padding."""
    bare = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, 0, conv.dilation,
        conv.groups, conv.bias is not None, dtype=torch.float64,
    )  # fmt: skip
    bare.load_state_dict(conv.state_dict())
    return bare.requires_grad_(False)


def draw_error(
    strip: Strip, merged: Tensor, true: Tensor, title: str = MERGED_LESS_BOTH, sign: str = ""
) -> None:
    """A panel with `|merged - true|`, and how many positions are off by how much."""
    error = (merged - true).abs()
    scale = true.abs().max()
    off = (error > 1e-9 * scale).sum().item()
    note = "exact everywhere"
    if off:
        most = (error.max() / scale).item()
        note = f"{off} of {error.numel()} positions are off,\nby up to {most:.0%} of the largest"
    axes = strip.panel(title, note, sign)
    draw_zero_or(axes, error, off > 0)


def draw_zero_or(axes: Axes, error: Tensor, off: bool) -> None:
    """An error that is more than rounding, or the digit 0."""
    if off:
        cells(axes, error, error.max().item(), ERRORS)
    else:
        axes.text(0.5, 0.5, "0", fontsize=20, color=MUTED, ha="center", va="center",
                  transform=axes.transAxes)  # fmt: skip
