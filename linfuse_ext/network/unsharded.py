"""A sharded network as torch.export can read it, and the sharded parameters back into its graph.

torch.export reads neither parameters that are DTensors nor FSDP2's modules. What it needs of a
parameter is its shape; the values are read when a merge needs them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..meshes import fsdp_module, is_of_a_mesh, is_sharded, let_go, placed_like


def unsharded(model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """A network that reads as the sharded one does on one device.

    Args:
        model: Any network. One of FSDP2 that still holds gathered parameters lets go of them.

    Returns:
        The model itself where nothing is sharded. Otherwise a copy without FSDP2's classes and
        without what torch.distributed does before and after a layer, whose sharded parameters have
        shapes but no values; and these parameters, by name.
    """
    for part in model.modules():
        let_go(part)
    named = model.named_parameters(remove_duplicate=False)
    sharded = {name: parameter for name, parameter in named if is_sharded(parameter)}
    return (_copied(model, {}), sharded) if sharded else (model, {})


def put_back(graph: GraphModule, sharded: dict[str, Any]) -> None:
    """Gives a captured graph the sharded parameters in place of what stood for them."""
    for name, parameter in sharded.items():
        path, _, last = name.rpartition(".")
        try:
            owner = graph.get_submodule(path)
        except AttributeError:
            continue
        if last in owner._parameters:
            setattr(owner, last, parameter)


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
            value = type(value)(kept)
        attributes[name] = value
    attributes["_buffers"] = dict(module._buffers)
    attributes["_parameters"] = {
        name: _stand_in(parameter, made) for name, parameter in module._parameters.items()
    }
    attributes["_modules"] = {
        name: None if part is None else _copied(part, made)
        for name, part in module._modules.items()
    }
    return copy


def _stand_in(parameter: Tensor | None, made: dict[int, Any]) -> Tensor | None:
    """A parameter of the same shape that takes no memory; what is tied stays tied."""
    if parameter is None or not is_sharded(parameter):
        return parameter
    if id(parameter) not in made:
        one = torch.empty(1, dtype=parameter.dtype, device=parameter.device)
        made[id(parameter)] = nn.Parameter(
            one.expand(parameter.shape), requires_grad=parameter.requires_grad
        )
    found: Tensor = made[id(parameter)]
    return found
