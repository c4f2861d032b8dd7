"""A sharded network as torch.export can read it, and the sharded tensors back into its graph.

torch.export reads neither parameters and buffers that are DTensors nor FSDP2's modules. What it
needs of a tensor is its shape; the values are read when a merge needs them.
"""

from __future__ import annotations

import functools
import itertools
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from ..meshes import (
    check_rules,
    fsdp_module,
    gathered,
    is_of_a_mesh,
    is_sharded,
    let_go,
    placed_like,
)


def unsharded(model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """A network that reads as the sharded one does on one device.

    Args:
        model: Any network. One of FSDP2 that still holds gathered parameters lets go of them.

    Returns:
        The model itself where nothing is sharded. Otherwise a copy without FSDP2's classes and
        without what torch.distributed does before and after a layer, whose sharded parameters and
        buffers have shapes but no values; and these, by name.
    """
    for part in model.modules():
        let_go(part)
    named = itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    sharded = {name: tensor for name, tensor in named if is_sharded(tensor)}
    if not sharded:
        return model, {}
    check_rules("collapse", *next(iter(sharded.items())))
    stand_ins: dict[int, Any] = {}
    for tensor in sharded.values():  # of tied ones there is one
        stand_ins.setdefault(id(tensor), _without_values(tensor))
    return copied(model, stand_ins), sharded


def _without_values(tensor: Tensor) -> Tensor:
    """A tensor of the same kind and shape that takes no memory."""
    one = torch.empty((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(one, requires_grad=tensor.requires_grad)
    return one


def put_back(graph: GraphModule, sharded: dict[str, Any]) -> None:
    """Gives a captured graph the sharded tensors in place of what stood for them."""
    for name, tensor in sharded.items():
        path, _, last = name.rpartition(".")
        try:
            owner = graph.get_submodule(path)
        except AttributeError:
            continue
        if last in owner._parameters or last in owner._buffers:
            setattr(owner, last, tensor)


def shard_like(module: nn.Module, sources: list[Any]) -> None:
    """Shards a new layer as the largest of the sharded parameters that it was made of.

    Args:
        module: A merged layer, with the same values on every rank; it is changed.
        sources: Those parameters; the others may be among them.
    """
    sharded = [source for source in sources if is_sharded(source)]
    if not sharded:
        return
    layout = max(sharded, key=lambda source: int(source.numel()))
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                # Of a bias, a map of biases or a scale only the channels are split.
                axes = parameter.dim() if name == "weight" else 1
                placed = placed_like(parameter.detach(), layout, axes)
                setattr(part, name, nn.Parameter(placed, requires_grad=parameter.requires_grad))


def copied(module: nn.Module, made: dict[int, Any]) -> nn.Module:
    """A copy of a module and of all that leads to its parts, without FSDP2 and the mesh's hooks.

    Args:
        module: Any module; it and all that it holds stay as they are.
        made: By id, what stands in for a tensor, or for a module; copies are entered. A DTensor
            that is not in it is gathered: a layer that is held, but is no part.
    """
    if id(module) in made:
        known: nn.Module = made[id(module)]
        return known
    fsdp, kind = fsdp_module(), type(module)
    if fsdp is not None and isinstance(module, fsdp):
        kind = next(each for each in kind.__mro__ if not issubclass(each, fsdp))
    copy: nn.Module = object.__new__(kind)
    made[id(module)] = copy

    def of_copies(value: Any) -> Any:
        return pytree.tree_map(lambda leaf: _copied_leaf(leaf, made), value)

    attributes = vars(copy)
    for name, value in vars(module).items():
        if name.endswith("_hooks") and isinstance(value, dict):
            kept = {key: hook for key, hook in value.items() if not is_of_a_mesh(hook)}
            value = type(value)(kept)
        elif name in ("_parameters", "_buffers"):
            attributes[name] = {key: _copied_tensor(each, made) for key, each in value.items()}
            continue
        attributes[name] = of_copies(value)
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(module, name):
                setattr(copy, name, of_copies(getattr(module, name)))
    return copy


def _copied_leaf(value: Any, made: dict[int, Any]) -> Any:
    """What leads to a module leads to its copy: lists of layers and bound methods do."""
    if isinstance(value, nn.Module):
        return copied(value, made)
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _copied_leaf(value.__self__, made))
    if type(value) is functools.partial:
        parts = (value.func, value.args, value.keywords)
        func, args, keywords = pytree.tree_map(lambda leaf: _copied_leaf(leaf, made), parts)
        return functools.partial(func, *args, **keywords)
    return value


def _copied_tensor(tensor: Tensor | None, made: dict[int, Any]) -> Tensor | None:
    if tensor is None or not is_sharded(tensor):
        return tensor
    if id(tensor) not in made:
        whole = gathered(tensor.detach())
        if isinstance(tensor, nn.Parameter):
            whole = nn.Parameter(whole, requires_grad=tensor.requires_grad)
        made[id(tensor)] = whole
    found: Tensor = made[id(tensor)]
    return found
