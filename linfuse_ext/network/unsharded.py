"""A sharded network as torch.export can read it, and the sharded tensors back into its graph.

torch.export reads neither parameters and buffers that are DTensors nor FSDP2's modules. What it
needs of a tensor is its shape; the values are read when a merge needs them.
"""

from __future__ import annotations

import itertools
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..meshes import check_rules, fsdp_module, is_of_a_mesh, is_sharded, let_go, placed_like


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
    if sharded:
        check_rules("collapse", *next(iter(sharded.items())))
    return (_copied(model, {}), sharded) if sharded else (model, {})


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


def _copied(module: nn.Module, made: dict[int, Any]) -> nn.Module:
    """A copy that shares everything with a module but its parameters, hooks and parts."""
    if id(module) in made:
        known: nn.Module = made[id(module)]
        return known
    fsdp, kind = fsdp_module(), type(module)
    if fsdp is not None and isinstance(module, fsdp):
        kind = next(each for each in kind.__mro__ if not issubclass(each, fsdp))
    copy: nn.Module = object.__new__(kind)
    made[id(module)] = copy
    attributes = vars(copy)
    for name, value in vars(module).items():
        if name.endswith("_hooks") and isinstance(value, dict):
            kept = {key: hook for key, hook in value.items() if not is_of_a_mesh(hook)}
            attributes[name] = type(value)(kept)
        elif name in ("_parameters", "_buffers"):
            attributes[name] = {key: _stand_in(tensor, made) for key, tensor in value.items()}
        else:
            attributes[name] = _of_copies(value, made)
    return copy


def _of_copies(value: Any, made: dict[int, Any]) -> Any:
    """An attribute that may hold modules, with their copies in their places.

    Lists of layers and bound methods lead to the sharded layers otherwise.
    """
    if isinstance(value, nn.Module):
        return _copied(value, made)
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
        return MethodType(value.__func__, _copied(value.__self__, made))
    kind = type(value)
    if kind not in (list, tuple, dict):
        return value
    if id(value) in made:
        return made[id(value)]
    if kind is tuple:
        return tuple(_of_copies(each, made) for each in value)
    copy = made[id(value)] = kind()
    if kind is dict:
        copy.update((key, _of_copies(each, made)) for key, each in value.items())
    else:
        copy.extend(_of_copies(each, made) for each in value)
    return copy


def _stand_in(tensor: Tensor | None, made: dict[int, Any]) -> Tensor | None:
    """A tensor of the same kind and shape that takes no memory; what is tied stays tied."""
    if tensor is None or not is_sharded(tensor):
        return tensor
    if id(tensor) not in made:
        one = torch.empty((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
        if isinstance(tensor, nn.Parameter):
            one = nn.Parameter(one, requires_grad=tensor.requires_grad)
        made[id(tensor)] = one
    found: Tensor = made[id(tensor)]
    return found
