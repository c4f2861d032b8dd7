"""Operations of a captured graph as affine maps of one sample: the table READERS.

A reader takes a Call and returns a Reading, or None where the call is not affine in its input, or
does not treat each sample by itself. The batch is axis 0 of every value; a reader must refuse what
touches that axis. To add an operation: write a reader in readers/, name its ATen operations above
it, and add a line to tests/network/test_operations.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from .constants import Constants
from .costs import flops_of
from .maps import (
    AffineMap,
    Deferred,
    Operator,
    Shape,
)


class Join(NamedTuple):
    """How an operation of several values puts them together: a sum, or stacked along an axis."""

    dim: int | None  # of the sample; None for a sum


class Reading(NamedTuple):
    """What an operation does to a sample."""

    operands: list[tuple[Node, list[AffineMap]]]  # each value, and the maps that it goes through
    join: Join | None
    flops: int
    multiplies: bool  # by weights of any kind; what only moves or adds is no layer


Reader = Callable[["Call"], Reading | None]
READERS: dict[Any, Reader] = {}

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def reads(*names: str) -> Callable[[Reader], Reader]:
    """Enters a reader under the names of ATen operations."""

    def enter(reader: Reader) -> Reader:
        for name in names:
            packet = getattr(torch.ops.aten, name, None)
            if packet is not None:  # not every release of torch has all of them
                READERS[packet] = reader
        return reader

    return enter


def arguments_of(node: Node) -> dict[str, Any]:
    """All arguments of a call of an ATen operation by name, in their order, defaults included."""
    schema: Any = node.target._schema  # type: ignore[union-attr]
    defaults = {argument.name: argument.default_value for argument in schema.arguments}
    return defaults | dict(zip(defaults, node.args, strict=False)) | node.kwargs


def is_same_size(one: Any, other: Any) -> bool:
    """Whether two sizes, ints or symbols, are known to be equal."""
    if isinstance(one, int) and isinstance(other, int):
        return one == other
    if isinstance(one, torch.SymInt) and isinstance(other, torch.SymInt):
        return bool(one.node.expr == other.node.expr)
    return False


def sample_shape(value: Any) -> Shape | None:
    """The shape of a sample of this value; None where it has no samples of one fixed shape."""
    tensor = value.meta.get("val") if isinstance(value, Node) else None
    if not isinstance(tensor, Tensor) or tensor.dim() < 1 or tensor.dtype not in _FLOATS:
        return None
    shape = tensor.shape[1:]
    if not all(isinstance(size, int) and size > 0 for size in shape):
        return None
    return tuple(shape)


class Call:
    """A node, its arguments by the names of its schema, and the shapes before and behind it."""

    def __init__(self, node: Node, constants: Constants) -> None:
        """For a node that calls an ATen operation with one result, a tensor with samples."""
        self.node = node
        self.constants = constants
        self.arguments = arguments_of(node)
        shape = sample_shape(node)
        assert shape is not None
        self.out_shape = shape

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def first(self) -> Any:
        """The first argument, in most operations the value."""
        return next(iter(self.arguments.values()))

    def shape_of(self, value: Any) -> Shape | None:
        """The shape of a sample, of a value with as many samples as the result."""
        shape = sample_shape(value)
        if shape is None or value in self.constants:
            return None
        before, behind = value.meta["val"], self.node.meta["val"]
        same = is_same_size(before.shape[0], behind.shape[0]) and before.dtype == behind.dtype
        return shape if same else None

    @property
    def in_shape(self) -> Shape | None:
        """The shape of a sample of the first argument."""
        return self.shape_of(self.first)

    def are_numbers(self, *names: str) -> bool:
        """Whether arguments hold no values of the graph."""
        return not any(
            isinstance(item, Node)
            for name in names
            for item in (self[name] if isinstance(self[name], (list, tuple)) else [self[name]])
        )

    def dims(self, given: int | Sequence[int]) -> list[int] | None:
        """Axes of the sample, from axes of the batch; None where the batch is among them."""
        axes = [given] if isinstance(given, int) else list(given)
        count = self.first.meta["val"].dim() if isinstance(self.first, Node) else 0
        axes = [axis % count for axis in axes]
        return None if 0 in axes else [axis - 1 for axis in axes]

    def constant(self, name: str, shape: Shape | None = None) -> Deferred | None:
        """An argument that is a constant tensor; None where it is None."""
        return None if self[name] is None else self.constants.deferred(self[name], shape)

    def are_constants(self, *names: str) -> bool:
        """Whether arguments are constant tensors, or left out."""
        return all(self[name] is None or self[name] in self.constants for name in names)

    def rerun(self, samples: Tensor) -> Tensor:
        """The operation itself, in float64, on other samples."""
        first = next(iter(self.arguments))
        arguments = {}
        for name, value in self.arguments.items():
            if name == first:
                value = samples
            elif isinstance(value, (list, tuple)):
                value = [self.constants[v] if isinstance(v, Node) else v for v in value]
            elif isinstance(value, Node):
                value = self.constants[value]
            arguments[name] = value
        result: Tensor = self.node.target(**arguments)  # type: ignore[operator]
        return result

    def through(self, *maps: AffineMap, flops: int | None = None) -> Reading:
        """The reading of an operation of one value; `flops` where the maps' own are not meant."""
        counted = sum(map(flops_of, maps)) if flops is None else flops
        return Reading([(self.first, list(maps))], None, counted, counted > 0)

    def moved(self, run: Callable[[Tensor], Tensor] | None = None, flops: int = 0) -> Reading:
        """The reading of an operation that is linear, and no more than that."""
        assert self.in_shape is not None
        operator = Operator(self.in_shape, self.out_shape, None, run or self.rerun)
        return self.through(operator, flops=flops)


def read(node: Node, constants: Constants) -> Reading | None:
    """What a node does to a sample, or None where that is not affine."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    reader = READERS.get(node.target.overloadpacket)
    if reader is None or node in constants or sample_shape(node) is None:
        return None
    return reader(Call(node, constants))
