"""Drawings of transposed convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import linfuse_ext as lf

from .maps import draw_error, image
from .strip import COUNTS, Strip, cells, frame, strength


def _layer(kernel: int, seed: int, **settings: object) -> nn.ConvTranspose2d:
    generator = torch.Generator().manual_seed(seed)
    conv = nn.ConvTranspose2d(1, 1, kernel, bias=False, dtype=torch.float64, **settings)
    conv.weight.data = torch.rand(conv.weight.shape, generator=generator, dtype=torch.float64) - 0.4
    return conv.requires_grad_(False)


def cut_between() -> Strip:
    """Padding of a transposed layer cuts values off before the next could spread them."""
    first, second = _layer(3, 5, padding=1), _layer(3, 6)
    x = image(8)
    full = F.conv_transpose2d(x, first.weight)
    fused = lf.fuse_conv_conv(_with(first, padding=0), second)
    fused.padding = (1, 1)
    strip = Strip(3)
    limit = strength(full)
    axes = strip.panel("first(x), and what it cuts off", "padding 1 keeps\nwhat is in the frame")
    cells(axes, full[0, 0], limit)
    frame(axes, 1, 1, 8, 8)
    kept = torch.zeros_like(full)
    kept[..., 1:-1, 1:-1] = first(x)
    axes = strip.panel("what the second layer spreads", "the rest is gone", "≠")
    cells(axes, kept[0, 0], limit)
    frame(axes, 1, 1, 8, 8)
    draw_error(strip, fused(x)[0, 0], second(first(x))[0, 0])
    return strip


def _with(conv: nn.ConvTranspose2d, padding: int) -> nn.ConvTranspose2d:
    other = _layer(conv.kernel_size[0], 0, padding=padding)
    other.weight.data = conv.weight.data
    return other


def uneven_bias() -> Strip:
    """How many taps reach an output position: a bias comes through as often."""
    strip = Strip(3)
    ones = torch.ones(1, 1, 5, 5, dtype=torch.float64)
    for title, note, kernel, stride, padding in (
        ("kernel 3, stride 2", "an uneven pattern everywhere", 3, 2, 0),
        ("kernel 3, stride 1", "fewer at the rim", 3, 1, 0),
        ("the same, padding 2", "the rim is cut off:\nall positions alike", 3, 1, 2),
    ):
        counts = F.conv_transpose2d(
            ones,
            torch.ones(1, 1, kernel, kernel, dtype=torch.float64),
            stride=stride,
            padding=padding,
        )[0, 0]
        cells(strip.panel(title, note), counts, 14, COUNTS, numbers=".0f")
    return strip


def mixed() -> Strip:
    """Down and up again: neighbouring outputs see their input by different kernels."""
    generator = torch.Generator().manual_seed(2)
    down = nn.Conv1d(1, 1, 3, stride=2, padding=1, bias=False, dtype=torch.float64)
    up = nn.ConvTranspose1d(1, 1, 4, stride=2, padding=1, bias=False, dtype=torch.float64)
    for conv in (down, up):
        conv.weight.data = torch.rand(conv.weight.shape, generator=generator, dtype=torch.float64)
        conv.requires_grad_(False)
    one = lf.conv_to_linear(down, 12).weight.detach()
    two = lf.conv_to_linear(up, 6).weight.detach()
    square = [torch.zeros(12, 12, dtype=torch.float64) for _ in range(2)]
    square[0][:, 3:9], square[1][3:9] = two, one
    strip = Strip(3)
    limit = strength(one, two, two @ one)
    for title, matrix, note, sign, inside in (
        ("$A_2$", square[0], "transposed, stride 2:\n6 → 12 positions", "", (3, 0, 6, 12)),
        ("$A_1$", square[1], "stride 2:\n12 → 6 positions", "·", (0, 3, 12, 6)),
        (
            "$A_2 A_1$",
            two @ one,
            "even and odd rows are different:\nno kernel slides along",
            "=",
            (0, 0, 12, 12),
        ),
    ):
        axes = strip.panel(title, note, sign)
        cells(axes, matrix, limit, lines="none")
        frame(axes, *inside)
    return strip
