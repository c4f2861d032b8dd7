"""Padding and upsampling."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...composition import Pair
from ..maps import (
    Deferred,
    Operator,
    Shape,
    deferred_full,
)
from ..operations import Call, Reading, reads
from ..rules import depthwise

_MODES = {
    "constant": "zeros",
    "reflect": "reflect",
    "replicate": "replicate",
    "circular": "circular",
}


@reads("pad", "constant_pad_nd")
def _pad(call: Call) -> Reading | None:
    shape = call.in_shape
    if shape is None or not call.are_numbers("pad", "value"):
        return None
    flat = list(call["pad"])
    if len(flat) // 2 > len(shape):
        return None
    return _padded(call, shape, flat, call.arguments.get("mode", "constant"), call["value"] or 0)


@reads("reflection_pad1d", "reflection_pad2d", "reflection_pad3d")
def _reflection_pad(call: Call) -> Reading | None:
    return _padded_by(call, "reflect")


@reads("replication_pad1d", "replication_pad2d", "replication_pad3d")
def _replication_pad(call: Call) -> Reading | None:
    return _padded_by(call, "replicate")


def _padded_by(call: Call, mode: str) -> Reading | None:
    shape, flat = call.in_shape, list(call["padding"])
    if shape is None or len(flat) // 2 != len(shape) - 1:
        return None
    return _padded(call, shape, flat, mode, 0)


def _padded(call: Call, shape: Shape, flat: list[int], mode: str, value: float) -> Reading:
    """A pointwise depthwise convolution with that padding, where padding can be that."""
    axes = len(shape) - 1
    pairs: list[Pair] = [(flat[n], flat[n + 1]) for n in range(0, len(flat), 2)][::-1]
    if not any(flat):
        return call.through()
    known = _MODES.get(mode)
    fits = 1 <= axes <= 3 and len(pairs) <= axes and known is not None and min(flat) >= 0
    if fits and known is not None and not value:
        pads = ((0, 0),) * (axes - len(pairs)) + tuple(pairs)
        weight = deferred_full((shape[0], *[1] * (axes + 1)), 1.0)
        ones = (1,) * axes
        return call.through(
            depthwise(shape, call.out_shape, ones, weight, padding=pads, padding_mode=known),
            flops=0,
        )

    def run(samples: Tensor) -> Tensor:
        padded: Tensor = F.pad(samples, flat, mode=mode)
        return padded

    offset = None
    if value:
        one = (1, *shape)

        def border() -> Tensor:
            return F.pad(torch.zeros(one, dtype=torch.float64), flat, value=value)[0]

        offset = Deferred(call.out_shape, border)
    return call.through(Operator(shape, call.out_shape, offset, run), flops=0)


@reads("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d")
def _nearest(call: Call) -> Reading | None:
    shape = call.in_shape
    if shape is None or not call.are_numbers(*list(call.arguments)[1:]):
        return None
    times = [out / size for out, size in zip(call.out_shape[1:], shape[1:], strict=True)]
    scales = call.arguments.get("scale_factors")
    if scales is None:
        scales = [v for name, v in call.arguments.items() if name.startswith("scales")]
    told = [float(scale) for scale in scales if scale is not None]
    if any(t != int(t) for t in times) or (told and told != times):
        return call.moved()
    kernel = tuple(int(t) for t in times)
    weight = deferred_full((shape[0], 1, *kernel), 1.0)
    return call.through(
        depthwise(shape, call.out_shape, kernel, weight, kernel, transposed=True), flops=0
    )


@reads("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d")
def _nearest_exact(call: Call) -> Reading | None:
    fixed = call.in_shape is not None and call.are_numbers(*list(call.arguments)[1:])
    return call.moved() if fixed else None


@reads("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d",
        "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")  # fmt: skip
def _interpolation(call: Call) -> Reading | None:
    if call.in_shape is None or not call.are_numbers(*list(call.arguments)[1:]):
        return None
    taps = 4 if "bicubic" in str(call.node.target) else 2
    return call.moved(flops=2 * taps ** (len(call.in_shape) - 1) * math.prod(call.out_shape))
