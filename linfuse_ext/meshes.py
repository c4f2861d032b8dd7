"""What the package must know of tensors that are sharded over a mesh of devices: DTensors.

torch.distributed is imported by whoever makes such tensors, and never from here: it takes longer to
import than all of this package.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_RULES = "linfuse_ext.distributed"

# What calls some of the ops on DTensors, see linfuse_ext/distributed/own_parts.py.
OWN_PARTS: dict[Any, Callable[..., Any]] = {}


def is_sharded(value: object) -> bool:
    """Whether it is a DTensor, however it is laid out."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def check_meshes(op: str, operands: dict[str, Tensor | None]) -> None:
    """Checks that all operands are DTensors of one mesh, or none.

    Args:
        op: The op's name, for messages.
        operands: By name; None for one that is left out.

    Raises:
        ValueError: They are not, or their sharding rules are not registered.
    """
    named = {name: operand for name, operand in operands.items() if operand is not None}
    sharded = [name for name, operand in named.items() if is_sharded(operand)]
    if not sharded:
        return
    first: Any = named[sharded[0]]
    check_rules(op, sharded[0], first)
    for name, operand in named.items():
        if name not in sharded:
            raise ValueError(
                f"{op}: `{name}` must be a DTensor, as `{sharded[0]}` is one, got a plain tensor; "
                "distribute_tensor(tensor, mesh, placements) makes one of it"
            )
        mesh = operand.device_mesh  # type: ignore[attr-defined]
        if mesh != first.device_mesh:
            raise ValueError(
                f"{op}: `{name}` must be on the mesh of `{sharded[0]}` ({first.device_mesh}), "
                f"got {mesh}"
            )


def check_rules(op: str, name: str, operand: object) -> None:
    """Checks that an operand is no DTensor until it is known how these are sharded.

    Args:
        op: What is asked for, for messages.
        name: The operand's name, for messages.
        operand: The operand.

    Raises:
        ValueError: It is one.
    """
    if is_sharded(operand) and _RULES not in sys.modules:
        raise ValueError(
            f"{op}: `{name}` must be a plain tensor until the rules for sharded ones are "
            f"registered, got a DTensor; type: import {_RULES}"
        )


def check_not_sharded(op: str, name: str, operand: object) -> None:
    """Refuses a DTensor where there is no sharded result to be made of it.

    Args:
        op: What is asked for, for messages.
        name: The operand's name, for messages.
        operand: The operand.

    Raises:
        ValueError: It is one.
    """
    if is_sharded(operand):
        raise ValueError(
            f"{op}: `{name}` must be a plain tensor, got a DTensor; {name}.full_tensor() gathers it"
        )


def moved(operand: Any, placements: Sequence[Any]) -> Any:
    """A DTensor with other placements; itself, without a trace in autograd, where it has them."""
    if operand is None or tuple(operand.placements) == tuple(placements):
        return operand
    placed = operand.redistribute(placements=placements)
    if not (torch.is_grad_enabled() and placed.requires_grad):
        return placed
    return _WithGradient.apply(placed)  # type: ignore[no-untyped-call]


def local_part(operand: Any, placements: Sequence[Any], grad: Sequence[Any] | None = None) -> Any:
    """What this rank has of a DTensor with other placements, as a plain tensor.

    Args:
        operand: A DTensor, or None, of which None is returned.
        placements: Where it is moved to.
        grad: The placements of which its gradient there is a part; by default those.
    """
    if operand is None:
        return None
    return moved(operand, placements).to_local(grad_placements=grad)


class _WithGradient(torch.autograd.Function):
    """The same DTensor, whose gradient is zeros where there is none: redistribute wants one."""

    @staticmethod
    def forward(ctx: Any, placed: Any) -> Any:
        ctx.set_materialize_grads(False)  # those zeros would not be a DTensor
        ctx.like = placed.detach()
        return placed.view_as(placed)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return torch.zeros_like(ctx.like) if grad is None else grad


def replicated(*operands: Any) -> tuple[Any, ...]:
    """Operands, with those that are DTensors replicated."""
    return tuple(
        moved(operand, _whole(operand)) if is_sharded(operand) else operand for operand in operands
    )


def wants_gradient(*operands: Tensor | None) -> bool:
    """Whether autograd will look at what is made of them."""
    given = [operand for operand in operands if operand is not None]
    return torch.is_grad_enabled() and any(operand.requires_grad for operand in given)


def on_whole(function: Callable[..., tuple[Tensor, ...]], *operands: Any) -> tuple[Any, ...]:
    """Calls a function on gathered DTensors, as plain tensors; what it returns is replicated.

    Its gradients are the same on every rank, and each rank keeps those of its shards.
    """
    tensor = sys.modules["torch.distributed.tensor"]
    mesh = next(operand.device_mesh for operand in operands if operand is not None)
    whole = [tensor.Replicate()] * mesh.ndim
    if is_on(mesh):
        results = function(*(local_part(operand, whole) for operand in operands))
        parts = results
    else:  # nothing is here; of the results it knows the shapes
        results = function(*map(_shape_of, operands))
        parts = tuple(
            each.new_empty(0, device=mesh.device_type, requires_grad=wants_gradient(*operands))
            for each in results
        )
    return tuple(
        tensor.DTensor.from_local(
            part, mesh, whole, run_check=False, shape=each.shape, stride=each.stride()
        )
        for part, each in zip(parts, results, strict=True)
    )


def _shape_of(operand: Any) -> Any:
    if operand is None:
        return None
    return torch.empty(operand.shape, dtype=operand.dtype, device="meta")


def _whole(layout: Any) -> list[Any]:
    return [sys.modules["torch.distributed.tensor"].Replicate()] * layout.device_mesh.ndim


def on_one_mesh(*operands: Tensor | None) -> tuple[Any, ...]:
    """Operands of layers, of which none or all are DTensors, and these of one mesh.

    Beside a sharded one a plain one is replicated: tensor parallelism leaves layers outside its
    plan as they are, the same on every rank. What is on another mesh is gathered there: beside a
    Linear that FSDP2 and tensor parallelism have sharded both, a convolution that only FSDP2 has.
    """
    sharded: list[Any] = [operand for operand in operands if is_sharded(operand)]
    if not sharded:
        return operands
    main = max(sharded, key=_leads)
    return tuple(
        operand
        if operand is None or getattr(operand, "device_mesh", None) == main.device_mesh
        else _beside(gathered(operand), main)
        for operand in operands
    )


def _leads(weight: Tensor) -> tuple[bool, int]:
    """What a merged layer is sharded like: a Linear, or else the larger layer."""
    return weight.dim() == 2, weight.numel()


def _beside(plain: Tensor, sharded: Any) -> Any:
    kind = sys.modules["torch.distributed.tensor"].DTensor
    return kind.from_local(plain, sharded.device_mesh, _whole(sharded), run_check=False)


def gathered(value: Any) -> Any:
    """A tensor as a plain one: a DTensor is put together on every rank.

    Raises:
        ValueError: This rank is outside of its mesh, and has nothing of it.
    """
    if not is_sharded(value):
        return value
    if not is_on(value.device_mesh):
        raise ValueError(
            f"a DTensor of {tuple(value.shape)} must be on a mesh of which this rank is a part to "
            f"be gathered, got {value.device_mesh}"
        )
    return value.full_tensor()


def is_on(mesh: Any) -> bool:
    """Whether this rank is a part of a mesh."""
    return mesh.get_coordinate() is not None


def placed_like(value: Any, layout: Any, axes: int | None = None) -> Any:
    """A tensor laid out over the mesh as another is: axis by axis, whatever its size.

    Args:
        value: A DTensor, or a plain tensor that is the same on every rank.
        layout: A DTensor. Where it splits an axis that `value` does not have, that is replicated.
        axes: How many axes of `value` may be split, from the first on; all of them by default.
    """
    tensor = sys.modules["torch.distributed.tensor"]
    mesh = layout.device_mesh
    axes = value.dim() if axes is None else axes
    placements = [
        placement if getattr(placement, "dim", axes) < axes else tensor.Replicate()
        for placement in layout.placements
    ]
    if is_sharded(value):
        placed = moved(value, placements)
        part = placed.to_local()
        if part.is_contiguous():
            return placed
        # FSDP2 takes no other parameters; what was moved from another axis may lie otherwise.
        return tensor.DTensor.from_local(
            part.contiguous(),
            mesh,
            placements,
            run_check=False,
            shape=value.shape,
            stride=value.stride(),
        )
    # Every rank has the values that it keeps.
    return tensor.distribute_tensor(value, mesh, placements, src_data_rank=None)


def placed_as_layers(
    weight: Any, bias: Any, layers: Sequence[tuple[Tensor, Tensor | None]]
) -> tuple[Any, Any]:
    """Weight and bias of a merged layer, sharded as the layers were: a Linear, or the largest.

    Args:
        weight: The merged weight.
        bias: Its bias, or None.
        layers: Weight and bias of each layer that it was made of.
    """
    sharded = [layer for layer in layers if is_sharded(layer[0])]
    if not sharded:
        return weight, bias
    like, like_bias = max(sharded, key=lambda layer: _leads(layer[0]))
    if bias is not None:
        bias = placed_like(bias, like_bias if is_sharded(like_bias) else like)
    return placed_like(weight, like), bias


def fsdp_module() -> Any:
    """FSDPModule, of which the modules under FSDP2's fully_shard are; None if there are none."""
    module = sys.modules.get("torch.distributed.fsdp")
    return None if module is None else getattr(module, "FSDPModule", None)


def let_go(module: Any) -> None:
    """Has a module of FSDP2 drop the whole parameters that a forward may have left behind."""
    kind = fsdp_module()
    if kind is not None and isinstance(module, kind):
        module.reshard()


def is_of_a_mesh(hook: Any) -> bool:
    """Whether a hook is torch.distributed's: it moves what a layer computes, and no more."""
    hook = getattr(hook, "hook", hook)  # hooks of a state_dict are wrapped
    # distribute_module hides a function of the caller's in one of its own.
    cells = (cell.cell_contents for cell in getattr(hook, "__closure__", None) or ())
    return all(_is_of_torch(part) for part in (hook, *filter(callable, cells)))


def _is_of_torch(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__module__", "")).startswith("torch.distributed.")


def call_sharded(
    op: Any, operands: tuple[Tensor | None, ...], *arguments: Any, **options: Any
) -> Any:
    """Calls an op of ours on operands that may be sharded."""
    if not any(map(is_sharded, operands)):
        return op(*operands, *arguments, **options)
    names = (argument.name for argument in op._schema.arguments)
    check_meshes(op._schema.name.partition("::")[2], dict(zip(names, operands, strict=False)))
    # A rank outside of the mesh makes nothing: torch knows how.
    given: list[Any] = [operand for operand in operands if operand is not None]
    if op in OWN_PARTS and is_on(given[0].device_mesh):
        return OWN_PARTS[op](op, operands, arguments, options)
    return op(*operands, *arguments, **options)
