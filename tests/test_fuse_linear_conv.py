"""fuse_linear_conv: values, dtypes, derivatives and torch's own checks of the op."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import BY_NAME, CASES, FEW, Case
from test_fuse_conv_linear import CUTS_OF_WAY, going_by
from tolerance import DTYPES, assert_close
from torch import nn

import linfuse_ext as lf
from linfuse_ext import _C, functional, reference
from linfuse_ext.geometry import make_geometry
from linfuse_ext.torch_ops import fuse_linear_conv_by_torch

INPUTS = 3  # D, features that go into the Linear


def names(case: Case) -> str:
    return case.name


def operands(
    case: Case, dtype: torch.dtype = torch.float64, device: str = "cpu", inputs: int = INPUTS
):
    cols = case.geometry().cols
    generator = torch.Generator().manual_seed(7)
    linear = torch.randn(cols, inputs, generator=generator, dtype=torch.float64)
    bias = torch.randn(cols, generator=generator, dtype=torch.float64)
    made = [linear.to(dtype), bias.to(dtype), case.weight(dtype), case.bias_vector(dtype)]
    return [None if value is None else value.to(device) for value in made]


def call(case: Case, *tensors):
    return functional.fuse_linear_conv(*tensors, *case.arguments(), **case.keywords())


def exact(case: Case, linear, linear_bias, weight, bias):
    matrix, offset = reference.conv_to_affine(weight, bias, *case.arguments(), **case.keywords())
    return matrix @ linear, offset if linear_bias is None else matrix @ linear_bias + offset


def assert_equals_the_reference(case: Case, tensors, weight, bias) -> None:
    wide = [None if value is None else value.double().cpu() for value in tensors]
    values = exact(case, *wide)
    magnitudes = exact(case, *(None if value is None else value.abs() for value in wide))
    terms = case.geometry().in_channels * wide[2][0, 0].numel() + 1
    assert_close(weight, values[0], magnitudes[0], terms)
    assert_close(bias, values[1], magnitudes[1], terms)


@pytest.mark.parametrize("inputs", [3, 40])
@pytest.mark.parametrize("case", CASES, ids=names)
def test_every_way_of_every_case(case: Case, inputs: int) -> None:
    """Images whose positions are not neighbours in memory, by all ways of a fused product."""
    gone = set()
    for dtype in DTYPES:
        tensors = operands(case, dtype, inputs=inputs)
        for way in ("cheapest", *CUTS_OF_WAY):
            with going_by(way):
                try:
                    weight, bias = call(case, *tensors)
                except ValueError:  # not every way takes every layer, or dtype
                    continue
            gone.add(way)
            assert_equals_the_reference(case, tensors, weight, bias)
    assert gone >= {"cheapest", "input"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=names)
def test_equals_the_reference(case: Case, dtype: torch.dtype, device: str, engine: str) -> None:
    tensors = operands(case, dtype, device)
    weight, bias = call(case, *tensors)
    assert weight.dtype == bias.dtype == dtype
    assert weight.is_contiguous() and bias.is_contiguous()
    assert_equals_the_reference(case, tensors, weight, bias)


@pytest.mark.parametrize("inputs", [0, 1, 16, 17, 33, 100, 129])
def test_any_number_of_columns(inputs: int, device: str) -> None:
    for case in FEW:
        for dtype in DTYPES:
            tensors = operands(case, dtype, device, inputs)
            assert_equals_the_reference(case, tensors, *call(case, *tensors))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_takes_operands_of_any_layout(dtype: torch.dtype, device: str) -> None:
    case = BY_NAME["grouped_dilated"]
    tensors = operands(case, dtype, device, inputs=35)
    linear, linear_bias, weight, bias = tensors
    expected = call(case, *tensors)
    apart = torch.stack([linear, linear], 2).flatten(1)[:, ::2]
    weight = weight.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    for other in (linear.T.contiguous().T, apart):
        assert not other.is_contiguous() and torch.equal(other, linear)
        actual = call(case, other, linear_bias, weight, bias)
        assert all(torch.equal(one, two) for one, two in zip(actual, expected, strict=True))


# Results past the caches, panels that roll, groups, few channels out: (D, weight, input, the rest).
CUTS = {
    "past the caches": (150, (48, 8, 3, 3), (37, 41), {"padding": 2}),
    "past the caches, columns that fill no line": (77, (96, 8, 3, 3), (37, 41), {"stride": 2}),
    "slabs that wrap": (100, (16, 16, 5), (3000,), {"padding": 9, "padding_mode": "circular"}),
    "long lines that wrap": (16, (16, 16, 3), (40000,), {"padding": 1, "padding_mode": "circular"}),
    "slabs that mirror": (16, (16, 16, 3, 3), (600, 10), {"padding": 1, "padding_mode": "reflect"}),
    "many lines that repeat": (
        16, (16, 16, 3, 3), (2000, 9), {"padding": 1, "padding_mode": "replicate"},
    ),
    "transposed": (60, (16, 12, 4, 3), (40, 41), {"transposed": True, "stride": 2, "padding": 1}),
    "transposed, many channels out": (40, (3, 40, 3), (200,), {"transposed": True}),
    "depthwise": (130, (64, 1, 3, 3), (30, 31), {"groups": 64, "padding": 1}),
    "one channel in": (128, (70, 1, 10), (2000,), {"stride": 5}),
    "weights in batches": (33, (700, 700, 3, 3), (3, 4), {"padding": 1}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cut", CUTS)
def test_every_cut_of_the_work(cut: str, dtype: torch.dtype) -> None:
    """Against torch's convolution in float64; the bits are those of any number of threads."""
    inputs, weight_size, input_size, rest = CUTS[cut]
    geometry = make_geometry("test", weight_size, input_size, **rest)
    generator = torch.Generator().manual_seed(3)
    tensors = [
        torch.randn(size, generator=generator, dtype=dtype)
        for size in ([geometry.cols, inputs], [geometry.cols], weight_size, [geometry.out_channels])
    ]
    weight, bias = functional.fuse_linear_conv(*tensors, input_size, **rest)
    arguments, keywords = geometry.op_arguments, geometry.op_keywords
    wide = [value.double() for value in tensors]
    values = fuse_linear_conv_by_torch(*wide, *arguments, **keywords)
    magnitudes = fuse_linear_conv_by_torch(*(v.abs() for v in wide), *arguments, **keywords)
    terms = geometry.in_channels * tensors[2][0, 0].numel() + 1
    assert_close(weight, values[0], magnitudes[0], terms)
    assert_close(bias, values[1], magnitudes[1], terms)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            again = functional.fuse_linear_conv(*tensors, input_size, **rest)
            assert torch.equal(weight, again[0]) and torch.equal(bias, again[1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_in_its_column(dtype: torch.dtype, value: float) -> None:
    case = BY_NAME["same3x3"]
    linear, linear_bias, weight, bias = operands(case, dtype, inputs=37)
    linear[5, 20] = value
    fused, fused_bias = call(case, linear, linear_bias, weight, bias)
    assert not fused[:, 20].isfinite().all()
    assert fused[:, :20].isfinite().all() and fused[:, 21:].isfinite().all()
    assert fused_bias.isfinite().all()


@pytest.mark.parametrize("level", _C.build_info()["simd_available"])
def test_every_simd_level_equals_the_reference(level: str) -> None:
    """The level is chosen once a process, so each level gets one."""
    script = (
        "import test_fuse_linear_conv as t\n"
        "from linfuse_ext import _C\n"
        f"assert _C.build_info()['simd'] == '{level}'\n"
        "for case in t.CASES:\n"
        "    for dtype in t.DTYPES:\n"
        "        tensors = t.operands(case, dtype, inputs=37)\n"
        "        t.assert_equals_the_reference(case, tensors, *t.call(case, *tensors))\n"
    )
    subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "LINFUSE_SIMD": level},
        cwd=Path(__file__).parent,
        check=True,
    )


@pytest.mark.parametrize("which", ["neither", "linear", "conv", "both"])
def test_layers_with_biases_in_all_combinations(which: str) -> None:
    linear = nn.Linear(7, 4 * 5 * 3, bias=which in ("linear", "both")).double()
    conv = nn.ConvTranspose2d(4, 3, 4, 2, 1, bias=which in ("conv", "both")).double()
    fused = lf.fuse_linear_conv(linear, conv, (5, 3))
    x = torch.randn(6, 7, dtype=torch.float64)
    y = conv(linear(x).unflatten(1, (4, 5, 3)))
    torch.testing.assert_close(fused(x), y.flatten(1))
    assert (fused.bias is None) == (which == "neither")


@pytest.mark.parametrize("case", CASES, ids=names)
def test_derivatives_of_first_and_second_order(case: Case) -> None:
    if case.name == "forum":
        pytest.skip("finite differences on 100 000 values; `plain3x3` is its small twin")
    tensors = operands(case)
    used = [value.requires_grad_() for value in tensors if value is not None]

    def run(*values):
        values = list(values)
        return call(case, *(None if value is None else values.pop(0) for value in tensors))

    assert torch.autograd.gradcheck(run, used, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, used, fast_mode=True)


@pytest.mark.parametrize("case", CASES, ids=names)
def test_opcheck(case: Case) -> None:
    tensors = [
        value if value is None else value.requires_grad_()
        for value in operands(case, torch.float32)
    ]
    geometry = case.geometry()
    torch.library.opcheck(
        torch.ops.linfuse.fuse_linear_conv.default,
        (*tensors, *geometry.op_arguments),
        geometry.op_keywords,
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("case", FEW, ids=names)
def test_compiles_exports_and_maps(case: Case) -> None:
    torch._dynamo.reset()
    tensors = operands(case)
    expected = call(case, *tensors)

    class Fuse(nn.Module):
        def forward(self, *values):
            return call(case, *values)

    compiled = torch.compile(Fuse(), backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(*tensors), expected)
    exported = torch.export.export(Fuse(), tuple(tensors)).module()
    torch.testing.assert_close(exported(*tensors), expected)
    batch = torch.stack([tensors[0], -tensors[0]])
    weights, _ = torch.func.vmap(lambda linear: call(case, linear, *tensors[1:]))(batch)
    torch.testing.assert_close(weights, torch.stack([expected[0], -expected[0]]))


def test_wrong_sizes_say_why() -> None:
    linear, conv = nn.Linear(7, 60), nn.Conv2d(4, 3, 3)
    with pytest.raises(ValueError, match=r"`linear_weight` must have shape \(64, D\).*\(60, 7\)"):
        lf.fuse_linear_conv(linear, conv, (4, 4))
    with pytest.raises(TypeError, match=r"`linear` must be one of Linear, got Conv2d"):
        lf.fuse_linear_conv(conv, conv, (4, 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True), (False, False)])
def test_linear_linear(dtype: torch.dtype, biases: tuple[bool, bool], device: str) -> None:
    first = nn.Linear(5, 40, bias=biases[0], dtype=dtype, device=device)
    second = nn.Linear(40, 3, bias=biases[1], dtype=dtype, device=device)
    fused = lf.fuse_linear_linear(first, second)
    assert (fused.in_features, fused.out_features) == (5, 3)
    assert (fused.bias is None) == (not any(biases)) and fused.weight.dtype == dtype
    wide = [layer.weight.detach().double().cpu() for layer in (first, second)]
    assert_close(fused.weight, wide[1] @ wide[0], wide[1].abs() @ wide[0].abs(), 40)
    if fused.bias is not None:
        terms = [torch.zeros(40), torch.zeros(3)]
        for number, layer in enumerate((first, second)):
            if layer.bias is not None:
                terms[number] = layer.bias.detach().cpu()
        b1, b2 = (term.double() for term in terms)
        assert_close(fused.bias, wide[1] @ b1 + b2, wide[1].abs() @ b1.abs() + b2.abs(), 41)


def test_linear_linear_derivatives_and_errors() -> None:
    operands = [
        torch.randn(size, dtype=torch.float64, requires_grad=True)
        for size in ((4, 2), (4,), (3, 4), (3,))
    ]
    assert torch.autograd.gradcheck(functional.fuse_linear_linear, operands)
    assert torch.autograd.gradgradcheck(functional.fuse_linear_linear, operands)
    with pytest.raises(ValueError, match=r"`second_weight` must have shape \(F, 4\).*\(3, 5\)"):
        lf.fuse_linear_linear(nn.Linear(2, 4), nn.Linear(5, 3))
