"""fuse_conv_linear: values, dtypes, derivatives, memory, and torch's own checks of the op."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cases import BY_NAME, CASES, FEW, Case
from tolerance import DTYPES, assert_close

from linfuse_ext import _C, functional, reference
from linfuse_ext.geometry import make_geometry
from linfuse_ext.torch_ops import fuse_conv_linear_by_torch

FEATURES = 4


def names(case: Case) -> str:
    return case.name


def operands(
    case: Case, dtype: torch.dtype = torch.float64, features: int = FEATURES, device: str = "cpu"
) -> list[torch.Tensor | None]:
    bias = case.bias_vector(dtype)
    made = [
        case.weight(dtype),
        bias,
        case.linear_weight(features, dtype),
        case.linear_bias(features, dtype),
    ]
    return [None if value is None else value.to(device) for value in made]


def call(case: Case, *tensors: torch.Tensor | None):
    return functional.fuse_conv_linear(*tensors, *case.arguments(), **case.keywords())


def assert_equals_the_reference(case: Case, tensors, weight, bias) -> None:
    wide = [None if value is None else value.double().cpu() for value in tensors]
    exact = reference.fuse_conv_linear(*wide, *case.arguments(), **case.keywords())
    magnitude = reference.fuse_conv_linear(
        *(None if value is None else value.abs() for value in wide),
        *case.arguments(),
        **case.keywords(),
    )
    geometry = case.geometry()
    terms = min(geometry.rows, geometry.out_channels * wide[0][0, 0].numel() * 4)
    assert_close(weight, exact[0], magnitude[0], terms)
    assert_close(bias, exact[1], magnitude[1], geometry.rows + 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=names)
def test_equals_the_reference(case: Case, dtype: torch.dtype, device: str, engine: str) -> None:
    tensors = operands(case, dtype, device=device)
    weight, bias = call(case, *tensors)
    assert weight.dtype == bias.dtype == dtype
    assert weight.is_contiguous() and bias.is_contiguous()
    assert_equals_the_reference(case, tensors, weight, bias)


@pytest.mark.parametrize("case", CASES, ids=names)
def test_computes_what_the_two_layers_compute(case: Case, device: str) -> None:
    geometry = case.geometry()
    tensors = operands(case, device=device)
    weight, bias = call(case, *tensors)
    x = torch.randn(3, geometry.in_channels, *geometry.input_size, dtype=torch.float64).to(device)
    y = reference.convolve(x, *tensors[:2], *case.arguments()[1:], **case.keywords())
    expected = torch.nn.functional.linear(y.flatten(1), *tensors[2:])
    torch.testing.assert_close(torch.nn.functional.linear(x.flatten(1), weight, bias), expected)


@pytest.mark.parametrize("features", [0, 1, 7, 16, 17, 33, 100, 129])
def test_any_number_of_rows(features: int, device: str) -> None:
    """Around the widths of a vector register, and none at all."""
    case = BY_NAME["asymmetric_stride"]
    for dtype in DTYPES:
        tensors = operands(case, dtype, features, device)
        weight, bias = call(case, *tensors)
        assert weight.shape == (features, case.geometry().cols) and bias.shape == (features,)
        assert_equals_the_reference(case, tensors, weight, bias)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 24, 25, 37])
def test_any_number_of_channels(channels: int) -> None:
    """Every width of the register tile, alone and in combination."""
    case = Case("channels", "", (3, channels, 2, 3), (3, 7), padding=1)
    for features in (5, 40, 150):
        for dtype in DTYPES:
            tensors = operands(case, dtype, features)
            assert_equals_the_reference(case, tensors, *call(case, *tensors))


TAILS = (1, 15, 16, 17, 31, 33)


@pytest.mark.parametrize("in_channels", TAILS)
@pytest.mark.parametrize("out_channels", TAILS)
def test_tails_of_every_dimension(out_channels: int, in_channels: int) -> None:
    """Matrix tiles are cut to fit, or filled up with zeros; lines of positions end anywhere."""
    for features, length in itertools.product(TAILS, (7, 70)):
        case = Case("tails", "", (out_channels, in_channels, 3), (length,), padding=1)
        tensors = operands(case, torch.bfloat16, features)
        assert_equals_the_reference(case, tensors, *call(case, *tensors))


# What makes the CPU cut the work in each of its ways, and (F, weight size, input size, the rest).
CUTS_OF_WAY = {
    "output": {
        "few channels in": (40, (16, 3, 3, 3), (9, 8), {"padding": (0, 1, 2, 0), "stride": 2}),
        "one channel in, taps off the image": (33, (17, 1, 2, 3), (7, 5), {"padding": 4}),
        "few channels in, many out": (20, (130, 2, 5), (23,), {"stride": 3, "dilation": 2}),
        "few channels in, groups": (7, (48, 2, 2, 2, 2), (4, 3, 5), {"groups": 3, "stride": 2}),
        "few channels in, taps that meet": (9, (16, 4, 3, 3), (5, 6), {"padding_mode": "reflect"}),
        "few channels in, several slabs": (70, (16, 4, 3, 3), (96, 90), {"padding": 1}),
    },
    "input": {
        "jobs of one thread": (40, (64, 1, 3, 3), (30, 31), {"groups": 64, "padding": 1}),
        "jobs of one thread, slabs, lines unread": (32, (8, 8, 3), (20000,), {"padding": 40}),
        "jobs of one thread, slabs that wrap": (
            32, (8, 8, 5), (20000,), {"padding": 7, "padding_mode": "circular"},
        ),
        "stretches of slabs, result beyond the caches": (
            100, (16, 16, 3, 3), (40, 70), {"padding": 3, "dilation": 3},
        ),
        "stretches of slabs that wrap": (
            100, (16, 16, 3, 3), (40, 70), {"padding": 2, "padding_mode": "circular"},
        ),
        "stretches of slabs, transposed": (
            60, (16, 12, 4, 3), (40, 71),
            {"transposed": True, "stride": 2, "padding": (1, 0, 2, 1)},
        ),
        "panels beyond the caches": (90, (64, 20, 3, 3), (41, 43), {}),
        "shared slabs": (3, (64, 12, 3, 3), (90, 110), {"padding": (3, 0, 0, 1)}),
        "shared slabs, many rows": (33, (64, 12, 3, 3), (90, 110), {"padding": (3, 0, 0, 1)}),
        "shared, weights in batches, many rows": (33, (700, 700, 3, 3), (3, 4), {"padding": 1}),
        "few rows, several blocks": (10, (20, 75, 3, 3), (9, 11), {"padding": 1, "stride": 2}),
        "few rows, results past the caches": (10, (20, 75, 3, 3), (41, 43), {"padding": 1}),
        "few rows, two panels, groups": (14, (24, 48, 2, 3), (7, 11), {"groups": 3, "padding": 1}),
        "shared slabs, transposed": (
            5, (12, 64, 3, 2), (45, 55), {"transposed": True, "stride": 2},
        ),
        "shared, weights in batches": (3, (700, 700, 3, 3), (3, 4), {"padding": 1}),
        "shared, halves of weights in batches": (3, (1000, 1000, 3, 3), (2, 3), {"padding": 1}),
        "sums longer than a register holds": (3, (9000, 20, 3), (3,), {"padding": 1}),
        "stretches of slabs, transposed, lines between": (
            40, (16, 8, 2), (9000,), {"transposed": True, "stride": 3, "padding": 2},
        ),
    },
    "position": {
        "plain": (3, (16, 24, 3, 3), (21, 19), {"padding": 1}),
        "strides": (
            1, (8, 9, 3, 2), (17, 22), {"stride": (3, 2), "padding": 2, "dilation": 2},
        ),
        "transposed": (
            5, (9, 14, 4, 3), (11, 13), {"transposed": True, "stride": (3, 2), "padding": 1},
        ),
        "groups": (9, (32, 2, 5), (90,), {"groups": 16, "padding": 3, "stride": 2}),
        "slabs": (2, (300, 2, 3), (20000,), {"padding": 1}),
        "slabs, transposed": (1, (4, 500, 3), (6000,), {"transposed": True, "stride": 2}),
        "three axes": (
            3, (12, 5, 2, 3, 2), (7, 6, 9),
            {"padding": (1, 0, 2), "stride": (1, 2, 1), "dilation": (2, 1, 1)},
        ),
        "many rows": (40, (8, 3, 3, 3), (40, 37), {"padding": 1}),
        "many rows, transposed": (
            33, (3, 5, 1, 3), (9, 50), {"transposed": True, "padding": (0, 1)},
        ),
        "pointwise": (33, (20, 30, 1, 1), (9, 11), {}),
        "pointwise, one row": (1, (64, 20, 1, 1), (40, 41), {}),
        "pointwise, few positions": (70, (24, 13, 1), (16,), {}),
        "pointwise, groups": (25, (12, 4, 1, 1, 1), (3, 5, 7), {"groups": 3}),
        "pointwise, transposed": (21, (20, 9, 1, 1), (10, 10), {"transposed": True, "groups": 2}),
        "pointwise, channels that crowd a cache": (20, (16, 30, 1), (1024,), {}),
        "pointwise, deep sums in the result": (3, (1100, 7, 1), (96,), {}),
        "pointwise, long lines": (3, (5, 4, 1), (777,), {}),
        "transposed, parts that nothing reads": (
            3, (4, 5, 2, 3), (6, 7), {"transposed": True, "stride": (4, 5), "padding": (0, 1)},
        ),
        "transposed, long lines": (
            2, (3, 4, 2), (211,), {"transposed": True, "stride": 3, "dilation": 2},
        ),
        "transposed, more parts than a piece of a line": (
            2, (2, 3, 5), (4,), {"transposed": True, "stride": 300, "dilation": 61},
        ),
        "one line in, five out": (2, (8, 3, 1, 3, 3), (1, 9, 9), {"padding": (2, 1, 1)}),
        "an axis that nothing reads": (
            1, (15, 5, 2, 2), (33, 3), {"padding": (2, 2, 2, 0), "stride": 2, "dilation": (2, 3)},
        ),
        "an image beyond the cache, several blocks": (3, (64, 14, 3, 3), (48, 50), {"padding": 1}),
    },
    "columns": {
        "plain": (33, (40, 1, 10), (163,), {"stride": 5}),
        "chunks": (17, (200, 1, 3, 3), (57, 59), {"stride": 2, "padding": 1}),
        "segments, groups": (
            9, (64, 2, 3, 2), (31, 33), {"groups": 4, "stride": (3, 1), "padding": 2},
        ),
        "that wrap": (
            20, (24, 1, 5, 5), (23, 20), {"stride": 2, "padding": 2, "padding_mode": "circular"},
        ),
        "that turn back": (
            20, (24, 2, 3, 4), (13, 21),
            {"stride": (2, 1), "padding": 1, "padding_mode": "reflect"},
        ),
        "three axes": (
            16, (30, 3, 2, 1, 2), (9, 6, 12), {"stride": (2, 1, 3), "padding": (1, 0, 2)},
        ),
        "few rows": (5, (64, 2, 3, 3), (12, 11), {"padding": 1}),
        "few rows, strides": (
            4, (100, 3, 2, 2), (15, 22), {"stride": (3, 2), "dilation": (1, 3)},
        ),
        "results past the caches": (40, (24, 2, 3), (9001,), {"stride": 2}),
        "few large images": (4, (512, 1, 3, 3), (64, 64), {"padding": 1}),
        "one line": (6, (64, 1, 5, 5), (1, 90), {"padding": 2}),
    },
    "cheapest": {
        "on a subgrid": (40, (16, 5, 1, 1), (9, 8), {"stride": 2}),
        "on a subgrid, few rows at a time": (70, (8, 64, 1), (701,), {"stride": 2}),
        "on a subgrid, padding alone for some outputs": (
            7, (12, 4, 1, 1), (10, 7), {"stride": (2, 3), "padding": (4, 5, 7, 3), "groups": 2},
        ),
        "on a subgrid of one axis": (
            18, (6, 4, 3, 1, 2), (5, 11, 6), {"stride": (1, 3, 2), "padding": (1, 0, 1)},
        ),
        "no subgrid, as all outputs read padding": (
            5, (3, 4, 1), (3,), {"stride": 9, "padding": 4},
        ),
    },
}  # fmt: skip
# By matrix tiles the work is cut as by input, for half types on a machine that has them and layers
# whose groups have two output channels at least.
HAS_TILES = _C.build_info()["simd"] == "amx"
HALVES = tuple(dtype for dtype in DTYPES if dtype.itemsize == 2)
CUTS = [(way, cut, dtype) for way, cuts in CUTS_OF_WAY.items() for cut in cuts for dtype in DTYPES]
if HAS_TILES:
    CUTS_OF_WAY["tiles"] = {
        cut: how for cut, how in CUTS_OF_WAY["input"].items() if how[3].get("groups") != how[1][0]
    }
    CUTS_OF_WAY["position_tiles"] = {
        cut: how
        for cut, how in CUTS_OF_WAY["position"].items()
        if how[1][0] > how[3].get("groups", 1)
    } | {
        "blocks, parts, and planes of zeros": (2, (67, 75, 3, 3), (9, 11), {"padding": 1}),
        "blocks and parts, strides": (1, (130, 40, 3, 2), (21, 17), {"stride": (3, 2)}),
        "blocks and parts, groups, transposed": (
            3, (80, 33, 3, 3), (7, 40), {"groups": 2, "transposed": True, "stride": 2},
        ),
    }  # fmt: skip
    CUTS += [
        (way, cut, dtype)
        for way in ("tiles", "position_tiles")
        for cut in CUTS_OF_WAY[way]
        for dtype in HALVES
    ]


@contextlib.contextmanager
def going_by(way: str) -> Iterator[None]:
    before = _C.set_way(way)
    try:
        yield
    finally:
        _C.set_way(before)


def make_cut(way: str, cut: str, dtype: torch.dtype):
    """Its geometry, operands, input size, and the other settings."""
    features, weight_size, input_size, rest = CUTS_OF_WAY[way][cut]
    rest = {"padding": 1, **rest} if rest.get("padding_mode") else rest
    geometry = make_geometry("test", weight_size, input_size, **rest)
    generator = torch.Generator().manual_seed(3)
    tensors = [
        torch.randn(size, generator=generator, dtype=dtype)
        for size in (weight_size, [geometry.out_channels], [features, geometry.rows], [features])
    ]
    return geometry, tensors, input_size, rest


@pytest.mark.parametrize(("way", "cut", "dtype"), CUTS, ids=str)
def test_every_cut_of_the_work(way: str, cut: str, dtype: torch.dtype) -> None:
    """Against torch's convolution in float64; layers too large for the matrix of the reference."""
    geometry, tensors, input_size, rest = make_cut(way, cut, dtype)
    with going_by(way):
        weight, bias = functional.fuse_conv_linear(*tensors, input_size, **rest)
    arguments, keywords = geometry.op_arguments, geometry.op_keywords
    wide = [value.double() for value in tensors]
    exact = fuse_conv_linear_by_torch(*wide, *arguments, **keywords)
    magnitude = fuse_conv_linear_by_torch(*(v.abs() for v in wide), *arguments, **keywords)
    terms = geometry.out_channels * tensors[0][0, 0].numel() * 4
    assert_close(weight, exact[0], magnitude[0], terms)
    assert_close(bias, exact[1], magnitude[1], geometry.rows + 1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with going_by(way):
            again = functional.fuse_conv_linear(*tensors, input_size, **rest)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(weight, again[0]) and torch.equal(bias, again[1])


@pytest.mark.parametrize("features", [3, 40])
@pytest.mark.parametrize("case", CASES, ids=names)
def test_every_way_of_every_case(case: Case, features: int) -> None:
    """By input everything goes; by the others what they can, and the rest is refused."""
    is_paired = case.geometry().out_channels > case.geometry().groups
    for dtype in DTYPES:
        tensors = operands(case, dtype, features)
        takes_all = ["cheapest", "input"]
        if HAS_TILES and is_paired and dtype in HALVES:
            takes_all.append("tiles")
        for way in CUTS_OF_WAY:
            with going_by(way):
                try:
                    weight, bias = call(case, *tensors)
                except ValueError as error:
                    assert way not in takes_all, error
                    continue
            assert_equals_the_reference(case, tensors, weight, bias)


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be cheapest, .* or position_tiles, got 'sideways'"):
        _C.set_way("sideways")


@pytest.mark.parametrize("features", [1, 100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_is_widened_and_rounded(dtype: torch.dtype, features: int) -> None:
    """Of each pair of a kernel that its stride skips over, an element meets either."""
    step = torch.finfo(dtype).eps
    conv_weight = torch.tensor([[[1 + step, 1 / 3]]], dtype=dtype)
    values = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    length = 65536 if features == 1 else 701
    linear = values.repeat(2)[: features * length].view(features, length)
    fused, _ = functional.fuse_conv_linear(conv_weight, None, linear, None, 2 * length, stride=2)
    wide = linear.float()[..., None]
    expected = wide * conv_weight.float().view(2)
    if dtype == torch.bfloat16 and _C.build_info()["simd"] == "amx":  # subnormals may be zeros
        smallest = torch.finfo(dtype).tiny
        may_vanish = (wide.abs() < smallest) | (expected.abs() < smallest)
        expected[may_vanish & (fused == 0).view_as(expected)] = 0
    torch.testing.assert_close(fused, expected.to(dtype).flatten(1), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("which", ["neither", "conv", "linear", "both"])
def test_biases_in_all_combinations(which: str, device: str) -> None:
    case = BY_NAME["same3x3"]
    conv_weight, conv_bias, linear_weight, linear_bias = operands(case, device=device)
    tensors = [
        conv_weight,
        conv_bias if which in ("conv", "both") else None,
        linear_weight,
        linear_bias if which in ("linear", "both") else None,
    ]
    weight, bias = call(case, *tensors)
    assert_equals_the_reference(case, tensors, weight, bias)
    assert bias.any() == (which != "neither")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_takes_operands_of_any_layout(dtype: torch.dtype, device: str) -> None:
    case = BY_NAME["grouped_dilated"]
    tensors = operands(case, dtype, features=35, device=device)
    expected = call(case, *tensors)
    conv_weight = tensors[0].permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    linear_weight = tensors[2].T.contiguous().T
    assert not conv_weight.is_contiguous() and not linear_weight.is_contiguous()
    actual = call(case, conv_weight, tensors[1], linear_weight, tensors[3])
    assert all(torch.equal(one, two) for one, two in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FEW, ids=names)
def test_bits_do_not_depend_on_the_threads(case: Case, dtype: torch.dtype) -> None:
    tensors = operands(case, dtype, features=70)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 1, 2):
            torch.set_num_threads(threads)
            results.append(call(case, *tensors))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_not_a_number_stays_in_its_row(device: str) -> None:
    case = BY_NAME["same3x3"]
    tensors = operands(case, device=device)
    tensors[2][1, 0] = torch.nan
    weight, bias = call(case, *tensors)
    poisoned = torch.zeros(FEATURES, dtype=torch.bool, device=device)
    poisoned[1] = True
    assert torch.equal(bias.isnan(), poisoned)
    assert torch.equal(weight.isnan().any(1), poisoned)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_where_it_belongs(dtype: torch.dtype, value: float) -> None:
    """Nothing is multiplied with the zeros that fill up vectors and tiles, or with padding."""
    case = Case("poisoned", "", (5, 18, 3, 2), (4, 35), padding=(1, 0), stride=(1, 2))
    clean = [None if t is None else t.abs() + 0.5 for t in operands(case, dtype, features=19)]
    gone = set()
    for which in (0, 2):
        for place in range(0, clean[which].numel(), clean[which].numel() // 7):
            tensors = [None if t is None else t.clone() for t in clean]
            tensors[which].view(-1)[place] = value
            marked = [torch.ones_like(t, dtype=torch.float64) for t in clean]
            marked[which].zero_().view(-1)[place] = 1
            reached, _ = reference.fuse_conv_linear(*marked, *case.arguments(), **case.keywords())
            rows = torch.arange(19) == (place // clean[2].shape[1] if which == 2 else -1)
            for way in ("cheapest", *CUTS_OF_WAY):
                with going_by(way):
                    try:
                        weight, bias = call(case, *tensors)
                    except ValueError:  # not every way takes every weight, or dtype
                        continue
                gone.add(way)
                assert torch.equal(weight.isfinite(), reached == 0)
                # All are positive: infinity must not become NaN on its way.
                spoiled = weight[reached != 0]
                assert (spoiled.isnan() if value != torch.inf else spoiled == value).all()
                assert torch.equal(bias.isfinite(), ~rows)
    assert gone >= {"cheapest", "input", "position"}
    assert dtype not in HALVES or not HAS_TILES or gone >= {"tiles", "position_tiles"}


@pytest.mark.parametrize("features", [1, 3, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_infinite_weight_meets_no_padding(dtype: torch.dtype, features: int) -> None:
    case = BY_NAME["same3x3"]
    conv_weight, conv_bias, linear_weight, linear_bias = operands(case, dtype, features)
    conv_weight[0, 0, 0, 0] = torch.inf
    matrix, _ = functional.conv_to_affine(
        conv_weight, conv_bias, *case.arguments(), **case.keywords()
    )
    fused, _ = call(case, conv_weight, conv_bias, linear_weight, linear_bias)
    reached = matrix.isinf().any(0)
    assert reached.any() and not reached.all()
    assert torch.equal(fused.isfinite(), ~reached.expand_as(fused))


def test_an_infinite_bias_meets_the_rows_that_it_belongs_to() -> None:
    """Seven slabs for two lines of output: most have nothing to add."""
    conv_bias = torch.ones(64)
    conv_bias[0] = torch.inf
    linear = torch.ones(1, 64 * 2 * 50_000)
    operands = (torch.ones(64, 1, 3, 1), conv_bias, linear, None)
    _, bias = functional.fuse_conv_linear(*operands, (7, 50_000), stride=(3, 1))
    assert bias == torch.inf


@pytest.mark.parametrize("stride", [2**48, 2**62, 2**63 - 1])
@pytest.mark.parametrize("features", [1, 20])
@pytest.mark.parametrize("transposed", [False, True])
def test_strides_beyond_every_size(stride: int, features: int, transposed: bool) -> None:
    """One position on the axis: a stride of any length moves nothing."""
    kernel, size = ((8, 8, 1, 1), (1, 4096)) if transposed else ((8, 8, 3, 1), (40, 50))
    out = 4096 if transposed else 50
    weight, linear = torch.randn(kernel), torch.randn(features, 8 * out)
    settings = {"stride": (stride, 1), "transposed": transposed}
    fused, _ = functional.fuse_conv_linear(weight, None, linear, None, size, **settings)
    rows = linear.view(features, 8, out)
    letters = "iok,fop->fikp" if transposed else "oik,fop->fikp"
    expected = torch.zeros(features, 8, *size)
    expected[:, :, : kernel[2]] = torch.einsum(letters, weight[..., 0], rows)
    torch.testing.assert_close(fused.view(expected.shape), expected)


@pytest.mark.parametrize("way", ["cheapest", "input", "output", "columns", "position"])
@pytest.mark.parametrize("channels", [3, 30])
@pytest.mark.parametrize("size", [(9, 11), (5, 8)])
@pytest.mark.parametrize("kernel", [1, 2])
def test_bits_do_not_depend_on_where_the_linear_lies(
    way: str, channels: int, size: tuple[int, int], kernel: int
) -> None:
    """Rows are read where the Linear has them only if they lie one behind the other there."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(20, channels, kernel, kernel, generator=generator)
    conv_bias = torch.randn(20, generator=generator)
    positions = math.prod(n + 1 - kernel for n in size)
    linear = torch.randn(33, 20 * positions, generator=generator)
    with going_by(way):
        one = functional.fuse_conv_linear(weight, conv_bias, linear, None, size)
        other = functional.fuse_conv_linear(weight, conv_bias, linear.T.contiguous().T, None, size)
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_rows_of_the_linear_may_lie_anywhere() -> None:
    """With gaps between them, the last one at the end of its memory; and all in one place."""
    weight, conv_bias = torch.randn(16, 1, 9), torch.randn(16)
    wide = torch.randn(20, 3 + 16 * 31)
    for linear in (wide[:, 3:], wide[7:8, 3:].expand(20, -1)):
        fused = functional.fuse_conv_linear(weight, conv_bias, linear, None, 129, stride=4)
        plain = functional.fuse_conv_linear(
            weight, conv_bias, linear.contiguous(), None, 129, stride=4
        )
        assert all(torch.equal(one, other) for one, other in zip(fused, plain, strict=True))


@pytest.mark.parametrize("case", CASES, ids=names)
def test_derivatives_of_first_and_second_order(case: Case, device: str) -> None:
    if case.name == "forum":
        pytest.skip("finite differences on 126 000 operands; `plain3x3` is its small twin")
    tensors = operands(case, features=2, device=device)
    used = [value.requires_grad_() for value in tensors if value is not None]

    def run(*values):
        values = list(values)
        filled = [None if value is None else values.pop(0) for value in tensors]
        return call(case, *filled)

    assert torch.autograd.gradcheck(run, used, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, used, fast_mode=True)


@pytest.mark.parametrize("op", ["linear", "conv"])
@pytest.mark.parametrize("case", FEW, ids=names)
def test_derivatives_of_the_adjoints(case: Case, op: str, device: str) -> None:
    """They close on each other, so that derivatives exist to every order."""
    geometry = case.geometry()
    conv_weight, _, linear_weight, _ = operands(case, features=2, device=device)
    grad = torch.randn(2, geometry.cols, dtype=torch.float64, device=device)
    arguments, keywords = geometry.op_arguments, geometry.op_keywords

    def linear(grad, weight):
        return torch.ops.linfuse.convolve_rows(grad, weight, *arguments, **keywords)

    def conv(grad, linear):
        return torch.ops.linfuse.fuse_conv_linear_backward_conv(
            grad, linear, list(case.weight_size), *arguments, **keywords
        )

    run, other = (linear, conv_weight) if op == "linear" else (conv, linear_weight)
    values = (grad.requires_grad_(), other.requires_grad_())
    assert torch.autograd.gradcheck(run, values, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, values, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=names)
def test_gradients_equal_those_of_the_reference(
    case: Case, dtype: torch.dtype, device: str
) -> None:
    tensors = [t if t is None else t.requires_grad_() for t in operands(case, dtype, device=device)]
    wide = [None if t is None else t.detach().double().cpu().requires_grad_() for t in tensors]
    outputs = call(case, *tensors)
    exact = reference.fuse_conv_linear(*wide, *case.arguments(), **case.keywords())
    upstream = [torch.ones_like(value) for value in exact]
    used = [t for t in tensors if t is not None]
    grads = torch.autograd.grad(outputs, used, [u.to(device=device, dtype=dtype) for u in upstream])
    exact_grads = torch.autograd.grad(exact, [t for t in wide if t is not None], upstream)
    scale = 1e-10 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps
    for grad, value, like in zip(grads, exact_grads, used, strict=True):
        assert grad.dtype == dtype and grad.shape == like.shape
        error = (grad.double().cpu() - value).norm()
        assert error <= scale * value.norm() + 1e-12


@pytest.mark.parametrize("case", CASES, ids=names)
def test_opcheck(case: Case, device: str) -> None:
    tensors = [
        t if t is None else t.requires_grad_() for t in operands(case, torch.float32, device=device)
    ]
    geometry = case.geometry()
    torch.library.opcheck(
        torch.ops.linfuse.fuse_conv_linear.default,
        (*tensors, *geometry.op_arguments),
        geometry.op_keywords,
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("case", FEW, ids=names)
def test_opcheck_of_the_adjoints(case: Case, device: str) -> None:
    geometry = case.geometry()
    conv_weight, _, linear_weight, _ = operands(case, torch.float32, device=device)
    grad = torch.randn(FEATURES, geometry.cols, device=device, requires_grad=True)
    torch.library.opcheck(
        torch.ops.linfuse.convolve_rows.default,
        (grad, conv_weight.requires_grad_(), *geometry.op_arguments),
        geometry.op_keywords,
        rtol=1e-4,
        atol=1e-4,
    )
    torch.library.opcheck(
        torch.ops.linfuse.fuse_conv_linear_backward_conv.default,
        (grad, linear_weight.requires_grad_(), list(case.weight_size), *geometry.op_arguments),
        geometry.op_keywords,
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("case", FEW, ids=names)
def test_vmap_runs_one_by_one(case: Case, device: str) -> None:
    conv_weight, conv_bias, linear_weight, linear_bias = operands(case, device=device)
    batch = torch.stack([linear_weight, 2 * linear_weight, -linear_weight], 1)
    weights, biases = torch.func.vmap(
        lambda linear: call(case, conv_weight, conv_bias, linear, linear_bias), in_dims=1
    )(batch)
    for n in range(3):
        weight, bias = call(case, conv_weight, conv_bias, batch[:, n], linear_bias)
        assert torch.equal(weights[n], weight) and torch.equal(biases[n], bias)


def test_batched_derivatives() -> None:
    """A vectorised Jacobian of a gradient runs vmap over both adjoints and their derivatives."""
    case = BY_NAME["conv1d"]
    conv_weight, conv_bias, linear_weight, linear_bias = operands(case, features=2)

    def gradient(fuse, conv_weight, linear_weight):
        weight, bias = fuse(
            conv_weight, conv_bias, linear_weight, linear_bias, *case.arguments(), **case.keywords()
        )
        energy = weight.pow(2).sum() + bias.pow(2).sum()
        return torch.autograd.grad(energy, (conv_weight, linear_weight), create_graph=True)

    def hessian(fuse, vectorize):
        return torch.autograd.functional.jacobian(
            lambda *values: gradient(fuse, *values),
            (conv_weight, linear_weight),
            vectorize=vectorize,
        )

    torch.testing.assert_close(
        hessian(functional.fuse_conv_linear, vectorize=True),
        hessian(reference.fuse_conv_linear, vectorize=False),
    )


MEMORY = """
import re, sys, torch
from linfuse_ext import functional

def peak():  # of this process image; getrusage would still know the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

torch.set_grad_enabled(False)
weight, linear, size, padding, *stride = eval(sys.argv[1])
functional.fuse_conv_linear(torch.ones(1, 1, 1), torch.ones(1), torch.ones(1, 1), None, 1)
before = peak()
bias = torch.ones(weight.shape[0], dtype=weight.dtype)
fused, _ = functional.fuse_conv_linear(
    weight, bias, linear, None, size, *stride or [1], padding
)
grown = peak() - before
bytes_of = lambda tensor: tensor.numel() * tensor.element_size()
print(grown, bytes_of(fused), bytes_of(weight) + bytes_of(linear))
"""

LARGE = {
    "the matrix would have 5 GB": "torch.ones(64, 32, 3, 3), torch.ones(256, 50176), (28, 28), 1",
    "one row over a large image": "torch.ones(64, 3, 3, 3), torch.ones(1, 3154176), (224, 224), 0",
    "the same in half": (
        "torch.ones(64, 3, 3, 3).bfloat16(), torch.ones(1, 3154176).bfloat16(), (224, 224), 0"
    ),
    "one long axis": "torch.ones(1, 1, 1), torch.ones(1, 2**23), 2**23, 0",
    "a long kernel": "torch.ones(1, 1, 1024), torch.ones(1, 31745), 2**15, 0",
    "a large weight": "torch.ones(512, 1024, 7, 7), torch.ones(2, 512), (7, 7), 0",
    "a transposed Linear": "torch.ones(64, 32, 3, 3), torch.ones(50176, 256).T, (28, 28), 1",
    "a stride over a large image": (
        "torch.ones(64, 256, 1, 1), torch.ones(40, 200704), (112, 112), 0, 2"
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_scratch_memory_is_bounded(name: str) -> None:
    """At most 64 MB and a tenth of the operands, whatever is large.

    In a process of its own, because the high-water mark of this one may already be above all that.
    """
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, LARGE[name]], capture_output=True, text=True, check=True
    )
    grown, output, inputs = (int(value) for value in result.stdout.split())
    assert grown + (8 << 20) > output, "the mark must have seen the output, or it shows nothing"
    assert grown <= output + (64 << 20) + (inputs + output) // 10


def test_long_sums_do_not_lose_digits() -> None:
    """A plain running sum of a million float32 would be off by some 1e-5."""
    seeded = torch.Generator().manual_seed(9)
    linear = torch.rand(2, 2**20, generator=seeded)
    _, bias = functional.fuse_conv_linear(
        torch.zeros(1, 1, 1, 1), torch.ones(1), linear, None, (1024, 1024)
    )
    torch.testing.assert_close(bias.double(), linear.double().sum(1), rtol=1e-7, atol=0)
    conv, linear = (
        torch.rand(4096, 2, 3, 3, generator=seeded),
        torch.rand(3, 36864, generator=seeded),
    )
    weight, _ = functional.fuse_conv_linear(conv, None, linear, None, (5, 5))
    exact, _ = reference.fuse_conv_linear(conv.double(), None, linear.double(), None, (5, 5))
    torch.testing.assert_close(weight.double(), exact, rtol=1.5e-6, atol=0)


@pytest.mark.parametrize("case", [BY_NAME["same3x3"], BY_NAME["transposed_grouped"]], ids=names)
def test_autocast_does_not_lower_the_precision(case: Case) -> None:
    def gradients() -> list[torch.Tensor]:
        tensors = [value.requires_grad_() for value in operands(case, torch.float32)]
        weight, bias = call(case, *tensors)
        return [weight, bias, *torch.autograd.grad(weight.sum() + bias.sum(), tensors)]

    expected = gradients()
    with torch.autocast("cpu", torch.bfloat16):
        actual = gradients()
    for one, two in zip(actual, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_half_gradients_of_many_rows_round_once() -> None:
    """Without oneDNN torch adds up the rows in the half type; the op must not."""
    case = Case("rows", "", (8, 4, 3, 3), (9, 8), padding=1)
    geometry = case.geometry()
    generator = torch.Generator().manual_seed(10)
    grad = torch.randn(400, geometry.cols, generator=generator).bfloat16()
    linear = torch.randn(400, geometry.rows, generator=generator).bfloat16()
    with torch.backends.mkldnn.flags(enabled=False):
        actual = torch.ops.linfuse.fuse_conv_linear_backward_conv(
            grad, linear, list(case.weight_size), *geometry.op_arguments, **geometry.op_keywords
        )
    exact = torch.ops.linfuse.fuse_conv_linear_backward_conv(
        grad.double(),
        linear.double(),
        list(case.weight_size),
        *geometry.op_arguments,
        **geometry.op_keywords,
    )
    torch.testing.assert_close(actual.double(), exact, rtol=2**-8, atol=1e-2)


def test_the_switch_for_tf32_is_read_in_both_spellings() -> None:
    from linfuse_ext.torch_engine import _tf32_is_on

    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    try:
        for value, on in (("ieee", False), ("tf32", True)):
            switch.fp32_precision = value
            assert _tf32_is_on() == on
    finally:
        switch.fp32_precision = before


@pytest.mark.parametrize("level", _C.build_info()["simd_available"])
def test_every_simd_level_equals_the_reference(level: str) -> None:
    """The level is chosen once a process, so each level gets one."""
    script = (
        "import test_fuse_conv_linear as t, torch\n"
        "from linfuse_ext import _C\n"
        f"assert _C.build_info()['simd'] == '{level}'\n"
        "for case in t.CASES:\n"
        "    for features in (3, 37):\n"
        "        t.test_every_way_of_every_case(case, features)\n"
        "for dtype in (torch.float16, torch.bfloat16):\n"
        "    for features in (1, 100):\n"
        "        t.test_every_half_is_widened_and_rounded(dtype, features)\n"
        "for channels in (1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 25):\n"
        "    t.test_any_number_of_channels(channels)\n"
    )
    subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "LINFUSE_SIMD": level},
        cwd=Path(__file__).parent,
        check=True,
    )


def test_unknown_simd_level_is_an_error() -> None:
    script = "import linfuse_ext\nlinfuse_ext._C.build_info()"
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "LINFUSE_SIMD": "mmx"},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "LINFUSE_SIMD must be one of the levels of this machine" in result.stderr
    assert "got 'mmx'" in result.stderr


def test_engines_go_by_name(engine: str) -> None:
    assert _C.set_engine("auto") == engine
    assert _C.set_engine(engine) == "auto"
    with pytest.raises(ValueError, match="must be auto, own or torch, got 'cudnn'"):
        _C.set_engine("cudnn")
    assert _C.set_engine(engine) == engine


@pytest.mark.parametrize("name", ["own", "torch", "auto", "", "cudnn"])
def test_the_environment_names_the_engine(name: str) -> None:
    known = name in ("own", "torch", "auto", "")
    code = "from linfuse_ext import _C; print(_C.set_engine('auto'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LINFUSE_ENGINE": name},
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == known
    expected = name or "auto" if known else "LINFUSE_ENGINE must be auto, own or torch, got 'cudnn'"
    assert expected in done.stdout + done.stderr


def test_torchs_engine_serves_gradients_and_compilation() -> None:
    case = BY_NAME["grouped_dilated"]
    tensors = [None if t is None else t.requires_grad_() for t in operands(case)]
    present = [t for t in tensors if t is not None]
    by_engine = {}
    before = _C.set_engine("auto")
    try:
        for name in ("own", "torch"):
            _C.set_engine(name)
            compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
            weight, bias = compiled(case, *tensors)
            total = (weight**2).sum() + (bias**3).sum()
            by_engine[name] = [weight, bias, *torch.autograd.grad(total, present)]
    finally:
        _C.set_engine(before)
    for own, by_torch in zip(*by_engine.values(), strict=True):
        torch.testing.assert_close(own, by_torch)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA card")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [4, 129])
def test_own_kernels_can_be_captured(dtype: torch.dtype, features: int) -> None:
    """In a CUDA graph, which forbids waiting for the card; a replay gives the same bits."""
    case = Case("large", "", (72, 50, 3, 3), (21, 19), padding=1)
    tensors = operands(case, dtype, features=features, device="cuda")
    before = _C.set_engine("own")
    try:
        expected = call(case, *tensors)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = call(case, *tensors)
    finally:
        _C.set_engine(before)
    for tensor in made:
        tensor.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(left, right) for left, right in zip(made, expected, strict=True))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA card")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("channels", [12, 24, 50, 150])
def test_own_kernels_by_large_tiles(dtype: torch.dtype, channels: int, padding: int) -> None:
    """Enough work for the tiles of large layers, packed from 16 channels on; equal bits."""
    case = Case("large", "", (72, channels, 3, 3), (21, 19), padding=padding)
    tensors = operands(case, dtype, features=129, device="cuda")
    before = _C.set_engine("own")
    try:
        first, second = call(case, *tensors), call(case, *tensors)
    finally:
        _C.set_engine(before)
    assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))
    geometry = case.geometry()
    wide = [None if t is None else t.double().cpu() for t in tensors]
    exact = fuse_conv_linear_by_torch(*wide, *geometry.op_arguments, **geometry.op_keywords)
    magnitude = fuse_conv_linear_by_torch(
        *(None if t is None else t.abs() for t in wide),
        *geometry.op_arguments,
        **geometry.op_keywords,
    )
    assert_close(first[0], exact[0], magnitude[0], 72 * 9)
    assert_close(first[1], exact[1], magnitude[1], geometry.rows + 1)
