"""How the functions on tensors call the ops: the short way where there is one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .geometry import Geometry
from .meshes import call_sharded


def call(
    op: Any, geometry: Geometry, *operands: Tensor | None, **options: Any
) -> tuple[Tensor, ...]:
    """Calls an op whose derivatives are given to register_autograd, with checked operands.

    Args:
        op: An overload of torch.ops.linfuse.
        geometry: What its geometry arguments are taken from.
        *operands: The tensors that stand before them.
        **options: What stands after them.

    Returns:
        What the op returns.
    """
    return call_with(op, operands, *geometry.op_arguments, **geometry.op_keywords, **options)


def call_with(
    op: Any, operands: tuple[Tensor | None, ...], *arguments: Any, **options: Any
) -> tuple[Tensor, ...]:
    """The same with all arguments spelled out."""
    if _is_plain_call(operands):
        with torch._C._AutoDispatchBelowAutograd():
            outputs: tuple[Tensor, ...] = op(*operands, *arguments, **options)
            return outputs
    if torch.compiler.is_compiling():
        outputs = op(*operands, *arguments, **options)
    else:
        outputs = call_sharded(op, operands, *arguments, **options)
    return outputs


def _is_plain_call(operands: tuple[Tensor | None, ...]) -> bool:
    """Whether the layer that register_autograd installs has nothing to do but to cost time.

    That layer is a Python function between the caller and the kernel, and takes longer than the
    kernel of a small op. Where no operand wants a gradient it goes on below autograd and does no
    more (torch/_library/autograd.py), so that a call may begin there. Whatever looks at a call
    before autograd does must see it as it is, and its own code must run with autograd on: traces,
    transforms of torch.func (their tensors are of the plain type), function modes, and subclasses
    of Tensor. Dispatch modes come below autograd anyway.
    """
    if (
        not _CAN_SKIP_AUTOGRAD
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_function_stack() > 0
    ):
        return False
    grad = torch.is_grad_enabled()
    for operand in operands:
        if operand is None:
            continue
        if type(operand) not in _PLAIN_TENSORS or (grad and operand.requires_grad):
            return False
    return True


_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
# Parts of torch without a promise: a version that lacks one is served the ordinary way.
_CAN_SKIP_AUTOGRAD = all(
    hasattr(torch._C, name)
    for name in (
        "_AutoDispatchBelowAutograd",
        "_are_functorch_transforms_active",
        "_len_torch_function_stack",
    )
)
