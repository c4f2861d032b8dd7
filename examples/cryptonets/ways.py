"""Four ways to make one Linear of a Conv2d and the Linear behind it.

Each takes `(conv, linear, input_size)` and returns the fused weight `[F, C_in * i_y * i_x]` and the
bias `[F]`. The first three are plain PyTorch, to compare with. They expect a bias, zero padding, no
dilation and one group; the last one takes any convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import linfuse_ext

Size = tuple[int, int]
Way = Callable[[nn.Conv2d, nn.Linear, Size], tuple[Tensor, Tensor]]


@torch.no_grad()
def by_loops(conv: nn.Conv2d, linear: nn.Linear, input_size: Size) -> tuple[Tensor, Tensor]:
    """Writes the convolution's matrix tap by tap, then multiplies: the well-known gist."""
    c_out, c_in, *kernel = conv.weight.shape
    outs = output_size(conv, input_size)
    shape = (c_out, *outs, c_in, *input_size)
    matrix = torch.zeros(shape, dtype=conv.weight.dtype)  # [C_out, o_y, o_x, C_in, i_y, i_x]
    for o_y, o_x, k_y, k_x in product(*map(range, (*outs, *kernel))):
        i_y = o_y * conv.stride[0] + k_y - conv.padding[0]
        i_x = o_x * conv.stride[1] + k_x - conv.padding[1]
        if 0 <= i_y < input_size[0] and 0 <= i_x < input_size[1]:  # else the tap reads padding
            for out_channel, in_channel in product(range(c_out), range(c_in)):
                tap = conv.weight[out_channel, in_channel, k_y, k_x]
                matrix[out_channel, o_y, o_x, in_channel, i_y, i_x] = tap
    offset = conv.bias.repeat_interleave(outs[0] * outs[1])  # [C_out * o_y * o_x]
    weight = linear.weight @ matrix.view(len(offset), -1)
    return weight, linear.bias + linear.weight @ offset


@torch.no_grad()
def by_one_hot_images(
    conv: nn.Conv2d, linear: nn.Linear, input_size: Size
) -> tuple[Tensor, Tensor]:
    """Sends a black image and one image per pixel through both layers: the forum's recipe."""
    pixels = conv.in_channels * input_size[0] * input_size[1]
    images = torch.eye(pixels + 1, pixels, dtype=conv.weight.dtype).roll(1, dims=0)
    images = images.view(-1, conv.in_channels, *input_size)  # [1 + pixels, C_in, i_y, i_x]
    answers = linear(conv(images).flatten(1))  # [1 + pixels, F]
    return (answers[1:] - answers[0]).T.contiguous(), answers[0]


@torch.no_grad()
def by_conv_transpose(
    conv: nn.Conv2d, linear: nn.Linear, input_size: Size
) -> tuple[Tensor, Tensor]:
    """Takes each row of the Linear back through the convolution: the best that torch has."""
    outs = output_size(conv, input_size)
    rows = linear.weight.view(-1, conv.out_channels, *outs)  # [F, C_out, o_y, o_x]
    unread = [  # input rows and columns at the end, which the last tap does not reach
        size + 2 * pad - stride * (out - 1) - kernel
        for size, pad, stride, out, kernel in zip(
            input_size, conv.padding, conv.stride, outs, conv.kernel_size, strict=True
        )
    ]
    weight = F.conv_transpose2d(rows, conv.weight, None, conv.stride, conv.padding, unread)
    return weight.flatten(1), linear.bias + rows.sum((2, 3)) @ conv.bias


def by_linfuse(conv: nn.Conv2d, linear: nn.Linear, input_size: Size) -> tuple[Tensor, Tensor]:
    """Ours, in one call."""
    fused = linfuse_ext.fuse_conv_linear(conv, linear, input_size)
    return fused.weight.detach(), fused.bias.detach()


def output_size(conv: nn.Conv2d, input_size: Size) -> Size:
    """Spatial size of the convolution's output."""
    height, width = (
        (size + 2 * pad - kernel) // stride + 1
        for size, pad, kernel, stride in zip(
            input_size, conv.padding, conv.kernel_size, conv.stride, strict=True
        )
    )
    return height, width


WAYS: dict[str, Way] = {
    "Python loops, then a product": by_loops,
    "one-hot images": by_one_hot_images,
    "conv_transpose2d by hand": by_conv_transpose,
    "linfuse_ext": by_linfuse,
}
