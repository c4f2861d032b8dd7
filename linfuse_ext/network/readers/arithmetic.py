"""Sums, scales and shifts, concatenations."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..maps import (
    AffineMap,
    Deferred,
    Diagonal,
    Operator,
    Shape,
    deferred_full,
)
from ..operations import Call, Join, Reading, reads
from .views import view


def _constant_operand(call: Call, value: Any, shape: Shape) -> Deferred | None:
    """A number or a constant tensor that every sample meets alike, with the axes of a sample."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return deferred_full([1] * len(shape), float(value))
    if value not in call.constants:
        return None
    size = tuple(value.meta["val"].shape) if "val" in value.meta else None
    size = tuple(call.constants[value].shape) if size is None else size
    if len(size) > len(shape) + 1 or (len(size) == len(shape) + 1 and size[0] != 1):
        return None
    inner = size[-len(shape) :] if shape else ()
    return call.constants.deferred(value, (*[1] * (len(shape) - len(inner)), *inner))


def _spread(before: Shape, behind: Shape) -> list[AffineMap]:
    """What broadcasting does to a sample."""
    if before == behind:
        return []
    more = (1,) * (len(behind) - len(before))

    def run(samples: Tensor) -> Tensor:
        samples = samples.reshape(samples.shape[0], *more, *before)
        return samples.expand(samples.shape[0], *behind)

    return [Operator(before, behind, None, run)]


def _shift_or_scale(
    call: Call, value: Node, scale: Deferred | float | None, shift: Deferred | None
) -> Reading | None:
    shape, behind = call.shape_of(value), call.out_shape
    if shape is None or len(shape) != len(behind):
        return None
    size = math.prod(behind)
    ones = [1] * len(behind)
    if scale is None or isinstance(scale, float):
        factor = deferred_full(ones, 1.0 if scale is None else scale)
    else:
        factor = scale
    multiplies = scale is not None and scale != -1  # a sign goes with the sum
    flops = size * max(1, multiplies + (shift is not None))
    maps = [*_spread(shape, behind), Diagonal(behind, behind, shift, factor)]
    return Reading([(value, maps)], None, flops, multiplies)


def _operands(call: Call) -> tuple[Any, Any]:
    left, right = list(call.arguments.values())[:2]
    return left, right


def _sum(call: Call, left: Any, right: Any, signs: tuple[float, float]) -> Reading | None:
    """`signs[0] left + signs[1] right`, each a value or a constant."""
    behind = call.out_shape
    values = [
        (v, s) for v, s in ((left, signs[0]), (right, signs[1])) if call.shape_of(v) is not None
    ]
    if len(values) == 2:
        operands = []
        for value, sign in values:
            shape = call.shape_of(value)
            assert shape is not None
            if len(shape) != len(behind):
                return None
            maps = _spread(shape, behind)
            if sign != 1:
                ones = deferred_full([1] * len(behind), sign)
                maps.append(Diagonal(behind, behind, None, ones))
            operands.append((value, maps))
        scales = sum(sign not in (1, -1) for _, sign in values)
        flops = math.prod(behind) * (1 + scales)
        return Reading(operands, Join(None), flops, scales > 0)
    if len(values) == 0:
        return None
    value, sign = values[0]
    other, other_sign = (right, signs[1]) if value is left else (left, signs[0])
    constant = _constant_operand(call, other, behind)
    if constant is None:
        return None
    shift = Deferred(constant.shape, lambda: constant.value * other_sign)
    return _shift_or_scale(call, value, None if sign == 1 else sign, shift)


@reads("add", "sub", "rsub")
def _add(call: Call) -> Reading | None:
    left, right = _operands(call)
    alpha = call.arguments.get("alpha", 1)
    if isinstance(alpha, Node):
        return None
    packet = call.node.target.overloadpacket  # type: ignore[union-attr]
    if packet is torch.ops.aten.add:
        return _sum(call, left, right, (1.0, float(alpha)))
    if packet is torch.ops.aten.sub:
        return _sum(call, left, right, (1.0, -float(alpha)))
    return _sum(call, left, right, (-float(alpha), 1.0))


@reads("mul", "div", "true_divide")
def _mul(call: Call) -> Reading | None:
    left, right = _operands(call)
    divides = call.node.target.overloadpacket is not torch.ops.aten.mul  # type: ignore[union-attr]
    if divides and call.arguments.get("rounding_mode") is not None:
        return None
    value, other = (left, right) if call.shape_of(left) is not None else (right, left)
    if call.shape_of(value) is None or (divides and value is not left):
        return None
    constant = _constant_operand(call, other, call.out_shape)
    if constant is None:
        return None
    if divides:
        divisor = constant
        constant = Deferred(divisor.shape, lambda: 1 / divisor.value)
    return _shift_or_scale(call, value, constant, None)


@reads("neg")
def _neg(call: Call) -> Reading | None:
    return None if call.in_shape is None else _shift_or_scale(call, call.first, -1.0, None)


@reads("cat", "stack")
def _cat(call: Call) -> Reading | None:
    values = list(call["tensors"])
    stacked = call.node.target.overloadpacket is torch.ops.aten.stack  # type: ignore[union-attr]
    dim = call["dim"] % (len(call.out_shape) + 1)
    if dim == 0 or not values:
        return None
    operands: list[tuple[Node, list[AffineMap]]] = []
    for value in values:
        shape = call.shape_of(value)
        if shape is None:
            return None
        part = (*shape[: dim - 1], 1, *shape[dim - 1 :]) if stacked else shape
        if len(part) != len(call.out_shape):
            return None
        operands.append((value, view(shape, part)))
    return Reading(operands, Join(dim - 1), 0, False)
