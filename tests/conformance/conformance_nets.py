"""What the whole grid shares: cases that name their trap, layers without defaults, one bound.

The cases follow the published tests and bug reports of the tools of the field. Each says what goes
wrong in a tool that falls for it; the words are part of the message if the case fails here.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tolerance import assert_close
from torch import Tensor, nn

import linfuse_ext as lf

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}

# What a graph may hold beside its layers that multiplies nothing.
_MOVES = {"clone", "flatten", "pad", "permute", "relu", "reshape", "sym_size", "unflatten", "view"}


@dataclass(frozen=True)
class Case:
    """A network, and the trap that it guards against."""

    name: str
    trap: str
    build: Callable[[], nn.Module]
    size: tuple[int, ...]  # of one sample

    def model(self, dtype: torch.dtype = torch.float64) -> Any:
        return filled(self.build(), self.name).to(dtype)

    def samples(self, dtype: torch.dtype = torch.float64, count: int = 3) -> Tensor:
        return drawn(count, *self.size, name=self.name).to(dtype)


def every(cases: Sequence[Any]) -> Any:
    """Parametrizes a test by `case`; names must be unique."""
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), "names must be unique"
    return pytest.mark.parametrize("case", cases, ids=names)


def _draw(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def drawn(*size: int, name: str = "") -> Tensor:
    """Normal numbers, the same for the same name."""
    return torch.randn(size, generator=_draw(name), dtype=torch.float64)


def filled(model: nn.Module, name: str = "") -> nn.Module:
    """The network in eval mode and float64, with no parameter or statistic that could be skipped.

    A zero bias, a BatchNorm that is the identity or a symmetric kernel hides what it tests.
    """
    draw = _draw(name)
    with torch.no_grad():
        for key, value in [*model.named_parameters(), *model.named_buffers()]:
            if not value.is_floating_point() or "fixed" in key:
                continue
            numbers = torch.randn(value.shape, generator=draw)
            if key.endswith("running_var") or (value.dim() == 1 and key.endswith("weight")):
                numbers = numbers.abs() + 0.5
            elif value.dim() > 1:
                numbers = numbers / value[0].numel() ** 0.5
            value.copy_(numbers)
    return model.double().eval()


def _absolute(model: nn.Module) -> nn.Module:
    """The network that adds up the absolute values of what `model` adds up."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for key, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.is_floating_point():
                # A BatchNorm takes its mean away.
                value.copy_(-value.abs() if key.endswith("running_mean") else value.abs())
    return model


def _terms(model: nn.Module, x: Tensor) -> int:
    """Of the longest sum: no merged layer adds up more than a sample has elements."""
    own = sum(p[0].numel() + 2 for p in model.parameters() if p.dim() > 1)
    return x[0].numel() + own + 16 * sum(1 for _ in model.modules())


def assert_equals(actual: Tensor, model: nn.Module, x: Tensor, trap: str) -> None:
    """Holds `actual` to `model`, its layers one by one by plain torch in float64.

    Args:
        actual: What the merged layers computed on `x`.
        model: The layers as they were; of non-negative maps, sums and ReLUs beside its parameters,
            so that its absolute values bound the rounding of every order of summation.
        x: The samples.
        trap: What went wrong if this fails.
    """
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        want, most = exact(x.double()), _absolute(exact)(x.double().abs())
    try:
        assert_close(actual.detach(), want, most, _terms(model, x))
    except AssertionError as error:
        raise AssertionError(f"{trap}: {error}") from None


def assert_differs(wrong: Tensor, right: Tensor, trap: str) -> None:
    """The trap is one: who falls for it is off by more than any rounding."""
    assert (wrong - right).abs().max() > 1e-3 * right.abs().max(), f"no trap at all: {trap}"


def left(model: nn.Module) -> list[str]:
    """The layers of a collapsed network in their order, without ReLUs and what only moves."""
    found = []
    for node in model.graph.nodes:
        if node.op == "call_module":
            found.append(type(model.get_submodule(node.target)).__name__)
        elif node.op == "call_function":
            schema = getattr(node.target, "_schema", None)
            found.append(schema.name.split("::")[1] if schema else node.target.__name__)
    return [name for name in found if name not in _MOVES]


def collapsed(model: nn.Module, x: Tensor, **options: Any) -> Any:
    """`lf.collapse` to the fewest layers."""
    return lf.collapse(model, x, **{"policy": "always", **options})


def parameter_bytes(layer: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in layer.parameters())
