"""On every rank: derivatives of sharded operands, to second order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from checks_ops import _conv_linear, _linear_conv, _matrix, _operands
from sharding import BY_NAME, COLUMNS, ROWS, SUM, WHOLE, case_of, collectives, leaves, shard
from tolerance import assert_close
from torch.distributed.tensor import DTensor

from linfuse_ext import functional


def _gradients(op: Callable[..., Any], operands: Sequence[Any], outer: Sequence[Any]) -> Any:
    given = [each for each in operands if each is not None]
    return torch.autograd.grad(op(*operands), given, outer)


def _check(
    op: Callable[..., Any],
    operands: Sequence[Any],
    mesh: Any,
    places: Sequence[Any],
    grads: Sequence[Any] | None = None,
) -> None:
    """The gradients of a sum of products with the outputs, and where they lie."""
    whole, sharded = leaves(operands), leaves(_sharded(operands, mesh, places))
    outer = [torch.randn(each.shape, dtype=torch.float64) for each in op(*whole)]
    outputs = op(*sharded)
    like = [
        shard(g, mesh, *(WHOLE if p == SUM else p for p in output.placements))
        for g, output in zip(outer, outputs, strict=True)
    ]
    exact = _gradients(op, whole, outer)
    magnitude = _gradients(op, leaves(_absolute(operands)), _absolute(outer))
    given = [each for each in sharded if each is not None]
    with collectives(0 if grads is not None else None):
        actual = torch.autograd.grad(outputs, given, like)
    for one, want, size in zip(actual, exact, magnitude, strict=True):
        assert_close(one.full_tensor(), want, size, 9999)
    if grads is not None:
        assert [one.placements for one in actual] == [(place,) for place in grads]


def _sharded(operands: Sequence[Any], mesh: Any, places: Sequence[Any]) -> list[Any]:
    return [shard(t, mesh, p) for t, p in zip(operands, places, strict=True)]


def _absolute(tensors: Sequence[Any]) -> list[Any]:
    return [None if each is None else each.abs() for each in tensors]


def gradients_of_a_sharded_linear_are_sharded_as_it_is(mesh: Any) -> None:
    for name in ("all_differ", "voxels", "upsample"):
        case = BY_NAME[name]
        for features in (8, 5):
            operands = _operands(case, features, behind=True)
            places = (WHOLE, WHOLE, ROWS, ROWS)
            _check(_conv_linear(case), operands, mesh, places, (SUM, SUM, ROWS, ROWS))
            operands = _operands(case, features, behind=False)
            places = (COLUMNS, WHOLE, WHOLE, WHOLE)
            _check(_linear_conv(case), operands, mesh, places)


def gradients_are_right_with_fewer_rows_than_ranks(mesh: Any) -> None:
    case = BY_NAME["grouped_dilated"]
    for features in (3, 1):
        operands = _operands(case, features, behind=True)
        _check(_conv_linear(case), operands, mesh, (WHOLE, WHOLE, ROWS, ROWS))
        _check(_conv_linear(case), operands, mesh, (ROWS, ROWS, ROWS, ROWS))
        operands = _operands(case, features, behind=False)
        _check(_linear_conv(case), operands, mesh, (COLUMNS, WHOLE, WHOLE, WHOLE))


def gradients_of_sums_over_columns(mesh: Any) -> None:
    for case in (case_of("all_differ", 8), case_of("upsample", 4)):
        operands = _operands(case, 5, behind=True)
        channels = COLUMNS if case.transposed else ROWS
        grads = (channels, ROWS, COLUMNS, WHOLE)
        _check(_conv_linear(case), operands, mesh, (channels, ROWS, COLUMNS, WHOLE), grads)


def gradients_of_whole_groups(mesh: Any) -> None:
    case = BY_NAME["transposed_depthwise"]
    operands = _operands(case, 5, behind=True)
    places = (ROWS, ROWS, COLUMNS, WHOLE)
    _check(_conv_linear(case), operands, mesh, places, (ROWS, ROWS, COLUMNS, SUM))
    _check(_conv_linear(case), operands, mesh, (WHOLE, WHOLE, COLUMNS, WHOLE))


def gradients_of_shards_everywhere(mesh: Any) -> None:
    for name in ("all_differ", "grouped", "upsample", "circular"):
        case = BY_NAME[name]
        _check(_conv_linear(case), _operands(case, 5, behind=True), mesh, [ROWS] * 4)
        _check(_linear_conv(case), _operands(case, 5, behind=False), mesh, [ROWS] * 4)


def gradients_of_a_matrix_stay_with_its_rows(mesh: Any) -> None:
    for case in (case_of("all_differ", 8), case_of("grouped", 8), case_of("reflect", 4)):
        operands = [case.weight(), case.bias_vector()]
        _check(_matrix(case), operands, mesh, (ROWS, ROWS), (ROWS, ROWS))


def gradients_of_the_op_itself_stay_with_its_rows(mesh: Any) -> None:
    for case in (case_of("all_differ", 8), case_of("upsample", 4)):
        geometry = case.geometry()

        def call(weight: Any, geometry: Any = geometry) -> Any:
            op = torch.ops.linfuse.conv_to_affine
            return op(weight, None, *geometry.op_arguments, **geometry.op_keywords)[:1]

        channels = COLUMNS if case.transposed else ROWS
        _check(call, [case.weight()], mesh, (channels,), (channels,))


def gradients_of_a_matrix_that_is_cut_elsewhere(mesh: Any) -> None:
    for case in (case_of("all_differ", 5), BY_NAME["grouped_dilated"], BY_NAME["upsample"]):
        operands = [case.weight(), case.bias_vector()]
        _check(_matrix(case), operands, mesh, (ROWS, ROWS))
        _check(_matrix(case), operands, mesh, (COLUMNS, WHOLE))
        _check(_matrix(case, rows=(3, 9)), operands, mesh, (ROWS, ROWS))


def gradients_of_merged_kernels(mesh: Any) -> None:
    operands = [torch.randn(6, 3, 3, dtype=torch.float64), torch.randn(6, dtype=torch.float64)]
    operands += [torch.randn(8, 6, 2, dtype=torch.float64), torch.randn(8, dtype=torch.float64)]
    for places in ((ROWS,) * 4, (WHOLE, WHOLE, ROWS, ROWS), (WHOLE, WHOLE, COLUMNS, WHOLE)):
        _check(functional.fuse_conv_conv, operands, mesh, places)


def gradients_of_one_output_alone(mesh: Any) -> None:
    """What has no part in it has zeros for a gradient, or none."""
    case, groups = case_of("all_differ", 8), BY_NAME["transposed_depthwise"]
    kernels = [torch.randn(6, 3, 3, dtype=torch.float64), torch.randn(6, dtype=torch.float64)]
    kernels += [torch.randn(8, 6, 2, dtype=torch.float64), torch.randn(8, dtype=torch.float64)]
    conv = [case.weight(), case.bias_vector()]
    for call, operands, places in (
        (_conv_linear(case), _operands(case, 5, behind=True), (WHOLE, WHOLE, COLUMNS, WHOLE)),
        (_conv_linear(groups), _operands(groups, 5, behind=True), (WHOLE, WHOLE, COLUMNS, WHOLE)),
        (_conv_linear(case), _operands(case, 5, behind=True), (ROWS,) * 4),
        (_linear_conv(case), _operands(case, 5, behind=False), (ROWS,) * 4),
        (_matrix(case, rows=(3, 9)), conv, (ROWS, ROWS)),
        (_matrix(BY_NAME["grouped_dilated"]), None, (ROWS, ROWS)),
        (functional.fuse_conv_conv, kernels, (ROWS,) * 4),
    ):
        if operands is None:
            operands = [BY_NAME["grouped_dilated"].weight(), torch.randn(6, dtype=torch.float64)]
        for which in (0, 1):
            whole, sharded = leaves(operands), leaves(_sharded(operands, mesh, places))
            call(*whole)[which].sum().backward()
            _full(call(*sharded)[which]).sum().backward()
            for one, want in zip(sharded, whole, strict=True):
                if want.grad is None:
                    assert one.grad is None or not one.grad.full_tensor().any()
                else:
                    torch.testing.assert_close(one.grad.full_tensor(), want.grad)


def second_derivatives(mesh: Any) -> None:
    case = case_of("all_differ", 8)

    def penalty(op: Callable[..., Any], operands: Sequence[Any]) -> Any:
        given = [each for each in operands if each is not None]
        value = sum((each**3).sum() for each in map(_full, op(*operands)))
        first = torch.autograd.grad(value, given, create_graph=True)
        total = sum((each**2).sum() for each in map(_full, first))
        return torch.autograd.grad(total, given)

    groups = BY_NAME["transposed_depthwise"]
    for op, layer, behind, places in (
        (_conv_linear, case, True, (WHOLE, WHOLE, ROWS, ROWS)),
        (_conv_linear, case, True, (ROWS, ROWS, COLUMNS, WHOLE)),
        (_conv_linear, groups, True, (ROWS, ROWS, COLUMNS, WHOLE)),
        (_linear_conv, case, False, (COLUMNS, WHOLE, WHOLE, WHOLE)),
    ):
        call, operands = op(layer), _operands(layer, 5, behind=behind)
        exact = penalty(call, leaves(operands))
        actual = penalty(call, leaves(_sharded(operands, mesh, places)))
        for one, want in zip(actual, exact, strict=True):
            torch.testing.assert_close(one.full_tensor(), want, rtol=1e-10, atol=1e-10)


def _full(tensor: Any) -> Any:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
