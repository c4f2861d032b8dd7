"""NaN, infinities, subnormals, signed zeros go where the definition over taps sends them."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from cases import BY_NAME, Case
from every_op import bits, run_python
from tolerance import DTYPES
from torch import Tensor

from linfuse_ext import _C, functional, reference

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

NAMES = (
    "same3x3", "all_differ", "pad_beyond_kernel", "asymmetric_stride", "stride_holes",
    "pointwise_strided", "grouped_dilated", "depthwise", "circular_grouped",
    "replicate_asymmetric", "reflect", "conv1d", "conv3d", "transposed_grouped",
    "transposed_pair", "transposed_holes", "transposed_cropped",
)  # fmt: skip
VALUES = (torch.inf, -torch.inf, torch.nan)


@functools.cache
def taps(name: str) -> Tensor:
    """`[taps, rows, cols]`: what each element of the weight ties, by torch's convolution."""
    case = BY_NAME[name]
    count = torch.Size(case.weight_size).numel()
    unit = torch.eye(count, dtype=torch.float64).view(count, *case.weight_size)
    ties = [
        reference.conv_to_affine(one, None, *case.arguments(), **case.keywords())[0] for one in unit
    ]
    return torch.stack(ties) != 0


def by_definition(
    ties: Tensor, weight: Tensor, left: Tensor | None, right: Tensor | None
) -> Tensor:
    """left @ A, A @ right or A, as sums over taps alone: 0 for what is finite, and so on as kind().

    Products that no tap asks for are counted with nothing, and not multiplied with zeros.
    """
    counts: list[Tensor | float] = [0.0] * 4
    for tied, value in zip(ties, weight.double().flatten(), strict=True):
        operand = torch.ones(()) if left is None is right else left if right is None else right
        kinds = kind(operand.double() * value)
        for n in range(1, 4):
            some = (kinds == n).double()
            if not some.any():
                continue
            if left is not None:
                counts[n] = counts[n] + some @ tied.double()
            else:
                counts[n] = counts[n] + (tied * some if right is None else tied.double() @ some)
    shape = torch.zeros_like(kind(operand), dtype=torch.float64)
    if left is not None:
        zero = shape @ ties[0].double()
    else:
        zero = shape * ties[0] if right is None else ties[0].double() @ shape
    plus, minus, nan = (zero + count > 0 for count in counts[1:])
    nan = nan | (plus & minus)
    return torch.where(nan, 3, plus + 2 * minus)


def kind(values: Tensor) -> Tensor:
    """0 for what is finite, 1 and 2 for infinities, 3 for NaN."""
    values = values.double()
    return (values == torch.inf) + 2 * (values == -torch.inf) + 3 * values.isnan()


def poisoned(
    case: Case, dtype: torch.dtype, features: int, where: str, value: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Positive operands, one of which has the value in one place, and perhaps zeros beside it."""
    geometry = case.geometry()
    weight = case.weight(dtype).abs() + 0.5
    left = case.linear_weight(features, dtype).abs() + 0.5
    right = torch.rand(geometry.cols, features, dtype=torch.float64).to(dtype) + 0.5
    if where == "weight":
        weight.view(-1)[weight.numel() // 2] = value
    elif where == "weight, against zeros":
        weight.view(-1)[1 % weight.numel()] = value
        left[:, ::2] = 0
        right[::2] = 0
    else:
        left[1, left.shape[1] // 2] = left[2, 0] = value
        right[right.shape[0] // 2, 1] = right[0, 2] = value
        if where == "linear, against zeros":
            weight.view(-1)[::2] = 0
    return weight, left, right


WHERE = ("weight", "weight, against zeros", "linear", "linear, against zeros")


def products(name: str, dtype: torch.dtype, features: int):
    """Every product with a poisoned operand: its name, what it is, and by the definition."""
    case, ties = BY_NAME[name], taps(name)
    settings = case.arguments(), case.keywords()
    for where, value in itertools.product(WHERE, VALUES):
        weight, left, right = poisoned(case, dtype, features, where, value)
        fused, _ = functional.fuse_conv_linear(
            weight, None, left, None, *settings[0], **settings[1]
        )
        yield (where, value), fused, by_definition(ties, weight, left, None)
        fused, _ = functional.fuse_linear_conv(
            right, None, weight, None, *settings[0], **settings[1]
        )
        yield (where, value), fused, by_definition(ties, weight, None, right)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_products_by_our_kernels(name: str, dtype: torch.dtype) -> None:
    before = _C.set_engine("own")
    try:
        for where, fused, exact in products(name, dtype, 3):
            assert torch.equal(kind(fused), exact), where
    finally:
        _C.set_engine(before)


def check_a_few_products() -> None:
    """For a process of its own; more rows, which other kernels take."""
    for name in ("same3x3", "transposed_pair"):
        for dtype in DTYPES:
            for where, fused, exact in products(name, dtype, 37):
                assert torch.equal(kind(fused), exact), (name, dtype, where)


def test_products_of_many_rows() -> None:
    check_a_few_products()


@pytest.mark.parametrize("name", ["same3x3", "all_differ", "transposed_pair"])
def test_torchs_convolution_hides_nothing(name: str) -> None:
    """It multiplies zeros of the padding as well, so that more may become NaN, but not less."""
    before = _C.set_engine("torch")
    try:
        for dtype in DTYPES:
            for where, fused, exact in products(name, dtype, 3):
                assert not (fused.isfinite() & (exact != 0)).any(), where
                if where[0] == "linear" and fused.shape[0] == 3:
                    assert fused[0].isfinite().all(), "rows of the Linear do not mix"
    finally:
        _C.set_engine(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_matrix_in_every_layout(name: str, dtype: torch.dtype) -> None:
    case, ties = BY_NAME[name], taps(name)
    tied = ties.any(0)
    for where, value in itertools.product(WHERE[:1], VALUES):
        weight, _, _ = poisoned(case, dtype, 3, where, value)
        exact = by_definition(ties, weight, None, None)
        arguments = (weight, None, *case.arguments())
        dense, _ = functional.conv_to_affine(*arguments, **case.keywords())
        assert torch.equal(kind(dense), exact)
        assert (bits(dense[~tied]) == 0).all(), "a zero of the matrix stays zero"
        for layout in (torch.sparse_csr, torch.sparse_coo):
            sparse, _ = functional.conv_to_affine(*arguments, **case.keywords(), layout=layout)
            coo = sparse.to_sparse_coo().coalesce()
            rows, cols = coo.indices()
            assert torch.equal(bits(coo.values()), bits(dense[rows, cols]))
            stored = torch.zeros_like(tied)
            stored[rows, cols] = True
            assert torch.equal(stored, tied)
        size, vectors, _ = functional.conv_to_diagonals(*arguments, **case.keywords())
        for d, diagonal in vectors.items():
            row = torch.arange(size)
            column = (row + d) % size
            inside = (row < dense.shape[0]) & (column < dense.shape[1])
            there = dense[row[inside], column[inside]]
            assert torch.equal(diagonal[inside].nan_to_num(), there.nan_to_num())
            assert torch.equal(kind(diagonal[inside]), kind(there))
            assert (diagonal[~inside] == 0).all()


# Two convolutions ---------------------------------------------------------------------------------


def merged_by_definition(first: Tensor, second: Tensor, step1: int, step2: int) -> Tensor:
    """Sums over pairs of taps of 1-d convolutions, the zeros between them left out."""
    (mid, cin, k1), (cout, _, k2) = first.shape, second.shape
    total = torch.zeros(cout, cin, (k1 - 1) * step1 + (k2 - 1) * step2 + 1, dtype=torch.float64)
    for a, b, m in itertools.product(range(k1), range(k2), range(mid)):
        total[:, :, a * step1 + b * step2] += (
            second[:, m, b].double()[:, None] * first[m, :, a].double()[None]
        )
    return total


@pytest.mark.parametrize("gradients", [False, True], ids=["own", "with gradients"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_convolutions(dtype: torch.dtype, gradients: bool) -> None:
    """With gradients torch's convolution computes: it hides nothing, but may spoil more."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 2, 3), (3, 4, 2))
    for (d1, s1, d2), which, value, zeros in itertools.product(
        [(1, 1, 1), (2, 1, 3), (3, 2, 1)], (0, 1), VALUES, (False, True)
    ):
        weights = [(torch.rand(shape, generator=generator) + 0.5).to(dtype) for shape in shapes]
        weights[which].view(-1)[weights[which].numel() // 2] = value
        if zeros:
            weights[1 - which].view(-1)[::2] = 0
        exact = merged_by_definition(*weights, d1, s1 * d2)
        merged, _ = functional.fuse_conv_conv(
            weights[0].requires_grad_(gradients), None, weights[1], None,
            first_stride=s1, first_dilation=d1, second_dilation=d2,
        )  # fmt: skip
        merged = merged.detach()
        if gradients:
            assert not (merged.isfinite() & ~exact.isfinite()).any()
        else:
            assert torch.equal(kind(merged), kind(exact)), (d1, s1, d2, which, value)


# Biases -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_biases(dtype: torch.dtype, value: float, engine: str) -> None:
    case = BY_NAME["same3x3"]
    settings = (*case.arguments(),)
    weight, left = case.weight(dtype).abs() + 0.5, case.linear_weight(3, dtype).abs() + 0.5
    geometry = case.geometry()
    channels, positions = geometry.out_channels, geometry.rows // geometry.out_channels
    bias = torch.ones(channels, dtype=dtype)
    bias[1] = value

    _, offset = functional.conv_to_affine(weight, bias, *settings)
    assert torch.equal(kind(offset), kind(bias).repeat_interleave(positions))
    matrix, _ = functional.conv_to_affine(weight, bias, *settings)
    assert matrix.isfinite().all(), "a bias does not reach the matrix"

    left[2] = 0  # zero times infinity
    fused, merged = functional.fuse_conv_linear(weight, bias, left, None, *settings)
    exact = left.double() @ bias.double().repeat_interleave(positions)
    assert torch.equal(kind(merged), kind(exact)) and fused.isfinite().all()
    behind = torch.ones(3, dtype=dtype)
    behind[0] = value
    _, merged = functional.fuse_conv_linear(weight, None, left, behind, *settings)
    assert torch.equal(kind(merged), kind(behind))

    before = torch.ones(geometry.cols, dtype=dtype)
    before[7] = value
    right = torch.ones(geometry.cols, 3, dtype=dtype)
    fused, merged = functional.fuse_linear_conv(right, before, weight, None, *settings)
    exact = by_definition(taps("same3x3"), weight, None, before[:, None])[:, 0]
    assert fused.isfinite().all() and not (merged.isfinite() & (exact != 0)).any()
    if engine == "own":
        assert torch.equal(kind(merged), exact)
    _, merged = functional.fuse_linear_conv(right, None, weight, bias, *settings)
    assert torch.equal(kind(merged), kind(bias).repeat_interleave(positions))

    first, second = torch.ones(4, 2, 3, dtype=dtype), torch.ones(3, 4, 2, dtype=dtype)
    second[0] = 0
    fused, merged = functional.fuse_conv_conv(first, bias[:4], second, None)
    exact = (second.double().sum(2) * bias[:4].double()).sum(1)
    assert torch.equal(kind(merged), kind(exact)) and fused.isfinite().all()


# Small, large and signed --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tap_keeps_its_bits(dtype: torch.dtype) -> None:
    """The matrix holds copies: zeros keep their sign, subnormals what they are."""
    tiny = torch.finfo(dtype).smallest_normal
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    values = [-0.0, 0.0, smallest, -smallest, tiny / 2, torch.inf, -torch.inf, torch.nan, 1.0]
    weight = torch.tensor(values, dtype=torch.float64).to(dtype).view(1, 1, 3, 3)
    assert weight[0, 0, 0, 2] != 0
    for image in ((3, 3), (40, 40)):
        matrix, _ = functional.conv_to_affine(weight, None, image)
        for row, col in ((0, 0), (-1, -2 * image[1] - 3)):
            at = torch.tensor([a * image[1] + b for a in range(3) for b in range(3)]) + col
            assert torch.equal(bits(matrix[row, at]), bits(weight))
        sparse, _ = functional.conv_to_affine(weight, None, image, layout=torch.sparse_csr)
        assert torch.equal(bits(sparse.values()[:9]), bits(weight))


SMALL = {  # a subnormal, and what makes it a normal number again
    torch.float32: (2.0**-140, 2.0**120),
    torch.float64: (2.0**-1040, 2.0**1000),
    torch.float16: (2.0**-20, 2.0**10),
    torch.bfloat16: (2.0**-130, 2.0**120),
}


def check_subnormals(dtype: torch.dtype) -> None:
    """Powers of two: exact, unless a unit takes subnormals for zeros."""
    small, large = SMALL[dtype]
    # bfloat16 of AMX does so, by its definition; torch's convolution on it as well.
    flushed = dtype == torch.bfloat16 and _C.build_info()["simd"] == "amx"
    for channels, kernel, image in itertools.product((1, 16, 64), (1, 3), ((3, 4), (10, 9))):
        for a, b in ((small, large), (large, small), (small, 1.0)):
            weight = torch.full((channels, channels, kernel, kernel), a, dtype=dtype)
            rows = channels * (image[0] - kernel + 1) * (image[1] - kernel + 1)
            left = torch.zeros(33, rows, dtype=dtype)
            left[:, 0] = b
            fused, _ = functional.fuse_conv_linear(weight, None, left, None, image)
            right = torch.zeros(channels * image[0] * image[1], 33, dtype=dtype)
            right[0] = b
            other, _ = functional.fuse_linear_conv(right, None, weight, None, image)
            for values in (fused[:, 0], other[0]):
                exact = values.double() == a * b
                assert (exact | (values == 0) if flushed else exact).all(), (channels, image, a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_subnormals(dtype: torch.dtype) -> None:
    check_subnormals(dtype)


def check_overflow(dtype: torch.dtype) -> None:
    """Sums are rounded once: beyond the largest number to infinity, and only at the end."""
    most = torch.finfo(dtype).max
    for channels, features in itertools.product((2, 16, 48), (1, 33)):
        weight = torch.ones(channels, channels, 1, 1, dtype=dtype)
        left = torch.zeros(features, channels * 12, dtype=dtype)
        left[:, 0], left[:, 12] = most, most  # position 0 of two channels
        fused, bias = functional.fuse_conv_linear(weight, None, left, left[:, 0], (3, 4))
        assert (fused[:, ::12] == torch.inf).all() and bias.isfinite().all()
        assert (fused.view(features, channels, 12)[:, :, 1:] == 0).all()
        fused, _ = functional.fuse_conv_linear(-weight, None, left, None, (3, 4))
        assert (fused[:, ::12] == -torch.inf).all()
        fused, _ = functional.fuse_linear_conv(left.T.contiguous(), None, weight, None, (3, 4))
        assert (fused[::12] == torch.inf).all()
        if dtype == torch.float16 and channels > 2:  # there and back again, in float32
            left[:, 24] = -most
            fused, _ = functional.fuse_conv_linear(weight, None, left, None, (3, 4))
            assert (fused[:, ::12] == most).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_overflow(dtype: torch.dtype) -> None:
    check_overflow(dtype)


@pytest.mark.parametrize("value", [60000.0, -60000.0])
def test_overflow_where_padding_repeats(value: float) -> None:
    """Taps that meet are summed, in float32, and rounded once."""
    weight = torch.full((1, 1, 3), value, dtype=torch.float16)
    matrix, _ = functional.conv_to_affine(weight, None, 3, padding=1, padding_mode="replicate")
    assert matrix[0, 0] == matrix[2, 2] == (torch.inf if value > 0 else -torch.inf)
    assert matrix.isinf().sum() == 2
    weight[0, 0, 1] *= -1
    matrix, _ = functional.conv_to_affine(weight, None, 3, padding=1, padding_mode="replicate")
    assert matrix.isfinite().all()


# Every level of vector instructions ---------------------------------------------------------------


@pytest.mark.parametrize("level", _C.build_info()["simd_available"][:-1])
def test_every_simd_level(level: str) -> None:
    """The level is chosen once a process; the highest is that of this one."""
    script = (
        "import test_not_finite as t\n"
        f"assert t._C.build_info()['simd'] == '{level}'\n"
        "t.check_a_few_products()\n"
        "for dtype in t.DTYPES:\n"
        "    t.check_subnormals(dtype)\n"
        "    t.check_overflow(dtype)\n"
    )
    result = run_python(script, timeout=120, LINFUSE_SIMD=level)
    assert result.returncode == 0, result.stderr
