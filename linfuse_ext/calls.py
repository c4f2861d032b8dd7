"""How the functions on tensors call the ops: the short way where there is one."""

from __future__ import annotations

import functools
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
    if _is_plain_call(operands):
        arguments, keywords = _spelled_shortly(geometry)
        return _call_below_autograd(op, operands, arguments, {**keywords, **options})
    return _call(op, operands, geometry.op_arguments, {**geometry.op_keywords, **options})


def call_with(
    op: Any, operands: tuple[Tensor | None, ...], *arguments: Any, **options: Any
) -> tuple[Tensor, ...]:
    """The same with all arguments spelled out."""
    if _is_plain_call(operands):
        return _call_below_autograd(op, operands, arguments, options)
    return _call(op, operands, arguments, options)


def _call_below_autograd(
    op: Any, operands: tuple[Tensor | None, ...], arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[Tensor, ...]:
    with torch._C._AutoDispatchBelowAutograd():
        return op(*operands, *arguments, **named)  # type: ignore[no-any-return]


def _call(
    op: Any, operands: tuple[Tensor | None, ...], arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[Tensor, ...]:
    if torch.compiler.is_compiling():
        return op(*operands, *arguments, **named)  # type: ignore[no-any-return]
    return call_sharded(op, operands, *arguments, **named)  # type: ignore[no-any-return]


def _spelled_shortly(geometry: Geometry) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that stand for a geometry in a call of an op, as few and short as they can be.

    torch reads lists element by element, which takes as long as the kernel of a small op.
    """
    try:
        return _remembered_spelling(geometry)
    except TypeError:  # a symbol has no hash
        return geometry.op_arguments, geometry.op_keywords


@functools.lru_cache(maxsize=256)
def _remembered_spelling(geometry: Geometry) -> tuple[tuple[Any, ...], dict[str, Any]]:
    *lists, groups = geometry.op_arguments
    # One value stands for as many as there are axes.
    arguments = [tuple(values[:1] if len(set(values)) == 1 else values) for values in lists]
    arguments.append(groups)
    defaults = [None, (1,), (0,), (1,), 1]
    while arguments[-1] == defaults[len(arguments) - 1]:
        arguments.pop()
    return tuple(arguments), geometry.op_keywords


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
