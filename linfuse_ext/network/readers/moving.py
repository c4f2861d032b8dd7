"""What moves elements, or copies them, and computes nothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.fx import Node

from ...composition import Conv
from ..maps import (
    Convolution,
    Deferred,
    Shape,
)
from ..operations import Call, Reading, reads
from .views import view


@reads("clone", "alias", "contiguous", "lift_fresh_copy")
def _same(call: Call) -> Reading | None:
    return None if call.in_shape is None else call.through()


@reads("dropout", "feature_dropout", "alpha_dropout", "native_dropout")
def _dropout(call: Call) -> Reading | None:
    return None if call.in_shape is None or call["train"] is not False else call.through()


@reads("to", "_to_copy", "type_as")
def _convert(call: Call) -> Reading | None:
    before, behind = call.first.meta["val"], call.node.meta["val"]
    same = before.dtype == behind.dtype and before.device == behind.device
    return None if call.in_shape is None or not same else call.through()


@reads("view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")
def _reshape(call: Call) -> Reading | None:
    if call.in_shape is None:
        return None
    return call.through(*view(call.in_shape, call.out_shape))


@reads("permute", "transpose", "movedim", "t", "swapaxes", "numpy_T", "adjoint", "mT")
def _permute(call: Call) -> Reading | None:
    shape = call.in_shape
    if shape is None or not call.are_numbers(*list(call.arguments)[1:]):
        return None
    # Where each axis goes, from the operation itself on a tensor whose sizes name its axes.
    count = len(shape) + 1
    marked = torch.empty(tuple(range(2, count + 2)), device="meta")
    order = [size - 2 for size in call.rerun(marked).shape]
    if order[0] != 0:
        return None
    # What moves only axes of size 1 moves no element.
    large = [axis for axis in order[1:] if shape[axis - 1] > 1]
    if large == sorted(large):
        return call.through(*view(shape, call.out_shape))
    return call.moved()


def _chosen_channels(call: Call, shape: Shape) -> Reading:
    """Channels left out, doubled or in another order: a pointwise convolution that picks them."""
    axes = len(shape) - 1
    device = call.node.meta["val"].device
    numbers = torch.arange(shape[0], dtype=torch.float64, device=device)
    numbers = numbers.reshape(1, -1, *[1] * axes)
    picked = [int(n) for n in call.rerun(numbers).flatten().tolist()]
    if picked == list(range(shape[0])):
        return call.through(*view(shape, call.out_shape))
    channels = len(picked)
    if not 1 <= axes <= 3 or channels == 0:
        return call.moved()

    def make() -> Tensor:
        weight = torch.zeros(channels, shape[0], dtype=torch.float64)
        weight[torch.arange(channels), torch.tensor(picked)] = 1
        return weight.reshape(channels, shape[0], *[1] * axes)

    ones = (1,) * axes
    pads, zeros = ((0, 0),) * axes, (0,) * axes
    settings = Conv(ones, ones, pads, ones, 1, False, zeros, "zeros", shape[0], channels, False)
    weight = Deferred((channels, shape[0], *ones), make)
    behind = (channels, *shape[1:])
    picking = Convolution(shape, behind, None, settings, weight)
    return call.through(picking, *view(behind, call.out_shape), flops=0)


@reads(
    "slice", "narrow", "select", "index_select", "flip", "roll", "cumsum", "repeat_interleave"
)  # fmt: skip
def _along_axes(call: Call) -> Reading | None:
    given = call.arguments.get("dims", call.arguments.get("dim"))
    if given is None or given == [] or call.in_shape is None:
        return None
    if not call.are_numbers(*(n for n in list(call.arguments)[1:] if n != "index")):
        return None
    if _is_whole_slice(call):
        return call.through()
    index = call.arguments.get("index")
    if isinstance(index, Node) and index not in call.constants:
        return None
    dims = call.dims(given)
    if dims is None or call.arguments.get("dtype") is not None:
        return None
    packet = call.node.target.overloadpacket  # type: ignore[union-attr]
    if packet is torch.ops.aten.cumsum:
        return call.moved(flops=math.prod(call.in_shape))
    return _chosen_channels(call, call.in_shape) if dims == [0] else call.moved()


def _is_whole_slice(call: Call) -> bool:
    """Whether a slice takes all of an axis, as `x[:, 1:]` does of the batch."""
    if "end" not in call.arguments:
        return False
    start, end, step = (call[name] for name in ("start", "end", "step"))
    return start in (None, 0) and step == 1 and (end is None or end == torch.iinfo(torch.int64).max)


@reads("index")
def _index(call: Call) -> Reading | None:
    indices = call["indices"]
    fixed = all(index is None or index in call.constants for index in indices)
    if call.in_shape is None or not fixed or indices[0] is not None:
        return None
    given = [n for n, index in enumerate(indices) if index is not None]
    if given != list(range(given[0], given[-1] + 1)):
        return None  # torch then puts what they choose in front of the batch
    return _chosen_channels(call, call.in_shape) if given == [1] else call.moved()


@reads("expand", "repeat", "tile")
def _repeat(call: Call) -> Reading | None:
    shape = call.in_shape
    if shape is None:
        return None
    name = list(call.arguments)[1]
    times = call[name]
    if name == "size":  # expand: of axes of size 1, and of new ones, but not before the batch
        if len(times) != len(shape) + 1:
            return None
        behind = call.out_shape
        return call.moved(lambda samples: samples.expand(samples.shape[0], *behind))
    if not call.are_numbers(name) or len(times) > len(shape) + 1:
        return None
    if len(times) == len(shape) + 1 and times[0] != 1:
        return None
    return call.moved()


@reads("im2col", "col2im")
def _columns(call: Call) -> Reading | None:
    return None if call.in_shape is None else call.moved()


@reads("channel_shuffle")
def _channel_shuffle(call: Call) -> Reading | None:
    return None if not call.in_shape else _chosen_channels(call, call.in_shape)


@reads("pixel_shuffle", "pixel_unshuffle")
def _pixel_shuffle(call: Call) -> Reading | None:
    """A transposed convolution of kernel and stride r, with one tap a channel; or its adjoint."""
    shape = call.in_shape
    if shape is None or len(shape) != 3:
        return None
    up = call.node.target.overloadpacket is torch.ops.aten.pixel_shuffle  # type: ignore[union-attr]
    r = call["upscale_factor" if up else "downscale_factor"]
    many = call.out_shape[0]
    few, tap, pads = many if up else shape[0], (r, r), ((0, 0),) * 2
    settings = Conv(tap, tap, pads, (1, 1), few, up, (0, 0), "zeros", shape[0], many, False)

    def make() -> Tensor:
        taps = torch.eye(r * r, dtype=torch.float64).reshape(r * r, 1, r, r)
        return taps.repeat(few, 1, 1, 1)

    weight = Deferred((few * r * r, 1, r, r), make)
    return call.through(Convolution(shape, call.out_shape, None, settings, weight), flops=0)
