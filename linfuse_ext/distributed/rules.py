"""How each op may be sharded: for one axis of a mesh, all ways in which every rank makes its part.

A rule is called with an op's arguments, DTensors replaced by their specs, and returns its ways. A
way is the placements of the outputs and of the tensors that are given, in their order. torch takes
the way that moves least, for every axis of the mesh.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.distributed.tensor import Partial, Placement, Replicate, Shard

from ..geometry import Geometry
from ..operands import op_geometry

Way = tuple[list[Placement], list[Placement]]
Rule = Callable[..., list[Way]]

WHOLE = Replicate()
SUM = Partial()


def axis_of(placement: Placement) -> int | None:
    """The axis of a tensor that a placement splits; None if it does not."""
    # The shards of two axes of a mesh on one axis of a tensor have a class of their own.
    axis: int | None = getattr(placement, "dim", None)
    return axis


def out_axis(geometry: Geometry) -> int:
    """The axis of a convolution's weight that its output channels are on."""
    return 1 if geometry.transposed else 0


def cuts_channels(geometry: Geometry, ranks: int) -> bool:
    """Whether each rank can be given output channels of its own, with the same arguments for all.

    An even cut of the channels is one of their positions as well; with groups a rank's channels
    would be those of a convolution with fewer of them.
    """
    return geometry.groups == 1 and geometry.out_channels % ranks == 0


def _splits(operand: Any, axis: int) -> list[Placement]:
    """The ways to split an axis, that by which the operand is split already included."""
    found = [placement for placement in operand.placements if axis_of(placement) == axis]
    return list(dict.fromkeys([Shard(axis), *found]))


def _is_split(operand: Any, axis: int) -> bool:
    return any(axis_of(placement) == axis for placement in operand.placements)


def _is_whole(operand: Any) -> bool:
    return all(placement == WHOLE for placement in operand.placements)


def _given(operands: tuple[Any, ...], *placements: Placement) -> list[Placement]:
    """The placements of those operands that are not left out."""
    pairs = zip(operands, placements, strict=True)
    return [placement for operand, placement in pairs if operand is not None]


def conv_to_affine(weight: Any, bias: Any, *arguments: Any, **keywords: Any) -> list[Way]:
    """Each rank makes the rows of its output channels."""
    geometry = op_geometry("conv_to_affine", weight.shape, arguments, keywords)
    operands = (weight, bias)
    ways: list[Way] = [([WHOLE, WHOLE], _given(operands, WHOLE, WHOLE))]
    if keywords.get("rows") is None and cuts_channels(geometry, weight.mesh.size()):
        split = Shard(out_axis(geometry))
        ways.append(([Shard(0), Shard(0)], _given(operands, split, Shard(0))))
    return ways


def conv_to_affine_backward(
    grad_matrix: Any, weight_size: Any, *arguments: Any, **keywords: Any
) -> list[Way]:
    """The adjoint of that: rows to output channels."""
    geometry = op_geometry("conv_to_affine_backward", weight_size, arguments, keywords)
    ways: list[Way] = [([WHOLE], [WHOLE])]
    if keywords.get("rows") is None and cuts_channels(geometry, grad_matrix.mesh.size()):
        ways.append(([Shard(out_axis(geometry))], [Shard(0)]))
    return ways


def fuse_conv_linear(
    conv_weight: Any,
    conv_bias: Any,
    linear_weight: Any,
    linear_bias: Any,
    *arguments: Any,
    **keywords: Any,
) -> list[Way]:
    """Rows of the Linear are independent; its columns are summed over, channel by channel."""
    geometry = op_geometry("fuse_conv_linear", conv_weight.shape, arguments, keywords)
    operands = (conv_weight, conv_bias, linear_weight, linear_bias)
    ways: list[Way] = [([WHOLE, WHOLE], _given(operands, WHOLE, WHOLE, WHOLE, WHOLE))]
    for rows in _splits(linear_weight, 0):
        ways.append(([rows, rows], _given(operands, WHOLE, WHOLE, rows, rows)))
    # The result of this one is as large on every rank as the whole: only where it is asked for.
    if _is_split(linear_weight, 1) and cuts_channels(geometry, conv_weight.mesh.size()):
        channels = Shard(out_axis(geometry))
        ways.append(([SUM, SUM], _given(operands, channels, Shard(0), Shard(1), SUM)))
    return ways


def fuse_linear_conv(
    linear_weight: Any,
    linear_bias: Any,
    conv_weight: Any,
    conv_bias: Any,
    *arguments: Any,
    **keywords: Any,
) -> list[Way]:
    """Columns of the Linear are images of their own; output channels of the convolution likewise.

    The bias is one image more, which every rank takes through the convolution.
    """
    geometry = op_geometry("fuse_linear_conv", conv_weight.shape, arguments, keywords)
    operands = (linear_weight, linear_bias, conv_weight, conv_bias)
    ways: list[Way] = [([WHOLE, WHOLE], _given(operands, WHOLE, WHOLE, WHOLE, WHOLE))]
    for columns in _splits(linear_weight, 1):
        ways.append(([columns, WHOLE], _given(operands, columns, WHOLE, WHOLE, WHOLE)))
    # A Linear that is sharded must not be gathered for it.
    if _is_whole(linear_weight) and cuts_channels(geometry, conv_weight.mesh.size()):
        channels = Shard(out_axis(geometry))
        ways.append(([Shard(0), Shard(0)], _given(operands, WHOLE, WHOLE, channels, Shard(0))))
    return ways


def convolve_rows(rows: Any, conv_weight: Any, *arguments: Any, **keywords: Any) -> list[Way]:
    """Rows are images of their own; output channels are computed independently."""
    geometry = op_geometry("convolve_rows", conv_weight.shape, arguments, keywords)
    ways: list[Way] = [([WHOLE], [WHOLE, WHOLE])]
    ways += [([split], [split, WHOLE]) for split in _splits(rows, 0)]
    if not _is_split(rows, 0) and cuts_channels(geometry, conv_weight.mesh.size()):
        ways.append(([Shard(1)], [WHOLE, Shard(out_axis(geometry))]))
    return ways


def fuse_conv_linear_backward_conv(
    grad_weight: Any, linear_weight: Any, weight_size: Any, *arguments: Any, **keywords: Any
) -> list[Way]:
    """A sum over rows; each output channel has columns of the Linear of its own."""
    geometry = op_geometry("fuse_conv_linear_backward_conv", weight_size, arguments, keywords)
    ways: list[Way] = [([WHOLE], [WHOLE, WHOLE])]
    ways += [([SUM], [split, split]) for split in _splits(linear_weight, 0)]
    if _is_split(linear_weight, 1) and cuts_channels(geometry, linear_weight.mesh.size()):
        ways.append(([Shard(out_axis(geometry))], [WHOLE, Shard(1)]))
    return ways


def fuse_conv_conv(
    first_weight: Any,
    first_bias: Any,
    second_weight: Any,
    second_bias: Any,
    first_stride: Any = (1,),
    first_dilation: Any = (1,),
    first_groups: int = 1,
    second_dilation: Any = (1,),
    second_groups: int = 1,
) -> list[Way]:
    """Output channels of the second are independent; with groups they read different ones."""
    operands = (first_weight, first_bias, second_weight, second_bias)
    ways: list[Way] = [([WHOLE, WHOLE], _given(operands, WHOLE, WHOLE, WHOLE, WHOLE))]
    ranks = first_weight.mesh.size()
    if first_groups == second_groups == 1 and second_weight.shape[0] % ranks == 0:
        split = Shard(0)
        ways.append(([split, split], _given(operands, WHOLE, WHOLE, split, split)))
    return ways


def conv_to_csr(weight: Any, *arguments: Any, **keywords: Any) -> list[Way]:
    """Replicated: the row pointers of a part begin at 0 again, and its size is no even share."""
    return [([WHOLE, WHOLE, WHOLE], [WHOLE])]


def conv_to_csr_backward(grad_values: Any, *arguments: Any, **keywords: Any) -> list[Way]:
    """Replicated, as conv_to_csr is."""
    return [([WHOLE], [WHOLE])]


# All ops but fuse_conv_linear_by_torch and fuse_linear_conv_by_torch, which are there to compare
# engines by: they have no fake kernel, of which torch learns the shape of a result.
RULES: dict[str, Rule] = {
    "conv_to_affine": conv_to_affine,
    "conv_to_affine_backward": conv_to_affine_backward,
    "conv_to_csr": conv_to_csr,
    "conv_to_csr_backward": conv_to_csr_backward,
    "convolve_rows": convolve_rows,
    "fuse_conv_conv": fuse_conv_conv,
    "fuse_conv_linear": fuse_conv_linear,
    "fuse_conv_linear_backward_conv": fuse_conv_linear_backward_conv,
    "fuse_linear_conv": fuse_linear_conv,
}

# Ops that are told the size of the weight that they make, and where that argument stands.
MAKES_A_WEIGHT = {
    "conv_to_affine_backward": 1,
    "conv_to_csr_backward": 1,
    "fuse_conv_linear_backward_conv": 2,
}
