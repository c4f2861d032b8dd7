"""How far a merged layer is from what it replaces, on the example inputs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map

from ..meshes import gathered
from .capture import Captured, input_leaves
from .constants import Constants, attribute, is_written
from .planning import Segment
from .rewriting import Made


class _Recorder(Interpreter):
    """Runs a graph and keeps the values of some nodes, and all numbers."""

    def __init__(self, module: GraphModule, wanted: set[Node]) -> None:
        super().__init__(module)
        self.kept: dict[Node, Any] = {}
        self._wanted = wanted

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        # Each where it is read, so that one layer after the other is whole.
        args, kwargs = tree_map(gathered, (args, kwargs))
        return super().call_function(target, args, kwargs)

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n in self._wanted or isinstance(value, int):
            self.kept[n] = gathered(value)
        return value


def run_example(captured: Captured, wanted: set[Node]) -> dict[Node, Any]:
    """The values of these nodes, and all numbers: on the first sample, if any number will do."""
    inputs = captured.inputs
    leaves = input_leaves(captured.module, inputs.arguments, inputs.keywords)
    one = [leaf[:1] if 0 in inputs.dynamic.get(id(leaf), {}) else leaf for leaf in leaves]
    try:
        return _run(captured, wanted, one)
    except Exception:  # some need an even number, or more than one
        return _run(captured, wanted, leaves)


def _run(captured: Captured, wanted: set[Node], leaves: list[Any]) -> dict[Node, Any]:
    recorder = _Recorder(captured.module, wanted)
    # What the network writes to its inputs must not reach the caller's.
    leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    written = [
        attribute(captured.module, str(node.target))
        for node in captured.module.graph.nodes
        if node.op == "get_attr" and is_written(node)
    ]
    with torch.no_grad():
        before = [buffer.clone() for buffer in written]
        try:
            recorder.run(*leaves, enable_io_processing=False)
        finally:  # these are still the model's own
            for buffer, value in zip(written, before, strict=True):
                buffer.copy_(value)
    return recorder.kept


def error_of(
    segment: Segment, made: Made, values: dict[Node, Any], constants: Constants
) -> float | None:
    """The largest difference from the old layers in float64, over their largest value."""
    start: Tensor = values[segment.start]
    wide: dict[Node, Any] = {segment.start: start.double()}

    def value_of(node: Node) -> Any:
        if node not in wide:
            if node in values:
                wide[node] = values[node]
            elif node in constants:
                return constants[node]
            else:
                arguments, keywords = map_arg((node.args, node.kwargs), value_of)
                wide[node] = node.target(*arguments, **keywords)  # type: ignore[operator]
        return wide[node]

    with torch.no_grad():
        for step in segment.steps:  # in order: a network is deeper than a recursion may be
            value_of(step.node)
        want = wide[segment.end]
        got = made.run(start).double()
    finite = want.isfinite()
    if not torch.equal(got[~finite].nan_to_num(), want[~finite].nan_to_num()):
        return float("inf")
    if not finite.any():
        return None
    largest = float(want[finite].abs().max())
    error = float((got[finite] - want[finite]).abs().max())
    error = error / largest if largest > 0 else error
    return error if math.isfinite(error) else float("inf")
