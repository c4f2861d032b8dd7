"""The plain-torch twin of every operation: slow, obvious, and the oracle of the tests and docs.

Everything follows from one idea: the columns of a linear map's matrix are its values on the unit
vectors. The convolution itself is torch's, applied to one image per input position, so that nothing
here shares a formula with the kernels. A call of the package never comes here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def _pairs(padding: Any, axes: int, kernel: Sequence[int], dilation: Any) -> list[tuple[int, int]]:
    if padding == "valid":
        padding = 0
    if padding == "same":
        spread = [dilation] * axes if isinstance(dilation, int) else list(dilation) * axes
        totals = [spread[n] * (kernel[n] - 1) for n in range(axes)]
        return [(total // 2, total - total // 2) for total in totals]
    values = [padding] if isinstance(padding, int) else list(padding)
    if len(values) == 2 * axes:
        return [(values[2 * n], values[2 * n + 1]) for n in range(axes)]
    values = values if len(values) == axes else values * axes
    return [(value, value) for value in values]


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    transposed: bool = False,
    output_padding: Any = 0,
    padding_mode: str = "zeros",
) -> Tensor:
    """Returns the convolution of `x` `[N, C_in, *in]`, with every setting of the package."""
    axes = weight.dim() - 2
    pairs = _pairs(padding, axes, weight.shape[2:], dilation)
    flat = [value for pair in reversed(pairs) for value in pair]
    if not transposed:
        mode = "constant" if padding_mode == "zeros" else padding_mode
        if any(flat):
            x = F.pad(x, flat, mode=mode)
        return _CONVOLUTIONS[axes](x, weight, bias, stride, 0, dilation, groups)
    # A transposed convolution cuts its padding off the full result, whose high end
    # output_padding then extends by positions that no tap reaches.
    full = _TRANSPOSED[axes](x, weight, None, stride, 0, 0, groups, dilation)
    extra = [output_padding] * axes if isinstance(output_padding, int) else list(output_padding)
    extra = extra * axes if len(extra) == 1 else extra
    cut = [value for (low, high), e in zip(pairs, extra, strict=True) for value in (-low, e - high)]
    cut = [value for n in reversed(range(axes)) for value in cut[2 * n : 2 * n + 2]]
    extended = F.pad(full, [max(value, 0) for value in cut])
    y = F.pad(extended, [min(value, 0) for value in cut])
    return y if bias is None else y + bias.view(-1, *[1] * axes)


def conv_to_affine(
    weight: Tensor, bias: Tensor | None, input_size: Any, *arguments: Any, **keywords: Any
) -> tuple[Tensor, Tensor]:
    """The matrix and offset of a convolution: its values on the unit images, and on zero.

    Shapes and arguments are those of linfuse_ext.functional.conv_to_affine, but for `rows` and
    `layout`.

    Examples:
        >>> conv_to_affine(torch.tensor([[[1.0, 2.0]]]), None, 3)[0]
        tensor([[1., 2., 0.],
                [0., 1., 2.]])
    """
    axes = weight.dim() - 2
    sizes = [input_size] * axes if isinstance(input_size, int) else list(input_size)
    sizes = sizes * axes if len(sizes) == 1 else sizes
    groups = arguments[3] if len(arguments) > 3 else keywords.get("groups", 1)
    channels = weight.shape[0] if keywords.get("transposed") else weight.shape[1] * groups
    cols = channels * math.prod(sizes)
    unit = torch.eye(cols, dtype=weight.dtype, device=weight.device).view(cols, channels, *sizes)
    matrix = convolve(unit, weight, None, *arguments, **keywords).flatten(1).T
    zero = torch.zeros(1, channels, *sizes, dtype=weight.dtype, device=weight.device)
    offset = convolve(zero, weight, bias, *arguments, **keywords).flatten()
    return matrix, offset


def fuse_conv_linear(
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    input_size: Any,
    *arguments: Any,
    **keywords: Any,
) -> tuple[Tensor, Tensor]:
    """The merged Linear, by the product with the convolution's matrix.

    Shapes and arguments are those of linfuse_ext.functional.fuse_conv_linear.
    """
    matrix, offset = conv_to_affine(conv_weight, conv_bias, input_size, *arguments, **keywords)
    bias = linear_weight @ offset
    return linear_weight @ matrix, bias if linear_bias is None else bias + linear_bias
