"""The matrix of a convolution without its zeros: its size, its op, and what is made of it.

`linfuse::conv_to_csr` is linear in the weight through its values. Its adjoint is the op
conv_to_csr_backward, whose own adjoint is conv_to_csr again. Columns and row pointers depend on the
geometry alone.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .calls import call
from .geometry import Geometry
from .operands import check_tensor, op_geometry, op_rows
from .registrations import _none_for, _one_by_one

_OPS = torch.ops.linfuse
_LARGEST_INT32 = 2**31 - 1


# Counts: mirrors csrc/geometry/stored_taps.h ------------------------------------------------------


def _fold(position: int, size: int, padding_mode: str) -> int:
    """Where a position of the padded axis reads the unpadded one; mirrors fold in geometry.h."""
    if 0 <= position < size:
        return position
    if padding_mode == "reflect":
        return abs(position) if position < 0 else 2 * (size - 1) - position
    if padding_mode == "replicate":
        return 0 if position < 0 else size - 1
    return position + size if position < 0 else position - size


def _larger(left: int, right: int) -> int:
    """The larger of two ints or SymInts, without a guard on which it is."""
    return torch.sym_max(left, right)  # type: ignore[no-untyped-call, no-any-return]


def _smaller(left: int, right: int) -> int:
    return torch.sym_min(left, right)  # type: ignore[no-untyped-call, no-any-return]


@functools.lru_cache(maxsize=64)
def _repeating_prefix(
    size: int, kernel: int, out: int, stride: int, low: int, dilation: int, padding_mode: str
) -> tuple[int, ...]:
    """Input positions that the first o output positions of an axis read, for every o up to out."""
    counts = (
        len({_fold(o * stride + k * dilation - low, size, padding_mode) for k in range(kernel)})
        for o in range(out)
    )
    return tuple(itertools.accumulate(counts, initial=0))


def _prefix(geometry: Geometry, axis: int, o: int) -> int | None:
    """Pairs (o', i) of an axis that a tap ties, over the output positions o' before o.

    In closed form with zero padding, whether sizes are symbolic or not. The other modes are counted
    one by one; None where their sizes are symbolic.
    """
    size, out = geometry.input_size[axis], geometry.output_size[axis]
    stride, dilation = geometry.stride[axis], geometry.dilation[axis]
    low, _ = geometry.padding[axis]
    kernel = int(geometry.kernel_size[axis])  # a symbolic one is fixed: kernels are of one size
    if geometry.padding_mode != "zeros":
        sizes = (size, out, stride, low, dilation, o)
        if any(isinstance(value, torch.SymInt) for value in sizes):
            return None
        return _repeating_prefix(
            size, kernel, out, stride, low, dilation, geometry.padding_mode
        )[o]  # fmt: skip
    coarse, fine = (size, o) if geometry.transposed else (o, size)
    total: int = 0
    for k in range(kernel):
        # The coarse positions c that k ties to a fine one: 0 <= c * stride + shift < fine.
        shift = k * dilation - low
        first = _larger(0, -(shift // stride))
        stop = _smaller(coarse, -((shift - fine) // stride))
        total = total + _larger(0, stop - first)
    return total


def _stored_before(geometry: Geometry, row: int) -> int | None:
    """Elements stored in the rows before `row`, which may be one beyond the last."""
    positions = math.prod(geometry.output_size)
    stored, o = row // positions, row % positions
    digits: list[int] = []
    for out in reversed(geometry.output_size):
        digits.insert(0, o % out)
        o = o // out
    lines = 1
    for axis, at in enumerate(digits):
        total = _prefix(geometry, axis, geometry.output_size[axis])
        before, through = _prefix(geometry, axis, at), _prefix(geometry, axis, at + 1)
        if total is None or before is None or through is None:
            return None
        stored = stored * total + lines * before
        lines = lines * (through - before)
    return stored * (geometry.in_channels // geometry.groups)


def count_stored(geometry: Geometry, rows: tuple[int, int] | None) -> int | None:
    """Elements of the matrix that are taps, or of a block of its rows, by the geometry alone.

    None where the sizes are symbolic and the padding repeats, so that there is no formula.

    Examples:
        >>> from linfuse_ext.geometry import make_geometry
        >>> count_stored(make_geometry("layer", (64, 64, 3, 3), (64, 64), padding=1), None)
        147865600
    """
    if rows is None:
        channels = geometry.out_channels * (geometry.in_channels // geometry.groups)
        totals = [_prefix(geometry, a, out) for a, out in enumerate(geometry.output_size)]
        return None if None in totals else channels * math.prod(t for t in totals if t is not None)
    start, stop = _stored_before(geometry, rows[0]), _stored_before(geometry, rows[1])
    return None if start is None or stop is None else stop - start


# Registrations ------------------------------------------------------------------------------------


@torch.library.register_fake("linfuse::conv_to_csr")
def _(weight: Tensor, *arguments: Any, index32: bool = False, **keywords: Any) -> Any:
    op = "conv_to_csr"
    check_tensor(op, "weight", weight)
    geometry = op_geometry(op, weight.shape, arguments, keywords)
    start, stop = op_rows(op, geometry, keywords)
    stored: Any = count_stored(geometry, keywords.get("rows"))
    if stored is None:
        stored = torch.library.get_ctx().new_dynamic_size()
    index = torch.int32 if index32 else torch.int64
    return (
        weight.new_empty(stored),
        weight.new_empty(stored, dtype=index),
        weight.new_empty(stop - start + 1, dtype=index),
    )


@torch.library.register_fake("linfuse::conv_to_csr_backward")
def _(grad_values: Tensor, weight_size: Any, *arguments: Any, **keywords: Any) -> Any:
    return grad_values.new_empty(weight_size)


def _save_conv_to_csr(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    weight, *ctx.arguments = inputs
    ctx.keywords = {name: v for name, v in keyword_only_inputs.items() if name != "index32"}
    ctx.weight_size = weight.shape
    ctx.set_materialize_grads(False)


def _conv_to_csr_gradient(ctx: Any, grad_values: Tensor | None, *indices: None) -> Any:
    grad_weight = None
    if grad_values is not None:
        grad_weight = _OPS.conv_to_csr_backward(
            grad_values, ctx.weight_size, *ctx.arguments, **ctx.keywords
        )
    return grad_weight, *_none_for(ctx.arguments)


def _save_conv_to_csr_backward(
    ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any
) -> None:
    _, _, *ctx.arguments = inputs
    ctx.keywords = keyword_only_inputs


def _conv_to_csr_backward_gradient(ctx: Any, grad: Tensor) -> Any:
    values, _, _ = _OPS.conv_to_csr(grad, *ctx.arguments, **ctx.keywords)
    return values, None, *_none_for(ctx.arguments)


def _batched_conv_to_csr(
    info: Any, in_dims: Any, weight: Tensor, *arguments: Any, **keywords: Any
) -> Any:
    """Only the values differ within a batch: all of it shares the indices."""
    weights = weight.unbind(in_dims[0])
    _, columns, row_pointers = _OPS.conv_to_csr(weights[0], *arguments, **keywords)
    values = [_OPS.conv_to_csr(one, *arguments, **keywords)[0] for one in weights]
    return (torch.stack(values), columns, row_pointers), (0, None, None)


torch.library.register_autograd(
    "linfuse::conv_to_csr", _conv_to_csr_gradient, setup_context=_save_conv_to_csr
)
torch.library.register_autograd(
    "linfuse::conv_to_csr_backward",
    _conv_to_csr_backward_gradient,
    setup_context=_save_conv_to_csr_backward,
)
torch.library.register_vmap("linfuse::conv_to_csr", _batched_conv_to_csr)
torch.library.register_vmap("linfuse::conv_to_csr_backward", _one_by_one(_OPS.conv_to_csr_backward))


# What functional makes of it ----------------------------------------------------------------------


def check_layout(op: str, layout: torch.layout) -> None:
    """Accepts the layouts that a matrix can have."""
    if not isinstance(layout, torch.layout):
        raise TypeError(f"{op}: `layout` must be a torch.layout, got {layout!r}")
    if layout not in (torch.strided, torch.sparse_csr, torch.sparse_coo):
        raise ValueError(
            f"{op}: `layout` must be torch.strided, torch.sparse_csr or torch.sparse_coo, "
            f"got {layout}"
        )


def check_index_dtype(
    op: str,
    index_dtype: torch.dtype,
    layout: torch.layout,
    geometry: Geometry,
    rows: tuple[int, int] | None,
) -> None:
    """Accepts int64, and int32 for torch.sparse_csr where the indices fit."""
    if not isinstance(index_dtype, torch.dtype):
        raise TypeError(f"{op}: `index_dtype` must be a torch.dtype, got {index_dtype!r}")
    if index_dtype == torch.int64:
        return
    if layout != torch.sparse_csr or index_dtype != torch.int32:
        allowed = "torch.int64 or torch.int32" if layout == torch.sparse_csr else "torch.int64"
        raise ValueError(
            f"{op}: `index_dtype` must be {allowed} for the layout {layout}, got {index_dtype}"
        )
    start, stop = (0, geometry.rows) if rows is None else rows
    most = (stop - start) * geometry.in_channels // geometry.groups
    most *= math.prod(geometry.kernel_size)
    if max(most, geometry.cols) <= _LARGEST_INT32:
        return  # without counting, which takes time where padding repeats
    stored = count_stored(geometry, rows)
    if stored is not None and max(stored, geometry.cols) > _LARGEST_INT32:
        raise ValueError(
            f"{op}: `index_dtype` must be torch.int64 for {stored} elements in {geometry.cols} "
            f"columns, got {index_dtype}"
        )


def make_matrix(
    weight: Tensor,
    geometry: Geometry,
    layout: torch.layout,
    rows: tuple[int, int] | None,
    index_dtype: torch.dtype,
) -> Tensor:
    """The matrix as torch.sparse_csr or torch.sparse_coo; gradients flow through its values."""
    values, columns, row_pointers = call(
        _OPS.conv_to_csr.default, geometry, weight, rows=rows, index32=index_dtype == torch.int32
    )
    size = (row_pointers.shape[0] - 1, geometry.cols)
    if layout == torch.sparse_csr:
        return torch.sparse_csr_tensor(row_pointers, columns, values, size, check_invariants=False)
    indices = torch.empty(2, values.shape[0], dtype=torch.int64, device=weight.device)
    indices[1] = columns
    del columns  # no more than three indices per element at a time
    indices[0] = _row_of_each(row_pointers, values.shape[0])
    return torch.sparse_coo_tensor(indices, values, size, check_invariants=False, is_coalesced=True)


def make_offset(
    weight: Tensor, bias: Tensor | None, geometry: Geometry, rows: tuple[int, int] | None
) -> Tensor:
    """The offset: the bias of every row."""
    start, stop = (0, geometry.rows) if rows is None else rows
    if bias is None:
        return weight.new_zeros(stop - start)
    positions = math.prod(geometry.output_size)
    offset = bias.repeat_interleave(positions, output_size=geometry.rows)
    return offset[start:stop]


def _row_of_each(row_pointers: Tensor, stored: int) -> Tensor:
    rows = torch.arange(row_pointers.shape[0] - 1, device=row_pointers.device)
    return rows.repeat_interleave(row_pointers.diff(), output_size=stored)


class Diagonals(NamedTuple):
    """An affine map by its generalised diagonals, see functional.conv_to_diagonals.

    Attributes:
        size: n, the power of two that the matrix is padded to, on both sides.
        vectors: Offset d to diagonal d, `[n]`, which holds `A[r, (r + d) mod n]` at r. Only the
            diagonals that a tap lies on, by ascending offset.
        offset: b, `[n]`, zero behind the rows of A.
    """

    size: int
    vectors: dict[int, Tensor]
    offset: Tensor


def make_diagonals(weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Diagonals:
    """The generalised diagonals, from the stored elements alone."""
    n = 1 << (max(geometry.rows, geometry.cols) - 1).bit_length()
    values, columns, row_pointers = call(_OPS.conv_to_csr.default, geometry, weight)
    rows = _row_of_each(row_pointers, values.shape[0])
    diagonal = columns.sub_(rows).remainder_(n)
    used = torch.zeros(n, dtype=torch.bool, device=weight.device)
    used[diagonal] = True
    numbers = used.nonzero().flatten()
    # Where an element goes in all vectors laid side by side: no two go to the same place.
    place = (used.cumsum(0) - 1)[diagonal].mul_(n).add_(rows)
    flat = values.new_zeros(numbers.shape[0] * n).scatter(0, place, values)
    vectors = dict(zip(numbers.tolist(), flat.view(-1, n).unbind(), strict=True))
    offset = torch.nn.functional.pad(
        make_offset(weight, bias, geometry, None), (0, n - geometry.rows)
    )
    return Diagonals(n, vectors, offset)
