"""The other ways of doing it: what one would write, or install, without this package.

A peer of `conv_to_affine` is ``f(layer, conv_weight, conv_bias) -> (matrix, offset)``, a peer of
`fuse_conv_linear` is ``f(layer, conv_weight, conv_bias, linear_weight, linear_bias) ->
(weight, bias)``. Each returns contiguous tensors. Shapes: matrix ``[rows, cols]``, linear weight
``[F, rows]``, fused weight ``[F, cols]``.

``test_peers.py`` checks every one of them against the convolution itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.layers import Layer, Sizes

Affine = tuple[Tensor, Tensor]

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_CONV_INPUT = {
    1: torch.nn.grad.conv1d_input,
    2: torch.nn.grad.conv2d_input,
    3: torch.nn.grad.conv3d_input,
}


def conv(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The layer's convolution on a batch ``[N, C_in, *in]``."""
    if layer.transposed:
        return _CONV_TRANSPOSE[layer.axes](
            x, weight, bias, stride=layer.stride, padding=layer.padding, groups=layer.groups,
            dilation=layer.dilation,
        )  # fmt: skip
    return CONV[layer.axes](
        x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups
    )


def offset(layer: Layer, conv_bias: Tensor) -> Tensor:
    """The convolution's bias, once per output position."""
    return conv_bias.repeat_interleave(math.prod(layer.output_size))


def _images(layer: Layer, linear_weight: Tensor) -> Tensor:
    """Rows of the Linear seen as images ``[F, C_out, *out]``."""
    return linear_weight.view(-1, layer.out_channels, *layer.output_size)


def _fused_bias(images: Tensor, conv_bias: Tensor, linear_bias: Tensor) -> Tensor:
    return linear_bias + images.flatten(2).sum(2) @ conv_bias


def _eye_images(features: int, shape: Sizes, like: Tensor) -> Tensor:
    """One image per feature, with that feature one and all others zero."""
    return torch.eye(features, dtype=like.dtype, device=like.device).view(features, *shape)


# --- fuse_conv_linear ------------------------------------------------------------------------


def fuse_adjoint(layer: Layer, cw: Tensor, cb: Tensor, lw: Tensor, lb: Tensor) -> Affine:
    """Takes each row of the Linear back through the convolution with its adjoint.

    The adjoint of a convolution is the transposed convolution with the same weight and the
    other way round.
    """
    images = _images(layer, lw)
    if layer.transposed:
        back = CONV[layer.axes](
            images, cw, None, layer.stride, layer.padding, layer.dilation, layer.groups
        )
    else:
        back = _CONV_TRANSPOSE[layer.axes](
            images, cw, None, stride=layer.stride, padding=layer.padding,
            output_padding=layer.adjoint_output_padding, groups=layer.groups,
            dilation=layer.dilation,
        )  # fmt: skip
    return back.flatten(1).contiguous(), _fused_bias(images, cb, lb)


def fuse_conv_input(layer: Layer, cw: Tensor, cb: Tensor, lw: Tensor, lb: Tensor) -> Affine:
    """The same adjoint through ``torch.nn.grad.convNd_input``: the convolution's backward."""
    images = _images(layer, lw)
    back = _CONV_INPUT[layer.axes](
        (images.shape[0], layer.in_channels, *layer.input_size), cw, images,
        layer.stride, layer.padding, layer.dilation, layer.groups,
    )  # fmt: skip
    return back.flatten(1).contiguous(), _fused_bias(images, cb, lb)


def fuse_one_hot(layer: Layer, cw: Tensor, cb: Tensor, lw: Tensor, lb: Tensor) -> Affine:
    """Feeds both layers every image that has a single pixel on; each answer is a column."""
    pixels = _eye_images(layer.cols, (layer.in_channels, *layer.input_size), cw)
    columns = F.linear(conv(layer, pixels, cw).flatten(1), lw)
    return columns.T.contiguous(), F.linear(offset(layer, cb), lw, lb)


def fuse_jacrev(layer: Layer, cw: Tensor, cb: Tensor, lw: Tensor, lb: Tensor) -> Affine:
    """Differentiates both layers, as one function, at zero; the value there is the bias."""

    def both(x: Tensor) -> Tensor:
        return F.linear(conv(layer, x[None], cw, cb).flatten(1), lw, lb)[0]

    zero = cw.new_zeros(layer.in_channels, *layer.input_size)
    weight = torch.func.jacrev(both)(zero)
    return weight.flatten(1).contiguous(), both(zero)


def fuse_einconv(layer: Layer, cw: Tensor, cb: Tensor, lw: Tensor, lb: Tensor) -> Affine:
    """The einsum that the package einconv writes for a convolution's input gradient."""
    from einconv.expressions.convNd_input_vjp import einsum_expression

    images = _images(layer, lw)
    equation, operands, shape = einsum_expression(
        cw, images, layer.input_size, layer.stride, layer.padding, layer.dilation, layer.groups
    )
    weight = torch.einsum(equation, *operands).reshape(shape)
    return weight.flatten(1).contiguous(), _fused_bias(images, cb, lb)


def _through_matrix(build: Callable[[Layer, Tensor, Tensor], Affine]) -> Callable[..., Affine]:
    """Builds the matrix first, then multiplies by it."""

    def fuse(layer: Layer, cw: Tensor, cb: Tensor, lw: Tensor, lb: Tensor) -> Affine:
        matrix, offset = build(layer, cw, cb)
        return lw @ matrix, torch.addmv(lb, lw, offset)

    fuse.__doc__ = f"Builds the matrix (`{build.__name__}`), then multiplies the Linear by it."
    return fuse


# --- conv_to_affine --------------------------------------------------------------------------


def matrix_adjoint(layer: Layer, cw: Tensor, cb: Tensor) -> Affine:
    """The adjoint applied to the rows of an identity: one image per output feature."""
    rows = torch.eye(layer.rows, dtype=cw.dtype, device=cw.device)
    return fuse_adjoint(layer, cw, cb, rows, cw.new_zeros(layer.rows))


def matrix_one_hot(layer: Layer, cw: Tensor, cb: Tensor) -> Affine:
    """Convolves every image that has a single pixel on; each answer is a column."""
    pixels = _eye_images(layer.cols, (layer.in_channels, *layer.input_size), cw)
    return conv(layer, pixels, cw).flatten(1).T.contiguous(), offset(layer, cb)


def matrix_jacrev(layer: Layer, cw: Tensor, cb: Tensor) -> Affine:
    """Differentiates the convolution at zero, one backward pass per output feature."""
    zero = cw.new_zeros(layer.in_channels, *layer.input_size)
    jacobian = torch.func.jacrev(lambda x: conv(layer, x[None], cw, cb).flatten())(zero)
    return jacobian.flatten(1).contiguous(), conv(layer, zero[None], cw, cb).flatten()


def matrix_gist_loops(layer: Layer, cw: Tensor, cb: Tensor) -> Affine:
    """One Python assignment per output position, tap and pair of channels."""
    matrix = cw.new_zeros(layer.rows, layer.cols)
    shape_out = (layer.out_channels, *layer.output_size)
    shape_in = (layer.in_channels, *layer.input_size)
    # the weight's first axis holds all of one side's channels, its second one group of the other
    all_channels, group_channels = cw.shape[:2]
    per_group = all_channels // layer.groups
    for taps in itertools.product(*(layer.taps(axis) for axis in range(layer.axes))):
        out_at, tap, in_at = zip(*taps, strict=True)
        for a in range(all_channels):
            for c in range(group_channels):
                b = a // per_group * group_channels + c
                c_out, c_in = (b, a) if layer.transposed else (a, b)
                row = _flat((c_out, *out_at), shape_out)
                col = _flat((c_in, *in_at), shape_in)
                matrix[row, col] = cw[(a, c, *tap)]
    return matrix, offset(layer, cb)


def tap_indices(layer: Layer, cw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row and column of every tap, and its position in the kernel.

    Returns:
        row and col, int64, which broadcast to ``[all_channels, group_channels, taps]``, the first
        two being those of the weight; and tap_at, ``[taps]``.
    """
    out_at = tap_at = in_at = torch.zeros(1, dtype=torch.int64)
    for axis in range(layer.axes):
        o, k, i = torch.tensor(layer.taps(axis)).T
        out_at = (out_at[:, None] * layer.output_size[axis] + o).flatten()
        tap_at = (tap_at[:, None] * layer.kernel[axis] + k).flatten()
        in_at = (in_at[:, None] * layer.input_size[axis] + i).flatten()
    out_at, tap_at, in_at = (t.to(cw.device) for t in (out_at, tap_at, in_at))

    all_channels, group_channels = cw.shape[:2]
    a = torch.arange(all_channels, device=cw.device)[:, None]
    b = a // (all_channels // layer.groups) * group_channels
    b = b + torch.arange(group_channels, device=cw.device)
    c_out, c_in = (b, a) if layer.transposed else (a, b)
    row = c_out[:, :, None] * math.prod(layer.output_size) + out_at
    col = c_in[:, :, None] * math.prod(layer.input_size) + in_at
    return row, col, tap_at


def matrix_indexed_write(layer: Layer, cw: Tensor, cb: Tensor) -> Affine:
    """Zeros, then all taps at once by one write through index tensors."""
    row, col, tap_at = tap_indices(layer, cw)
    matrix = cw.new_zeros(layer.rows, layer.cols)
    matrix[row, col] = cw.flatten(2)[:, :, tap_at]  # [all_channels, group_channels, taps]
    return matrix, offset(layer, cb)


def matrix_einconv(layer: Layer, cw: Tensor, cb: Tensor) -> Affine:
    """The index patterns of the package einconv, contracted with the weight.

    A transposed convolution takes the patterns of the convolution it is the adjoint of. Groups
    are on the diagonal of an identity between output and input groups.
    """
    from einconv import index_pattern

    far = layer.output_size if layer.transposed else layer.input_size
    settings = zip(far, layer.kernel, layer.stride, layer.padding, layer.dilation, strict=True)
    patterns = [index_pattern(*s, device=cw.device, dtype=cw.dtype) for s in settings]
    taps, near_at, far_at = "abc"[: layer.axes], "hwd"[: layer.axes], "xyz"[: layer.axes]
    pattern_terms = [f"{t}{n}{f}" for t, n, f in zip(taps, near_at, far_at, strict=True)]
    terms = ",".join([f"gpq{taps}", "gj", *pattern_terms])
    near, other = f"gp{near_at}", f"jq{far_at}"
    equation = f"{terms}->{other}{near}" if layer.transposed else f"{terms}->{near}{other}"
    matrix = torch.einsum(
        equation,
        cw.unflatten(0, (layer.groups, -1)),
        torch.eye(layer.groups, dtype=cw.dtype, device=cw.device),
        *patterns,
    )
    return matrix.reshape(layer.rows, layer.cols).contiguous(), offset(layer, cb)


def _flat(index: Sizes, shape: Sizes) -> int:
    """Position of an index in a flattened tensor of that shape."""
    position = 0
    for at, size in zip(index, shape, strict=True):
        position = position * size + at
    return position


fuse_gist_loops = _through_matrix(matrix_gist_loops)
fuse_indexed_write = _through_matrix(matrix_indexed_write)
