"""The operations on tensors, differentiable, in the argument order of torch.nn.functional.conv2d.

Index letters, everywhere the same: `o` output position, `i` input position, `k` kernel element,
`c_out`, `c_in` channels, `f` a row of the Linear. A *row* of the convolution's matrix is
`(c_out, o)`, a *column* `(c_in, i)`, both in the order of torch.flatten on a contiguous tensor.

Every function checks all its arguments before any memory is touched: TypeError or ValueError,
worded "op: `argument` requirement, got value".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .geometry import Geometry, as_int, make_geometry

__all__ = ["conv_to_affine", "fuse_conv_linear"]

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

Size = int | Sequence[int]
Padding = int | Sequence[int] | str


def _check_tensor(op: str, name: str, tensor: object, like: Tensor | None = None) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: `{name}` must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{op}: `{name}` must be a dense tensor, got {tensor.layout}")
    if like is None:
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{op}: `{name}` must be float32, float64, float16 or bfloat16, got {tensor.dtype}"
            )
        return
    if tensor.dtype != like.dtype:
        raise TypeError(
            f"{op}: `{name}` must have the dtype of the weight ({like.dtype}), got {tensor.dtype}"
        )
    if tensor.device != like.device:
        raise ValueError(
            f"{op}: `{name}` must be on the device of the weight ({like.device}), "
            f"got {tensor.device}"
        )


def _check_vector(op: str, name: str, vector: Tensor | None, like: Tensor, size: int) -> None:
    if vector is None:
        return
    _check_tensor(op, name, vector, like)
    if vector.dim() != 1 or vector.shape[0] != size:
        raise ValueError(f"{op}: `{name}` must have shape ({size},), got {tuple(vector.shape)}")


def _check_rows(op: str, rows: Sequence[int] | None, geometry: Geometry) -> tuple[int, int] | None:
    if rows is None:
        return None
    if not isinstance(rows, Sequence) or isinstance(rows, str) or len(rows) != 2:
        raise TypeError(f"{op}: `rows` must be a pair (start, stop) or None, got {rows!r}")
    start, stop = (as_int(op, "rows", value) for value in rows)
    if not (start >= 0 and start <= stop and stop <= geometry.rows):
        raise ValueError(
            f"{op}: `rows` must be (start, stop) with 0 <= start <= stop <= {geometry.rows}, "
            f"got {(start, stop)}"
        )
    return start, stop


def conv_to_affine(
    weight: Tensor,
    bias: Tensor | None,
    input_size: Size,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    transposed: bool = False,
    output_padding: Size = 0,
    padding_mode: str = "zeros",
    layout: torch.layout = torch.strided,
    rows: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Writes a convolution as the affine map that it is, `y = A x + b` on flattened tensors.

    `A[(c_out, o), (c_in, i)]` is the sum of `weight[c_out, c_in, k]` over the kernel elements k
    that tie output position o to input position i: at most one with zero padding, several where
    padding repeats an input position. The rest of A is zero. This is the matrix of V. Dumoulin and
    F. Visin, "A guide to convolution arithmetic for deep learning", arXiv:1603.07285, section 4.1.

    Args:
        weight: `[C_out, C_in / groups, *kernel]`, or `[C_in, C_out / groups, *kernel]` if
            transposed; 1 to 3 spatial axes. float32, float64, float16 or bfloat16; half types are
            summed in float32 and rounded once.
        bias: `[C_out]`, or None for zeros.
        input_size: Spatial size of the convolution's input, in positions: an int or one per axis.
        stride: An int or one per axis.
        padding: An int, one per axis, a (low, high) pair per axis flattened, first axis first
            (`(top, bottom, left, right)`), 'same' or 'valid'.
        dilation: An int or one per axis.
        groups: Groups of the convolution.
        transposed: Whether it is a transposed convolution.
        output_padding: Extra positions at the high end of a transposed convolution's output.
        padding_mode: 'zeros', 'reflect', 'replicate' or 'circular', as torch.nn.Conv2d has them.
        layout: Layout of the matrix; torch.strided.
        rows: `(start, stop)` for only these rows of the matrix and of the offset.

    Returns:
        The matrix A, `[C_out * prod(out), C_in * prod(in)]`, and the offset b,
        `[C_out * prod(out)]`, contiguous, with the dtype and device of `weight`.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: An argument has a wrong value, shape or device.

    Example:
        >>> weight, bias = torch.tensor([[[1.0, 2.0]]]), torch.tensor([0.5])
        >>> matrix, offset = conv_to_affine(weight, bias, input_size=3)
        >>> matrix
        tensor([[1., 2., 0.],
                [0., 1., 2.]])
        >>> offset
        tensor([0.5000, 0.5000])
    """
    op = "conv_to_affine"
    _check_tensor(op, "weight", weight)
    if not isinstance(layout, torch.layout):
        raise TypeError(f"{op}: `layout` must be a torch.layout, got {layout!r}")
    if layout != torch.strided:
        raise ValueError(f"{op}: `layout` must be torch.strided, got {layout}")
    geometry = make_geometry(
        op,
        weight.shape,
        input_size,
        stride,
        padding,
        dilation,
        groups,
        transposed,
        output_padding,
        padding_mode,
    )
    _check_vector(op, "bias", bias, weight, geometry.out_channels)
    block = _check_rows(op, rows, geometry)
    matrix, offset = torch.ops.linfuse.conv_to_affine(
        weight, bias, *geometry.op_arguments, **geometry.op_keywords, rows=block
    )
    return matrix, offset


def fuse_conv_linear(
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    input_size: Size,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    transposed: bool = False,
    output_padding: Size = 0,
    padding_mode: str = "zeros",
) -> tuple[Tensor, Tensor]:
    r"""Merges a convolution and the Linear behind it, `linear(conv(x).flatten(1))`.

    The merged weight is `linear_weight @ A` with A the matrix of the convolution, and its bias
    `linear_bias + linear_weight @ b`. A is never built: row f of the product is row f of
    `linear_weight`, seen as an image `[C_out, *out]` and taken back through the convolution (its
    input gradient), at `2 F C_out (C_in / groups) prod(kernel) prod(out)` operations.

    Args:
        conv_weight: `[C_out, C_in / groups, *kernel]`, or `[C_in, C_out / groups, *kernel]` if
            transposed; 1 to 3 spatial axes. float32, float64, float16 or bfloat16; half types are
            summed in float32 and rounded once.
        conv_bias: `[C_out]`, or None for zeros.
        linear_weight: `[F, C_out * prod(out)]`, of the dtype and on the device of `conv_weight`.
        linear_bias: `[F]`, or None for zeros.
        input_size: Spatial size of the convolution's input, in positions: an int or one per axis.
        stride: An int or one per axis.
        padding: An int, one per axis, a (low, high) pair per axis flattened, first axis first
            (`(top, bottom, left, right)`), 'same' or 'valid'.
        dilation: An int or one per axis.
        groups: Groups of the convolution.
        transposed: Whether it is a transposed convolution.
        output_padding: Extra positions at the high end of a transposed convolution's output.
        padding_mode: 'zeros', 'reflect', 'replicate' or 'circular', as torch.nn.Conv2d has them.

    Returns:
        The merged weight `[F, C_in * prod(in)]` and bias `[F]`, contiguous.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: An argument has a wrong value, shape or device.

    Example:
        >>> conv_weight, conv_bias = torch.tensor([[[1.0, 2.0]]]), torch.tensor([0.5])
        >>> linear_weight, linear_bias = torch.tensor([[1.0, 10.0]]), torch.tensor([3.0])
        >>> fuse_conv_linear(conv_weight, conv_bias, linear_weight, linear_bias, input_size=3)
        (tensor([[ 1., 12., 20.]]), tensor([8.5000]))
    """
    op = "fuse_conv_linear"
    _check_tensor(op, "conv_weight", conv_weight)
    _check_tensor(op, "linear_weight", linear_weight, conv_weight)
    geometry = make_geometry(
        op,
        conv_weight.shape,
        input_size,
        stride,
        padding,
        dilation,
        groups,
        transposed,
        output_padding,
        padding_mode,
    )
    if linear_weight.dim() != 2 or linear_weight.shape[1] != geometry.rows:
        raise ValueError(
            f"{op}: `linear_weight` must have shape (F, {geometry.rows}), as the convolution's "
            f"output flattens to {geometry.rows}, got {tuple(linear_weight.shape)}"
        )
    _check_vector(op, "conv_bias", conv_bias, conv_weight, geometry.out_channels)
    _check_vector(op, "linear_bias", linear_bias, conv_weight, linear_weight.shape[0])
    weight, bias = torch.ops.linfuse.fuse_conv_linear(
        conv_weight,
        conv_bias,
        linear_weight,
        linear_bias,
        *geometry.op_arguments,
        **geometry.op_keywords,
    )
    return weight, bias
