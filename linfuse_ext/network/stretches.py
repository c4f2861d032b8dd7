"""Which nodes of a graph can become one: stretches with a single source and no way out.

A step is a node that READERS can read. Of two values, `a` dominates `v` if every way from the
graph's inputs to `v` goes through `a` (T. Lengauer and R. E. Tarjan, "A fast algorithm for finding
dominators in a flowgraph", 1979, has the words; here the graph has no cycles, and one pass is
enough). If besides all between them is steps, and no value between them is used anywhere else, then
`v` is one affine map of `a`: the two are the ends of a stretch.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch.fx import GraphModule, Node

from ..composition import Refusal
from . import readers  # noqa: F401  (fills the table of operations)
from .constants import Constants
from .maps import AffineMap, View, identity
from .modules import module_of
from .operations import Join, read
from .rules import compose


class Step(NamedTuple):
    """A node that is an affine map of its operands, sample by sample."""

    node: Node
    operands: list[tuple[Node, list[AffineMap]]]
    join: Join | None
    flops: int
    params: int
    multiplies: bool

    @property
    def is_nothing(self) -> bool:
        """Whether the value goes through unchanged, as through dropout in eval mode."""
        return self.join is None and not self.operands[0][1]


def is_view(step: Step) -> bool:
    """Whether a step does nothing but reshape."""
    maps = [affine for _, each in step.operands for affine in each]
    return step.join is None and all(isinstance(affine, View) for affine in maps)


class Link(NamedTuple):
    """From one value to the next that all ways lead through: a step, or a net of several."""

    start: Node
    end: Node
    steps: list[Step]  # in the order of the graph; the last is that of `end`


class Stretch(NamedTuple):
    """A chain of links; what is inside is used nowhere else."""

    links: list[Link]


class Graph:
    """The steps of a captured graph, and how they hang together."""

    def __init__(self, module: GraphModule, constants: Constants) -> None:
        """Reads every node of the graph."""
        self.steps: dict[Node, Step] = {}
        self._order = {node: n for n, node in enumerate(module.graph.nodes)}
        for node in module.graph.nodes:
            reading = read(node, constants)
            if reading is not None:
                self.steps[node] = Step(
                    node,
                    reading.operands,
                    reading.join,
                    reading.flops,
                    _count_parameters(node, constants),
                    reading.multiplies,
                )
        self._folded = _fold_layers(self.steps)
        self._dominator: dict[Node, Node | None] = {}
        self._depth: dict[Node, int] = {}
        for node, step in self.steps.items():
            self._enter(node, step)

    def _enter(self, node: Node, step: Step) -> None:
        found: Node | None = step.operands[0][0]
        for operand, _ in step.operands[1:]:
            found = self._common(found, operand)
        self._dominator[node] = found
        self._depth[node] = 0 if found is None else self._depth.get(found, 0) + 1

    def _common(self, one: Node | None, other: Node | None) -> Node | None:
        """The last value that dominates both."""
        while one is not other:
            if one is None or other is None:
                return None
            if self._depth.get(one, 0) >= self._depth.get(other, 0):
                one = self._dominator.get(one)
            else:
                other = self._dominator.get(other)
        return one

    def _between(self, start: Node, end: Node) -> set[Node]:
        """The values behind `start` that `end` is made of, `end` included."""
        found: set[Node] = set()
        todo = [end]
        while todo:
            node = todo.pop()
            if node not in found:
                found.add(node)
                todo += [
                    operand for operand, _ in self.steps[node].operands if operand is not start
                ]
        return found

    def _step_of(self, node: Node) -> Node:
        while node in self._folded:
            node = self._folded[node]
        return node

    def is_own_layer(self, step: Step) -> bool:
        """Whether a step is a layer of this package, which export took apart."""
        return module_of(step.node)[1] in _OWN_LAYERS and step.node in self._folded.values()

    def stretch(self, end: Node) -> Stretch | None:
        """The longest stretch that ends with this step; None where its operands meet no more."""
        chain: list[Node] = [end]
        length = 0  # of the longest chain from which no way leads out
        inside: set[Node] = set()
        leaving: set[Node] = set()  # users of what is inside that are not
        start = self._dominator[end]
        while start is not None:
            added = self._between(start, chain[-1]) - inside
            inside |= added
            for node in added - {end}:
                leaving |= {self._step_of(user) for user in node.users}
            leaving -= inside
            chain.append(start)
            length = length if leaving else len(chain)
            start = self._dominator.get(start)
        if length == 0:
            return None
        return Stretch([self._link(a, b) for a, b in pairwise(chain[:length][::-1])])

    def _link(self, start: Node, end: Node) -> Link:
        inside = sorted(self._between(start, end), key=self._order.__getitem__)
        return Link(start, end, [self.steps[node] for node in inside])


_OWN_LAYERS = ("linfuse_ext.network.layers.BiasMap", "linfuse_ext.network.layers.ScaleShift")


def _fold_layers(steps: dict[Node, Step]) -> dict[Node, Node]:
    """Puts back what export took apart: padding that repeats the input, and this package's layers.

    Returns:
        For each node that is no step of its own now, the one that it went into.
    """
    folded: dict[Node, Node] = {}
    for node, step in list(steps.items()):
        before = steps.get(step.operands[0][0])
        if before is None or len(before.node.users) > 1 or before.join or step.join:
            continue
        if before.is_nothing or step.is_nothing:
            continue
        if not _are_one_layer(before.node, node):
            continue
        layer: AffineMap | Refusal = identity(before.operands[0][1][0].in_shape)
        for affine in (*before.operands[0][1], *step.operands[0][1]):
            layer = layer if isinstance(layer, Refusal) else compose(affine, layer)
        if isinstance(layer, Refusal):
            continue
        steps[node] = step._replace(
            operands=[(before.operands[0][0], [layer])],
            flops=before.flops + step.flops,
            params=before.params + step.params,
            multiplies=before.multiplies or step.multiplies,
        )
        del steps[before.node]
        folded[before.node] = node
    return folded


def _are_one_layer(before: Node, node: Node) -> bool:
    path, kind = module_of(node)
    inner, _ = module_of(before)
    if kind in _OWN_LAYERS:
        return inner == path or inner.startswith(f"{path}.")
    padded = before.target in _PADDING and ".conv." in kind
    return padded and inner == path


_PADDING = {torch.ops.aten.pad.default, torch.ops.aten.constant_pad_nd.default} | {
    getattr(torch.ops.aten, f"{kind}_pad{n}d").default
    for kind in ("reflection", "replication")
    for n in (1, 2, 3)
}


def _count_parameters(node: Node, constants: Constants) -> int:
    found: set[Node] = set()
    for source in node.all_input_nodes:
        if source in constants:
            found |= constants.parameters(source)
    return sum(constants.deferred(parameter).size for parameter in found)
