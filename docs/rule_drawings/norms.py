"""Drawings of BatchNorm and average pooling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import linfuse_ext as lf

from .maps import draw_error, image, layer
from .strip import COUNTS, MUTED, Strip, cells, frame, ring, strength


def norm_behind() -> Strip:
    """Behind a layer a BatchNorm scales rows of the matrix and shifts the offset."""
    conv = nn.Conv1d(1, 3, 3, padding=1, dtype=torch.float64).requires_grad_(False)
    kernels = [[1.0, 1.6, -0.8], [-0.9, 1.4, 0.7], [0.6, -0.8, 1.0]]
    conv.weight.data = torch.tensor(kernels, dtype=torch.float64).unsqueeze(1)
    bn = nn.BatchNorm1d(3, dtype=torch.float64).eval().requires_grad_(False)
    bn.weight.data = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    size = 5
    fused = lf.fuse_bn(conv, bn)
    one, merged = (lf.conv_to_linear(each, size).weight.detach() for each in (conv, fused))
    scale = torch.diag((bn.weight.data / (1 + bn.eps) ** 0.5).repeat_interleave(size))
    strip = Strip(4)
    limit = strength(one, scale, merged)
    wide = torch.zeros(15, 15, dtype=torch.float64)
    for title, matrix, note, sign in (
        ("scale", scale, "one number per channel", ""),
        ("A, the layer", one, "3 channels of 5 positions", "·"),
        ("merged", merged, "the rows of a channel,\nscaled together", "="),
    ):
        shown = wide.clone()
        shown[:, (15 - matrix.shape[1]) // 2 :][:, : matrix.shape[1]] = matrix
        axes = strip.panel(title, note, sign)
        cells(axes, shown, limit, lines="none")
        left = (15 - matrix.shape[1]) / 2
        axes.hlines([5, 10], left, 15 - left, colors=MUTED, linewidth=0.8)
        frame(axes, left, 0, matrix.shape[1], 15)
    x = image(size)[:, 0, :1]
    draw_error(strip, fused(x)[0], bn(conv(x))[0])
    return strip


def norm_before() -> Strip:
    """Before a padded layer the shift ends where the padding begins."""
    conv = layer(3, 4, padding=1)
    bn = nn.BatchNorm2d(1, dtype=torch.float64).eval().requires_grad_(False)
    bn.running_mean.data.fill_(-0.8)
    x = image(10)
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    shift = bn.bias - bn.running_mean * scale
    ones = torch.ones(1, 1, 10, 10, dtype=torch.float64)
    shifted = shift * ones
    bias_map = conv(shifted)[0, 0]
    true = conv(bn(x))[0, 0]
    scaled = F.conv2d(x, conv.weight * scale, padding=1)[0, 0]
    strip = Strip(4)
    axes = strip.panel("the shift, with zeros around", "padding is not shifted")
    cells(axes, F.pad(shifted, (1, 1, 1, 1))[0, 0], strength(shift))
    ring(axes, 12, 1, "0")
    axes = strip.panel("layer(the shift)", "the bias map", "→")
    cells(axes, bias_map, strength(bias_map))
    draw_error(strip, scaled + shift * conv.weight.sum(), true, "with one bias")
    draw_error(strip, scaled + bias_map, true, "with the bias map")
    return strip


def pooling() -> Strip:
    """What each window of an average pooling divides by."""
    ones = torch.ones(1, 1, 6, 6, dtype=torch.float64)
    strip = Strip(3)
    for title, pool, note in (
        ("padding counts", nn.AvgPool2d(3, 1, 1), "count_include_pad=True:\na convolution"),
        (
            "padding does not count",
            nn.AvgPool2d(3, 1, 1, count_include_pad=False),
            "count_include_pad=False:\nno convolution has two divisors",
        ),
        (
            "a window too many",
            nn.AvgPool2d(3, 2, 0, ceil_mode=True),
            "ceil_mode=True: the last windows\nreach beyond the input",
        ),
    ):
        low = pool.padding
        padded = F.pad(ones, (low, 3, low, 3))
        window = torch.ones(1, 1, 3, 3, dtype=torch.float64)
        summed = F.conv2d(padded, window, stride=pool.stride)
        out = pool(ones)
        rows = out.shape[-1]
        divisor = (summed[..., :rows, :rows] / out)[0, 0]
        cells(strip.panel(title, note), divisor, 14, COUNTS, numbers=".0f")
    return strip
