"""Layers that are made of sharded ones: how they run again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor.parallel import parallelize_module

from .rules import axis_of

__all__ = ["fully_shard_again"]

_OP = "fully_shard_again"
Places = list[tuple[nn.Module, str]]


def fully_shard_again(module: nn.Module, plan: Any = None, **options: Any) -> nn.Module:
    """Gives fully_shard (FSDP2) a layer or network whose parameters are sharded already.

    fully_shard takes a DTensor for tensor parallelism and wants a second axis of the mesh for it.
    Here the parameters that the module has become FSDP's own, without being gathered.

    Args:
        module: With parameters that are DTensors of one mesh; it is changed in place. Under FSDP2
            and tensor parallelism both, the last axis of the mesh is that of the latter, and those
            outside of the plan may be on the mesh of the others.
        plan: The plan of torch.distributed.tensor.parallel.parallelize_module, if tensor
            parallelism has a part in it: a style for a layer, or styles by the names of layers.
        **options: Of torch.distributed.fsdp.fully_shard. `mesh` is by default that of the
            parameters.

    Returns:
        The module.

    Raises:
        ValueError: No parameter is a DTensor, or they are of several meshes, or not sharded as
            fully_shard does it: by rows on the last axis of its mesh, and replicated on one before
            it; or not as the plan has it.
    """
    sharded = {name: p for name, p in module.named_parameters() if isinstance(p, DTensor)}
    mesh = _mesh_of(module, sharded.values())
    tensor_mesh = None
    if plan is not None:
        mesh, tensor_mesh = _parts(mesh)
    for name, parameter in sharded.items():
        _check(name, parameter, mesh)
    places: dict[int, Places] = {}
    for part in module.modules():
        for name, held in part._parameters.items():
            if isinstance(held, DTensor):
                places.setdefault(id(held), []).append((part, name))
    old = [getattr(*each[0]) for each in places.values()]
    try:
        for parameter, each in zip(old, places.values(), strict=True):
            _put(_without_values(parameter, mesh, tensor_mesh), each)
        if tensor_mesh is not None:
            parallelize_module(module, tensor_mesh, plan)
            for parameter, each in zip(old, places.values(), strict=True):
                # A style makes parameters of its own.
                _put(getattr(*each[0]).requires_grad_(parameter.requires_grad), each)
        fully_shard(module, **{"mesh": mesh, **options})
    except BaseException:
        for parameter, each in zip(old, places.values(), strict=True):
            _put(parameter, each)
        raise
    # As a checkpoint is loaded into a network that was sharded before it had values.
    module.load_state_dict(dict(sharded), strict=False, assign=True)
    return module


def _put(parameter: Any, places: Places) -> None:
    for part, name in places:
        setattr(part, name, parameter)


def _mesh_of(module: nn.Module, sharded: Any) -> Any:
    """The mesh of the parameters: of two that are, that with more axes."""
    meshes = sorted({parameter.device_mesh for parameter in sharded}, key=lambda mesh: -mesh.ndim)
    if not meshes or len({mesh.ndim for mesh in meshes}) < len(meshes):
        raise ValueError(
            f"{_OP}: `module` must have parameters that are DTensors of one mesh, got "
            f"{len(meshes)} meshes in {type(module).__name__}"
        )
    return meshes[0]


def _parts(mesh: Any) -> tuple[Any, Any]:
    """The mesh of fully_shard and that of tensor parallelism."""
    names = mesh.mesh_dim_names
    if names is None or len(names) < 2:
        raise ValueError(
            f"{_OP}: `plan` must be None for parameters on a mesh that has not two named axes, got "
            f"{mesh}"
        )
    return mesh[tuple(names[:-1])], mesh[names[-1]]


def _is_parallel(parameter: DTensor, mesh: Any) -> bool:
    """Whether tensor parallelism has sharded it, beside fully_shard on this mesh."""
    return int(parameter.device_mesh.ndim) > int(mesh.ndim)


def _check(name: str, parameter: DTensor, mesh: Any) -> None:
    """Accepts what fully_shard would make of it: rows, and replicas of them."""
    placements = parameter.placements
    if _is_parallel(parameter, mesh):
        placements = placements[:-1]
    elif parameter.device_mesh != mesh:
        raise ValueError(
            f"{_OP}: `module` must have parameters that are DTensors of one mesh, got {name} on "
            f"{parameter.device_mesh} beside {mesh}"
        )
    whole: list[Placement] = [Replicate()]
    if list(placements[:-1]) not in ([], whole) or axis_of(placements[-1]) != 0:
        raise ValueError(
            f"{_OP}: `module` must be sharded as fully_shard does it, by rows, got {name} with "
            f"{parameter.placements}; redistribute it first, or give the `plan` of tensor "
            "parallelism"
        )


def _without_values(parameter: DTensor, mesh: Any, tensor_mesh: Any) -> nn.Parameter:
    """A parameter as fully_shard takes it: a DTensor where tensor parallelism has sharded it."""
    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    if _is_parallel(parameter, mesh):
        whole = DTensor.from_local(empty, tensor_mesh, [Replicate()], run_check=False)
        empty = whole.redistribute(placements=parameter.placements[-1:])
    return nn.Parameter(empty, requires_grad=parameter.requires_grad)
