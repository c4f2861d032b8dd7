"""torch.compile, torch.export and AOTInductor take every op, static sizes and symbolic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BY_NAME, CASES, FEW, Case
from torch import Tensor, nn

from linfuse_ext import functional

FEATURES = 3


def names(case: Case) -> str:
    return case.name


class Both(nn.Module):
    """Runs both ops on one geometry, as a user's own code would."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case

    def forward(self, weight: Tensor, bias: Tensor | None, linear: Tensor) -> Any:
        arguments, keywords = self.case.arguments(), self.case.keywords()
        matrix, offset = functional.conv_to_affine(weight, bias, *arguments, **keywords)
        fused, fused_bias = functional.fuse_conv_linear(
            weight, bias, linear, None, *arguments, **keywords
        )
        return matrix, offset, fused, fused_bias


class Table(nn.Module):
    """Both ops on every case, so that one compilation covers the table."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.ModuleList(Both(case) for case in CASES)

    def forward(self, operands: list[list[Tensor | None]]) -> Any:
        return [module(*values) for module, values in zip(self.each, operands, strict=True)]


def operands(case: Case) -> list[Any]:
    return [case.weight(), case.bias_vector(), case.linear_weight(FEATURES)]


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES, ids=names)
def test_compiles_whole_with_symbolic_sizes(case: Case) -> None:
    torch._dynamo.reset()
    run = torch.compile(Both(case), backend="aot_eager", fullgraph=True, dynamic=True)
    assert_same(run(*operands(case)), Both(case)(*operands(case)))


@pytest.mark.parametrize("case", FEW, ids=names)
def test_derivatives_compile(case: Case) -> None:
    torch._dynamo.reset()

    def gradients(run: Any) -> Any:
        values = [v if v is None else v.requires_grad_() for v in operands(case)]
        used = [v for v in values if v is not None]
        loss = sum((output * output.detach()).sum() for output in run(*values))
        return torch.autograd.grad(loss, used)

    compiled = torch.compile(Both(case), backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(gradients(compiled), gradients(Both(case)))


def test_one_compilation_serves_all_input_sizes() -> None:
    torch._dynamo.reset()
    case = BY_NAME["all_differ"]
    graphs = []

    def count(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def matrix(weight: Tensor, image: Tensor) -> Tensor:
        return functional.conv_to_affine(
            weight, None, image.shape[2:], *case.arguments()[1:], **case.keywords()
        )[0]

    run = torch.compile(matrix, backend=count, fullgraph=True, dynamic=True)
    for size in ((7, 10), (12, 9), (20, 21), (8, 30)):
        image = torch.empty(1, 6, *size)
        assert_same(run(case.weight(), image), matrix(case.weight(), image))
    assert len(graphs) == 1


def test_inductor_compiles_the_table() -> None:
    torch._dynamo.reset()
    values = [operands(case) for case in CASES]
    run = torch.compile(Table(), fullgraph=True, dynamic=False)
    assert_same(run(values), Table()(values))


@pytest.mark.parametrize("case", FEW, ids=names)
def test_exports(case: Case) -> None:
    program = torch.export.export(Both(case), tuple(operands(case)))
    assert_same(program.module()(*operands(case)), Both(case)(*operands(case)))


def test_exports_with_a_symbolic_input_size() -> None:
    case = BY_NAME["same3x3"]

    class Matrix(nn.Module):
        def forward(self, weight: Tensor, image: Tensor) -> Tensor:
            size = image.shape[2:]
            return functional.conv_to_affine(weight, None, size, padding="same")[0]

    height, width = torch.export.Dim("height", min=3), torch.export.Dim("width", min=3)
    program = torch.export.export(
        Matrix(),
        (case.weight(), torch.empty(1, 3, 6, 6)),
        dynamic_shapes={"weight": None, "image": {2: height, 3: width}},
    )
    image = torch.empty(1, 3, 9, 5)
    assert_same(program.module()(case.weight(), image), Matrix()(case.weight(), image))


def test_aot_inductor_packages_the_table(tmp_path: Any) -> None:
    values = ([operands(case) for case in CASES],)
    program = torch.export.export(Table(), values)
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "table.pt2")
    )
    run = torch._inductor.aoti_load_package(package)
    flat = torch.utils._pytree.tree_leaves
    assert_same(flat(run(*values)), flat(Table()(*values)))


def test_aot_inductor_packages_the_derivatives(tmp_path: Any) -> None:
    """The adjoint ops, as a compiled program meets them."""

    class Adjoints(nn.Module):
        def forward(self, values: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> Any:
            outputs = []
            for case, (weight, linear, grad_matrix, grad) in zip(FEW, values, strict=True):
                geometry = case.geometry()
                arguments, keywords = geometry.op_arguments, geometry.op_keywords
                size = list(case.weight_size)
                ops = torch.ops.linfuse
                outputs.append(
                    (
                        ops.conv_to_affine_backward(grad_matrix, size, *arguments, **keywords),
                        ops.convolve_rows(grad, weight, *arguments, **keywords),
                        ops.fuse_conv_linear_backward_conv(
                            grad, linear, size, *arguments, **keywords
                        ),
                    )
                )
            return outputs

    values = []
    for case in FEW:
        geometry = case.geometry()
        generator = torch.Generator().manual_seed(6)
        size = (FEATURES, geometry.cols)
        values.append(
            (
                case.weight(),
                case.linear_weight(FEATURES),
                torch.randn(geometry.rows, geometry.cols, generator=generator).double(),
                torch.randn(size, generator=generator).double(),
            )
        )
    program = torch.export.export(Adjoints(), (values,))
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "adjoints.pt2")
    )
    run = torch._inductor.aoti_load_package(package)
    flat = torch.utils._pytree.tree_leaves
    torch.testing.assert_close(flat(run(values)), flat(Adjoints()(values)))
