"""Average pooling and means."""

from __future__ import annotations

import math

import torch

from ..maps import (
    Deferred,
    Shape,
    deferred_full,
)
from ..operations import Call, Reading, reads
from ..rules import depthwise
from .views import view


def _mean_kernel(in_shape: Shape, kernel: Shape, divisor: float) -> Deferred:
    return deferred_full((in_shape[0], 1, *kernel), 1 / divisor)


@reads("avg_pool1d", "avg_pool2d", "avg_pool3d")
def _avg_pool(call: Call) -> Reading | None:
    shape = call.in_shape
    axes = int(str(call.node.target)[len("aten.avg_pool")])
    if shape is None or len(shape) != axes + 1:
        return None

    def each(name: str) -> Shape:
        values = [call[name]] if isinstance(call[name], int) else list(call[name])
        return tuple(values) * (axes // len(values)) if values else ()

    kernel, padding = each("kernel_size"), each("padding")
    stride = each("stride") or kernel
    divisor = call.arguments.get("divisor_override")
    flops = math.prod(call.out_shape) * math.prod(kernel)
    inside = all(
        (out - 1) * s + k <= size + 2 * p
        for size, out, k, s, p in zip(
            shape[1:], call.out_shape[1:], kernel, stride, padding, strict=True
        )
    )
    counted = call["count_include_pad"] or not any(padding) or divisor is not None
    if not (inside and counted):
        # The windows at the rim have divisors of their own.
        return call.moved(flops=flops)
    weight = _mean_kernel(shape, kernel, divisor or math.prod(kernel))
    pads = tuple((p, p) for p in padding)
    return call.through(depthwise(shape, call.out_shape, kernel, weight, stride, pads), flops=flops)


@reads(
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
)
def _adaptive_avg_pool(call: Call) -> Reading | None:
    shape = call.in_shape
    if shape is None or not call.are_numbers("output_size"):
        return None
    axes = len(call["output_size"]) if isinstance(call["output_size"], (list, tuple)) else 1
    if len(shape) != axes + 1:
        return None
    flops = math.prod(shape)
    if any(size % out for size, out in zip(shape[1:], call.out_shape[1:], strict=True)):
        return call.moved(flops=flops)
    kernel = tuple(size // out for size, out in zip(shape[1:], call.out_shape[1:], strict=True))
    weight = _mean_kernel(shape, kernel, math.prod(kernel))
    return call.through(depthwise(shape, call.out_shape, kernel, weight, kernel), flops=flops)


@reads("mean", "sum")
def _reduction(call: Call) -> Reading | None:
    if call.arguments.get("dim") is None or call["dtype"] is not None or not call["dim"]:
        return None
    shape, dims = call.in_shape, call.dims(call["dim"])
    if shape is None or dims is None:
        return None
    flops = math.prod(shape)
    axes = len(shape) - 1
    if sorted(dims) != list(range(1, axes + 1)) or not 1 <= axes <= 3:
        return call.moved(flops=flops)
    is_mean = call.node.target.overloadpacket is torch.ops.aten.mean  # type: ignore[union-attr]
    weight = _mean_kernel(shape, shape[1:], math.prod(shape[1:]) if is_mean else 1)
    one = (shape[0], *[1] * axes)
    pooled = depthwise(shape, one, shape[1:], weight, shape[1:])
    return call.through(pooled, *view(one, call.out_shape), flops=flops)
