"""Calls that begin below autograd: nobody who looks at a call can tell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, Case
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from linfuse_ext import calls, functional
from linfuse_ext.geometry import make_geometry
from linfuse_ext.operands import op_geometry

WEIGHT, BIAS = torch.randn(4, 2, 3, 3), torch.randn(4)
LINEAR, LINEAR_BIAS = torch.randn(5, 48), torch.randn(5)

CALLS = {
    "conv_to_affine": lambda w: functional.conv_to_affine(w, BIAS, (6, 5)),
    "fuse_conv_linear": lambda w: functional.fuse_conv_linear(w, BIAS, LINEAR, LINEAR_BIAS, (6, 5)),
    "conv_to_csr": lambda w: functional.conv_to_diagonals(w, BIAS, (6, 5))[1][0],
}


@pytest.fixture(params=CALLS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_short_way_is_taken_and_gives_the_same(name: str, monkeypatch: Any) -> None:
    parameter = torch.nn.Parameter(WEIGHT)
    assert calls._is_plain_call((WEIGHT, None))
    assert not calls._is_plain_call((WEIGHT, parameter))
    with torch.no_grad():
        assert calls._is_plain_call((WEIGHT, parameter))
    short = CALLS[name](WEIGHT)
    monkeypatch.setattr(calls, "_CAN_SKIP_AUTOGRAD", False)
    assert not calls._is_plain_call((WEIGHT, None))
    torch.testing.assert_close(short, CALLS[name](WEIGHT), rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_short_spelling_stands_for_the_same_geometry(case: Case) -> None:
    geometry = case.geometry()
    arguments, keywords = calls._spelled_shortly(geometry)
    assert op_geometry("case", torch.Size(case.weight_size), arguments, keywords) == geometry
    assert len(arguments) == 1 or arguments[-1] != (None, (1,), (0,), (1,), 1)[len(arguments) - 1]
    assert all(len(values) == 1 or len(set(values)) > 1 for values in arguments[:4])


def test_a_geometry_of_symbols_is_spelled_out() -> None:
    class Symbol(int):
        __hash__ = None  # type: ignore[assignment]

    geometry = make_geometry("case", (4, 2, 3, 3), (6, 6))._replace(groups=Symbol(1))
    spelling = geometry.op_arguments, geometry.op_keywords
    assert calls._spelled_shortly(geometry) == spelling


def test_what_comes_out_is_an_ordinary_tensor(name: str) -> None:
    for output in torch.utils._pytree.tree_leaves(CALLS[name](WEIGHT)):
        assert not output.requires_grad
        assert output.grad_fn is None
        output.requires_grad_().mul(2).sum().backward()
        assert (output.grad == 2).all()


@pytest.mark.parametrize("position", range(4))
def test_a_single_operand_that_requires_grad_is_enough(position: int) -> None:
    operands = [WEIGHT, BIAS, LINEAR, LINEAR_BIAS]
    operands[position] = operands[position].clone().requires_grad_()
    outputs = functional.fuse_conv_linear(*operands, (6, 5))
    sum(output.sum() for output in outputs if output.requires_grad).backward()
    assert operands[position].grad is not None


def test_function_modes_see_the_call_and_may_differentiate(name: str) -> None:
    class Mode(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []
            self.gradient: Any = None

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if isinstance(func, torch._ops.OpOverload):
                self.seen.append(func._opname)
                x = torch.ones(2, requires_grad=True)
                (self.gradient,) = torch.autograd.grad((x * x).sum(), x)
            return func(*args, **(kwargs or {}))

    with Mode() as mode:
        CALLS[name](WEIGHT)
    assert name in mode.seen
    assert (mode.gradient == 2).all()


def test_dispatch_modes_see_the_call(name: str) -> None:
    class Mode(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            self.seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with Mode() as mode:
        CALLS[name](WEIGHT)
    assert f"linfuse::{name}" in mode.seen


def test_subclasses_see_the_call() -> None:
    class Tagged(Tensor):
        pass

    matrix, _ = functional.conv_to_affine(WEIGHT.as_subclass(Tagged), BIAS, (6, 5))
    assert type(matrix) is Tagged


@pytest.mark.parametrize("name", ["conv_to_affine", "fuse_conv_linear"])
def test_gradients_flow_out_of_vmap(name: str) -> None:
    """Its tensors are of the plain type, and what they hold may want gradients."""

    def total(weight: Tensor) -> Tensor:
        return sum((output * output).sum() for output in CALLS[name](weight))

    weight = WEIGHT.clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(weight), weight)
    batch = torch.stack([WEIGHT, WEIGHT]).requires_grad_()
    (each,) = torch.autograd.grad(torch.func.vmap(total)(batch).sum(), batch)
    torch.testing.assert_close(each, torch.stack([expected, expected]))


def test_transforms_see_the_call() -> None:
    def inside(weight: Tensor) -> Tensor:
        assert not calls._is_plain_call((weight,))
        assert not calls._is_plain_call((WEIGHT,))
        return weight

    torch.func.vmap(inside)(WEIGHT)
    torch.func.grad(lambda weight: inside(weight).sum())(WEIGHT)


def test_autocast_changes_nothing(name: str) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = CALLS[name](WEIGHT)
    torch.testing.assert_close(lowered, CALLS[name](WEIGHT), rtol=0, atol=0)


def test_inference_mode(name: str) -> None:
    with torch.inference_mode():
        outputs = torch.utils._pytree.tree_leaves(CALLS[name](WEIGHT))
    assert all(output.is_inference() for output in outputs)
