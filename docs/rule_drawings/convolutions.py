"""Drawings of two convolutions with zero padding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import linfuse_ext as lf

from .maps import draw_error, image, layer, without_padding
from .strip import Strip, cells, frame, ring, strength


def _merged(first: nn.Conv2d, second: nn.Conv2d) -> nn.Module:
    """The only convolution that is right away from the border: summed padding, one bias."""
    fused = lf.fuse_conv_conv(without_padding(first), without_padding(second))
    fused.padding = tuple(
        p1 + s1 * p2 for p1, s1, p2 in zip(first.padding, first.stride, second.padding, strict=True)
    )
    return fused.requires_grad_(False)


def no_padding_behind() -> Strip:
    """Two kernels make one, whose taps lie as far apart as the strides say."""
    first, second = layer(3, 2, bias=True, stride=2, padding=1), layer(2, 3, bias=True)
    fused = lf.fuse_conv_conv(first, second)
    x = image(14)
    strip = Strip(4)
    limit = strength(first.weight, second.weight, fused.weight)
    for title, conv, note, sign in (
        ("first kernel", first, "kernel 3, stride 2, padding 1", ""),
        (
            "second kernel",
            second,
            "kernel 2, no padding",
            "\N{ASTERISK OPERATOR}",
        ),
        (
            "merged kernel",
            fused,
            "kernel 5, stride 2, padding 1:\nthe second, two apart",
            "=",
        ),
    ):
        axes = strip.panel(title, note, sign)
        cells(axes, conv.weight[0, 0], limit, numbers=".2f")
    draw_error(strip, fused(x)[0, 0], second(first(x))[0, 0])
    return strip


def pointwise_first() -> Strip:
    """Nothing in, nothing out: the zeros around the image stay zeros."""
    first, second = layer(1, 3), layer(3, 3, padding=1)
    x = image(8)
    fused = lf.fuse_conv_conv(first, second)
    around = F.pad(x, (1, 1, 1, 1))
    strip = Strip(4)
    axes = strip.panel("x, with zeros around", "what the merged layer reads")
    cells(axes, around[0, 0], 1)
    ring(axes, 10, 1, "0")
    axes = strip.panel(
        "first(x, with zeros around)",
        "kernel 1 without bias:\n0 stays 0",
        "→",
    )
    cells(axes, first(around)[0, 0], strength(first(x)))
    ring(axes, 10, 1, "0")
    axes = strip.panel("first(x), with zeros around", "what the second layer reads:\nthe same", "=")
    cells(axes, F.pad(first(x), (1, 1, 1, 1))[0, 0], strength(first(x)))
    ring(axes, 10, 1, "0")
    draw_error(strip, fused(x)[0, 0], second(first(x))[0, 0])
    return strip


def pointwise_bias() -> Strip:
    """The bias of the first layer ends where the padding begins."""
    first, second = layer(1, 3, bias=True), layer(3, 4, padding=1)
    first.bias.data.fill_(0.7)
    x, zero = image(10), torch.zeros(1, 1, 10, 10, dtype=torch.float64)
    fused = _merged(first, second)
    true = second(first(x))[0, 0]
    bias_map = second(first(zero))[0, 0]
    strip = Strip(4)
    axes = strip.panel("first(0), with zeros around", "the bias ends at the border")
    cells(axes, F.pad(first(zero), (1, 1, 1, 1))[0, 0], 1)
    ring(axes, 12, 1, "0")
    axes = strip.panel(
        "second(first(0))", "the bias map: what the bias\nbecomes at each position", "→"
    )
    cells(axes, bias_map, strength(bias_map))
    draw_error(strip, fused(x)[0, 0], true, "with one bias")
    repaired = F.conv2d(x, fused.weight, padding=1)[0, 0] + bias_map
    draw_error(strip, repaired, true, "with the bias map")
    return strip


def padding_between() -> Strip:
    """Zeros stand where the first layer would have put out values."""
    first, second = layer(3, 5, padding=1), layer(3, 6, padding=1)
    x = image(10)
    fused = _merged(first, second)
    true = second(first(x))
    wide = F.conv2d(x, first.weight, padding=2)  # one position more on every side
    strip = Strip(4)
    limit = strength(wide)
    axes = strip.panel("first(x), and beyond", "what one convolution\nwould read")
    cells(axes, wide[0, 0], limit)
    frame(axes, 1, 1, 10, 10)
    axes = strip.panel("first(x), with zeros around", "what the second layer reads", "≠")
    cells(axes, F.pad(first(x), (1, 1, 1, 1))[0, 0], limit)
    ring(axes, 12, 1, "0")
    draw_error(strip, fused(x)[0, 0], true[0, 0])
    hidden = wide.clone()
    hidden[..., 1:-1, 1:-1] = 0
    repaired = fused(x) - F.conv2d(hidden, second.weight)
    draw_error(strip, repaired[0, 0], true[0, 0], "ring subtracted")
    return strip


def full_first() -> Strip:
    """A first layer that is padded to the full puts out all that it has."""
    first, second = layer(3, 5, padding=2), layer(3, 6, padding=1)
    x = image(8)
    fused = lf.fuse_conv_conv(first, second)
    wide = F.conv2d(x, first.weight, padding=3)
    strip = Strip(3)
    axes = strip.panel("first(x), and beyond", "beyond it every tap reads padding:\nnothing but 0")
    cells(axes, wide[0, 0], strength(wide))
    frame(axes, 1, 1, 10, 10)
    axes = strip.panel("first(x), with zeros around", "what the second layer reads:\nthe same", "=")
    cells(axes, F.pad(first(x), (1, 1, 1, 1))[0, 0], strength(wide))
    ring(axes, 12, 1, "0")
    draw_error(strip, fused(x)[0, 0], second(first(x))[0, 0])
    return strip
