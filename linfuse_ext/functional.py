"""The operations on tensors, differentiable, in the argument order of torch.nn.functional.conv2d.

Index letters, everywhere the same: `o` output position, `i` input position, `k` kernel element,
`c_out`, `c_in` channels, `f` a row of the Linear. A *row* of the convolution's matrix is
`(c_out, o)`, a *column* `(c_in, i)`, both in the order of torch.flatten on a contiguous tensor.

Every function checks all its arguments before any memory is touched: TypeError or ValueError,
worded "op: `argument` requirement, got value".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import sparse, torch_engine
from .calls import call, call_with
from .composition import Conv, Merge, compose
from .geometry import Geometry, as_int, check_fits, make_geometry, make_settings, remembered
from .meshes import check_meshes, check_not_sharded, is_sharded, on_whole, wants_gradient
from .operands import check_bias, check_holds_values, check_tensor

__all__ = [
    "conv_to_affine",
    "conv_to_diagonals",
    "fuse_conv_conv",
    "fuse_conv_linear",
    "fuse_linear_conv",
    "fuse_linear_linear",
]

_OPS = torch.ops.linfuse

Size = int | Sequence[int]
Padding = int | Sequence[int] | str


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
    index_dtype: torch.dtype = torch.int64,
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
        layout: Layout of the matrix: torch.strided, torch.sparse_csr or torch.sparse_coo. The
            sparse ones store the taps and nothing else, by ascending column (coalesced), are built
            without a dense pass, and pass gradients on through their values. torch.compile makes
            no sparse tensors; torch.ops.linfuse.conv_to_csr, which returns values, columns and row
            pointers, compiles.
        rows: `(start, stop)` for only these rows of the matrix and of the offset.
        index_dtype: Of the indices; torch.int32 only for torch.sparse_csr, where they fit.

    Returns:
        The matrix A, `[C_out * prod(out), C_in * prod(in)]`, and the offset b,
        `[C_out * prod(out)]`, contiguous, with the dtype and device of `weight`.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: An argument has a wrong value, shape or device.

    Examples:
        >>> weight, bias = torch.tensor([[[1.0, 2.0]]]), torch.tensor([0.5])
        >>> matrix, offset = conv_to_affine(weight, bias, input_size=3)
        >>> matrix
        tensor([[1., 2., 0.],
                [0., 1., 2.]])
        >>> offset
        tensor([0.5000, 0.5000])
        >>> matrix, _ = conv_to_affine(weight, bias, input_size=3, layout=torch.sparse_coo)
        >>> matrix.indices(), matrix.values()
        (tensor([[0, 0, 1, 1],
                [0, 1, 1, 2]]), tensor([1., 2., 1., 2.]))
    """
    op = "conv_to_affine"
    check_tensor(op, "weight", weight)
    if layout is not torch.strided:
        sparse.check_layout(op, layout)
    settings = (stride, padding, dilation, groups, transposed, output_padding, padding_mode)
    geometry = make_geometry(op, tuple(weight.shape), input_size, *settings)
    check_bias(op, "bias", bias, weight, geometry.out_channels)
    block = _check_rows(op, rows, geometry)
    if index_dtype is not torch.int64:
        sparse.check_index_dtype(op, index_dtype, layout, geometry, block)
    if layout is not torch.strided:
        check_not_sharded(f"{op} with layout {layout}", "weight", weight)
        if layout == torch.sparse_csr and not weight.is_meta:
            check_holds_values(op, "weight", weight, "torch makes no fake tensors of this layout")
        matrix = sparse.make_matrix(weight, geometry, layout, block, index_dtype)
        return matrix, sparse.make_offset(weight, bias, geometry, block)
    options = {} if block is None else {"rows": block}
    matrix, offset = call(_OPS.conv_to_affine.default, geometry, weight, bias, **options)
    return matrix, offset


def conv_to_diagonals(
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
) -> sparse.Diagonals:
    r"""Writes a convolution by the generalised diagonals of its matrix, for encrypted vectors.

    Under homomorphic encryption a vector can be rotated and multiplied by a plain vector slot by
    slot, so that `A x` is a sum over diagonals, `sum_d diagonal_d * rotate(x, d)` (S. Halevi and
    V. Shoup, "Algorithms in HElib", CRYPTO 2014, section 4.3). A is padded with zeros to n x n, n
    the next power of two as packing asks for it; diagonal d holds `A[r, (r + d) mod n]` at r. A
    convolution has few diagonals, and only those with a tap are returned. They are made from the
    stored elements; neither the dense matrix nor a sort takes part.

    Args:
        weight: As conv_to_affine takes it; so are all other arguments.
        bias: `[C_out]`, or None for zeros.
        input_size: Spatial size of the convolution's input, in positions: an int or one per axis.
        stride: An int or one per axis.
        padding: An int, one per axis, a (low, high) pair per axis flattened, 'same' or 'valid'.
        dilation: An int or one per axis.
        groups: Groups of the convolution.
        transposed: Whether it is a transposed convolution.
        output_padding: Extra positions at the high end of a transposed convolution's output.
        padding_mode: 'zeros', 'reflect', 'replicate' or 'circular', as torch.nn.Conv2d has them.

    Returns:
        `size`, which is n; `vectors`, a dict from the offset d to the diagonal, `[n]`; and
        `offset`, the offset b padded with zeros to `[n]`. Of the dtype and on the device of
        `weight`; gradients flow to `weight` and `bias`.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: An argument has a wrong value, shape or device.

    Examples:
        >>> weight, bias = torch.tensor([[[1.0, 2.0]]]), torch.tensor([0.5])
        >>> size, vectors, offset = conv_to_diagonals(weight, bias, input_size=3)
        >>> size, vectors
        (4, {0: tensor([1., 1., 0., 0.]), 1: tensor([2., 2., 0., 0.])})
        >>> x = torch.tensor([1.0, 10.0, 100.0, 0.0])  # padded to n
        >>> offset + sum(diagonal * x.roll(-d) for d, diagonal in vectors.items())
        tensor([ 21.5000, 210.5000,   0.0000,   0.0000])
    """
    op = "conv_to_diagonals"
    check_tensor(op, "weight", weight)
    check_not_sharded(op, "weight", weight)
    settings = (stride, padding, dilation, groups, transposed, output_padding, padding_mode)
    geometry = make_geometry(op, tuple(weight.shape), input_size, *settings)
    check_bias(op, "bias", bias, weight, geometry.out_channels)
    check_holds_values(op, "weight", weight, "it is looked up which diagonals there are")
    return sparse.make_diagonals(weight, bias, geometry)


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

    Examples:
        >>> conv_weight, conv_bias = torch.tensor([[[1.0, 2.0]]]), torch.tensor([0.5])
        >>> linear_weight, linear_bias = torch.tensor([[1.0, 10.0]]), torch.tensor([3.0])
        >>> fuse_conv_linear(conv_weight, conv_bias, linear_weight, linear_bias, input_size=3)
        (tensor([[ 1., 12., 20.]]), tensor([8.5000]))
    """
    op = "fuse_conv_linear"
    check_tensor(op, "conv_weight", conv_weight)
    check_tensor(op, "linear_weight", linear_weight, conv_weight)
    settings = (stride, padding, dilation, groups, transposed, output_padding, padding_mode)
    geometry = make_geometry(op, tuple(conv_weight.shape), input_size, *settings)
    if linear_weight.dim() != 2 or linear_weight.shape[1] != geometry.rows:
        raise ValueError(
            f"{op}: `linear_weight` must have shape (F, {geometry.rows}), as the convolution's "
            f"output flattens to {geometry.rows}, got {tuple(linear_weight.shape)}"
        )
    check_bias(op, "conv_bias", conv_bias, conv_weight, geometry.out_channels)
    check_bias(op, "linear_bias", linear_bias, conv_weight, linear_weight.shape[0])
    operands = (conv_weight, conv_bias, linear_weight, linear_bias)
    weight, bias = call(_OPS.fuse_conv_linear.default, geometry, *operands)
    return weight, bias


def fuse_linear_conv(
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
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
    r"""Merges a Linear and the convolution behind it into one Linear.

    `conv(linear(x).unflatten(1, (C_in, *input_size))).flatten(1)` has the weight
    `A @ linear_weight`, with A the matrix of the convolution, and the bias `A @ linear_bias + b`. A
    is never built: each column of `linear_weight`, and its bias, is an image that goes forward
    through the convolution, at `2 D C_out (C_in / groups) prod(kernel) prod(out)` operations.

    Args:
        linear_weight: `[C_in * prod(input_size), D]`, of the dtype and on the device of
            `conv_weight`.
        linear_bias: `[C_in * prod(input_size)]`, or None for zeros.
        conv_weight: `[C_out, C_in / groups, *kernel]`, or `[C_in, C_out / groups, *kernel]` if
            transposed; 1 to 3 spatial axes. float32, float64, float16 or bfloat16.
        conv_bias: `[C_out]`, or None for zeros.
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
        The merged weight `[C_out * prod(out), D]` and bias `[C_out * prod(out)]`, contiguous.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: An argument has a wrong value, shape or device.

    Examples:
        >>> conv_weight, conv_bias = torch.tensor([[[1.0, 2.0]]]), torch.tensor([0.5])
        >>> linear_weight = torch.tensor([[1.0], [10.0], [100.0]])
        >>> fuse_linear_conv(linear_weight, None, conv_weight, conv_bias, input_size=3)
        (tensor([[ 21.],
                [210.]]), tensor([0.5000, 0.5000]))
    """
    op = "fuse_linear_conv"
    check_tensor(op, "conv_weight", conv_weight)
    check_tensor(op, "linear_weight", linear_weight, conv_weight)
    settings = (stride, padding, dilation, groups, transposed, output_padding, padding_mode)
    geometry = make_geometry(op, tuple(conv_weight.shape), input_size, *settings)
    if linear_weight.dim() != 2 or linear_weight.shape[0] != geometry.cols:
        raise ValueError(
            f"{op}: `linear_weight` must have shape ({geometry.cols}, D), as the convolution's "
            f"input unflattens from {geometry.cols}, got {tuple(linear_weight.shape)}"
        )
    check_bias(op, "linear_bias", linear_bias, conv_weight, geometry.cols)
    check_bias(op, "conv_bias", conv_bias, conv_weight, geometry.out_channels)
    operands = (linear_weight, linear_bias, conv_weight, conv_bias)
    weight, bias = call(_OPS.fuse_linear_conv.default, geometry, *operands)
    return weight, bias


def fuse_linear_linear(
    first_weight: Tensor,
    first_bias: Tensor | None,
    second_weight: Tensor,
    second_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Merges two Linears in a row, `second(first(x))`, into one.

    Args:
        first_weight: `[M, D]`. float32, float64, float16 or bfloat16.
        first_bias: `[M]`, or None for zeros.
        second_weight: `[F, M]`, of the dtype and on the device of `first_weight`.
        second_bias: `[F]`, or None for zeros.

    Returns:
        The merged weight `second_weight @ first_weight`, `[F, D]`, and bias
        `second_weight @ first_bias + second_bias`, `[F]`.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: An argument has a wrong shape or device.

    Examples:
        >>> first, second = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]])
        >>> fuse_linear_linear(first, torch.tensor([1.0, 1.0]), second, None)
        (tensor([[11.]]), tensor([7.]))
    """
    op = "fuse_linear_linear"
    check_pair(op, first_weight, second_weight)
    if first_weight.dim() != 2:
        raise ValueError(
            f"{op}: `first_weight` must have shape (M, D), got {tuple(first_weight.shape)}"
        )
    if second_weight.dim() != 2 or second_weight.shape[1] != first_weight.shape[0]:
        raise ValueError(
            f"{op}: `second_weight` must have shape (F, {first_weight.shape[0]}), as the first "
            f"Linear puts out {first_weight.shape[0]}, got {tuple(second_weight.shape)}"
        )
    check_bias(op, "first_bias", first_bias, first_weight, first_weight.shape[0])
    check_bias(op, "second_bias", second_bias, first_weight, second_weight.shape[0])
    check_fits(op, [second_weight.shape[0] * max(1, first_weight.shape[1]) * 8])
    check_meshes(
        op,
        {
            "first_weight": first_weight,
            "first_bias": first_bias,
            "second_weight": second_weight,
            "second_bias": second_bias,
        },
    )
    wide = torch.promote_types(first_weight.dtype, torch.float32)
    bias = second_weight.new_zeros(second_weight.shape[0], dtype=wide)
    if first_bias is not None:
        bias = second_weight.to(wide) @ first_bias.to(wide)
    if second_bias is not None:
        bias = bias + second_bias.to(wide)
    return second_weight @ first_weight, bias.to(first_weight.dtype)


def check_pair(op: str, first_weight: Tensor, second_weight: Tensor) -> None:
    """Checks the weights of two layers in a row: dtypes and devices."""
    check_tensor(op, "first_weight", first_weight)
    check_tensor(op, "second_weight", second_weight, first_weight)


@remembered
def _merge(
    op: str,
    first_size: Sequence[int],
    second_size: Sequence[int],
    first_has_bias: bool,
    second_has_bias: bool,
    *settings: Any,
) -> Merge:
    """The merge of two convolutions, from their weights' sizes and the settings of both in turn."""
    each = len(settings) // 2
    first = make_settings(f"{op}, first layer", first_size, *settings[:each])
    second = make_settings(f"{op}, second layer", second_size, *settings[each:])
    merge = compose(op, Conv.of(first, first_has_bias), Conv.of(second, second_has_bias))
    settings = (first, second, merge.result)
    numbers = [n for each in settings for n in (*each.stride, *each.dilation)]
    numbers += [n for each in settings for pair in each.padding for n in pair]
    result = merge.result
    channels = result.out_channels * result.in_channels // result.groups
    check_fits(op, [*numbers, math.prod(result.kernel_size) * channels * 8])
    return merge


def fuse_conv_conv(
    first_weight: Tensor,
    first_bias: Tensor | None,
    second_weight: Tensor,
    second_bias: Tensor | None,
    first_stride: Size = 1,
    first_padding: Padding = 0,
    first_dilation: Size = 1,
    first_groups: int = 1,
    second_stride: Size = 1,
    second_padding: Padding = 0,
    second_dilation: Size = 1,
    second_groups: int = 1,
    *,
    first_transposed: bool = False,
    first_output_padding: Size = 0,
    first_padding_mode: str = "zeros",
    second_transposed: bool = False,
    second_output_padding: Size = 0,
    second_padding_mode: str = "zeros",
) -> tuple[Tensor, Tensor]:
    r"""Merges two convolutions in a row, `second(first(x))`, into one, where that is exact.

    The kernel elements of the merged convolution are the sums, over the channels between the
    layers, of all products of two elements; they lie `k1 d1 + k2 (s1 d2)` from the first, and are
    kept `gcd(d1, s1 d2)` apart. Its stride is `s1 s2`, its padding `p1 + s1 p2`, its dilation that
    greatest common divisor, its groups `gcd(g1, g2)`, its bias `b2 + sum_k w2[k] b1`. Where the
    second layer pads, this is exact only for some first layers: the rules stand in
    linfuse_ext/composition.py. Everything is computed in float64 and rounded once.

    Args:
        first_weight: `[C_mid, C_in / first_groups, *k1]`, or `[C_in, C_mid / first_groups, *k1]` if
            transposed; 1 to 3 spatial axes. float32, float64, float16 or bfloat16.
        first_bias: `[C_mid]`, or None for zeros.
        second_weight: `[C_out, C_mid / second_groups, *k2]`, or `[C_mid, C_out / second_groups,
            *k2]` if transposed; dtype and device of `first_weight`.
        second_bias: `[C_out]`, or None for zeros.
        first_stride: An int or one per axis; likewise for the second.
        first_padding: An int, one per axis, a (low, high) pair per axis flattened, 'same' or
            'valid'; likewise for the second.
        first_dilation: An int or one per axis; likewise for the second.
        first_groups: Groups of the first convolution; likewise for the second.
        second_stride: See the first.
        second_padding: See the first.
        second_dilation: See the first.
        second_groups: See the first.
        first_transposed: Whether it is a transposed convolution; likewise for the second.
        first_output_padding: Of a transposed convolution; likewise for the second.
        first_padding_mode: 'zeros', 'reflect', 'replicate' or 'circular'; likewise for the second.
        second_transposed: See the first.
        second_output_padding: See the first.
        second_padding_mode: See the first.

    Returns:
        The merged weight, `[C_out, C_in / groups, *kernel]` (or transposed), and bias `[C_out]`.

    Raises:
        FusionError: No single convolution computes the same; the message names the rule.
        TypeError: An argument has a wrong type or dtype.
        ValueError: An argument has a wrong value, shape or device.

    Examples:
        >>> first, second = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 4.0]]])
        >>> fuse_conv_conv(first, None, second, torch.tensor([5.0]))
        (tensor([[[ 3., 10.,  8.]]]), tensor([5.]))
    """
    op = "fuse_conv_conv"
    check_pair(op, first_weight, second_weight)
    merge = _merge(
        op, tuple(first_weight.shape), tuple(second_weight.shape),
        first_bias is not None, second_bias is not None,
        first_stride, first_padding, first_dilation, first_groups,
        first_transposed, first_output_padding, first_padding_mode,
        second_stride, second_padding, second_dilation, second_groups,
        second_transposed, second_output_padding, second_padding_mode,
    )  # fmt: skip
    check_bias(op, "first_bias", first_bias, first_weight, merge.first.out_channels)
    check_bias(op, "second_bias", second_bias, first_weight, merge.second.out_channels)
    return merge_weights(merge, first_weight, first_bias, second_weight, second_bias)


def merge_weights(
    merge: Merge,
    first_weight: Tensor,
    first_bias: Tensor | None,
    second_weight: Tensor,
    second_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The weight and bias of a merged convolution whose settings linfuse_ext.composition made.

    Args:
        merge: What composition.compose returned for the two layers.
        first_weight: As for fuse_conv_conv; likewise the rest.
        first_bias: See fuse_conv_conv.
        second_weight: See fuse_conv_conv.
        second_bias: See fuse_conv_conv.

    Returns:
        Weight and bias, of the dtype of `first_weight`.
    """
    first, second = merge.first, merge.second
    operands = (first_weight, first_bias, second_weight, second_bias)
    if any(map(is_sharded, operands)):
        turned = merge.turn_first or merge.turn_second or merge.result.transposed
        if turned or wants_gradient(*operands):  # more than the op itself, which has its rule
            weight, bias = on_whole(lambda *whole: merge_weights(merge, *whole), *operands)
            return weight, bias
    if merge.turn_first:
        first_weight = torch_engine.turn(first_weight, first.groups)
    if merge.turn_second:
        second_weight = torch_engine.turn(second_weight, second.groups)
    if not merge.result.transposed:
        weight, bias = call_with(
            _OPS.fuse_conv_conv.default,
            (first_weight, first_bias, second_weight, second_bias),
            first.stride,
            first.dilation,
            first.groups,
            second.dilation,
            second.groups,
        )
        return weight, bias
    # A transposed convolution is the adjoint of the convolution of the same weight, and the adjoint
    # of two maps in a row is that of the second, then that of the first.
    weight, _ = call_with(
        _OPS.fuse_conv_conv.default,
        (second_weight, None, first_weight, None),
        second.stride,
        second.dilation,
        second.groups,
        first.dilation,
        first.groups,
    )
    forward = torch_engine.turn(second_weight, second.groups)
    bias = torch_engine.merged_bias(first_bias, forward, second_bias, second.groups)
    return weight, bias.to(first_weight.dtype)
