"""Layers that are made of sharded ones: how they run again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

__all__ = ["fully_shard_again"]


def _is_as_fully_shard(parameter: DTensor) -> bool:
    """By rows on a mesh of one axis; on one of two, replicated on the first."""
    rows: tuple[Placement, ...] = (Shard(0),)
    return parameter.placements in (rows, (Replicate(), *rows))


def fully_shard_again(module: nn.Module, **options: Any) -> nn.Module:
    """Gives fully_shard (FSDP2) a layer or network whose parameters are sharded already.

    fully_shard takes a DTensor for tensor parallelism and wants a second axis of the mesh for it.
    Here the parameters that the module has become FSDP's own, without being gathered.

    Args:
        module: With parameters that are DTensors of one mesh; it is changed in place.
        **options: Of torch.distributed.fsdp.fully_shard. `mesh` is by default that of the
            parameters.

    Returns:
        The module.

    Raises:
        ValueError: No parameter is a DTensor, or they are of several meshes, or not sharded as
            fully_shard does it: by rows, and with a mesh of two axes replicated on the first.
    """
    op = "fully_shard_again"
    sharded = {name: p for name, p in module.named_parameters() if isinstance(p, DTensor)}
    meshes = {parameter.device_mesh for parameter in sharded.values()}
    if len(meshes) != 1:
        raise ValueError(
            f"{op}: `module` must have parameters that are DTensors of one mesh, got "
            f"{len(meshes)} meshes in {type(module).__name__}"
        )
    for name, placed in sharded.items():
        if not _is_as_fully_shard(placed):
            raise ValueError(
                f"{op}: `module` must be sharded as fully_shard does it, by rows, got {name} with "
                f"{placed.placements}; redistribute it first"
            )
    options.setdefault("mesh", meshes.pop())
    names: dict[int, list[tuple[nn.Module, str]]] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if isinstance(parameter, DTensor):
                names.setdefault(id(parameter), []).append((part, name))
    for places in names.values():
        old: Any = getattr(*places[0])
        empty = nn.Parameter(
            torch.empty(old.shape, dtype=old.dtype, device="meta"), requires_grad=old.requires_grad
        )
        for part, name in places:
            setattr(part, name, empty)
    fully_shard(module, **options)
    # As a checkpoint is loaded into a network that was sharded before it had values.
    module.load_state_dict(dict(sharded), strict=False, assign=True)
    return module
