"""conv_to_affine: values, dtypes, rows, derivatives, and torch's own checks of the op."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from cases import BY_NAME, CASES, FEW, Case
from tolerance import DTYPES, assert_close

from linfuse_ext import functional, reference

OP = torch.ops.linfuse.conv_to_affine.default


def names(case: Case) -> str:
    return case.name


def call(case: Case, weight: torch.Tensor, bias: torch.Tensor | None, **keywords):
    return functional.conv_to_affine(weight, bias, *case.arguments(), **case.keywords(), **keywords)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=names)
def test_equals_the_reference(case: Case, dtype: torch.dtype, device: str) -> None:
    weight, bias = case.weight(dtype), case.bias_vector(dtype)
    matrix, offset = call(case, weight.to(device), None if bias is None else bias.to(device))
    assert matrix.dtype == dtype and matrix.is_contiguous() and offset.is_contiguous()
    wide = weight.double(), None if bias is None else bias.double()
    exact, exact_offset = reference.conv_to_affine(*wide, *case.arguments(), **case.keywords())
    magnitude, _ = reference.conv_to_affine(
        wide[0].abs(), None, *case.arguments(), **case.keywords()
    )
    terms = weight[0, 0].numel()  # the most taps that padding can make meet
    assert_close(matrix, exact, magnitude, terms)
    assert torch.equal(offset.cpu().double(), exact_offset)
    if case.padding_mode == "zeros":
        assert torch.equal(matrix.cpu().double(), exact), "a single tap is copied, not computed"


@pytest.mark.parametrize("case", CASES, ids=names)
def test_computes_what_the_convolution_computes(case: Case, device: str) -> None:
    geometry = case.geometry()
    weight, bias = case.weight(device=device), case.bias_vector(device=device)
    matrix, offset = call(case, weight, bias)
    assert matrix.shape == (geometry.rows, geometry.cols)
    x = torch.randn(3, geometry.in_channels, *geometry.input_size, dtype=torch.float64).to(device)
    y = reference.convolve(x, weight, bias, *case.arguments()[1:], **case.keywords())
    assert y.shape[2:] == geometry.output_size
    torch.testing.assert_close(x.flatten(1) @ matrix.T + offset, y.flatten(1))


@pytest.mark.parametrize("case", CASES, ids=names)
def test_rows_are_a_block_of_the_whole(case: Case, device: str) -> None:
    weight, bias = case.weight(device=device), case.bias_vector(device=device)
    matrix, offset = call(case, weight, bias)
    rows = matrix.shape[0]
    for start, stop in {
        (0, rows),
        (rows // 3, rows - rows // 4),
        (rows // 2, rows // 2),
        (rows - 1, rows),
    }:
        block, part = call(case, weight, bias, rows=(start, stop))
        assert torch.equal(block, matrix[start:stop])
        assert torch.equal(part, offset[start:stop])


def test_takes_operands_of_any_layout(device: str) -> None:
    case = BY_NAME["grouped_dilated"]
    weight, bias = case.weight(device=device), case.bias_vector(device=device)
    expected = call(case, weight, bias)
    strided = weight.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    spread = torch.stack([bias, bias], 1)[:, 0]
    assert not strided.is_contiguous() and not spread.is_contiguous()
    for actual, same in zip(call(case, strided, spread), expected, strict=True):
        assert torch.equal(actual, same)
    expanded = weight[:1].expand_as(weight)
    for actual, same in zip(
        call(case, expanded, bias), call(case, expanded.clone(), bias), strict=True
    ):
        assert torch.equal(actual, same)


def test_not_a_number_stays_where_the_taps_are(device: str) -> None:
    case = BY_NAME["all_differ"]
    matrix, _ = call(case, torch.full(case.weight_size, torch.nan, device=device), None)
    ones, _ = call(case, torch.ones(case.weight_size, device=device), None)
    assert torch.equal(matrix.isnan(), ones == 1)


@pytest.mark.parametrize("case", FEW, ids=names)
def test_bits_do_not_depend_on_the_threads(case: Case) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(call(case, case.weight(torch.float32), case.bias_vector(torch.float32)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("groups", [1, 2], ids=["20MB", "41MB"])
def test_large_results_hold_nothing_of_the_memory_before(groups: int) -> None:
    """Large results count on fresh pages, which memory that an allocator kept does not have."""
    weight = torch.randn(8, 4, 3, 3)
    rows, cols = 8 * 20 * 20, 4 * groups * 20 * 20
    build = partial(functional.conv_to_affine, weight, None, (20, 20), 1, 1, 1, groups)
    # blocks too small to be treated so
    expected = torch.cat([build(rows=(row, row + 100))[0] for row in range(0, rows, 100)])
    before = torch.get_num_threads()
    try:
        for threads in (1, 1, 2):
            torch.set_num_threads(threads)
            for kept in (rows, rows // 2):  # all of the memory was in use, or half of it
                used = torch.full((kept, cols), torch.nan)
                del used
                assert torch.equal(build()[0], expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": (2, 1), "padding": (2, 1), "dilation": (1, 2)},
        {"padding": (0, 3, 2, 1), "groups": 2},
        {"padding": 7},
        {"padding": 2, "padding_mode": "circular"},
        {"padding": (3, 1), "padding_mode": "reflect", "stride": (1, 2)},
        {"padding": 2, "padding_mode": "replicate", "groups": 4},
        {"transposed": True, "stride": 2, "padding": 1, "output_padding": 1},
        {"transposed": True, "dilation": 2, "groups": 2},
    ],
    ids=str,
)
def test_rows_that_are_moved_are_those_that_are_written(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    # Only from 64 rows on are rows made by moving others of their shape.
    groups = 1 if options.get("transposed") else options.get("groups", 1)
    weight = torch.randn(8, 4 // groups, 3, 3).to(dtype)
    build = partial(functional.conv_to_affine, weight, None, (9, 11), **options)
    matrix, _ = build()
    blocks = [build(rows=(at, min(at + 60, len(matrix))))[0] for at in range(0, len(matrix), 60)]
    assert len(matrix) > 64 and torch.equal(matrix, torch.cat(blocks))


def test_a_block_of_rows_costs_what_it_holds() -> None:
    """One row of a layer whose output would not fit anywhere."""
    for mode in ("zeros", "replicate"):
        matrix, _ = functional.conv_to_affine(
            torch.ones(1, 1, 1), None, 1, padding=2**40, padding_mode=mode, rows=(2**40, 2**40 + 1)
        )
        assert matrix.tolist() == [[1.0]]
    grad = torch.ops.linfuse.conv_to_affine_backward(
        torch.ones(1, 1), [1, 1, 1], [1], padding=[2**40], rows=[2**40, 2**40 + 1]
    )
    assert grad.item() == 1


def test_vmap_over_nothing() -> None:
    case = BY_NAME["same3x3"]
    matrices, offsets = torch.func.vmap(lambda weight: call(case, weight, None))(
        torch.empty(0, *case.weight_size)
    )
    geometry = case.geometry()
    assert matrices.shape == (0, geometry.rows, geometry.cols)
    assert offsets.shape == (0, geometry.rows)


def test_matrices_beyond_32_bits() -> None:
    """46 416 x 46 400 half-precision numbers are 4.3 GB."""
    weight = torch.randn(1, 1, 17, dtype=torch.float16)
    size = 46400
    matrix, _ = functional.conv_to_affine(weight, None, size, padding=16)
    assert matrix.numel() > 2**31
    for row in (0, 16, size // 2, matrix.shape[0] - 1):
        expected = torch.zeros(size, dtype=torch.float16)
        for k in range(17):
            if 0 <= row - 16 + k < size:
                expected[row - 16 + k] = weight[0, 0, k]
        assert torch.equal(matrix[row], expected)


@pytest.mark.parametrize("case", CASES, ids=names)
def test_derivatives_of_first_and_second_order(case: Case, device: str) -> None:
    if case.geometry().rows * case.geometry().cols > 8000:
        case = BY_NAME["plain3x3"]  # finite differences cost a run per weight
    weight = case.weight(device=device).requires_grad_()
    bias = case.bias_vector(device=device)
    operands = (weight,) if bias is None else (weight, bias.requires_grad_())

    def run(weight, bias=None):
        return call(case, weight, bias)

    assert torch.autograd.gradcheck(run, operands, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, operands, fast_mode=True)


@pytest.mark.parametrize("case", FEW, ids=names)
def test_derivatives_of_a_block_of_rows(case: Case, device: str) -> None:
    rows = case.geometry().rows
    block = (rows // 3, rows - rows // 4)
    weight = case.weight(device=device).requires_grad_()
    bias = case.bias_vector(device=device)
    operands = (weight,) if bias is None else (weight, bias.requires_grad_())

    def run(weight, bias=None):
        return call(case, weight, bias, rows=block)

    assert torch.autograd.gradcheck(run, operands, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, operands, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=names)
def test_backward_gathers_what_the_reference_scatters(
    case: Case, dtype: torch.dtype, device: str
) -> None:
    geometry = case.geometry()
    weight = case.weight(dtype).to(device).requires_grad_()
    matrix, _ = call(case, weight, None)
    seed = torch.Generator().manual_seed(5)
    upstream = torch.randn(matrix.shape, generator=seed, dtype=torch.float64).to(dtype)
    (grad,) = torch.autograd.grad(matrix, weight, upstream.to(device))

    def gather(values: torch.Tensor) -> torch.Tensor:
        wide = case.weight().requires_grad_()
        exact, _ = reference.conv_to_affine(wide, None, *case.arguments(), **case.keywords())
        return torch.autograd.grad(exact, wide, values)[0]

    terms = max(geometry.rows // geometry.out_channels, geometry.cols // geometry.in_channels)
    exact, magnitude = gather(upstream.double()), gather(upstream.double().abs())
    assert_close(grad, exact, magnitude, terms)


def test_gradient_of_the_offset_alone() -> None:
    case = BY_NAME["same3x3"]
    weight, bias = case.weight().requires_grad_(), case.bias_vector().requires_grad_()
    _, offset = call(case, weight, bias)
    by_weight, by_bias = torch.autograd.grad(offset.sum(), (weight, bias), allow_unused=True)
    assert by_weight is None or not by_weight.any()
    assert torch.equal(by_bias, torch.full_like(bias, 36))


@pytest.mark.parametrize("case", CASES, ids=names)
def test_opcheck(case: Case, device: str) -> None:
    weight = case.weight(torch.float32, device=device).requires_grad_()
    bias = case.bias_vector(torch.float32, device=device)
    geometry = case.geometry()
    torch.library.opcheck(
        OP,
        (weight, bias if bias is None else bias.requires_grad_(), *geometry.op_arguments),
        {**geometry.op_keywords, "rows": [0, geometry.rows // 2]},
    )


@pytest.mark.parametrize("case", FEW, ids=names)
def test_opcheck_of_the_backward(case: Case, device: str) -> None:
    geometry = case.geometry()
    grad = torch.randn(geometry.rows, geometry.cols, device=device, requires_grad=True)
    torch.library.opcheck(
        torch.ops.linfuse.conv_to_affine_backward.default,
        (grad, list(case.weight_size), *geometry.op_arguments),
        geometry.op_keywords,
    )


@pytest.mark.parametrize("case", FEW, ids=names)
def test_vmap_runs_one_by_one(case: Case, device: str) -> None:
    weights = torch.stack([case.weight(device=device) * n for n in (1, 2, 3)], 1)
    bias = case.bias_vector(device=device)
    matrices, offsets = torch.func.vmap(lambda weight: call(case, weight, bias), in_dims=1)(weights)
    for n in range(3):
        matrix, offset = call(case, weights[:, n], bias)
        assert torch.equal(matrices[n], matrix) and torch.equal(offsets[n], offset)


def test_batched_derivatives() -> None:
    """A vectorised Hessian runs vmap over the backward op and over the op in its derivative."""
    case = BY_NAME["grouped"]
    geometry = case.geometry()

    def energy(weight):
        return call(case, weight, None)[0].pow(2).sum()

    hessian = torch.autograd.functional.hessian(energy, case.weight(), vectorize=True)
    size = hessian.shape[0] * hessian.shape[1] * hessian.shape[2] * hessian.shape[3]
    uses = torch.ops.linfuse.conv_to_affine_backward(
        torch.ones(geometry.rows, geometry.cols, dtype=torch.float64),
        list(case.weight_size),
        *geometry.op_arguments,
        **geometry.op_keywords,
    )
    torch.testing.assert_close(hessian.reshape(size, size), 2 * uses.flatten().diag())
