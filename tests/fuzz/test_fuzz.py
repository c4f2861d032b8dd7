"""Random calls: right values from every valid one, a clear error or right values from a broken one.

A longer search, with other examples in every run:

    LINFUSE_EXAMPLES=5000 python -m pytest tests/fuzz
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from fuzz import kinds, oracle
from fuzz.calls import FUNCTIONAL, OPS, Call
from fuzz.found import DEFECTS, Defect
from fuzz.search import search
from fuzz.strategies import NAMES
from hypothesis import Phase, event, given
from hypothesis import strategies as st

from linfuse_ext import functional


@search(kinds.VALUES_OF_FUNCTIONS.name, 250)
@given(call=kinds.VALUES_OF_FUNCTIONS.calls())
def test_functions_give_right_values(call: Call) -> None:
    event(kinds.VALUES_OF_FUNCTIONS.answer(call))


@search(kinds.VALUES_OF_OPS.name, 250)
@given(call=kinds.VALUES_OF_OPS.calls())
def test_ops_give_right_values(call: Call) -> None:
    event(kinds.VALUES_OF_OPS.answer(call))


@search(kinds.BAD_FOR_FUNCTIONS.name, 300)
@given(call=kinds.BAD_FOR_FUNCTIONS.calls())
def test_functions_refuse_bad_arguments_clearly(call: Call) -> None:
    event(kinds.BAD_FOR_FUNCTIONS.answer(call))


@search(kinds.BAD_FOR_OPS.name, 300)
@given(call=kinds.BAD_FOR_OPS.calls())
def test_ops_refuse_bad_arguments(call: Call) -> None:
    event(kinds.BAD_FOR_OPS.answer(call))


def test_every_function_and_every_op_is_drawn() -> None:
    assert set(NAMES[FUNCTIONAL]) == set(functional.__all__)
    ops = {
        schema.name.removeprefix("linfuse::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("linfuse::")
    }
    assert set(NAMES[OPS]) == ops
    assert set(oracle.EXPECTED) == set(NAMES[FUNCTIONAL]) | ops


# --- defects that were found


def marks(defect: Defect) -> list[pytest.MarkDecorator]:
    if defect.open_for is None:
        return []
    return [pytest.mark.xfail(strict=True, reason=defect.reason)]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:Casting complex values to real")
@pytest.mark.parametrize(
    "defect", [pytest.param(each, marks=marks(each), id=each.call.op) for each in DEFECTS]
)
def test_what_was_found_does_not_return(defect: Defect) -> None:
    arguments = defect.call.arguments()
    assert defect.open_for is None or defect.open_for(defect.call, arguments)
    start = time.perf_counter()
    oracle.check(defect.call, arguments, defect.valid)
    if defect.seconds is not None:
        assert time.perf_counter() - start < defect.seconds


# --- the search itself: it must find what is wrong, print it so that it can be pasted, and keep it

PLAIN = Call(
    FUNCTIONAL,
    "fuse_conv_linear",
    {
        "conv_weight": "torch.randn([2, 2, 3], generator=torch.Generator().manual_seed(1))",
        "conv_bias": "torch.ones(2)",
        "linear_weight": "torch.randn([5, 6], generator=torch.Generator().manual_seed(2))",
        "linear_bias": "None",
        "input_size": "5",
    },
)


@pytest.mark.parametrize("factor", [1 + 1e-4, float("nan"), 0])
@pytest.mark.parametrize("output", [0, 1])
def test_a_wrong_value_is_found(
    factor: float, output: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = functional.fuse_conv_linear

    def wrong(**arguments: object) -> tuple[torch.Tensor, ...]:
        outputs = right(**arguments)
        outputs[output].view(-1)[3] *= factor
        return outputs

    arguments = PLAIN.arguments()
    assert oracle.check(PLAIN, arguments, valid=True) == oracle.RIGHT
    monkeypatch.setattr(functional, "fuse_conv_linear", wrong)
    with pytest.raises(AssertionError):
        oracle.check(PLAIN, arguments, valid=True)


def test_a_wrong_derivative_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * (1 + 1e-4)

    right = functional.fuse_conv_linear
    call = PLAIN.replace(conv_weight=f"{PLAIN.code['conv_weight']}.requires_grad_()")
    assert oracle.check(call, call.arguments(), valid=True) == oracle.RIGHT
    monkeypatch.setattr(
        functional,
        "fuse_conv_linear",
        lambda conv_weight, **others: right(conv_weight=Wrong.apply(conv_weight), **others),
    )
    with pytest.raises(AssertionError, match="x the bound"):
        oracle.check(call, call.arguments(), valid=True)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("fuse_conv_linear: something"),
        ValueError("something"),
        ValueError("conv_to_affine: something"),
        OverflowError("fuse_conv_linear: something"),
        MemoryError("fuse_conv_linear: something"),
        RuntimeError("out of memory"),
    ],
    ids=repr,
)
def test_an_unclear_error_is_found(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**arguments: object) -> None:
        raise error

    monkeypatch.setattr(functional, "fuse_conv_linear", fail)
    with pytest.raises(AssertionError, match=str(error)):
        oracle.check(PLAIN, PLAIN.arguments(), valid=False)


def test_an_operand_that_is_written_to_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = functional.fuse_conv_linear

    def write(**arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = right(**arguments)
        arguments["linear_weight"].mul_(2)
        return outputs

    monkeypatch.setattr(functional, "fuse_conv_linear", write)
    with pytest.raises(AssertionError, match="written to"):
        oracle.check(PLAIN, PLAIN.arguments(), valid=True)


def test_a_call_prints_as_what_it_is() -> None:
    namespace = {"torch": torch, "functional": functional}
    pasted = eval(repr(PLAIN), namespace)
    for one, two in zip(pasted, PLAIN.function()(**PLAIN.arguments()), strict=True):
        assert torch.equal(one, two)


def test_a_failing_example_is_kept_and_replayed(tmp_path: Path) -> None:
    """Also by a test of another source, and also once it passes."""
    seen: list[int] = []

    @search("numbers", 200, path=tmp_path)
    @given(number=st.integers(0, 10**6))
    def fails(number: int) -> None:
        assert number < 1000

    with pytest.raises(AssertionError):
        fails()
    assert any(tmp_path.rglob("*"))

    for _ in range(3):
        seen.clear()

        @search("numbers", 200, path=tmp_path, phases=[Phase.reuse])
        @given(number=st.integers(0, 10**6))
        def passes(number: int) -> None:
            seen.append(number)

        passes()
        assert seen == [1000]

    seen.clear()

    @search("other numbers", 20, path=tmp_path)
    @given(number=st.integers(0, 10**6))
    def other(number: int) -> None:
        seen.append(number)

    other()
    assert seen and 1000 not in seen
