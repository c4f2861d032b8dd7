"""conv_to_csr and what is made of it: values, indices, memory, derivatives, torch's own checks."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from cases import BY_NAME, CASES, FEW, Case
from scipy import sparse as scipy_sparse
from tolerance import DTYPES
from torch import Tensor, nn

from linfuse_ext import functional, reference
from linfuse_ext.geometry import make_geometry
from linfuse_ext.sparse import count_stored

OP = torch.ops.linfuse.conv_to_csr
BACKWARD = torch.ops.linfuse.conv_to_csr_backward

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")


def names(case: Case) -> str:
    return case.name


def call(case: Case, weight: Tensor, bias: Tensor | None = None, **keywords: Any) -> Any:
    keywords = {"layout": torch.sparse_csr, **keywords}
    return functional.conv_to_affine(weight, bias, *case.arguments(), **case.keywords(), **keywords)


def triples(case: Case, weight: Tensor, **keywords: Any) -> tuple[Tensor, Tensor, Tensor]:
    geometry = case.geometry()
    return OP(weight, *geometry.op_arguments, **geometry.op_keywords, **keywords)


def gather(case: Case, grad_values: Tensor, **keywords: Any) -> Tensor:
    geometry = case.geometry()
    arguments, options = geometry.op_arguments, geometry.op_keywords
    return BACKWARD(grad_values, list(case.weight_size), *arguments, **options, **keywords)


def some_rows(case: Case) -> list[tuple[int, int]]:
    rows = case.geometry().rows
    return [(0, rows), (rows // 3, rows - rows // 4), (rows // 2, rows // 2), (rows - 1, rows)]


# Values and indices


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=names)
def test_equals_the_dense_matrix_and_scipy(case: Case, dtype: torch.dtype, device: str) -> None:
    weight, bias = case.weight(dtype, device=device), case.bias_vector(dtype, device=device)
    dense, dense_offset = call(case, weight, bias, layout=torch.strided)
    matrix, offset = call(case, weight, bias)
    assert matrix.layout == torch.sparse_csr and matrix.dtype == dtype
    assert matrix.shape == dense.shape and matrix.device == weight.device
    assert torch.equal(matrix.to_dense(), dense)
    assert torch.equal(offset, dense_offset)
    values = matrix.values().cpu().double().numpy()
    columns, pointers = matrix.col_indices().cpu().numpy(), matrix.crow_indices().cpu().numpy()
    by_scipy = scipy_sparse.csr_array((values, columns, pointers), shape=tuple(matrix.shape))
    by_scipy.check_format(full_check=True)
    assert by_scipy.has_canonical_format, "columns ascend, none twice"
    expected = scipy_sparse.csr_array(dense.cpu().double().numpy())
    assert (by_scipy != expected).nnz == 0


@pytest.mark.parametrize("case", CASES, ids=names)
def test_stores_the_taps_and_nothing_else(case: Case, device: str) -> None:
    """All indices against the non-zeros of a matrix whose weights are ones."""
    ones = torch.ones(case.weight_size, device=device)
    dense, _ = call(case, ones, layout=torch.strided)
    expected = dense.to_sparse_csr()
    values, columns, row_pointers = triples(case, ones)
    assert torch.equal(columns, expected.col_indices())
    assert torch.equal(row_pointers, expected.crow_indices())
    assert torch.equal(values, expected.values())
    assert values.numel() == count_stored(case.geometry(), None)
    zeros, _, _ = triples(case, torch.zeros_like(ones))
    assert zeros.numel() == values.numel(), "what is stored depends on the geometry alone"


@pytest.mark.parametrize("case", CASES, ids=names)
def test_computes_what_the_convolution_computes(case: Case, device: str) -> None:
    geometry = case.geometry()
    weight, bias = case.weight(device=device), case.bias_vector(device=device)
    x = torch.randn(3, geometry.in_channels, *geometry.input_size, dtype=torch.float64).to(device)
    y = reference.convolve(x, weight, bias, *case.arguments()[1:], **case.keywords())
    for layout in (torch.sparse_csr, torch.sparse_coo):
        matrix, offset = call(case, weight, bias, layout=layout)
        torch.testing.assert_close((matrix @ x.flatten(1).T).T + offset, y.flatten(1))
        torch.testing.assert_close(matrix @ x[0].flatten() + offset, y[0].flatten())


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=names)
def test_rows_are_a_block_of_the_whole(case: Case, index_dtype: torch.dtype, device: str) -> None:
    weight, bias = case.weight(device=device), case.bias_vector(device=device)
    dense, offset = call(case, weight, bias, layout=torch.strided)
    for start, stop in some_rows(case):
        block, part = call(case, weight, bias, rows=(start, stop), index_dtype=index_dtype)
        assert block.crow_indices().dtype == block.col_indices().dtype == index_dtype
        assert block.crow_indices()[0] == 0 and block.crow_indices()[-1] == block.values().numel()
        assert block.values().numel() == count_stored(case.geometry(), (start, stop))
        assert torch.equal(block.to_dense(), dense[start:stop])
        assert torch.equal(part, offset[start:stop])


@pytest.mark.parametrize("case", CASES, ids=names)
def test_coo_is_coalesced_without_a_sort(case: Case, device: str) -> None:
    weight, bias = case.weight(device=device), case.bias_vector(device=device)
    dense, _ = call(case, weight, bias, layout=torch.strided)
    for rows in some_rows(case):
        matrix, _ = call(case, weight, bias, layout=torch.sparse_coo, rows=rows)
        assert matrix.layout == torch.sparse_coo and matrix.is_coalesced()
        assert torch.equal(matrix.to_dense(), dense[slice(*rows)])
        loose = torch.sparse_coo_tensor(
            matrix.indices(), matrix.values(), matrix.shape, check_invariants=True
        )
        sorted_by_torch = loose.coalesce()
        assert torch.equal(sorted_by_torch.indices(), matrix.indices())
        assert torch.equal(sorted_by_torch.values(), matrix.values())


def test_takes_a_weight_of_any_strides(device: str) -> None:
    case = BY_NAME["grouped_dilated"]
    weight = case.weight(device=device)
    strided = weight.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert not strided.is_contiguous()
    for actual, same in zip(triples(case, strided), triples(case, weight), strict=True):
        assert torch.equal(actual, same)
    grad = torch.randn(triples(case, weight)[0].shape, device=device).double()
    spread = torch.stack([grad, grad], 1)[:, 0]
    assert torch.equal(gather(case, spread), gather(case, grad))


@pytest.mark.parametrize("case", FEW, ids=names)
def test_bits_do_not_depend_on_the_threads(case: Case) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made = triples(case, case.weight(torch.float32))
            results.append((*made, gather(case, made[0])))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


BIG = """
import time
import torch
from linfuse_ext import functional

def peak():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

weight = torch.randn(64, 64, 3, 3)
functional.conv_to_affine(weight[:1, :1], None, (64, 64), padding=1, layout=torch.sparse_csr)
before, start = peak(), time.perf_counter()
matrix, offset = functional.conv_to_affine(
    weight, None, (64, 64), padding=1, layout=torch.sparse_csr
)
seconds, grown = time.perf_counter() - start, peak() - before
parts = (matrix.values(), matrix.col_indices(), matrix.crow_indices(), offset)
size = sum(part.numel() * part.element_size() for part in parts)
x = torch.randn(64 * 64 * 64)
expected = torch.nn.functional.conv2d(x.view(1, 64, 64, 64), weight, padding=1).flatten()
torch.testing.assert_close(matrix @ x, expected, rtol=1e-4, atol=1e-4)
print(matrix.values().numel(), seconds, grown, size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_layer_takes_seconds_and_its_own_size() -> None:
    """64 to 64 channels, 3x3, on 64x64: 275 GB as a dense matrix."""
    done = subprocess.run([sys.executable, "-c", BIG], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stored, seconds, grown, size = done.stdout.split()
    assert int(stored) == 64 * 64 * (3 * 64 - 2) ** 2
    assert int(grown) < 1.1 * int(size), f"{grown} bytes for a matrix of {size}"
    assert float(seconds) < 60, "a busy machine's minute; an idle one's second"


# Errors


WEIGHT = torch.ones(4, 2, 3, 3)


WRONG = [
    ({"layout": torch.sparse_csc}, ValueError,
     "`layout` must be torch.strided, torch.sparse_csr or torch.sparse_coo, got torch.sparse_csc"),
    ({"layout": "csr"}, TypeError, "`layout` must be a torch.layout, got 'csr'"),
    ({"index_dtype": torch.int16}, ValueError,
     "`index_dtype` must be torch.int64 or torch.int32 for the layout torch.sparse_csr, got torch"),
    ({"index_dtype": torch.int32, "layout": torch.sparse_coo}, ValueError,
     "`index_dtype` must be torch.int64 for the layout torch.sparse_coo, got torch.int32"),
    ({"index_dtype": torch.int32, "layout": torch.strided}, ValueError,
     "`index_dtype` must be torch.int64 for the layout torch.strided, got torch.int32"),
    ({"index_dtype": "int32"}, TypeError, "`index_dtype` must be a torch.dtype, got 'int32'"),
    ({"rows": (3, 2)}, ValueError,
     "`rows` must be (start, stop) with 0 <= start <= stop <= 48, got (3, 2)"),
    ({"stride": 0}, ValueError, "`stride` must be positive, got (0,)"),
]  # fmt: skip


@pytest.mark.parametrize(("keywords", "error", "message"), WRONG)
def test_wrong_arguments(keywords: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        functional.conv_to_affine(WEIGHT, None, (6, 5), **{"layout": torch.sparse_csr, **keywords})
    assert str(caught.value).startswith("conv_to_affine: ") and message in str(caught.value)


def test_int32_indices_must_fit() -> None:
    """More elements, and more columns, than int32 counts; neither is allocated."""
    weight = torch.ones(1, 1, 1).expand(2**11, 2**10, 1)
    with pytest.raises(ValueError, match=r"`index_dtype` must be torch.int64 for 2147483648 elem"):
        functional.conv_to_affine(
            weight, None, 2**10, layout=torch.sparse_csr, index_dtype=torch.int32
        )
    with pytest.raises((RuntimeError, ValueError), match="`index32` must be False for 2147483648"):
        OP(weight, [2**10], index32=True)
    wide = torch.ones(1, 2**10, 1)
    with pytest.raises(ValueError, match="for 1024 elements in 2147484672 columns"):
        functional.conv_to_affine(
            wide, None, 2**21 + 1, 2**21 + 1, layout=torch.sparse_csr, index_dtype=torch.int32
        )
    with pytest.raises((RuntimeError, ValueError), match="in 2147484672 columns, got True"):
        OP(wide, [2**21 + 1], [2**21 + 1], index32=True)
    _, columns, _ = OP(wide, [2**21 + 1], [2**21 + 1])
    assert columns[-1] == 1023 * (2**21 + 1), "and int64 holds them"


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: OP(WEIGHT.int(), [6, 5]), "`weight` must be float32, float64, float16"),
        (lambda: OP(WEIGHT, [6, 5, 4]), "`input_size` must have one value or 2"),
        (lambda: OP(WEIGHT, [6, 5], rows=[0, 49]), "`rows` must be (start, stop) with 0 <="),
        (lambda: OP(WEIGHT, [6, 5], dilation=[2**62]), "the sizes must fit in 63 bits"),
        (lambda: BACKWARD(torch.ones(3), [4, 2, 3, 3], [6, 5]), "`grad_values` must have shape"),
    ],
)
def test_direct_callers_meet_the_same_checks(run: Any, message: str) -> None:
    with pytest.raises((RuntimeError, ValueError)) as caught:
        run()
    assert message in str(caught.value)


# Derivatives


@pytest.mark.parametrize("case", CASES, ids=names)
def test_derivatives_of_first_and_second_order(case: Case, device: str) -> None:
    weight = case.weight(device=device).requires_grad_()
    rows = some_rows(case)[1]

    def whole(weight: Tensor) -> Tensor:
        return triples(case, weight)[0]

    def block(weight: Tensor) -> Tensor:
        return triples(case, weight, rows=rows, index32=True)[0]

    for run in (whole, block):
        assert torch.autograd.gradcheck(run, weight, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, weight, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=names)
def test_backward_gathers_what_the_dense_backward_gathers(
    case: Case, dtype: torch.dtype, device: str
) -> None:
    """Whole numbers, so that every order of summation gives the same bits."""
    _, columns, row_pointers = triples(case, case.weight(dtype, device=device))
    seed = torch.Generator().manual_seed(5)
    grad = torch.randint(-3, 4, columns.shape, generator=seed).to(device=device, dtype=dtype)
    size = (case.geometry().rows, case.geometry().cols)
    dense = torch.sparse_csr_tensor(
        row_pointers, columns, grad, size, check_invariants=True
    ).to_dense()
    geometry = case.geometry()
    expected = torch.ops.linfuse.conv_to_affine_backward(
        dense, list(case.weight_size), *geometry.op_arguments, **geometry.op_keywords
    )
    actual = gather(case, grad)
    assert actual.dtype == dtype and torch.equal(actual, expected)


@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_coo], ids=str)
@pytest.mark.parametrize("case", FEW, ids=names)
def test_gradients_flow_through_the_sparse_tensor(
    case: Case, layout: torch.layout, device: str
) -> None:
    geometry = case.geometry()
    x = torch.randn(geometry.cols, 2, dtype=torch.float64).to(device)
    losses = [
        lambda matrix: torch.sparse.mm(matrix, x).pow(2).sum(),
        lambda matrix: (matrix @ x).pow(2).sum(),
        lambda matrix: matrix.to_dense().pow(3).sum(),
    ]

    def gradients(loss: Any, layout: torch.layout) -> tuple[Tensor, ...]:
        weight = case.weight(device=device).requires_grad_()
        bias = case.bias_vector(device=device)
        operands = (weight,) if bias is None else (weight, bias.requires_grad_())
        matrix, offset = call(case, weight, bias, layout=layout)
        return torch.autograd.grad(
            loss(matrix) + offset.pow(3).sum(), operands, allow_unused=bias is None
        )

    for loss in losses:
        torch.testing.assert_close(gradients(loss, layout), gradients(loss, torch.strided))
    # Of the values alone: the dense matrix is zero elsewhere.
    torch.testing.assert_close(
        gradients(lambda matrix: matrix.values().pow(3).sum(), layout),
        gradients(losses[2], torch.strided),
    )


# torch's own checks


@pytest.mark.parametrize("case", CASES, ids=names)
def test_opcheck(case: Case, device: str) -> None:
    geometry = case.geometry()
    weight = case.weight(torch.float32, device=device).requires_grad_()
    torch.library.opcheck(
        OP.default,
        (weight, *geometry.op_arguments),
        {**geometry.op_keywords, "rows": list(some_rows(case)[1]), "index32": True},
    )


@pytest.mark.parametrize("case", FEW, ids=names)
def test_opcheck_of_the_whole_and_of_the_backward(case: Case, device: str) -> None:
    geometry = case.geometry()
    weight = case.weight(torch.float32, device=device).requires_grad_()
    torch.library.opcheck(OP.default, (weight, *geometry.op_arguments), geometry.op_keywords)
    values, _, _ = triples(case, weight)
    torch.library.opcheck(
        BACKWARD.default,
        (values.detach().requires_grad_(), list(case.weight_size), *geometry.op_arguments),
        geometry.op_keywords,
    )


@pytest.mark.parametrize("case", FEW, ids=names)
def test_vmap_batches_the_values_and_shares_the_indices(case: Case, device: str) -> None:
    weights = torch.stack([case.weight(device=device) * n for n in (1, 2, 3)], 1)
    batched = torch.func.vmap(lambda weight: triples(case, weight), in_dims=1)(weights)
    for n in range(3):
        for actual, expected in zip(batched, triples(case, weights[:, n]), strict=True):
            assert torch.equal(actual[n], expected)
    grads = torch.func.vmap(lambda values: gather(case, values))(batched[0])
    for n in range(3):
        assert torch.equal(grads[n], gather(case, batched[0][n]))


def test_batched_derivatives() -> None:
    case = BY_NAME["circular_grouped"]
    weight = case.weight()

    def energy(run: Any) -> Tensor:
        return torch.autograd.functional.hessian(run, weight, vectorize=True)

    sparse = energy(lambda weight: triples(case, weight)[0].pow(3).sum())
    dense = energy(lambda weight: call(case, weight, layout=torch.strided)[0].pow(3).sum())
    torch.testing.assert_close(sparse, dense)


# Compiled


class Triples(nn.Module):
    """The op on one geometry, whose input size is that of an image."""

    def __init__(self, case: Case, rows: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.case = case
        self.rows = rows

    def forward(self, weight: Tensor, image: Tensor) -> Any:
        geometry = make_geometry(
            "test", weight.shape, image.shape[2:], *self.case.arguments()[1:],
            **self.case.keywords(),
        )  # fmt: skip
        return OP(weight, *geometry.op_arguments, **geometry.op_keywords, rows=self.rows)


def image_for(case: Case, larger: int = 0) -> Tensor:
    geometry = case.geometry()
    return torch.empty(1, 1, *(size + larger for size in geometry.input_size))


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", FEW, ids=names)
def test_one_compilation_serves_all_input_sizes(case: Case) -> None:
    torch._dynamo.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    run = torch.compile(Triples(case), backend=count, fullgraph=True, dynamic=True)
    for larger in (20, 1, 5, 9):  # first, sizes that no size of a weight happens to equal
        operands = case.weight(), image_for(case, larger)
        assert_same(run(*operands), Triples(case)(*operands))
    assert len(graphs) == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("case", FEW, ids=names)
def test_derivatives_compile(case: Case, backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Triples(case), backend=backend, fullgraph=True, dynamic=True)

    def gradient(run: Any) -> Tensor:
        weight = case.weight().requires_grad_()
        values, _, _ = run(weight, image_for(case))
        return torch.autograd.grad(values.pow(3).sum(), weight)[0]

    torch.testing.assert_close(gradient(compiled), gradient(Triples(case)))


@pytest.mark.parametrize("name", ["all_differ", "transposed_pair", "reflect"])
def test_a_block_of_rows_compiles_with_symbolic_sizes(name: str) -> None:
    torch._dynamo.reset()
    case = BY_NAME[name]
    module = Triples(case, some_rows(case)[1])
    run = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    operands = case.weight(), image_for(case)
    assert_same(run(*operands), module(*operands))


@pytest.mark.parametrize("case", FEW, ids=names)
def test_exports(case: Case) -> None:
    operands = case.weight(), image_for(case)
    program = torch.export.export(Triples(case), operands)
    assert_same(program.module()(*operands), Triples(case)(*operands))


@pytest.mark.parametrize("name", ["same3x3", "circular"])
def test_exports_with_a_symbolic_input_size(name: str) -> None:
    case = BY_NAME[name]
    height, width = torch.export.Dim("height", min=3), torch.export.Dim("width", min=3)
    program = torch.export.export(
        Triples(case),
        (case.weight(), image_for(case)),
        dynamic_shapes={"weight": None, "image": {2: height, 3: width}},
    )
    operands = case.weight(), image_for(case, 4)
    assert_same(program.module()(*operands), Triples(case)(*operands))


def test_aot_inductor_packages_the_op_and_its_adjoint(tmp_path: Any) -> None:
    class Table(nn.Module):
        def forward(self, weights: list[Tensor]) -> Any:
            made = [triples(case, w) for case, w in zip(FEW, weights, strict=True)]
            return [(m, gather(case, m[0])) for case, m in zip(FEW, made, strict=True)]

    weights = [case.weight() for case in FEW]
    program = torch.export.export(Table(), (weights,))
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "table.pt2")
    )
    run = torch._inductor.aoti_load_package(package)
    flat = torch.utils._pytree.tree_leaves
    assert_same(flat(run(weights)), flat(Table()(weights)))


# Diagonals


@pytest.mark.parametrize("case", CASES, ids=names)
def test_rotating_and_summing_the_diagonals_convolves(case: Case, device: str) -> None:
    geometry = case.geometry()
    weight, bias = case.weight(device=device), case.bias_vector(device=device)
    made = functional.conv_to_diagonals(weight, bias, *case.arguments(), **case.keywords())
    n = made.size
    assert n & (n - 1) == 0 and n // 2 < max(geometry.rows, geometry.cols) <= n
    x = torch.randn(1, geometry.in_channels, *geometry.input_size, dtype=torch.float64).to(device)
    y = reference.convolve(x, weight, bias, *case.arguments()[1:], **case.keywords()).flatten()
    packed = nn.functional.pad(x.flatten(), (0, n - geometry.cols))
    result = made.offset + sum(vector * packed.roll(-d) for d, vector in made.vectors.items())
    torch.testing.assert_close(result[: geometry.rows], y)
    assert not result[geometry.rows :].any()


@pytest.mark.parametrize("case", CASES, ids=names)
def test_diagonals_are_those_of_the_padded_matrix(case: Case, device: str) -> None:
    weight = case.weight(device=device)
    made = functional.conv_to_diagonals(weight, None, *case.arguments(), **case.keywords())
    dense, _ = call(case, weight, layout=torch.strided)
    n = made.size
    padded = nn.functional.pad(dense, (0, n - dense.shape[1], 0, n - dense.shape[0]))
    r = torch.arange(n, device=device)
    assert list(made.vectors) == sorted(made.vectors)
    for d in range(n):
        diagonal = padded[r, (r + d) % n]
        assert (d in made.vectors) == bool(diagonal.any()), "no diagonal without a tap"
        if d in made.vectors:
            assert torch.equal(made.vectors[d], diagonal)


def test_derivatives_of_the_diagonals() -> None:
    case = BY_NAME["circular_grouped"]
    operands = case.weight().requires_grad_(), case.bias_vector().requires_grad_()

    def run(weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        made = functional.conv_to_diagonals(weight, bias, *case.arguments(), **case.keywords())
        return *made.vectors.values(), made.offset

    assert torch.autograd.gradcheck(run, operands, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, operands, fast_mode=True)


def test_wrong_arguments_of_the_diagonals() -> None:
    with pytest.raises(ValueError, match=r"conv_to_diagonals: `stride` must be positive, got \(0,"):
        functional.conv_to_diagonals(WEIGHT, None, (6, 5), 0)
    with pytest.raises(TypeError, match="conv_to_diagonals: `weight` must be a tensor, got list"):
        functional.conv_to_diagonals([1.0], None, (6, 5))
    with pytest.raises(ValueError, match=r"conv_to_diagonals: `bias` must have shape \(4,\), got"):
        functional.conv_to_diagonals(WEIGHT, torch.ones(3), (6, 5))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA card")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_can_be_captured(dtype: torch.dtype) -> None:
    """In a CUDA graph, which forbids waiting for the card; a replay gives the same bits."""
    case = BY_NAME["same3x3"]
    weight = case.weight(dtype, device="cuda")
    expected = triples(case, weight)
    expected_gradient = gather(case, expected[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = triples(case, weight)
        gradient = gather(case, made[0])
    for tensor in (*made, gradient):
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    both = zip((*made, gradient), (*expected, expected_gradient), strict=True)
    assert all(torch.equal(left, right) for left, right in both)
