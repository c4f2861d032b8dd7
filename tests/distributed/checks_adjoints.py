"""On every rank: derivatives of sharded operands, to second order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from checks_ops import _conv_linear, _linear_conv, _matrix, _operands
from sharding import BY_NAME, COLUMNS, ROWS, SUM, WHOLE, case_of, collectives, leaves, shard
from tolerance import assert_close

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


def second_derivatives(mesh: Any) -> None:
    case = case_of("all_differ", 8)

    def penalty(op: Callable[..., Any], operands: Sequence[Any], outer: Any) -> Any:
        weight, _ = op(*operands)
        given = [each for each in operands if each is not None]
        first = torch.autograd.grad(weight, given, outer, create_graph=True, allow_unused=True)
        total = sum((each**2).sum() for each in first if each is not None)
        return torch.autograd.grad(total, given, allow_unused=True)

    for op, behind, places, out in (
        (_conv_linear(case), True, (WHOLE, WHOLE, ROWS, ROWS), ROWS),
        (_conv_linear(case), True, (ROWS, ROWS, COLUMNS, WHOLE), WHOLE),
        (_linear_conv(case), False, (COLUMNS, WHOLE, WHOLE, WHOLE), COLUMNS),
    ):
        operands = _operands(case, 5, behind=behind)
        whole, sharded = leaves(operands), leaves(_sharded(operands, mesh, places))
        outer = torch.randn(op(*whole)[0].shape, dtype=torch.float64)
        exact = penalty(op, whole, outer)
        actual = penalty(op, sharded, shard(outer, mesh, out))
        for one, want in zip(actual, exact, strict=True):
            assert (one is None) == (want is None)
            if one is not None:
                torch.testing.assert_close(one.full_tensor(), want, rtol=1e-10, atol=1e-10)
