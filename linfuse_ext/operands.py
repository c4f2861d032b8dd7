"""What every op asks of the tensors that it is given, checked before any memory is touched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from .geometry import DTYPES, Geometry, check_fits, make_geometry, per_axis

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
        ValueError: It is on another device or of another shape, has none yet, or carries a
            forward-mode tangent.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: `{name}` must be a tensor, got {type(tensor).__name__}")
    # These classes ask a function of theirs, which takes as long as the rest of the checks.
    if type(tensor) is not Tensor and isinstance(
        tensor, (UninitializedParameter, UninitializedBuffer)
    ):
        raise ValueError(
            f"{op}: `{name}` must have a shape, got a parameter of a lazy layer that has not run"
        )
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
    if size is not None and tensor.shape != size and not _fits(tensor, size):
        numbers = ", ".join("F" if n is None else str(n) for n in size)
        text = f"({numbers},)" if len(size) == 1 else f"({numbers})"
        raise ValueError(f"{op}: `{name}` must have shape {text}, got {tuple(tensor.shape)}")


def check_holds_values(op: str, name: str, tensor: Tensor, why: str) -> None:
    """Refuses a tensor that stands for one, on meta or fake, where values are asked for."""
    if tensor.is_meta or isinstance(tensor, FakeTensor):
        raise ValueError(f"{op}: `{name}` must hold values, as {why}, got a tensor without any")


def check_bias(op: str, name: str, bias: Tensor | None, like: Tensor, size: int) -> None:
    """Checks a vector that may be left out."""
    if bias is not None:
        check_tensor(op, name, bias, like, (size,))


def op_geometry(op: str, weight_size: Any, arguments: Any, keywords: Any) -> Geometry:
    """The geometry from an op's arguments, input_size first; `rows` is not part of it."""
    # The dispatcher makes lists of what were tuples.
    spelled = (tuple(a) if isinstance(a, list) else a for a in (weight_size, *arguments))
    keywords = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in keywords.items()
        if name != "rows"
    }
    return make_geometry(op, *spelled, **keywords)


def op_rows(op: str, geometry: Geometry, keywords: Any) -> tuple[int, int]:
    """[start, stop) of the matrix's rows from an op's arguments; all of them without `rows`."""
    rows = keywords.get("rows")
    if rows is None:
        return 0, geometry.rows
    if len(rows) != 2 or not (rows[0] >= 0 and rows[0] <= rows[1] and rows[1] <= geometry.rows):
        raise ValueError(
            f"{op}: `rows` must be (start, stop) with 0 <= start <= stop <= {geometry.rows}, "
            f"got {tuple(rows)}"
        )
    return rows[0], rows[1]


def check_fuse_conv_linear(
    op: str,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    arguments: Any,
    keywords: Any,
) -> Geometry:
    """Checks the operands of fuse_conv_linear against their geometry, which it returns."""
    check_tensor(op, "conv_weight", conv_weight)
    geometry = op_geometry(op, conv_weight.shape, arguments, keywords)
    check_tensor(op, "linear_weight", linear_weight, conv_weight, (None, geometry.rows))
    check_bias(op, "conv_bias", conv_bias, conv_weight, geometry.out_channels)
    check_bias(op, "linear_bias", linear_bias, conv_weight, linear_weight.shape[0])
    return geometry


def check_fuse_linear_conv(
    op: str,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    arguments: Any,
    keywords: Any,
) -> Geometry:
    """Checks the operands of fuse_linear_conv against their geometry, which it returns."""
    check_tensor(op, "conv_weight", conv_weight)
    geometry = op_geometry(op, conv_weight.shape, arguments, keywords)
    check_tensor(op, "linear_weight", linear_weight, conv_weight, (geometry.cols, None))
    check_bias(op, "linear_bias", linear_bias, conv_weight, geometry.cols)
    check_bias(op, "conv_bias", conv_bias, conv_weight, geometry.out_channels)
    return geometry


def check_fuse_conv_conv(
    first_weight: Tensor,
    first_bias: Tensor | None,
    second_weight: Tensor,
    second_bias: Tensor | None,
    first_stride: Sequence[int] = (1,),
    first_dilation: Sequence[int] = (1,),
    first_groups: int = 1,
    second_dilation: Sequence[int] = (1,),
    second_groups: int = 1,
) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[int, int]]:
    """What an element of each kernel moves by, per axis, and the groups, of operands that fit.

    Takes the arguments of the op as they come, and mirrors the checks of
    csrc/ops/fuse_conv_conv.cpp.
    """
    op = "fuse_conv_conv"
    check_tensor(op, "first_weight", first_weight)
    check_tensor(op, "second_weight", second_weight, first_weight)
    axes = first_weight.dim() - 2
    if not 1 <= axes <= 3 or second_weight.dim() != axes + 2:
        raise ValueError(
            f"{op}: both weights must have the same 3, 4 or 5 dimensions, got shapes "
            f"{tuple(first_weight.shape)} and {tuple(second_weight.shape)}"
        )
    for weight in (first_weight, second_weight):
        if any(size < 1 for size in weight.shape):
            raise ValueError(
                f"{op}: the weights must have no empty dimension, got shape {tuple(weight.shape)}"
            )
    middle, out_channels = first_weight.shape[0], second_weight.shape[0]
    for name, groups, channels in (
        ("first_groups", first_groups, middle),
        ("second_groups", second_groups, out_channels),
    ):
        if groups < 1 or channels % groups != 0:
            raise ValueError(
                f"{op}: `{name}` must be at least 1 and divide the layer's {channels} output "
                f"channels, got {groups}"
            )
    if middle != second_weight.shape[1] * second_groups:
        raise ValueError(
            f"{op}: `second_weight` must take the {middle} channels that the first puts out, got "
            f"{second_weight.shape[1] * second_groups}"
        )
    check_bias(op, "first_bias", first_bias, first_weight, middle)
    check_bias(op, "second_bias", second_bias, first_weight, out_channels)
    stride = per_axis(op, "first_stride", first_stride, axes, 1)
    dilation = per_axis(op, "first_dilation", first_dilation, axes, 1)
    second_dilation = per_axis(op, "second_dilation", second_dilation, axes, 1)
    steps = dilation, tuple(s * d for s, d in zip(stride, second_dilation, strict=True))
    check_fits(op, steps[1])
    return steps, (first_groups, second_groups)


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
