"""Average pooling as the convolution that it is, where it is one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .errors import FusionError
from .functional import Size
from .geometry import DTYPES, as_int, per_axis
from .modules import _CONVOLUTIONS, _check_module

__all__ = ["pool_to_conv"]

_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


def _ceil_mode_adds(size: int, kernel: int, stride: int, padding: int) -> bool:
    """Whether ceil_mode adds a window on an axis of this size.

    It adds one where a stride is left over behind the last full window, unless that one would start
    beyond the input and its low padding: torch leaves such a window out.
    """
    room = size + 2 * padding - kernel
    next_start = (room // stride + 1) * stride  # counted from the first padded position
    return room % stride != 0 and next_start < size + padding


def _ceil_mode_may_add(kernel: int, stride: int, padding: int) -> bool:
    """Whether ceil_mode adds a window on an axis of some size.

    Let r > 0 be the positions left over behind the last full window. The next window starts at
    `size + 2 padding - kernel - r + stride`, so that it is left out if `stride - r >= kernel -
    padding`. With a stride above 1 some sizes have r = stride - 1: it is left out for every size if
    and only if `padding >= kernel - 1`.
    """
    return stride > 1 and padding < kernel - 1


def pool_to_conv(
    pool: nn.Module,
    channels: int,
    input_size: Size | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Writes an average pooling as the depthwise convolution that computes the same, where exact.

    `pool(x) == conv(x)` for every `x` of shape `[N, channels, *input_size]`. Every weight is 1 over
    the number of elements in a window, or over `divisor_override`. A convolution has one divisor
    for all windows, and so must the pooling:

    - `count_include_pad=False` with padding divides by fewer elements at the border: not exact,
      unless `divisor_override` says by how many.
    - `ceil_mode=True` may add windows that reach beyond the padded input, which no padding of a
      convolution gives. It adds none if on every axis `stride == 1` or `padding >= kernel_size -
      1`; else that depends on the input size.

    Args:
        pool: An AvgPool1d, AvgPool2d or AvgPool3d. Subclasses are accepted where they compute the
            same.
        channels: Channels of its input, C.
        input_size: Spatial size of its input, in positions: an int or one per axis. Only needed for
            `ceil_mode=True`; the result is then exact for this size.
        dtype: Of the weight: float32, float64, float16 or bfloat16; torch's default if None.
        device: Of the weight; torch's default if None.

    Returns:
        A Conv1d, Conv2d or Conv3d with `groups=channels` and without bias. Its weight, `[C, 1,
        *kernel_size]`, requires no gradient, as a pooling has nothing to train; `training` is that
        of `pool`.

    Raises:
        FusionError: The pooling is no convolution; the message says why and what would work.
        TypeError: `pool` is no such layer, overrides its forward, or an argument has a wrong type.
        ValueError: An argument has a wrong value, or `pool` has hooks.

    Examples:
        >>> pool = torch.nn.AvgPool2d(3, stride=2, padding=1)
        >>> conv = pool_to_conv(pool, channels=4)
        >>> conv
        Conv2d(4, 4, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), groups=4, bias=False)
        >>> x = torch.rand(5, 4, 7, 8)
        >>> torch.allclose(pool(x), conv(x), atol=1e-6)
        True
    """
    op = "pool_to_conv"
    _check_module(op, "pool", pool, _POOLS)
    layer: Any = pool
    axes = next(n for n, kind in enumerate(_POOLS, start=1) if isinstance(pool, kind))
    channels = as_int(op, "channels", channels)
    if channels < 1:
        raise ValueError(f"{op}: `channels` must be positive, got {channels}")
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if dtype not in DTYPES:
        raise TypeError(
            f"{op}: `dtype` must be float32, float64, float16 or bfloat16, got {dtype!r}"
        )
    kernel = per_axis(op, "pool.kernel_size", layer.kernel_size, axes, 1)
    stride = per_axis(op, "pool.stride", layer.stride, axes, 1)
    padding = per_axis(op, "pool.padding", layer.padding, axes, 0)
    if any(2 * pad > size for pad, size in zip(padding, kernel, strict=True)):
        raise ValueError(
            f"{op}: `pool.padding` must be at most half of the kernel size {kernel}, got {padding}"
        )
    size = None if input_size is None else per_axis(op, "input_size", input_size, axes, 1)
    divisor = getattr(layer, "divisor_override", None)
    if divisor == 0:
        raise ValueError(f"{op}: `pool.divisor_override` must not be zero, got {divisor}")
    if any(padding) and not layer.count_include_pad and divisor is None:
        raise FusionError(
            f"{op}: `pool` must count its padding, as windows at the border otherwise divide by "
            f"fewer elements than the others; got {pool} with count_include_pad=False. Exact "
            "instead: count_include_pad=True, divisor_override or padding=0 (each changes what is "
            "computed at the border), or a Linear, which has a row for each position"
        )
    if layer.ceil_mode:
        _check_ceil_mode(op, pool, (kernel, stride, padding), size)
    # On the meta device nothing is allocated and no random number is drawn.
    kind: Any = _CONVOLUTIONS[axes - 1]
    conv: nn.Module = kind(
        channels, channels, kernel, stride, padding, groups=channels, bias=False, device="meta"
    )
    value = 1 / (math.prod(kernel) if divisor is None else divisor)
    weight = torch.full((channels, 1, *kernel), value, dtype=dtype, device=device)
    conv.weight = nn.Parameter(weight, requires_grad=False)
    return conv.train(pool.training)


def _check_ceil_mode(
    op: str, pool: nn.Module, settings: tuple[tuple[int, ...], ...], size: tuple[int, ...] | None
) -> None:
    kernel, stride, padding = settings
    if size is None:
        adds = any(map(_ceil_mode_may_add, kernel, stride, padding))
        where = "for some input sizes"
        hint = "`input_size`, if it adds none for that size; or "
    else:
        adds = any(map(_ceil_mode_adds, size, kernel, stride, padding))
        where, hint = f"for input size {size}", ""
    if adds:
        raise FusionError(
            f"{op}: `pool` must not reach beyond its padded input, as no padding of a convolution "
            f"does; ceil_mode=True adds such windows {where}, got {pool}. Exact instead: {hint}"
            "ceil_mode=False (which leaves those windows out), or a Linear, which has a row for "
            "each position"
        )
