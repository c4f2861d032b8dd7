"""How functional arranges a call for the ranks, and calls in which each is told its own part.

A rule has every rank make the same call on its shards, and torch takes the rule that moves least.
That does not do

- for the matrix of a convolution whose weight is not cut as the matrix is: by groups, by a number
  of channels that the ranks do not divide, over its input channels. Each rank makes its own rows,
  of a weight of which it needs to know no more than these rows read;
- where a Linear has fewer rows (columns) than there are ranks: torch gathers what it could leave;
- where moving least is to gather a Linear;
- for columns of a Linear in whole groups of a convolution: no rank reads input channels of another,
  and what each makes are columns of the result;
- for derivatives, which are views and sums besides ops of ours: torch cuts no axis of a DTensor in
  parts of which its shards are not made.

Where a rank is told its part, the call is made on the shards as plain tensors, so that autograd
sees a plain call; what a gradient is, sharded or a sum over ranks, is said where they are taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from ..geometry import Geometry
from ..meshes import OWN_PARTS, local_part, moved, on_whole, replicated
from ..operands import op_geometry
from .rules import axis_of, cuts_channels, out_axis

_OPS = torch.ops.linfuse
Operands = tuple[Any, ...]


def register_own_parts() -> None:
    """Has linfuse_ext.functional call these."""
    OWN_PARTS[_OPS.conv_to_affine.default] = _conv_to_affine
    OWN_PARTS[_OPS.fuse_conv_linear.default] = _fuse_conv_linear
    OWN_PARTS[_OPS.fuse_linear_conv.default] = _fuse_linear_conv


def _ranks(mesh: Any, split: Sequence[bool]) -> int:
    """Over how many ranks the axes of a mesh that cut something cut it."""
    return math.prod(mesh.size(axis) for axis, cut in enumerate(split) if cut)


def _share(size: int, mesh: Any, split: Sequence[bool]) -> tuple[int, int]:
    """This rank's [start, stop) of an axis that is cut as torch.chunk does, by each mesh axis."""
    start, stop = 0, size
    for axis, cut in enumerate(split):
        if cut:
            piece = -(-(stop - start) // mesh.size(axis))
            start = min(stop, start + mesh.get_local_rank(axis) * piece)
            stop = min(stop, start + piece)
    return start, stop


def _joined(part: Tensor, mesh: Any, placements: Sequence[Placement], size: Sequence[int]) -> Any:
    stride = [math.prod(size[axis + 1 :]) for axis in range(len(size))]
    return DTensor.from_local(
        part, mesh, placements, run_check=False, shape=torch.Size(size), stride=tuple(stride)
    )


def _summed(split: Sequence[bool]) -> list[Placement]:
    """The gradient of what each rank reads whole for a part of its own: a sum over them."""
    return [Partial() if cut else Replicate() for cut in split]


def _placed(split: Sequence[bool], axis: int) -> list[Placement]:
    return [Shard(axis) if cut else Replicate() for cut in split]


def _conv_to_affine(op: Any, operands: Operands, arguments: Operands, options: Any) -> Any:
    weight = operands[0]
    mesh = weight.device_mesh
    geometry = op_geometry("conv_to_affine", weight.shape, arguments, options)
    split = [axis_of(placement) is not None for placement in weight.placements]
    if not any(split) or options.get("rows") is not None:
        return on_whole(lambda *whole: op(*whole, *arguments, **options), *operands)
    ranks = _ranks(mesh, split)
    rows = _placed(split, 0)
    start, stop = _share(geometry.rows, mesh, split)
    sizes = (geometry.rows, geometry.cols), (geometry.rows,)
    if cuts_channels(geometry, ranks) and _follows(weight, geometry):
        parts = [local_part(operands[0], weight.placements, weight.placements)]
        parts.append(local_part(operands[1], rows, rows))
        matrix, offset = op(*parts, *arguments, **options)
        return _joined(matrix, mesh, rows, sizes[0]), _joined(offset, mesh, rows, sizes[1])
    if _is_cut_alike(geometry, ranks, nested=sum(split) > 1):
        # These channels are all that the rows read: zeros stand for the others.
        low, high = _share(geometry.out_channels, mesh, split)
        own = grad = rows
        around = (low, geometry.out_channels - high)
    else:
        own, grad = [Replicate()] * mesh.ndim, _summed(split)
        around = (0, 0)
    parts = [_padded(local_part(operand, own, grad), around) for operand in operands]
    matrix, offset = op(*parts, *arguments, **{**options, "rows": (start, stop)})
    return _joined(matrix, mesh, rows, sizes[0]), _joined(offset, mesh, rows, sizes[1])


def _follows(weight: Any, geometry: Geometry) -> bool:
    """Whether a weight is cut over its output channels wherever it is cut."""
    return _cuts_only(weight, out_axis(geometry))


def _cuts_only(weight: Any, axis: int) -> bool:
    return all(placement in (Replicate(), Shard(axis)) for placement in weight.placements)


def _is_cut_alike(geometry: Geometry, ranks: int, nested: bool) -> bool:
    """Whether the rows that a rank should have are those of its share of axis 0 of the weight."""
    channels, rows = geometry.out_channels, geometry.rows
    if geometry.transposed:
        return False
    if channels % ranks == 0:
        return True
    return not nested and -(-channels // ranks) * (rows // channels) == -(-rows // ranks)


def _padded(part: Tensor | None, around: tuple[int, int]) -> Tensor | None:
    if part is None or around == (0, 0):
        return part
    return F.pad(part, [0, 0] * (part.dim() - 1) + list(around))


def _turned(linear: Any, away: int) -> list[Placement]:
    """Placements of a Linear's weight with the other of its axes split in place of this one."""
    turned: list[Placement] = []
    for placement in linear.placements:
        axis = axis_of(placement)
        if axis is None:
            turned.append(Replicate())
        else:
            turned.append(Shard(1 - away) if axis == away else placement)
    return turned


def _has_empty_ranks(weight: Any, axis: int) -> bool:
    split = [axis_of(placement) == axis for placement in weight.placements]
    ranks = _ranks(weight.device_mesh, split)
    return _cuts_only(weight, axis) and any(split) and int(weight.shape[axis]) < ranks


def _fuse_conv_linear(op: Any, operands: Operands, arguments: Operands, options: Any) -> Any:
    conv_weight, conv_bias, linear_weight, linear_bias = operands
    mesh = linear_weight.device_mesh
    geometry = op_geometry("fuse_conv_linear", conv_weight.shape, arguments, options)
    columns = [placement for placement in linear_weight.placements if axis_of(placement) == 1]
    if columns and set(columns) == {Shard(1)} and cuts_channels(geometry, mesh.size()):
        return op(*operands, *arguments, **options)
    if columns and geometry.groups > 1:
        split = [axis_of(placement) == 1 for placement in linear_weight.placements]
        ranks = _ranks(mesh, split)
        if _cuts_only(linear_weight, 1) and geometry.groups % ranks == 0:
            own = (*arguments[:-1], geometry.groups // ranks)
            return _groups_of_fuse_conv_linear(op, operands, own, options, geometry, split)
    rows = _turned(linear_weight, 1)
    linear_weight, linear_bias = moved(linear_weight, rows), moved(linear_bias, rows)
    if not _has_empty_ranks(linear_weight, 0):
        kernel = replicated(conv_weight, conv_bias)
        return op(*kernel, linear_weight, linear_bias, *arguments, **options)
    split = [axis_of(placement) is not None for placement in rows]
    whole, summed = [Replicate()] * mesh.ndim, _summed(split)
    parts = [local_part(each, whole, summed) for each in (conv_weight, conv_bias)]
    parts += [local_part(each, rows, rows) for each in (linear_weight, linear_bias)]
    weight, bias = op(*parts, *arguments, **options)
    features = linear_weight.shape[0]
    return (
        _joined(weight, mesh, rows, (features, geometry.cols)),
        _joined(bias, mesh, rows, (features,)),
    )


def _groups_of_fuse_conv_linear(
    op: Any,
    operands: Operands,
    arguments: Operands,
    options: Any,
    geometry: Geometry,
    split: Sequence[bool],
) -> Any:
    """Each rank has groups of its own, whose input channels no other rank reads."""
    conv_weight, conv_bias, linear_weight, linear_bias = operands
    mesh, features = linear_weight.device_mesh, linear_weight.shape[0]
    kernel, columns, summed = _placed(split, 0), _placed(split, 1), _summed(split)
    parts = [local_part(each, kernel, kernel) for each in (conv_weight, conv_bias)]
    parts.append(local_part(linear_weight, columns, columns))
    whole = local_part(linear_bias, [Replicate()] * mesh.ndim, summed)
    if whole is not None:  # counts once
        first = all(mesh.get_local_rank(axis) == 0 for axis, cut in enumerate(split) if cut)
        whole = torch.where(torch.tensor(first, device=whole.device), whole, 0)
    weight, bias = op(*parts, whole, *arguments, **options)
    return (
        _joined(weight, mesh, columns, (features, geometry.cols)),
        _SumOverRanks.apply(bias, mesh, summed),  # type: ignore[no-untyped-call]
    )


class _SumOverRanks(torch.autograd.Function):
    """A vector of which each rank has a summand.

    As DTensor.from_local, whose second derivative takes the gradient of what its backward hands
    each rank for the same on all of them: it is a sum over ranks.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, mesh: Any, placements: Sequence[Placement]) -> Any:
        ctx.mesh, ctx.placements = mesh, placements
        ctx.set_materialize_grads(False)  # zeros would not be a DTensor
        return _joined(part.detach(), mesh, placements, part.shape)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return local_part(grad, [Replicate()] * ctx.mesh.ndim, ctx.placements), None, None


def _fuse_linear_conv(op: Any, operands: Operands, arguments: Operands, options: Any) -> Any:
    linear_weight, linear_bias, conv_weight, conv_bias = operands
    mesh = linear_weight.device_mesh
    geometry = op_geometry("fuse_linear_conv", conv_weight.shape, arguments, options)
    split = [axis_of(placement) is not None for placement in linear_weight.placements]
    by_channels = cuts_channels(geometry, mesh.size()) and _follows(conv_weight, geometry)
    if by_channels and not any(split):
        return op(*operands, *arguments, **options)
    columns = _turned(linear_weight, 0)
    linear_weight = moved(linear_weight, columns)
    linear_bias, conv_weight, conv_bias = replicated(linear_bias, conv_weight, conv_bias)
    if not _has_empty_ranks(linear_weight, 1):
        return op(linear_weight, linear_bias, conv_weight, conv_bias, *arguments, **options)
    whole, summed = [Replicate()] * mesh.ndim, _summed(split)
    part = local_part(linear_weight, columns, columns)
    weight, _ = op(part, None, local_part(conv_weight, whole, summed), None, *arguments, **options)
    # The bias is whole on every rank, and so are its gradients.
    parts = [local_part(each, whole, whole) for each in (linear_bias, conv_weight, conv_bias)]
    _, bias = op(part.new_zeros(geometry.cols, 0), *parts, *arguments, **options)
    return (
        _joined(weight, mesh, columns, (geometry.rows, linear_weight.shape[1])),
        _joined(bias, mesh, whole, (geometry.rows,)),
    )
