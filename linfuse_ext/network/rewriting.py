"""The network with its merged layers: a GraphModule that shares nothing with the model."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Node

from ..modules import _make_conv, _make_linear
from .constants import Constants, attribute, is_written
from .layers import BiasMap, ScaleShift
from .maps import Convolution, Dense, Diagonal, Shape, View, dense, keeping_values
from .modules import module_of
from .naming import merged_name
from .operations import arguments_of
from .planning import Layer, Segment, as_layer
from .rules import by_channel
from .stretches import Graph, Step
from .unsharded import shard_like


class Made(NamedTuple):
    """A merged layer.

    Attributes:
        module: The layer; None for a mere reshape.
        flat: Whether it takes a sample flattened.
        in_shape: Of a sample before it.
        out_shape: Of a sample behind it.
    """

    module: nn.Module | None
    flat: bool
    in_shape: Shape
    out_shape: Shape

    def is_finite(self) -> bool:
        """Whether all weights are: not if they overflow the dtype, nor if 0 met infinity."""
        held = () if self.module is None else self.module.parameters()
        return all(bool(parameter.isfinite().all()) for parameter in held)

    def shard_like(self, steps: list[Step], constants: Constants) -> None:
        """Shards it as the steps that it was made of are sharded, if any is."""
        if self.module is not None:
            shard_like(self.module, constants.parameters_of(step.node for step in steps))

    def run(self, x: Tensor) -> Tensor:
        """What the network computes there."""
        y = x.reshape(x.shape[0], -1) if self.flat else x
        y = y if self.module is None else self.module(y)
        return y.reshape(x.shape[0], *self.out_shape)


def make_layer(segment: Segment, constants: Constants) -> Made:
    """Computes a merged layer in float64 and rounds it once to the dtype of the model.

    Args:
        segment: A run of neighbours that becomes a layer.
        constants: The values of the graph that it is in.

    Returns:
        The layer, in eval mode.
    """
    assert segment.layer is not None
    return _made_of(segment.layer, segment.start, segment.steps, constants)


def _made_of(layer: Layer, start: Node, steps: list[Step], constants: Constants) -> Made:
    value = start.meta["val"]
    parameters = constants.parameters_of(step.node for step in steps)
    grads = any(parameter.requires_grad for parameter in parameters)
    # What is made without a device of its own is made where the model is.
    with torch.no_grad(), torch.device(value.device), keeping_values():
        return _make(layer, value.dtype, grads)


def _make(layer: Layer, dtype: torch.dtype, grads: bool) -> Made:
    first, last = layer.maps[0], layer.maps[-1]
    shapes = (first.in_shape, last.out_shape)
    if layer.is_matrix:
        matrix, offset = dense(layer.maps)
        bias = None if offset is None else offset.to(dtype)
        linear = _make_linear(_rounded(matrix, dtype), bias, grads, grads, False)
        return Made(linear, True, *shapes)
    if isinstance(first, Convolution):
        return Made(_convolution(first, dtype, grads), False, *shapes)
    if isinstance(first, Dense):
        bias = None
        if first.offset is not None and all(n == 1 for n in first.offset.shape[:-1]):
            bias = first.offset.value.expand(first.out_shape).flatten()
            bias = bias[: first.weight.shape[0]].to(dtype)
        weight = _rounded(first.weight.value, dtype)
        module: nn.Module = _make_linear(weight, bias, grads, grads, False)
        if first.offset is not None and bias is None:
            module = BiasMap(module, _rounded(first.offset.value, dtype)).requires_grad_(grads)
        return Made(module.eval(), False, *shapes)
    if isinstance(first, Diagonal):
        shift = None if first.offset is None else _rounded(first.offset.value, dtype)
        scale = ScaleShift(_rounded(first.scale.value, dtype), shift)
        return Made(scale.requires_grad_(grads).eval(), False, *shapes)
    assert isinstance(first, View)
    return Made(None, False, *shapes)


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """In memory of its own: what was made of constants alone may be a model's parameter."""
    return value.to(dtype, copy=True).contiguous()


def _convolution(affine: Convolution, dtype: torch.dtype, grads: bool) -> nn.Module:
    settings, offset = affine.settings, affine.offset
    bias = None
    if offset is not None and by_channel(offset):
        bias = offset.value.expand(settings.out_channels, *offset.shape[1:]).flatten()
        bias = _rounded(bias, dtype)
    weight = _rounded(affine.weight.value, dtype)
    conv = _make_conv(settings, weight, bias, grads, grads)
    if offset is None or bias is not None:
        return conv.eval()
    bias_map = _rounded(offset.value.expand(affine.out_shape), dtype)
    return BiasMap(conv, bias_map).requires_grad_(grads).eval()


class Rewriter:
    """Puts merged layers into a graph, and gives it a root of its own."""

    def __init__(self, module: GraphModule, graph: Graph, constants: Constants) -> None:
        """For a captured graph, which is changed."""
        self._module = module
        self._graph = graph
        self._constants = constants
        self._layers: dict[str, nn.Module] = {}
        self._by_weight: dict[tuple[Any, ...], str] = {}
        self._now: dict[Node, Node] = {}  # what stands for a node that was replaced

    def replace(self, segment: Segment, made: Made) -> None:
        """Puts a merged layer in the place of its run."""
        name = merged_name(segment.steps, self._layers)
        self._replace(segment.start, segment.end, made, name)

    def _replace(self, start: Node, end: Node, made: Made, name: str) -> None:
        graph = self._module.graph
        with graph.inserting_before(end):
            value = self._now.get(start, start)
            if made.flat and len(made.in_shape) != 1:
                value = _reshaped(graph, value, (math.prod(made.in_shape),))
            if made.module is not None:
                self._layers[name] = made.module
                value = graph.create_node("call_module", name, (value,))
            behind = (math.prod(made.out_shape),) if made.flat else made.out_shape
            if behind != made.out_shape or made.module is None:
                value = _reshaped(graph, value, made.out_shape)
        self._stand_in(end, value)

    def _stand_in(self, old: Node, new: Node) -> None:
        """One node in the place of another, which dead code elimination then takes out."""
        new.meta["val"] = old.meta["val"]
        old.replace_all_uses_with(new)
        self._now[old] = new

    def keep(self, step: Step) -> None:
        """Puts a layer in the place of a convolution or Linear that stays, or of our own layers."""
        maps = step.operands[0][1]
        if self._graph.is_own_layer(step):
            layer = as_layer(maps[0])
            assert isinstance(layer, Layer), "it was one before"
            made = _made_of(layer, step.operands[0][0], [step], self._constants)
            made.shard_like([step], self._constants)
            self._replace(step.operands[0][0], step.node, made, module_of(step.node)[0])
            return
        if step.join is not None or len(maps) != 1:
            return
        affine, node = maps[0], step.node
        sources = [n for n in node.all_input_nodes if n in self._constants]
        if not sources or any(source.op != "get_attr" for source in sources):
            return
        if isinstance(affine, Convolution):
            settings = affine.settings
            if any(low != high for low, high in settings.padding):
                return
        elif isinstance(affine, Dense):
            settings = None
        else:
            return
        if not step.multiplies or "input" not in arguments_of(node):
            return
        biases = [attribute(self._module, str(source.target)) for source in sources[1:]]
        if any(bias.shape != affine.out_shape[-1:] for bias in biases if settings is None):
            return
        key = (affine.__class__, settings, *(str(source.target) for source in sources))
        name = self._by_weight.get(key)
        if name is None:
            name = merged_name([step], self._layers)
            self._by_weight[key] = name
            self._layers[name] = self._layer_of(settings, sources)
        value = self._now.get(step.operands[0][0], step.operands[0][0])
        with self._module.graph.inserting_before(node):
            self._stand_in(node, self._module.graph.create_node("call_module", name, (value,)))

    def _layer_of(self, settings: Any, sources: list[Node]) -> nn.Module:
        weight, *rest = (attribute(self._module, str(source.target)) for source in sources)
        bias = rest[0] if rest else None
        with torch.no_grad():
            if settings is None:
                layer: nn.Module = _make_linear(weight, bias, False, False, False)
            else:
                layer = _make_conv(settings, weight, bias, False, False)
        # The model's own parameters, for now: the root copies each of them once.
        layer.weight = _as_parameter(weight)
        if bias is not None:
            layer.bias = _as_parameter(bias)
        return layer.eval()

    def finish(self) -> GraphModule:
        """The network, with a copy of every parameter and buffer that it still uses."""
        graph = self._module.graph
        for node in reversed(list(graph.nodes)):
            if not node.users and node.op != "output" and _may_go(node):
                graph.erase_node(node)
        root = nn.Module()
        self._yield_names()
        for name, layer in self._layers.items():
            _put(root, name, layer)
        for node in graph.nodes:
            if node.op == "get_attr" and not _has(root, str(node.target)):
                _put(root, str(node.target), attribute(self._module, str(node.target)))
        _copy_all(root)
        graph._tracer_cls = None  # that of torch.export cannot load a pickle
        result = GraphModule(root, graph, class_name="Collapsed")
        return result.eval()

    def _yield_names(self) -> None:
        """Renames merged layers that have the path of a module of which something is still used."""
        graph = self._module.graph
        held = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
        for name in list(self._layers):
            inside = [path.removeprefix(f"{name}.") for path in held if path.startswith(f"{name}.")]
            kept = (attribute(self._module, f"{name}.{rest}") for rest in inside)
            layer = self._layers[name]
            if all(
                _has(layer, r) and attribute(layer, r) is k
                for r, k in zip(inside, kept, strict=True)
            ):
                continue
            count = 2
            while f"{name}_{count}" in self._layers or f"{name}_{count}" in held:
                count += 1
            self._layers[f"{name}_{count}"] = self._layers.pop(name)
            for node in graph.nodes:
                if node.op == "call_module" and node.target == name:
                    node.target = f"{name}_{count}"


def _may_go(node: Node) -> bool:
    # torch.fx asks the module that owns a graph, which does not have the merged layers yet.
    return node.op in ("get_attr", "call_module") or not node.is_impure()


def _as_parameter(value: Tensor) -> nn.Parameter:
    if isinstance(value, nn.Parameter):
        return value
    return nn.Parameter(value, requires_grad=False)


def _reshaped(graph: FxGraph, value: Node, shape: Shape) -> Node:
    if len(shape) == 1:
        return (
            graph.call_function(torch.flatten, (value, 1))
            if _rank(value) != 1
            else (graph.call_function(torch.unsqueeze, (value, 1)))
        )
    if shape == ():
        return graph.call_function(torch.flatten, (value,))
    flat = value if _rank(value) == 2 else graph.call_function(torch.flatten, (value, 1))
    return graph.call_function(torch.unflatten, (flat, 1, list(shape)))


def _rank(value: Node) -> int:
    known = value.meta.get("val")
    return known.dim() if isinstance(known, Tensor) else 2


def _has(root: nn.Module, path: str) -> bool:
    try:
        attribute(root, path)
    except AttributeError:
        return False
    return True


def _put(root: nn.Module, path: str, value: Any) -> None:
    """Enters a module, parameter, buffer or anything else under a path."""
    *parents, name = path.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = getattr(root, parent)
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        root.register_buffer(name, value)
    else:
        setattr(root, name, value)


def _copy_all(root: nn.Module) -> None:
    """Replaces every tensor by a copy, one tensor by one copy: what was tied stays tied."""
    copies: dict[int, Tensor] = {}
    for module in root.modules():
        for table in (module._parameters, module._buffers):
            for name, value in table.items():
                if value is None:
                    continue
                if id(value) not in copies:
                    copy = value.detach().clone()
                    if isinstance(value, nn.Parameter):
                        copy = nn.Parameter(copy, requires_grad=value.requires_grad)
                    copies[id(value)] = copy
                table[name] = copies[id(value)]  # type: ignore[assignment]


def drop_nothing(module: GraphModule, graph: Graph) -> bool:
    """Takes out what changes nothing, as dropout in eval mode; says whether there was any."""
    found = [step for step in graph.steps.values() if step.is_nothing and not _must_copy(step)]
    stays: dict[Node, Node] = {}
    for step in found:
        value = step.operands[0][0]
        stays[step.node] = stays.get(value, value)
        step.node.replace_all_uses_with(stays[step.node])
    for step in reversed(found):
        module.graph.erase_node(step.node)
    if found:  # what only led there
        module.graph.eliminate_dead_code()
        module.recompile()
    return bool(found)


def _must_copy(step: Step) -> bool:
    """Whether a copy is there for its memory: what it was made of is written to, or it is given."""
    if step.node.target is not torch.ops.aten.clone.default:
        return False
    given = any(user.op == "output" for user in step.node.users)
    return given or is_written(step.operands[0][0])
