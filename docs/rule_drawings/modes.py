"""Drawings of padding that repeats positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import linfuse_ext as lf

from .maps import draw_error, image, layer, without_padding
from .strip import ERRORS, Strip, cells, strength

_SIZE = 12


_FIRST, _SECOND = torch.tensor([0.5, 1.0, -0.8]), torch.tensor([-0.6, 1.0, 0.9])


def _line(kernel: Tensor, mode: str) -> nn.Conv1d:
    """A convolution of one axis that keeps the size."""
    size = len(kernel)
    conv = nn.Conv1d(
        1, 1, size, padding=size // 2, padding_mode=mode, bias=False, dtype=torch.float64
    )
    conv.weight.data = kernel.double().view(1, 1, -1)
    return conv.requires_grad_(False)


def _matrix(conv: nn.Module, size: int = _SIZE) -> Tensor:
    return lf.conv_to_linear(conv, size).weight.detach()


def _one_kernel(first: nn.Conv1d, second: nn.Conv1d) -> nn.Conv1d:
    """The convolution with the merged kernel, in the padding mode of the two."""
    bare = [
        nn.Conv1d(1, 1, conv.kernel_size, bias=False, dtype=torch.float64).requires_grad_(False)
        for conv in (first, second)
    ]
    for conv, source in zip(bare, (first, second), strict=True):
        conv.weight.data = source.weight.data
    return _line(lf.fuse_conv_conv(*bare).weight.data.flatten(), first.padding_mode)


def circular() -> Strip:
    """Round a ring there is no border: two steps along it are one longer step."""
    first, second = _line(_FIRST, "circular"), _line(_SECOND, "circular")
    one, two = _matrix(first), _matrix(second)
    fused = lf.fuse_conv_conv(first, second)
    strip = Strip(4)
    limit = strength(one, two, two @ one)
    for title, matrix, note, sign in (
        ("$A_2$", two, "kernel 3, padding 1, circular", ""),
        ("$A_1$", one, "kernel 3, padding 1, circular", "·"),
        ("$A_2 A_1$", two @ one, "kernel 5, padding 2, circular", "="),
    ):
        cells(strip.panel(title, note, sign), matrix, limit)
    draw_error(strip, _matrix(fused), two @ one, "merged \N{MINUS SIGN} product")
    return strip


def repeating() -> Strip:
    """In the plane: where padding repeats values, the merged layer repeats other ones."""
    strip = Strip(3)
    for mode in ("reflect", "replicate", "circular"):
        first = layer(3, 5, padding=1, padding_mode=mode)
        second = layer(3, 6, padding=1, padding_mode=mode)
        x = image(12)
        bare = lf.fuse_conv_conv(without_padding(first), without_padding(second))
        merged = nn.Conv2d(
            1, 1, 5, padding=2, padding_mode=mode, bias=False, dtype=torch.float64
        ).requires_grad_(False)
        merged.weight.data = bare.weight.data
        draw_error(strip, merged(x)[0, 0], second(first(x))[0, 0], f"both {mode}")
    return strip


def always_a_matrix() -> Strip:
    """The product of two matrices is a matrix, whatever happens at the border."""
    first, second = _line(_FIRST, "reflect"), _line(_SECOND, "zeros")
    one, two = _matrix(first), _matrix(second)
    strip = Strip(4)
    limit = strength(one, two, two @ one)
    for title, matrix, note, sign in (
        ("$A_2$", two, "kernel 3, zeros", ""),
        ("$A_1$", one, "kernel 3, reflect", "·"),
        ("$A_2 A_1$", two @ one, "one Linear: exact", "="),
    ):
        cells(strip.panel(title, note, sign), matrix, limit)
    error = (two @ one - _matrix(_one_kernel(first, second))).abs()
    axes = strip.panel("not as one convolution", "the rows at the border are those\nof no kernel")
    cells(axes, error, error.max().item(), ERRORS)
    return strip
