"""The CUDA kernels' logic without a card: the same .cu files, run by cuda_on_cpu/ on the CPU.

Weights and gradients are small whole numbers, so that every sum is exact in the type it is made in
and rounds once at the end: results must equal the reference to the last bit, in every dtype.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import BY_NAME, CASES, FEW, Case
from cuda_on_cpu.build import COMPILER, CSRC, build, kernel_sources
from cuda_on_cpu.kernels import STORAGE, KernelError, Kernels, Problem, Schedule
from cuda_on_cpu.prepare import prepare
from cuda_on_cpu.sanitized import Call, find_sanitizer, run_sanitized
from torch import Tensor

from linfuse_ext import reference

pytestmark = pytest.mark.skipif(
    shutil.which(COMPILER) is None, reason=f"there is no {COMPILER} to compile the kernels with"
)

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
HALVES = [torch.float16, torch.bfloat16]

# More for the segments of 16 KB that conv_to_affine works in.
SEGMENTS = [
    Case(
        "odd_rows",
        "rows that are no multiple of 16 bytes, over several segments",
        (5, 3, 3, 3),
        (11, 9),
        padding=1,
    ),
    Case("short_rows", "more rows in a segment than are described at once", (90, 1, 2), (4,)),
    Case("whole_segments", "rows end where segments end", (8, 1, 1, 1), (32, 32), stride=8),
    Case(
        "long_rows",
        "a row spans several segments, in every dtype",
        (2, 4, 3, 3),
        (65, 66),
        stride=32,
    ),
    Case(
        "long_rows_repeated",
        "the same, with taps that meet",
        (2, 4, 3, 3),
        (65, 66),
        stride=32,
        padding=1,
        padding_mode="replicate",
    ),
    Case(
        "long_rows_transposed",
        "the same, transposed",
        (41, 1, 2, 2),
        (20, 21),
        padding=9,
        transposed=True,
    ),
]

# More than one large tile in every direction, with rests, or another kind of map.
LARGE_TILES = [
    Case(
        "large_tiles",
        "items, input and output channels beyond a tile of fuse_conv_linear",
        (37, 70, 2, 1),
        (6, 5),
        stride=(1, 2),
    ),
    Case("wide_tiles", "more input channels than a tile takes", (3, 140, 1, 2), (2, 9), padding=1),
    Case("narrow_tiles", "33 to 64 input channels a group", (10, 40, 1, 2), (3, 19), padding=1),
    BY_NAME["many_channels"],
    BY_NAME["reflect"],
    BY_NAME["transposed_grouped"],
    BY_NAME["kernel_is_image"],
]

FORWARD = Schedule()
SCHEDULES = [
    FORWARD,
    Schedule("reverse", most_blocks=2),
    Schedule("shuffle", seed=1, most_blocks=1),
    Schedule("shuffle", seed=2),
]


def name_of(value: object) -> str:
    return value.name if isinstance(value, Case) else str(value).removeprefix("torch.")


def whole_numbers(size: tuple[int, ...], seed: int) -> Tensor:
    """Returns numbers that bfloat16 holds exactly, none of them 0, in float64."""
    generator = torch.Generator().manual_seed(seed)
    sign = torch.randint(0, 2, size, generator=generator) * 2 - 1
    return (torch.randint(1, 101, size, generator=generator) * sign).double()


def to_numpy(tensor: Tensor) -> np.ndarray:
    tensor = tensor.contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype in HALVES else tensor).numpy()


def to_torch(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(dtype) if dtype in HALVES else tensor


@functools.cache
def expected(case: Case) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Returns weight, bias, matrix and offset."""
    geometry = case.geometry()
    weight = whole_numbers(case.weight_size, seed=1)
    bias = whole_numbers((geometry.out_channels,), seed=2) if case.bias else None
    if geometry.cols < 2000:
        affine = reference.conv_to_affine(weight, bias, *case.arguments(), **case.keywords())
        return weight, bias, *affine
    # Long rows are few: each is what one output position passes back to the image.
    x = torch.zeros(1, geometry.in_channels, *geometry.input_size, dtype=weight.dtype)
    x.requires_grad_()
    y = reference.convolve(x, weight, bias, *case.arguments()[1:], **case.keywords()).flatten()
    rows = [torch.autograd.grad(value, x, retain_graph=True)[0].flatten() for value in y]
    return weight, bias, torch.stack(rows), y.detach()


@functools.cache
def expected_backward(case: Case, rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Returns grad_matrix, NaN wherever there is no tap, and grad_weight."""
    weight = torch.ones(case.weight_size, dtype=torch.float64, requires_grad=True)
    matrix, _ = reference.conv_to_affine(weight, None, *case.arguments(), **case.keywords())
    matrix = matrix[slice(*rows)]
    no_tap = matrix.detach() == 0
    grad_matrix = whole_numbers(tuple(matrix.shape), seed=3).masked_fill(no_tap, 0)
    (grad_weight,) = torch.autograd.grad(matrix, weight, grad_matrix)
    return grad_matrix.masked_fill(no_tap, torch.nan), grad_weight


def problem_of(case: Case, dtype: torch.dtype, rows: tuple[int, int] | None = None) -> Problem:
    geometry = case.geometry()
    return Problem(
        case.weight_size,
        *(value if isinstance(value, int) else tuple(value) for value in geometry.op_arguments),
        transposed=geometry.transposed,
        output_padding=geometry.output_padding,
        padding_mode=geometry.padding_mode,
        rows=(0, geometry.rows) if rows is None else rows,
        cols=geometry.cols,
        dtype=name_of(dtype),
    )


def some_rows(case: Case) -> tuple[int, int]:
    """A block that starts and stops within a channel."""
    rows = case.geometry().rows
    return (rows + 2) // 3, rows - rows // 4


def forward_call(case: Case, dtype: torch.dtype, schedule: Schedule, **options) -> Call:
    weight, bias, _, _ = expected(case)
    return "conv_to_affine", (
        schedule,
        problem_of(case, dtype, **options),
        to_numpy(weight.to(dtype)),
        None if bias is None else to_numpy(bias.to(dtype)),
    )


def backward_call(case: Case, dtype: torch.dtype, schedule: Schedule, **options) -> Call:
    problem = problem_of(case, dtype, **options)
    grad_matrix, _ = expected_backward(case, problem.rows)
    return "conv_to_affine_backward", (schedule, problem, to_numpy(grad_matrix.to(dtype)))


@functools.cache
def expected_csr(case: Case, rows: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns values, columns and row pointers, by the places that a matrix of ones has."""
    ones = torch.ones(case.weight_size, dtype=torch.float64)
    places, _ = reference.conv_to_affine(ones, None, *case.arguments(), **case.keywords())
    csr = places[slice(*rows)].to_sparse_csr()
    matrix = expected(case)[2][slice(*rows)]
    row, column = csr.to_sparse_coo().indices()
    return matrix[row, column], csr.col_indices(), csr.crow_indices()


def csr_call(case: Case, dtype: torch.dtype, schedule: Schedule, **options) -> Call:
    problem = problem_of(case, dtype, **options)
    values, _, _ = expected_csr(case, problem.rows)
    # Which index type does not depend on the dtype: between them the dtypes see both.
    index32 = dtype in (torch.float32, torch.float16)
    weight = to_numpy(expected(case)[0].to(dtype))
    return "conv_to_csr", (schedule, problem, weight, values.numel(), index32)


def csr_backward_call(case: Case, dtype: torch.dtype, schedule: Schedule, **options) -> Call:
    problem = problem_of(case, dtype, **options)
    grad_matrix, _ = expected_backward(case, problem.rows)
    _, columns, row_pointers = expected_csr(case, problem.rows)
    row = torch.arange(grad_matrix.shape[0]).repeat_interleave(row_pointers.diff())
    grad_values = grad_matrix[row, columns].to(dtype)
    return "conv_to_csr_backward", (schedule, problem, to_numpy(grad_values))


FEATURES = 5


@functools.cache
def expected_fused(case: Case) -> tuple[tuple[Tensor | None, ...], Tensor, Tensor]:
    """Returns operands, weight and bias; the operands are so small that every sum is exact."""
    conv_weight, conv_bias, matrix, offset = expected(case)
    linear_weight = whole_numbers((FEATURES, len(offset)), seed=5)
    linear_bias = whole_numbers((FEATURES,), seed=6) if case.groups == 1 else None
    weight, bias = linear_weight @ matrix, linear_weight @ offset
    bias = bias if linear_bias is None else bias + linear_bias
    assert max(float(t.abs().max()) for t in (weight, bias)) < 2**24
    return (conv_weight, conv_bias, linear_weight, linear_bias), weight, bias


def packed_ways(dtype: torch.dtype) -> list[str]:
    """The ways that pack their operands, which double does not go."""
    return [] if dtype == torch.float64 else ["packed", "packed_in_chunks"]


def fused_call(case: Case, dtype: torch.dtype, schedule: Schedule, way: str = "auto") -> Call:
    operands = (None if t is None else to_numpy(t.to(dtype)) for t in expected_fused(case)[0])
    return "fuse_conv_linear", (schedule, problem_of(case, dtype), way, *operands)


def check(case: Case, dtype: torch.dtype, call: Call, outputs: tuple[np.ndarray, ...]) -> None:
    """Compares with the reference, to the last bit."""
    name, (_, problem, *_) = call
    if name == "conv_to_csr":
        exact, *places = expected_csr(case, problem.rows)
        values, *indices = outputs
        assert torch.equal(to_torch(values, dtype), exact.to(dtype))
        for output, wanted in zip(indices, places, strict=True):
            assert np.array_equal(output, wanted.numpy())
        return
    if name == "fuse_conv_linear":
        exact = expected_fused(case)[1:]
        if call[1][2] in ("element", "tile", "large_tile"):
            exact, outputs = exact[:1], outputs[:1]
    elif name == "conv_to_affine":
        exact = tuple(tensor[slice(*problem.rows)] for tensor in expected(case)[2:])
    else:
        exact = expected_backward(case, problem.rows)[1:]
    for output, wanted in zip(outputs, exact, strict=True):
        assert torch.equal(to_torch(output, dtype), wanted.to(dtype))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The reference is small work: on a busy machine threads that wait for each other cost more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def cache(pytestconfig: pytest.Config) -> Path:
    return pytestconfig.cache.mkdir("cuda_on_cpu")


@pytest.fixture(scope="session")
def kernels(cache: Path) -> Kernels:
    return Kernels(build("races", cache))


@pytest.fixture(scope="session")
def sanitized(cache: Path) -> Path:
    if find_sanitizer() is None:
        pytest.skip(f"{COMPILER} comes without AddressSanitizer")
    return build("sanitized", cache)


def run(kernels: Kernels, call: Call) -> tuple[np.ndarray, ...]:
    name, arguments = call
    return getattr(kernels, name)(*arguments)


# The kernels


def test_every_cuda_source_is_run_here() -> None:
    launchers = {
        "conv_to_affine_cuda.cu",
        "conv_to_affine_backward_cuda.cu",
        "conv_to_csr_cuda.cu",
        "conv_to_csr_backward_cuda.cu",
        "upload_cuda.cu",
        "fuse_conv_linear_cuda.cu",
        "fuse_conv_linear_bias_cuda.cu",
        "fuse_conv_linear_by_tile_cuda.cu",
        "fuse_conv_linear_by_element_cuda.cu",
        "fuse_conv_linear_by_packed_cuda.cu",
        "fuse_conv_linear_pack_cuda.cu",
    }
    assert {path.name for path in kernel_sources()} == launchers, "see cuda_on_cpu/README.md"


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES + SEGMENTS, ids=name_of)
def test_conv_to_affine(kernels: Kernels, case: Case, dtype: torch.dtype) -> None:
    for schedule in SCHEDULES:
        call = forward_call(case, dtype, schedule)
        check(case, dtype, call, run(kernels, call))
    call = forward_call(case, dtype, FORWARD, rows=some_rows(case))
    check(case, dtype, call, run(kernels, call))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_conv_to_affine_backward(kernels: Kernels, case: Case, dtype: torch.dtype) -> None:
    # Who computes what does not depend on the dtype here: one schedule will do for the others.
    for schedule in SCHEDULES if dtype == torch.float32 else SCHEDULES[2:3]:
        call = backward_call(case, dtype, schedule)
        check(case, dtype, call, run(kernels, call))
    call = backward_call(case, dtype, FORWARD, rows=some_rows(case))
    check(case, dtype, call, run(kernels, call))


@pytest.mark.parametrize("make_call", [csr_call, csr_backward_call])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_conv_to_csr(
    kernels: Kernels, case: Case, dtype: torch.dtype, make_call: Callable[..., Call]
) -> None:
    for schedule in SCHEDULES if dtype == torch.float32 else SCHEDULES[2:3]:
        call = make_call(case, dtype, schedule)
        check(case, dtype, call, run(kernels, call))
    call = make_call(case, dtype, FORWARD, rows=some_rows(case))
    check(case, dtype, call, run(kernels, call))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", LARGE_TILES, ids=name_of)
def test_fuse_conv_linear_by_large_tiles(kernels: Kernels, case: Case, dtype: torch.dtype) -> None:
    for way in ["large_tile", *packed_ways(dtype)]:
        call = fused_call(case, dtype, SCHEDULES[2], way)
        check(case, dtype, call, run(kernels, call))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_fuse_conv_linear(kernels: Kernels, case: Case, dtype: torch.dtype) -> None:
    ways = [("auto", FORWARD), ("element", SCHEDULES[1]), ("tile", SCHEDULES[2])]
    if case.name != "replicate_wide":  # which has so many slots that large tiles take a minute
        if dtype == torch.float32:
            ways.append(("packed", SCHEDULES[3]))
        if dtype == torch.bfloat16:  # float16 differs in nothing but its tensor cores
            ways.append(("packed_in_chunks", SCHEDULES[1]))
    for way, schedule in ways:
        call = fused_call(case, dtype, schedule, way)
        check(case, dtype, call, run(kernels, call))


PACK = "fuse_conv_linear_pack_cuda.cu"
PACKED = "fuse_conv_linear_by_packed_cuda.cu"


def barriers_of(source: str) -> list[int]:
    """The lines of a source's barriers."""
    lines = (CSRC / "kernels" / source).read_text().splitlines()
    return [number for number, line in enumerate(lines, 1) if "__syncthreads()" in line]


MUCH = Case("much", "enough for packing", (16, 17, 1, 1), (32, 32))


@pytest.mark.parametrize(
    ("card", "packs"),
    [({}, True), ({"capability": 7}, False), ({"shared_bytes": 64 * 1024}, False)],
    ids=["tensor cores", "none", "little memory"],
)
def test_much_work_is_packed_where_the_card_can(kernels: Kernels, card: dict, packs: bool) -> None:
    problem = problem_of(MUCH, torch.float32)
    weight = whole_numbers(MUCH.weight_size, seed=1)
    linear = whole_numbers((33, MUCH.geometry().rows), seed=2)
    operands = to_numpy(weight.float()), None, to_numpy(linear.float()), None
    # Without the barrier of its steps nothing but the packed product fails.
    broken = Schedule(**card, without_barrier=barriers_of(PACKED)[3])
    if packs:
        with pytest.raises(KernelError, match=r"race|uninitialised"):
            kernels.fuse_conv_linear(broken, problem, "auto", *operands)
    else:
        made, _ = kernels.fuse_conv_linear(broken, problem, "auto", *operands)
        exact = torch.einsum("foi,oc->fci", linear.unflatten(1, (16, -1)), weight[:, :, 0, 0])
        assert torch.equal(to_torch(made, torch.float32), exact.flatten(1).float())


def many_features() -> tuple[Problem, list[np.ndarray], Tensor, Tensor]:
    """So many that a block packs several tiles of a row: a problem, operands, weight and bias."""
    case = Case("many", "", (10, 1, 1, 1), (70, 1), groups=2)
    weight, bias, linear, linear_bias = (
        whole_numbers(size, seed)
        for seed, size in enumerate([case.weight_size, (10,), (520, 10 * 70), (520,)])
    )
    fused = (linear.view(520, 2, 5, 70) * weight.view(2, 5, 1)).sum(2)
    fused_bias = linear.view(520, 10, 70).sum(2) @ bias + linear_bias
    operands = [to_numpy(t.float()) for t in (weight, bias, linear, linear_bias)]
    return problem_of(case, torch.float32), operands, fused.flatten(1), fused_bias


def test_slices_of_several_tiles(kernels: Kernels) -> None:
    problem, operands, *exact = many_features()
    made = kernels.fuse_conv_linear(SCHEDULES[1], problem, "packed", *operands)
    for output, wanted in zip(made, exact, strict=True):
        assert torch.equal(to_torch(output, torch.float32), wanted.float())
    broken = Schedule("reverse", without_barrier=barriers_of(PACK)[0])
    with pytest.raises(KernelError, match="race"):
        kernels.fuse_conv_linear(broken, problem, "packed", *operands)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_slices_of_the_bias(kernels: Kernels, schedule: Schedule) -> None:
    """So many rows and so few features that several blocks read one of them."""
    case = Case("long", "", (5, 1, 1), (2501,))
    sizes = [case.weight_size, (5,), (2, 5 * 2501), (2,)]
    tensors = [whole_numbers(size, seed) for seed, size in enumerate(sizes)]
    _, made = kernels.fuse_conv_linear(
        schedule, problem_of(case, torch.float32), "auto", *(to_numpy(t.float()) for t in tensors)
    )
    _, bias, linear, linear_bias = tensors
    wanted = linear.view(2, 5, 2501).sum(2) @ bias + linear_bias
    assert torch.equal(to_torch(made, torch.float32), wanted.float())


@pytest.mark.parametrize("way", ["auto", "packed"])
def test_an_infinite_bias_stays_infinite(kernels: Kernels, way: str) -> None:
    case = BY_NAME["same3x3"]
    weight, bias, _, _ = expected(case)
    linear = torch.ones(FEATURES, case.geometry().rows)
    bias = torch.full_like(bias, torch.inf)
    operands = (to_numpy(t.float()) for t in (weight, bias, linear))
    _, made = kernels.fuse_conv_linear(
        FORWARD, problem_of(case, torch.float32), way, *operands, None
    )
    assert np.isposinf(made).all()


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000])
@pytest.mark.parametrize("way", ["auto", "tile", "packed"])
def test_no_number_stays_none(kernels: Kernels, way: str, bits: int) -> None:
    """Whatever its bits: a card's own has all of them set."""
    case = BY_NAME["pointwise"]
    for place in range(2):
        weight = np.ones((5, 7), np.float32)
        linear = np.ones((FEATURES, 5, 12), np.float32)
        (weight if place else linear).view(np.uint32).ravel()[9] = bits
        operands = weight.reshape(case.weight_size), None, linear.reshape(FEATURES, 60), None
        made, _ = kernels.fuse_conv_linear(FORWARD, problem_of(case, torch.float32), way, *operands)
        wanted = np.einsum("foi,oc->fci", linear, weight).reshape(made.shape)
        assert np.isnan(wanted).any() and np.array_equal(np.isnan(made), np.isnan(wanted))


@pytest.mark.parametrize("way", ["element", "tile", "packed"])
def test_a_stride_beyond_the_image_may_be_any(kernels: Kernels, way: str) -> None:
    near, far = (Case("far", "", (3, 1, 2), (5,), stride=s, dilation=2) for s in (5, 2**63 - 1))
    name, (schedule, _, *rest) = fused_call(near, torch.float32, FORWARD, way)
    call = name, (schedule, problem_of(far, torch.float32), *rest)
    check(near, torch.float32, call, run(kernels, call))


def test_three_products_for_one_are_as_good_as_float32(kernels: Kernels) -> None:
    """Splitting a float32 for tensor cores loses no more than rounding every sum does."""
    case = Case("deep", "many terms", (96, 34, 3, 3), (7, 5), padding=1)
    generator = torch.Generator().manual_seed(0)
    sizes = case.weight_size, (FEATURES, case.geometry().rows)
    weight, linear = (torch.randn(size, generator=generator) for size in sizes)
    matrix, _ = reference.conv_to_affine(weight.double(), None, *case.arguments())
    exact = linear.double() @ matrix
    errors = {}
    for way in ("tile", "packed"):
        operands = to_numpy(weight), None, to_numpy(linear), None
        problem = problem_of(case, torch.float32)
        made, _ = kernels.fuse_conv_linear(FORWARD, problem, way, *operands)
        errors[way] = float((to_torch(made, torch.float32) - exact).norm() / exact.norm())
    assert errors["packed"] <= errors["tile"] <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_no_rows(kernels: Kernels, dtype: torch.dtype) -> None:
    case = BY_NAME["plain3x3"]
    matrix, offset = run(kernels, forward_call(case, dtype, FORWARD, rows=(5, 5)))
    assert matrix.size == offset.size == 0
    problem = problem_of(case, dtype, rows=(5, 5))
    nothing = np.zeros((0, problem.cols), problem.storage)
    (grad_weight,) = kernels.conv_to_affine_backward(FORWARD, problem, nothing)
    assert not grad_weight.any()
    values, columns, row_pointers = run(kernels, csr_call(case, dtype, FORWARD, rows=(5, 5)))
    assert values.size == columns.size == 0 and row_pointers.tolist() == [0]
    (grad_weight,) = kernels.conv_to_csr_backward(FORWARD, problem, values)
    assert not grad_weight.any()


def test_the_table_has_what_the_kernels_treat_apart() -> None:
    bytes_of = {dtype: STORAGE[name_of(dtype)].itemsize for dtype in DTYPES}
    for dtype, size in bytes_of.items():
        row_bytes = [case.geometry().cols * size for case in CASES + SEGMENTS]
        matrix_bytes = [expected(case)[2].numel() * size for case in CASES + SEGMENTS]
        assert any(count > 2 * 16384 for count in row_bytes), f"{dtype}: rows beyond a segment"
        assert any(count % 16 for count in row_bytes), f"{dtype}: rows that are not aligned"
        assert any(count % 16 for count in matrix_bytes), f"{dtype}: an end within a store"
        assert any(count % 16384 == 0 for count in matrix_bytes), f"{dtype}: an end on a segment's"


def test_stays_in_bounds_under_sanitizers(sanitized: Path, tmp_path: Path) -> None:
    schedule = Schedule("shuffle", seed=3, most_blocks=3)
    jobs = []
    for case in CASES + SEGMENTS:
        for dtype in DTYPES:
            jobs.append((case, dtype, forward_call(case, dtype, schedule)))
            jobs.append((case, dtype, forward_call(case, dtype, schedule, rows=some_rows(case))))
    for case in CASES:
        for dtype in DTYPES if expected(case)[0].numel() < 500 else [torch.bfloat16]:
            jobs.append((case, dtype, backward_call(case, dtype, schedule)))
            jobs.append((case, dtype, csr_call(case, dtype, schedule)))
            jobs.append((case, dtype, csr_call(case, dtype, schedule, rows=some_rows(case))))
            jobs.append((case, dtype, csr_backward_call(case, dtype, schedule)))
            jobs.append((case, dtype, fused_call(case, dtype, schedule, "element")))
    for case in FEW + LARGE_TILES:
        for dtype in DTYPES:
            jobs.append((case, dtype, fused_call(case, dtype, schedule)))
            for way in ["tile", *packed_ways(dtype)[-1:]]:
                jobs.append((case, dtype, fused_call(case, dtype, schedule, way)))
    results, said = run_sanitized(sanitized, [call for _, _, call in jobs], tmp_path)
    assert results, said
    for job, outputs in zip(jobs, results, strict=True):
        check(*job, outputs)


# The barriers


def fused_by_tile_call(case: Case, dtype: torch.dtype, schedule: Schedule) -> Call:
    # One block makes all the tiles, one after the other.
    return fused_call(case, dtype, replace(schedule, most_blocks=1), "tile")


def csr_call_of_one_block(case: Case, dtype: torch.dtype, schedule: Schedule) -> Call:
    return csr_call(case, dtype, replace(schedule, most_blocks=1))


def fused_by_packed_call(case: Case, dtype: torch.dtype, schedule: Schedule) -> Call:
    return fused_call(case, dtype, replace(schedule, most_blocks=1), "packed")


@pytest.mark.parametrize(
    ("source", "barrier", "make_call"),
    [
        ("conv_to_affine_cuda.cu", 0, forward_call),
        ("conv_to_affine_cuda.cu", 1, forward_call),
        ("conv_to_csr_cuda.cu", 0, csr_call),
        ("conv_to_csr_cuda.cu", 1, csr_call_of_one_block),
        ("block_sum.h", 0, backward_call),
        ("block_sum.h", 1, backward_call),
        ("block_sum.h", 0, csr_backward_call),
        ("block_sum.h", 1, csr_backward_call),
        ("fuse_conv_linear_by_tile_cuda.cu", 0, fused_by_tile_call),
        ("fuse_conv_linear_by_tile_cuda.cu", 1, fused_by_tile_call),
        ("fuse_conv_linear_by_tile_cuda.cu", 2, fused_by_tile_call),
        # The first has a test of its own. Without the fourth, others divide by sizes that are not
        # there yet.
        (PACK, 1, fused_by_packed_call),
        *((PACKED, n, fused_by_packed_call) for n in (0, 2, 3, 4)),
    ],
)
def test_taking_a_barrier_away_is_noticed(
    kernels: Kernels, source: str, barrier: int, make_call: Callable[..., Call]
) -> None:
    packed = make_call is fused_by_packed_call
    case = LARGE_TILES[0] if packed else BY_NAME["same3x3"]  # several tiles of both kinds
    schedule = Schedule("reverse", without_barrier=barriers_of(source)[barrier])
    call = make_call(case, torch.float32, schedule)
    with pytest.raises(KernelError, match=r"race|uninitialised"):
        run(kernels, call)


# The checks


FAULTS = np.arange(256, dtype=np.float32)


def test_a_kernel_without_fault_passes(kernels: Kernels, sanitized: Path, tmp_path: Path) -> None:
    for schedule in SCHEDULES:
        (out,) = kernels.planted(schedule, "no_fault", FAULTS)
        assert np.array_equal(out, FAULTS[::-1])
    results, said = run_sanitized(sanitized, [("planted", (FORWARD, "no_fault", FAULTS))], tmp_path)
    assert results and np.array_equal(results[0][0], FAULTS[::-1]), said


def test_finds_a_missing_barrier(kernels: Kernels) -> None:
    outputs = []
    for schedule in SCHEDULES:
        with pytest.raises(KernelError, match=r"`copy`.*reverse_kernel") as raised:
            kernels.planted(schedule, "missing_barrier", FAULTS)
        outputs.append(raised.value.outputs[0])
    results = {output.tobytes() for output in outputs}
    assert len(results) > 1, "results do not depend on the schedule"


def test_finds_a_divergent_barrier(kernels: Kernels) -> None:
    message = r"divergent barrier: thread 0 waits at .*line \d+, thread 128 has ended"
    with pytest.raises(KernelError, match=message):
        kernels.planted(FORWARD, "divergent_barrier", FAULTS)
    (out,) = kernels.planted(FORWARD, "no_fault", FAULTS)
    assert np.array_equal(out, FAULTS[::-1]), "a failed launch must leave nothing behind"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out_of_bounds", "out of bounds of `out`: thread 256 at byte 1024"),
        ("out_of_bounds_shared", "out of bounds of `storage`: thread 256 at byte 1024"),
    ],
)
def test_finds_a_write_out_of_bounds(
    kernels: Kernels, sanitized: Path, tmp_path: Path, name: str, message: str
) -> None:
    with pytest.raises(KernelError, match=message):
        kernels.planted(FORWARD, name, FAULTS)
    calls: list[Call] = [("planted", (FORWARD, name, FAULTS))]
    results, said = run_sanitized(sanitized, calls, tmp_path)
    assert not results
    assert "heap-buffer-overflow" in said and "out_of_bounds.cu" in said
    assert "WRITE of size 4" in said


def test_finds_a_launch_that_cuda_would_refuse(kernels: Kernels) -> None:
    with pytest.raises(KernelError, match="invalid configuration"):
        kernels.planted(FORWARD, "no_fault", FAULTS[:0])


PREPARED = [
    ("k<<<1, 2>>>(a);", "k", "1, 2", ", a);"),
    ("k<<<1,\n 2>>>\n(a,\n b);", "k", "1,\n 2", "\n, a,\n b);"),
    ("k<<<1, 2>>>();", "k", "1, 2", ");"),
    ("k<T, (N > 2)><<<f(g<T>(1)), 2>>>(a);", "k<T, (N > 2)>", "f(g<T>(1)), 2", ", a);"),
    ("k<<<f<g<h<T>>>(n), 2>>>(a);", "k", "f<g<h<T>>>(n), 2", ", a);"),
    ("k<<<1, N<2>>>>(f<g<h<T>>>(a));", "k", "1, N<2>", ", f<g<h<T>>>(a));"),
    ("x::A<T>::k<U><<<1, 2>>>(a);", "x::A<T>::k<U>", "1, 2", ", a);"),
    ("table.rows[n](m)<<<1, 2>>>(a);", "table.rows[n](m)", "1, 2", ", a);"),
    ("(n > 1 ? k : l)<<<1, 2>>>(a);", "(n > 1 ? k : l)", "1, 2", ", a);"),
]


@pytest.mark.parametrize(("source", "kernel", "config", "rest"), PREPARED)
def test_rewrites_a_launch(source: str, kernel: str, config: str, rest: str) -> None:
    expected = (
        f'::cuda_on_cpu::launch("{kernel}", {kernel}, ::cuda_on_cpu::LaunchConfig({config}){rest}'
    )
    for before in ("", "a = b; ", "if (n < 1) {", "// k<<<1, 2>>>(a)\n", 'f("<<<");'):
        prepared = prepare(before + source, "x.cu")
        assert prepared.split("\n", 2)[2] == before + expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("__shared__ float a[128];", 'auto& a = ::cuda_on_cpu::shared<float[128], 0>("a");'),
        ("__shared__ A<T, 2> a;", 'auto& a = ::cuda_on_cpu::shared<A<T, 2>, 0>("a");'),
        (
            "__shared__ alignas(16) T a[N / 2][3];",
            'auto& a = ::cuda_on_cpu::shared<T[N / 2][3], 0>("a", 16);',
        ),
        (
            "extern __shared__ alignas(16) unsigned char a[];",
            'auto* a = ::cuda_on_cpu::dynamic_shared<unsigned char>("a", 16);',
        ),
        (
            "__shared__ int a;\n  __shared__ int b;",
            'auto& a = ::cuda_on_cpu::shared<int, 0>("a");\n'
            '  auto& b = ::cuda_on_cpu::shared<int, 1>("b");',
        ),
    ],
)
def test_rewrites_shared_memory(source: str, expected: str) -> None:
    assert prepare(source, "x.cu") == f'#include <cuda_runtime.h>\n#line 1 "x.cu"\n{expected}'


@pytest.mark.parametrize(
    "source", ["extern __shared__ int a;", "__shared__ int a[];", "__shared__ int a, b;"]
)
def test_says_what_it_cannot_rewrite(source: str) -> None:
    with pytest.raises(ValueError, match="not supported"):
        prepare(source, "x.cu")


# csrc/kernels/dtype.h, which the CPU kernels share


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
def test_widening_a_half_is_exact(kernels: Kernels, dtype: torch.dtype) -> None:
    bits = np.arange(65536).astype(np.uint16)
    torch_wide = to_torch(bits, dtype).float().numpy()
    wide = kernels.widen(name_of(dtype), bits)
    assert np.array_equal(np.isnan(wide), np.isnan(torch_wide))
    real = ~np.isnan(wide)
    assert np.array_equal(wide.view(np.uint32)[real], torch_wide.view(np.uint32)[real])
    assert np.array_equal(kernels.narrow(name_of(dtype), wide)[real], bits[real]), "and back"


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
def test_rounding_to_a_half_is_torchs(kernels: Kernels, dtype: torch.dtype) -> None:
    # Every half, the middle between it and the next, and the floats around both; all overflows,
    # subnormals, zeros, infinities and NaNs are among them. Then any bits at all.
    halves = kernels.widen(name_of(dtype), np.arange(65536).astype(np.uint16)).view(np.uint32)
    middle = {torch.float16: 1 << 12, torch.bfloat16: 1 << 15}[dtype]
    near = [halves + np.uint32(offset) for offset in (0, 1, middle - 1, middle, middle + 1)]
    subnormal_ties = (np.arange(4096, dtype=np.float32) * np.float32(2.0**-26)).view(np.uint32)
    random = np.random.default_rng(0).integers(0, 2**32, 1 << 20, dtype=np.uint32)
    values = np.concatenate([*near, subnormal_ties, random]).view(np.float32)

    rounded = torch.from_numpy(values).to(dtype)
    bits = kernels.narrow(name_of(dtype), values)
    assert np.array_equal(np.isnan(values), to_torch(bits, dtype).isnan().numpy())
    real = ~np.isnan(values)
    assert np.array_equal(bits[real], to_numpy(rounded)[real])
