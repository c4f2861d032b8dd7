"""A model as a graph of ATen operations, by torch.export: none that writes, one result each.

The batch is axis 0 of every tensor input and may have any size. Nothing is decomposed further than
torch.export does on its own, so that a convolution stays a convolution.
"""

from __future__ import annotations

import inspect
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node, _pytree
from torch.utils import _pytree as pytree

from .unsharded import put_back, unsharded

_OP = "collapse"
_ATEN = torch.ops.aten


class Inputs(NamedTuple):
    """Example inputs.

    Attributes:
        arguments: Positional.
        keywords: By name.
        dynamic: Which axes of which of these tensors may have any size: by id, as torch.export
            wants them.
    """

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    dynamic: dict[int, dict[int, Any]]

    def dynamic_shapes(self, forward: Callable[..., Any]) -> dict[str, Any]:
        """Those axes, by the names of the arguments of a forward."""
        bound = dict(inspect.signature(forward).bind(*self.arguments, **self.keywords).arguments)
        shapes: dict[str, Any] = pytree.tree_map(lambda leaf: self.dynamic.get(id(leaf)), bound)
        return shapes


class Captured(NamedTuple):
    """A model as a graph, with the model's own parameters, and its inputs."""

    module: GraphModule
    inputs: Inputs


def capture(model: Any, example_inputs: Any) -> Captured:
    """Captures a module in eval mode, or takes the graph of an exported program.

    Args:
        model: An nn.Module or an ExportedProgram.
        example_inputs: A tensor, a sequence of positional inputs or a mapping of keyword inputs;
            None only for a program, for the inputs that it was exported with.

    Returns:
        The graph.

    Raises:
        TypeError: An argument is of no such type.
        ValueError: The model is in training mode, or torch.export cannot capture it; the message
            has its reason.
    """
    if isinstance(model, ExportedProgram):
        arguments, keywords = _inputs_of_program(model, example_inputs)
        module = _graph_of(model)
        inputs = _dynamic_axes(module, arguments, keywords)
    elif isinstance(model, nn.Module):
        if example_inputs is None:
            raise TypeError(f"{_OP}: `example_inputs` must be given for a module, got None")
        _check_module(model)
        arguments, keywords = _two_samples(*_as_inputs(example_inputs))
        batch = _batch_of((arguments, keywords))
        leaves = pytree.tree_leaves((arguments, keywords))
        dynamic = {id(leaf): {0: Dim("batch")} for leaf in leaves if _has_batch(leaf, batch)}
        inputs = Inputs(arguments, keywords, dynamic)
        readable, sharded = unsharded(model)
        module = _graph_of(_export(readable, inputs))
        put_back(module, sharded)
    else:
        raise TypeError(
            f"{_OP}: `model` must be an nn.Module or a torch.export.ExportedProgram, "
            f"got {type(model).__name__}"
        )
    return Captured(_normalised(module), inputs)


def _check_module(model: nn.Module) -> None:
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"{_OP}: `model` must hold values, got {name} on the meta device")
        if tensor.is_inference():
            raise ValueError(
                f"{_OP}: `model` must not be made in inference mode, which torch.export cannot "
                f"capture, got the inference tensor {name}"
            )
    training = [name or "the model itself" for name, part in model.named_modules() if part.training]
    if training:
        shown = ", ".join(training[:3]) + (", ..." if len(training) > 3 else "")
        raise ValueError(
            f"{_OP}: `model` must be in eval mode, got training mode in {shown}; "
            "call model.eval() first"
        )


def _as_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return tuple(example_inputs), {}
    raise TypeError(
        f"{_OP}: `example_inputs` must be a tensor, a sequence of positional inputs or a mapping "
        f"of keyword inputs, got {type(example_inputs).__name__}"
    )


def _inputs_of_program(
    program: ExportedProgram, example_inputs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if example_inputs is not None:
        return _as_inputs(example_inputs)
    if program.example_inputs is None:
        raise ValueError(
            f"{_OP}: `example_inputs` must be given for a program that was saved without its own"
        )
    arguments, keywords = program.example_inputs
    return tuple(arguments), dict(keywords)


def _batch_of(inputs: Any) -> int:
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    if not tensors or any(tensor.dim() == 0 for tensor in tensors[:1]):
        raise ValueError(
            f"{_OP}: `example_inputs` must hold a tensor whose axis 0 is the batch, "
            f"got {[tuple(tensor.shape) for tensor in tensors]}"
        )
    size: int = tensors[0].shape[0]
    if size == 0:
        raise ValueError(f"{_OP}: `example_inputs` must hold at least one sample, got none")
    return size


def _has_batch(leaf: Any, batch: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch


def _two_samples(
    arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs with at least two samples: torch.export takes an axis of size 1 for fixed."""
    if _batch_of((arguments, keywords)) > 1:
        return arguments, keywords

    def twice(leaf: Any) -> Any:
        return torch.cat([leaf, leaf]) if _has_batch(leaf, 1) else leaf

    doubled: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(twice, (arguments, keywords))
    return doubled


def _export(model: nn.Module, inputs: Inputs) -> ExportedProgram:
    with _reasons(), torch.no_grad():
        shapes = inputs.dynamic_shapes(model.forward)
        return torch.export.export(model, inputs.arguments, inputs.keywords, dynamic_shapes=shapes)


@contextmanager
def _reasons() -> Iterator[None]:
    """What torch.export says, as an error of ours."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise ValueError(
            f"{_OP}: `model` must be something that torch.export can capture with a batch of any "
            f"size, but it says: {reason}\nEvery input whose axis 0 has the size of the first "
            "one's is taken for a batch: if one is not, give another number of samples. A program "
            "that was exported in another way (strict=True, or with fixed sizes) can be given in "
            "place of the model."
        ) from error


def _graph_of(program: ExportedProgram) -> GraphModule:
    """The graph of a program, without operations that write into their arguments."""
    writes = any(
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        for node in program.graph.nodes
    )
    if writes:
        with _reasons(), _dropouts_as_aliases(program):
            program = program.run_decompositions({})
    module = program.module()
    assert isinstance(module, GraphModule)
    return module


@contextmanager
def _dropouts_as_aliases(program: ExportedProgram) -> Iterator[None]:
    """In eval mode dropout returns its argument; torch's functionalisation takes it for a copy."""
    found = [
        (node, node.args)
        for node in program.graph.nodes
        if node.target is _ATEN.dropout.default and node.args[2:] == (False,)
    ]
    try:
        for node, arguments in found:
            node.target, node.args = _ATEN.alias.default, arguments[:1]
        yield
    finally:
        for node, arguments in found:
            node.target, node.args = _ATEN.dropout.default, arguments


def input_leaves(module: GraphModule, arguments: Any, keywords: Any) -> list[Any]:
    """The inputs in the order of the graph's placeholders."""
    spec = module.graph._codegen.pytree_info.in_spec  # type: ignore[attr-defined]
    leaves: list[Any] = _pytree.tree_flatten_spec((list(arguments), keywords), spec)
    return leaves


def _dynamic_axes(
    module: GraphModule, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> Inputs:
    """The inputs, with the axes that a program was exported with as dynamic."""
    holes = [node for node in module.graph.nodes if node.op == "placeholder"]
    symbols = []
    for node in holes:
        value = node.meta.get("val")
        shape = value.shape if isinstance(value, Tensor) else ()
        symbols.append([n for n, size in enumerate(shape) if isinstance(size, torch.SymInt)])
    if any(0 in axes for axes in symbols):
        arguments, keywords = _two_samples(arguments, keywords)
    leaves = input_leaves(module, arguments, keywords)
    pairs = zip(leaves, symbols, strict=True)
    dynamic = {id(leaf): dict.fromkeys(axes, Dim.AUTO) for leaf, axes in pairs if axes}
    return Inputs(arguments, keywords, dynamic)


# --- operations with one result each, in the words that READERS knows


def _normalised(module: GraphModule) -> GraphModule:
    graph = module.graph
    sizes: dict[Any, Node] = {}  # the node that has the value of a symbol
    for node in list(graph.nodes):
        if node.op == "call_module" and str(node.target).startswith("_guards"):
            graph.erase_node(node)
        elif node.target is _ATEN.sym_size.int and isinstance(node.meta.get("val"), torch.SymInt):
            sizes.setdefault(node.meta["val"].node.expr, node)
        elif node.op == "call_function":
            if node.target in (_ATEN.view.default, _ATEN._unsafe_view.default):
                # A view fits only the strides of the example.
                node.target = _ATEN.reshape.default
            elif node.target in (_ATEN.reshape_as.default, _ATEN.view_as.default):
                _take_sizes(node, sizes)
            elif node.target is operator.getitem:
                _replace_part(graph, node)
    graph.eliminate_dead_code()
    module.recompile()
    return module


def _take_sizes(node: Node, sizes: dict[Any, Node]) -> None:
    """A reshape to the sizes of another value, without that value: it is not used for more."""
    shape = [
        size if isinstance(size, int) else sizes.get(size.node.expr)
        for size in node.meta["val"].shape
    ]
    if None not in shape:
        node.target = _ATEN.reshape.default
        node.args = (node.args[0], shape)


def _replace_part(graph: torch.fx.Graph, node: Node) -> None:
    """One of several results as an operation of its own."""
    whole, which = node.args
    if not isinstance(whole, Node) or whole.op != "call_function" or not isinstance(which, int):
        return
    call: tuple[Any, tuple[Any, ...]] | None = None
    if whole.target is _ATEN._native_batch_norm_legit_no_training.default and which == 0:
        value, weight, bias, mean, var, momentum, eps = whole.args
        call = (
            _ATEN.batch_norm.default,
            (value, weight, bias, mean, var, False, momentum, eps, False),
        )
    elif whole.target in _SPLITS:
        call = _part_of_split(whole, which)
    elif whole.target is _ATEN.unbind.int:
        dim = whole.args[1] if len(whole.args) > 1 else 0
        call = (_ATEN.select.int, (whole.args[0], dim, which))
    if call is None:
        return
    with graph.inserting_before(node):
        part = graph.call_function(*call)
    part.meta = dict(node.meta)
    node.replace_all_uses_with(part)
    graph.erase_node(node)


_SPLITS = {
    _ATEN.split.Tensor,
    _ATEN.split.sizes,
    _ATEN.split_with_sizes.default,
    _ATEN.chunk.default,
    _ATEN.unsafe_split.Tensor,
}


def _part_of_split(whole: Node, which: int) -> tuple[Any, tuple[Any, ...]] | None:
    value = whole.args[0]
    dim = whole.args[2] if len(whole.args) > 2 else whole.kwargs.get("dim", 0)
    parts = whole.meta["val"]
    if not isinstance(value, Node) or not isinstance(dim, int):
        return None
    sizes = [part.shape[dim] for part in parts]
    if not all(isinstance(size, int) for size in sizes):
        return None
    start = sum(sizes[:which])
    return _ATEN.slice.Tensor, (value, dim, start, start + sizes[which])
