"""On every rank: each op on shards has the values of one process, and moves what its rule says."""

from __future__ import annotations

import functools
from typing import Any

import torch
from sharding import (
    BY_NAME,
    COLUMNS,
    ROWS,
    SUM,
    WHOLE,
    assert_same,
    case_of,
    collectives,
    leaves,
    shard,
    share,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard

from linfuse_ext import functional
from linfuse_ext.meshes import gathered

# One of each kind: uneven stride and dilation, repeats, one axis and three, transposed, groups.
SEVERAL = [
    "all_differ",
    "circular_grouped",
    "replicate_asymmetric",
    "conv1d_pair",
    "voxels",
    "upsample",
    "transposed_grouped",
    "no_bias",
]
# Even shards, uneven ones, fewer than there are ranks, one.
COUNTS = (8, 5, 3, 1)


def _conv_linear(case: Any) -> Any:
    return functools.partial(_call_conv_linear, case)


def _call_conv_linear(case: Any, *operands: Any) -> Any:
    return functional.fuse_conv_linear(*operands, *case.arguments(), **case.keywords())


def _linear_conv(case: Any) -> Any:
    return functools.partial(_call_linear_conv, case)


def _call_linear_conv(case: Any, *operands: Any) -> Any:
    return functional.fuse_linear_conv(*operands, *case.arguments(), **case.keywords())


def _matrix(case: Any, **options: Any) -> Any:
    return lambda *operands: functional.conv_to_affine(
        *operands, *case.arguments(), **case.keywords(), **options
    )


def _operands(case: Any, features: int, behind: bool) -> list[Any]:
    """Weight and bias of the convolution and of a Linear behind it or before it."""
    geometry = case.geometry()
    size = (features, geometry.rows) if behind else (geometry.cols, features)
    linear = torch.randn(size, dtype=torch.float64)
    bias = torch.randn(size[0], dtype=torch.float64) if case.bias else None
    conv = [case.weight(), case.bias_vector()]
    return [*conv, linear, bias] if behind else [linear, bias, *conv]


def rows_of_a_linear_are_merged_where_they_are(mesh: Any) -> None:
    for name in SEVERAL:
        case = BY_NAME[name]
        for features in COUNTS:
            operands = _operands(case, features, behind=True)
            places = (WHOLE, WHOLE, ROWS, ROWS)
            sharded = [shard(t, mesh, p) for t, p in zip(operands, places, strict=True)]
            with collectives(0):
                weight, bias = _conv_linear(case)(*sharded)
            assert weight.placements == bias.placements == (ROWS,)
            own = share(features, mesh)
            assert weight.to_local().shape == (own, case.geometry().cols)
            assert bias.to_local().shape == (own,)
            assert_same((weight, bias), _conv_linear(case), operands, case.geometry().rows + 1)


def columns_of_whole_channels_make_sums(mesh: Any) -> None:
    for case in (case_of("all_differ", 8), case_of("upsample", 4), case_of("no_bias", 4)):
        operands = _operands(case, 5, behind=True)
        for conv in (WHOLE, Shard(1 if case.transposed else 0)):
            places = (conv, WHOLE if conv == WHOLE else ROWS, COLUMNS, WHOLE)
            sharded = [shard(t, mesh, p) for t, p in zip(operands, places, strict=True)]
            with collectives(0):
                weight, bias = _conv_linear(case)(*sharded)
            assert weight.placements == bias.placements == (SUM,)
            assert_same((weight, bias), _conv_linear(case), operands, case.geometry().rows + 9)


def columns_of_whole_groups_stay_columns(mesh: Any) -> None:
    for name in ("voxels", "circular_grouped", "transposed_depthwise"):
        case = BY_NAME[name]
        if case.geometry().groups % mesh.size():
            continue
        operands = _operands(case, 5, behind=True)
        for conv in (WHOLE, ROWS):
            places = (conv, conv, COLUMNS, WHOLE)
            sharded = [shard(t, mesh, p) for t, p in zip(operands, places, strict=True)]
            with collectives(0):
                weight, bias = _conv_linear(case)(*sharded)
            assert weight.placements == (COLUMNS,) and bias.placements == (SUM,)
            assert weight.to_local().shape == (5, case.geometry().cols // mesh.size())
            assert_same((weight, bias), _conv_linear(case), operands, case.geometry().rows + 9)


def columns_that_are_cut_elsewhere_are_right_too(mesh: Any) -> None:
    for case in (case_of("all_differ", 5), BY_NAME["grouped_dilated"], case_of("all_differ", 3)):
        operands = _operands(case, 6, behind=True)
        sharded = [
            shard(t, mesh, p) for t, p in zip(operands, (WHOLE, WHOLE, COLUMNS, WHOLE), strict=True)
        ]
        outputs = _conv_linear(case)(*sharded)
        # They become rows: no rank has the whole Linear.
        assert outputs[0].placements == (ROWS,)
        assert_same(outputs, _conv_linear(case), operands, case.geometry().rows + 9)


def columns_of_a_linear_go_forward_where_they_are(mesh: Any) -> None:
    for name in SEVERAL:
        case = BY_NAME[name]
        for features in COUNTS:
            operands = _operands(case, features, behind=False)
            places = (COLUMNS, WHOLE, WHOLE, WHOLE)
            sharded = [shard(t, mesh, p) for t, p in zip(operands, places, strict=True)]
            with collectives(0):
                weight, bias = _linear_conv(case)(*sharded)
            assert weight.placements == (COLUMNS,) and bias.placements == (WHOLE,)
            assert weight.to_local().shape == (case.geometry().rows, share(features, mesh))
            assert_same((weight, bias), _linear_conv(case), operands, case.geometry().cols + 1)


def a_linear_before_a_convolution_is_never_gathered(mesh: Any) -> None:
    case = case_of("all_differ", 8)
    operands = _operands(case, 9, behind=False)
    sharded = [shard(t, mesh, ROWS) for t in operands]
    weight, bias = _linear_conv(case)(*sharded)
    assert weight.placements == (COLUMNS,) and bias.placements == (WHOLE,)
    assert_same((weight, bias), _linear_conv(case), operands, case.geometry().cols + 1)


def output_channels_behind_a_linear_are_made_where_they_are(mesh: Any) -> None:
    for case in (case_of("all_differ", 8), case_of("upsample", 4)):
        operands = _operands(case, 3, behind=False)
        channels = Shard(1 if case.transposed else 0)
        places = (WHOLE, WHOLE, channels, ROWS)
        sharded = [shard(t, mesh, p) for t, p in zip(operands, places, strict=True)]
        with collectives(0):
            outputs = _linear_conv(case)(*sharded)
        assert all(each.placements == (ROWS,) for each in outputs)
        assert_same(outputs, _linear_conv(case), operands, case.geometry().cols + 1)


def each_rank_makes_its_own_rows_of_a_matrix(mesh: Any) -> None:
    for case in (case_of("all_differ", 8), case_of("reflect", 4), case_of("conv1d", 8)):
        operands = [case.weight(), case.bias_vector()]
        for bias in (ROWS, WHOLE):
            sharded = [shard(operands[0], mesh, ROWS), shard(operands[1], mesh, bias)]
            with collectives(0):
                matrix, offset = _matrix(case)(*sharded)
            assert matrix.placements == offset.placements == (ROWS,)
            geometry = case.geometry()
            assert matrix.to_local().shape == (geometry.rows // mesh.size(), geometry.cols)
            assert_same((matrix, offset), _matrix(case), operands, 9)


def rows_of_grouped_convolutions_need_nothing_moved(mesh: Any) -> None:
    # Whole groups, parts of a group, and one channel of several groups for each rank.
    for case in (case_of("grouped", 8), case_of("voxels", 4), case_of("depthwise_multiplier", 12)):
        operands = [case.weight(), case.bias_vector()]
        sharded = [shard(each, mesh, ROWS) for each in operands]
        with collectives(0):
            matrix, offset = _matrix(case)(*sharded)
        assert matrix.placements == offset.placements == (ROWS,)
        assert_same((matrix, offset), _matrix(case), operands, 9)


def a_matrix_is_cut_evenly_whatever_its_channels(mesh: Any) -> None:
    for name, case in BY_NAME.items():
        operands = [case.weight(), case.bias_vector()]
        sharded = [shard(each, mesh, ROWS) for each in operands]
        matrix, offset = _matrix(case)(*sharded)
        rows = share(case.geometry().rows, mesh)
        assert matrix.placements == offset.placements == (ROWS,), name
        assert matrix.to_local().shape[0] == offset.to_local().shape[0] == rows, name
        assert_same((matrix, offset), _matrix(case), operands, 99)


def input_channels_and_blocks_of_rows_are_right_too(mesh: Any) -> None:
    case = case_of("all_differ", 8)
    operands = [case.weight(), case.bias_vector()]
    by_input = [shard(operands[0], mesh, COLUMNS), shard(operands[1], mesh, WHOLE)]
    outputs = _matrix(case)(*by_input)
    assert outputs[0].placements == (ROWS,)
    assert_same(outputs, _matrix(case), operands, 9)
    by_output = [shard(each, mesh, ROWS) for each in operands]
    outputs = _matrix(case, rows=(5, 19))(*by_output)
    assert outputs[0].placements == (WHOLE,)
    assert_same(outputs, _matrix(case, rows=(5, 19)), operands, 9)


def another_setting_is_another_call(mesh: Any) -> None:
    weight = torch.randn(8, 3, 3, dtype=torch.float64)
    settings: list[dict[str, Any]] = [
        {"input_size": [7]},
        {"input_size": [9]},
        {"input_size": [9], "stride": [2]},
        {"input_size": [9], "padding": [1]},
        {"input_size": [9], "padding": [0, 2]},
        {"input_size": [9], "dilation": [2]},
        {"input_size": [9], "padding": [2], "padding_mode": "circular"},
        {"input_size": [9], "padding": [2], "padding_mode": "reflect"},
        {"input_size": [9], "rows": [0, 4]},
        {"input_size": [9], "rows": [0, 5]},
        {"input_size": [9], "rows": [2, 6]},
    ]
    # Twice, as torch remembers what it has seen; through the op itself, which has its rule.
    for each in settings * 2:
        call = functools.partial(torch.ops.linfuse.conv_to_affine, bias=None, **each)
        assert_same(call(shard(weight, mesh, ROWS)), call, [weight], 9)
    back = torch.randn(3, 8, 3, dtype=torch.float64)
    for extra in (0, 1, 0):
        call = functools.partial(
            torch.ops.linfuse.conv_to_affine,
            bias=None,
            input_size=[9],
            stride=[2],
            transposed=True,
            output_padding=[extra],
        )
        assert_same(call(shard(back, mesh, COLUMNS)), call, [back], 9)


def ops_are_called_without_functional_too(mesh: Any) -> None:
    ops = torch.ops.linfuse
    case = case_of("all_differ", 8)
    geometry = case.geometry()
    settings = (geometry.op_arguments, geometry.op_keywords)

    def call(op: Any) -> Any:
        return lambda *operands: _as_tuple(op(*operands, *settings[0], **settings[1]))

    conv, bias, linear, linear_bias = _operands(case, 5, behind=True)
    before = _operands(case, 5, behind=False)
    rows = torch.randn(5, geometry.cols, dtype=torch.float64)
    for op, operands, places, moved in (
        (ops.fuse_conv_linear, [conv, bias, linear, linear_bias], (WHOLE, WHOLE, ROWS, ROWS), 0),
        (ops.fuse_conv_linear, [conv, bias, linear, linear_bias], (ROWS, ROWS, COLUMNS, WHOLE), 0),
        (ops.fuse_linear_conv, before, (COLUMNS, WHOLE, WHOLE, WHOLE), 0),
        (ops.fuse_linear_conv, before, (WHOLE, WHOLE, ROWS, ROWS), 0),
        (ops.conv_to_affine, [conv, bias], (ROWS, ROWS), 0),
        (ops.convolve_rows, [rows, conv], (ROWS, WHOLE), 0),
        (ops.convolve_rows, [rows, conv], (WHOLE, ROWS), 0),
        (ops.conv_to_csr, [conv], (WHOLE,), 0),
        (ops.conv_to_csr, [conv], (ROWS,), 1),
    ):
        sharded = [shard(t, mesh, p) for t, p in zip(operands, places, strict=True)]
        with collectives(moved):
            outputs = call(op)(*sharded)
        if op is ops.conv_to_csr:
            for actual, want in zip(outputs, call(op)(*operands), strict=True):
                assert torch.equal(actual.full_tensor(), want)
            continue
        assert_same(outputs, call(op), operands, 999)


def columns_of_the_op_itself_are_cut_in_whole_channels_only(mesh: Any) -> None:
    for case in (case_of("all_differ", 6), BY_NAME["voxels"], BY_NAME["upsample"]):
        geometry = case.geometry()
        call = functools.partial(_call_op, torch.ops.linfuse.fuse_conv_linear, geometry)
        operands = _operands(case, 5, behind=True)
        places = (COLUMNS if case.transposed else ROWS, ROWS, COLUMNS, WHOLE)
        sharded = [shard(t, mesh, p) for t, p in zip(operands, places, strict=True)]
        assert_same(call(*sharded), call, operands, 999)


def _call_op(op: Any, geometry: Any, *operands: Any) -> Any:
    return op(*operands, *geometry.op_arguments, **geometry.op_keywords)


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, torch.Tensor) else value


def kernels_and_linears_are_merged_over_their_last_axis(mesh: Any) -> None:
    sizes = [(6, 3, 3, 3), (6,), (8, 6, 1, 1), (8,)]
    operands = [torch.randn(size, dtype=torch.float64) for size in sizes]
    sharded = [shard(t, mesh, p) for t, p in zip(operands, (WHOLE, WHOLE, ROWS, ROWS), strict=True)]
    with collectives(0):
        outputs = functional.fuse_conv_conv(*sharded)
    assert outputs[0].placements == (ROWS,)
    assert_same(outputs, functional.fuse_conv_conv, operands, 99)
    everywhere = [shard(each, mesh, ROWS) for each in operands]
    assert_same(functional.fuse_conv_conv(*everywhere), functional.fuse_conv_conv, operands, 99)

    def transposed(*kernels: Any) -> Any:
        return functional.fuse_conv_conv(*kernels, first_transposed=True, second_transposed=True)

    kernels = [torch.randn(3, 6, 1, dtype=torch.float64), None]
    kernels += [torch.randn(6, 5, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
    sharded = [shard(each, mesh, ROWS) for each in kernels]
    assert_same(transposed(*sharded), transposed, kernels, 99)

    sizes = [(9, 4), (9,), (5, 9), (5,)]
    for none in (None, 1, 3):
        linears = [torch.randn(size, dtype=torch.float64) for size in sizes]
        if none is not None:
            linears[none] = None
        sharded = [
            shard(t, mesh, p) for t, p in zip(linears, (WHOLE, WHOLE, ROWS, ROWS), strict=True)
        ]
        outputs = functional.fuse_linear_linear(*sharded)
        assert_same(outputs, functional.fuse_linear_linear, linears, 99)


def every_axis_of_a_mesh_has_its_own_placement(mesh: Any) -> None:
    if mesh.size() < 4:
        return
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    case = case_of("all_differ", 8)
    operands = _operands(case, 7, behind=True)
    for rows, bias, moved in (
        ((WHOLE, ROWS), (WHOLE, ROWS), 0),  # FSDP in groups that are replicated
        ((ROWS, ROWS), (ROWS, ROWS), 0),
        ((ROWS, COLUMNS), (ROWS, WHOLE), 0),  # FSDP and tensor parallelism
    ):
        whole = (WHOLE, WHOLE)
        places = (whole, whole, rows, bias)
        sharded = [shard(t, grid, *p) for t, p in zip(operands, places, strict=True)]
        with collectives(moved):
            outputs = _conv_linear(case)(*sharded)
        assert_same(outputs, _conv_linear(case), operands, case.geometry().rows + 9)
    for name, places in (("all_differ", (ROWS, ROWS)), ("voxels", (WHOLE, ROWS))):
        for channels in (8, 4):
            case = case_of(name, channels)
            kernel = [case.weight(), case.bias_vector()]
            sharded = [shard(t, grid, *places) for t in kernel]
            with collectives(0):
                outputs = _matrix(case)(*sharded)
            assert outputs[0].placements == places
            assert_same(outputs, _matrix(case), kernel, 9)
    case = case_of("all_differ", 7)
    kernel = [case.weight(), case.bias_vector()]
    sharded = [shard(t, grid, ROWS, ROWS) for t in kernel]
    assert_same(_matrix(case)(*sharded), _matrix(case), kernel, 9)


def ranks_outside_of_a_mesh_have_nothing_to_do(mesh: Any) -> None:
    few = DeviceMesh("cpu", list(range(mesh.size() - 1)))
    outside = mesh.get_local_rank() == mesh.size() - 1
    case = case_of("all_differ", 8)
    behind, before = _operands(case, 2, behind=True), _operands(case, 2, behind=False)
    kernels = [torch.randn(8, 4, 1, 1, dtype=torch.float64), None]
    kernels += [torch.randn(6, 8, 3, 3, dtype=torch.float64), None]
    for call, operands, places in (
        (_conv_linear(case), behind, (WHOLE, WHOLE, ROWS, ROWS)),
        (_conv_linear(case), behind, (WHOLE, WHOLE, COLUMNS, WHOLE)),
        (_linear_conv(case), before, (COLUMNS, WHOLE, WHOLE, WHOLE)),
        (_matrix(case), behind[:2], (ROWS, ROWS)),
        (_matrix(case, rows=(0, 4)), behind[:2], (ROWS, ROWS)),
        (functional.fuse_conv_conv, kernels, (ROWS,) * 4),
    ):
        sharded = [shard(t, few, p) for t, p in zip(operands, places, strict=True)]
        outputs = call(*leaves(sharded))
        assert outputs[0].requires_grad
        if outside:
            for actual, want in zip(outputs, call(*operands), strict=True):
                assert actual.shape == want.shape and actual.to_local().numel() == 0
        else:
            assert_same(outputs, call, operands, 999)
    if outside:
        try:
            gathered(sharded[0])
        except ValueError as error:
            assert "must be on a mesh of which this rank is a part" in str(error)
        else:
            raise AssertionError("there is nothing to put together")


def half_types_are_rounded_once_on_a_rank(mesh: Any) -> None:
    case = case_of("all_differ", 8)
    operands = [each.to(torch.bfloat16) for each in _operands(case, 5, behind=True)]
    sharded = [shard(t, mesh, p) for t, p in zip(operands, (WHOLE, WHOLE, ROWS, ROWS), strict=True)]
    outputs = _conv_linear(case)(*sharded)
    for actual, want in zip(outputs, _conv_linear(case)(*operands), strict=True):
        assert torch.equal(actual.full_tensor(), want)
