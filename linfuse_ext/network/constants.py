"""Which values of a graph depend on no input, and what they are."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ..meshes import gathered
from .maps import Deferred


def attribute(module: torch.nn.Module, path: str) -> Any:
    """What a get_attr node with this target holds."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _is_pure(node: Node) -> bool:
    """Whether a call gives the same each time, and changes nothing."""
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    random = torch.Tag.nondeterministic_seeded in node.target.tags
    return not random and not node.target._schema.is_mutable


class Constants:
    """The constant values of a graph.

    A parameter or buffer is one unless the graph writes to it; so is what pure operations make of
    constants alone: a reparametrised weight, a mask, a scale.
    """

    def __init__(self, module: GraphModule) -> None:
        """Finds the constants; their values are made when asked for."""
        self._module = module
        self._nodes: set[Node] = set()
        held = [node for node in module.graph.nodes if node.op == "get_attr"]
        # One buffer may be a part of another.
        written = {_memory(attribute(module, node.target)) for node in held if is_written(node)}
        for node in module.graph.nodes:
            if node.op == "get_attr":
                value = attribute(module, node.target)
                constant = isinstance(value, Tensor) and _memory(value) not in written
            else:
                constant = node.op == "call_function" and _is_pure(node)
                constant &= all(source in self._nodes for source in node.all_input_nodes)
            if constant:
                self._nodes.add(node)

    def __contains__(self, value: object) -> bool:
        return isinstance(value, Node) and value in self._nodes

    def __getitem__(self, node: Node) -> Any:
        """The value of a constant as the model has it, only wider: floating point in float64."""
        value = self._own(node)
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    def _own(self, node: Node) -> Any:
        """In the model's own precision: what rounds a weight must round the same one."""
        if node.op == "get_attr":
            return gathered(attribute(self._module, str(node.target)).detach())
        with torch.no_grad():
            arguments, keywords = map_arg((node.args, node.kwargs), self._own)
            return node.target(*arguments, **keywords)  # type: ignore[operator]

    def deferred(self, node: Node, shape: tuple[int, ...] | None = None) -> Deferred:
        """A constant as an entry of the algebra, in another shape if given."""
        own = tuple(node.meta["val"].shape) if "val" in node.meta else tuple(self[node].shape)
        shape = own if shape is None else shape
        return Deferred(shape, lambda: self[node].reshape(shape))

    def parameters(self, node: Node) -> set[Node]:
        """The parameters that a constant is made of, as get_attr nodes."""
        if node.op == "get_attr":
            value = attribute(self._module, str(node.target))
            return {node} if isinstance(value, torch.nn.Parameter) else set()
        found = set()
        for source in node.all_input_nodes:
            found |= self.parameters(source)
        return found

    def parameters_of(self, nodes: Iterable[Node]) -> list[Tensor]:
        """The parameters that calls read by way of constants, in the order of their names."""
        constants = {source for node in nodes for source in node.all_input_nodes if source in self}
        names = {str(held.target) for node in constants for held in self.parameters(node)}
        return [attribute(self._module, name) for name in sorted(names)]


def _memory(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)


def is_written(node: Node) -> bool:
    """Whether the graph writes to what a node holds, as to a counter."""
    for user in node.users:
        target = user.target
        if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
            return True
    return False
