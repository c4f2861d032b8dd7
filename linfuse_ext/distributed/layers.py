"""Layers that are made of sharded ones: how they run again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from ..network.unsharded import copied

__all__ = ["fully_shard_again"]

_OP = "fully_shard_again"


def fully_shard_again(module: nn.Module, plan: Any = None, **options: Any) -> nn.Module:
    """Gives fully_shard (FSDP2) a layer or network whose parameters are sharded already.

    fully_shard takes a DTensor for tensor parallelism and wants a second axis of the mesh for it.
    Here the parameters that the module has become FSDP's own, without being gathered.

    Args:
        module: With parameters that are DTensors of one mesh; it is changed in place. Parts of it
            that fully_shard has been given already stay as they are. Under FSDP2 and tensor
            parallelism both, the last axis of the mesh is that of the latter, and parameters
            outside of the plan may be on the mesh of the others.
        plan: The plan of torch.distributed.tensor.parallel.parallelize_module, if tensor
            parallelism has a part in it: a style for a layer, or styles by the names of layers.
        **options: Of torch.distributed.fsdp.fully_shard. `mesh` is by default that of the
            parameters, without its last axis where there is a plan.

    Returns:
        The module.

    Raises:
        ValueError: No parameter is a DTensor, or they are of several meshes, or not sharded as
            fully_shard does it: by rows on the last axis of its mesh, and replicated on one before
            it; or not as the plan has it. The module is as it was.
    """
    own = [part for part in module.modules() if isinstance(part, FSDPModule)]
    known = {id(parameter) for part in own for parameter in part.parameters()}
    sharded: dict[str, Any] = {
        name: parameter
        for name, parameter in module.named_parameters()
        if isinstance(parameter, DTensor) and id(parameter) not in known
    }
    if own and not sharded:
        raise ValueError(
            f"{_OP}: `module` must have parameters that are not FSDP's already, got none in "
            f"{type(module).__name__}; fully_shard itself does the rest"
        )
    mesh = _mesh_of(module, sharded.values())
    tensor_mesh = None
    if plan is not None:
        mesh, tensor_mesh = _parts(mesh)
    for name, parameter in sharded.items():
        _check(name, parameter, mesh)
    stand_ins = {id(p): _without_values(p, mesh, tensor_mesh) for p in sharded.values()}
    options.setdefault("mesh", mesh)
    # What a plan or an option is wrong about is found on a copy.
    rehearsal = copied(module, {**stand_ins, **{id(part): nn.Module() for part in own}})
    _shard(rehearsal, sharded, stand_ins, tensor_mesh, plan, options)
    for part in module.modules():
        for name, held in part._parameters.items():
            if id(held) in stand_ins:
                part._parameters[name] = stand_ins[id(held)]
    _shard(module, sharded, stand_ins, tensor_mesh, plan, options)
    return module


def _shard(
    module: nn.Module,
    sharded: dict[str, Any],
    stand_ins: dict[int, nn.Parameter],
    tensor_mesh: Any,
    plan: Any,
    options: dict[str, Any],
) -> None:
    """Shards a module whose parameters have no values, and gives it those that are sharded."""
    if tensor_mesh is not None:
        parallelize_module(module, tensor_mesh, plan)
        found = dict(module.named_parameters(remove_duplicate=False))
        for name, parameter in sharded.items():
            _check_plan(name, found[name], stand_ins[id(parameter)])
            found[name].requires_grad_(parameter.requires_grad)
    fully_shard(module, **options)
    # As a checkpoint is loaded into a network that was sharded before it had values.
    module.load_state_dict(dict(sharded), strict=False, assign=True)


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
    rows: Placement = Shard(0)
    if _is_parallel(parameter, mesh):
        placements, last = placements[:-1], placements[-1]
        if last == rows:  # fully_shard cuts what tensor parallelism has cut
            rows = _StridedShard(0, split_factor=parameter.device_mesh.size(-1))
    elif parameter.device_mesh != mesh:
        raise ValueError(
            f"{_OP}: `module` must have parameters that are DTensors of one mesh, got {name} on "
            f"{parameter.device_mesh} beside {mesh}"
        )
    if placements not in ((rows,), (Replicate(), rows)):
        raise ValueError(
            f"{_OP}: `module` must be sharded as fully_shard does it, by rows, got {name} with "
            f"{parameter.placements}; redistribute it first, or give the `plan` of tensor "
            "parallelism"
        )


def _check_plan(name: str, planned: Any, parameter: Any) -> None:
    """Accepts what a plan makes of a parameter: what it is already."""
    got, wanted = (getattr(each, "placements", None) for each in (planned, parameter))
    if planned is parameter:  # a style makes one of its own
        got = None
    if got != wanted:
        raise ValueError(
            f"{_OP}: `plan` must have {name} sharded as it is, {wanted or 'not at all'}, got "
            f"{got or 'nothing for it'}"
        )


def _without_values(parameter: DTensor, mesh: Any, tensor_mesh: Any) -> nn.Parameter:
    """A parameter as fully_shard takes it: a DTensor where tensor parallelism has sharded it."""
    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    if _is_parallel(parameter, mesh):
        whole = DTensor.from_local(empty, tensor_mesh, [Replicate()], run_check=False)
        empty = whole.redistribute(placements=parameter.placements[-1:])
    return nn.Parameter(empty, requires_grad=parameter.requires_grad)
