"""What every op asks of the tensors that it is given, checked before any memory is touched."""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from .geometry import DTYPES

Size = tuple[int | None, ...]


def check_tensor(
    op: str, name: str, tensor: object, like: Tensor | None = None, size: Size | None = None
) -> None:
    """Checks that an operand is a dense tensor of a dtype of ours, and of the size that it must be.

    Args:
        op: The op's name, for messages.
        name: The operand's name, for messages.
        tensor: The operand.
        like: A checked operand, the weight, whose dtype and device this one must have.
        size: Its shape; None in it stands for any number of rows of a Linear.

    Raises:
        TypeError: It is no dense tensor, or of another dtype.
        ValueError: It is on another device or of another shape, or carries a forward-mode tangent.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: `{name}` must be a tensor, got {type(tensor).__name__}")
    # Without this, forward-mode derivatives of a custom op are zeros without a word.
    if forward_ad._current_level >= 0 and _tangent(tensor) is not None:
        raise ValueError(
            f"{op}: `{name}` must carry no forward-mode tangent, as the ops have reverse-mode "
            "derivatives only; use torch.autograd.grad or backward()"
        )
    if tensor.is_nested:
        raise TypeError(f"{op}: `{name}` must be a dense tensor, got a nested one")
    if tensor.layout != torch.strided:
        raise TypeError(f"{op}: `{name}` must be a dense tensor, got {tensor.layout}")
    if like is None:
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{op}: `{name}` must be float32, float64, float16 or bfloat16, got {tensor.dtype}"
            )
    elif tensor.dtype != like.dtype:
        raise TypeError(
            f"{op}: `{name}` must have the dtype of the weight ({like.dtype}), got {tensor.dtype}"
        )
    elif tensor.device != like.device:
        raise ValueError(
            f"{op}: `{name}` must be on the device of the weight ({like.device}), "
            f"got {tensor.device}"
        )
    if size is not None and not _fits(tensor, size):
        numbers = ", ".join("F" if n is None else str(n) for n in size)
        text = f"({numbers},)" if len(size) == 1 else f"({numbers})"
        raise ValueError(f"{op}: `{name}` must have shape {text}, got {tuple(tensor.shape)}")


def check_bias(op: str, name: str, bias: Tensor | None, like: Tensor, size: int) -> None:
    """Checks a vector that may be left out."""
    if bias is not None:
        check_tensor(op, name, bias, like, (size,))


def _fits(tensor: Tensor, size: Size) -> bool:
    if tensor.dim() != len(size):
        return False
    for actual, wanted in zip(tensor.shape, size, strict=True):
        if wanted is not None and actual != wanted:
            return False
    return True


def _tangent(tensor: Tensor) -> Tensor | None:
    tangent: Tensor | None = forward_ad.unpack_dual(tensor).tangent  # type: ignore[no-untyped-call]
    return tangent
