"""A model as a graph of ATen operations, by torch.export: none that writes, one result each.

The batch is axis 0 of every tensor input and may have any size. Nothing is decomposed further than
torch.export does on its own, so that a convolution stays a convolution.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

_OP = "collapse"
_ATEN = torch.ops.aten


class Captured(NamedTuple):
    """A model as a graph.

    Attributes:
        module: The graph, with the model's own parameters.
        arguments: Example inputs, positional.
        keywords: Example inputs by name.
        dynamic_shapes: Of the inputs, as torch.export wants them.
    """

    module: GraphModule
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    dynamic_shapes: Any


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
        program, shapes = _functional(model), None
    elif isinstance(model, nn.Module):
        if example_inputs is None:
            raise TypeError(f"{_OP}: `example_inputs` must be given for a module, got None")
        _check_eval(model)
        arguments, keywords = _as_inputs(example_inputs)
        program, shapes = _export(model, arguments, keywords)
    else:
        raise TypeError(
            f"{_OP}: `model` must be an nn.Module or a torch.export.ExportedProgram, "
            f"got {type(model).__name__}"
        )
    module = program.module(check_guards=False)
    assert isinstance(module, GraphModule)
    return Captured(_normalised(module), arguments, keywords, shapes)


def _check_eval(model: nn.Module) -> None:
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


def _export(
    model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[ExportedProgram, Any]:
    batch = _batch_of((arguments, keywords))
    # An axis of size 1 is taken for fixed: two samples show that it is not.
    count = batch if batch > 1 else 2

    def repeated(leaf: Any) -> Any:
        if _has_batch(leaf, batch) and batch == 1:
            return torch.cat([leaf, leaf])
        return leaf

    def dynamic(leaf: Any) -> Any:
        return {0: Dim("batch")} if _has_batch(leaf, count) else None

    traced = pytree.tree_map(repeated, (arguments, keywords))
    shapes = pytree.tree_map(dynamic, traced)
    given = shapes[0] if not keywords else {**_names(model, shapes[0]), **shapes[1]}
    try:
        with torch.no_grad():
            return _functional(torch.export.export(model, *traced, dynamic_shapes=given)), given
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise ValueError(
            f"{_OP}: `model` must be something that torch.export can capture with a batch of any "
            f"size, but it says: {reason}\nA program that was exported in another way "
            "(strict=True, or with fixed sizes) can be given in place of the model."
        ) from error


def _has_batch(leaf: Any, batch: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch


def _names(model: nn.Module, shapes: tuple[Any, ...]) -> dict[str, Any]:
    """Positional shapes by the names of the forward's arguments."""
    names = model.forward.__code__.co_varnames[1 : 1 + len(shapes)]
    return dict(zip(names, shapes, strict=True))


def _functional(program: ExportedProgram) -> ExportedProgram:
    """The program without operations that write into their arguments."""
    writes = any(
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        for node in program.graph.nodes
    )
    return program.run_decompositions({}) if writes else program


# --- operations with one result each, in the words that READERS knows


def _normalised(module: GraphModule) -> GraphModule:
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "call_module" and str(node.target).startswith("_guards"):
            graph.erase_node(node)
        elif node.op == "call_function":
            if node.target in (_ATEN.view.default, _ATEN._unsafe_view.default):
                # A view fits only the strides of the example.
                node.target = _ATEN.reshape.default
            elif node.target is operator.getitem:
                _replace_part(graph, node)
    graph.eliminate_dead_code()
    module.recompile()
    return module


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
