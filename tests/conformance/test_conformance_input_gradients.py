"""The merged weight is the input gradient: rows of the Linear go back through the convolution.

Settings as in einconv's tables for input gradients, index patterns and transposed unfolding; what
they must be is asked of torch.nn.grad, and the bias of plain sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from conformance_nets import drawn, every
from tolerance import assert_close
from torch import Tensor

from linfuse_ext import functional

GRADIENTS = {
    1: torch.nn.grad.conv1d_input,
    2: torch.nn.grad.conv2d_input,
    3: torch.nn.grad.conv3d_input,
}
FORWARD = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}
TRANSPOSED = {1: torch.conv_transpose1d, 2: torch.conv_transpose2d, 3: torch.conv_transpose3d}


@dataclass(frozen=True)
class Layer:
    """Sizes and settings of a convolution, and the trap that they set."""

    name: str
    trap: str
    weight: tuple[int, ...]
    size: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)


ROOM = "an input that the last window does not reach gets no gradient, but it is there"
AXES = "stride, padding and dilation of one axis are used for another"
GROUPS = "the gradient of a group lands in the channels of another"
LAYERS = [
    # one axis: input gradients, then index patterns
    Layer("1-d", "the kernel is not turned around", (4, 3, 5), (50,)),
    Layer("1-d stride", ROOM, (4, 3, 5), (50,), {"stride": 2}),
    Layer("1-d stride 3, groups 2", GROUPS, (6, 2, 5), (50,), {"stride": 3, "groups": 2}),
    Layer("1-d padding", "padding is cut off, not added", (4, 3, 5), (50,), {"padding": 2}),
    Layer("1-d tuples", "one-element tuples", (4, 3, 5), (50,),
          {"padding": (2,), "stride": (3,), "dilation": (1,)}),
    Layer("1-d dilation", "taps are neighbours", (4, 3, 5), (50,), {"dilation": 2}),
    Layer("1-d same", "padding by name", (4, 3, 5), (20,), {"padding": "same"}),
    Layer("1-d even kernel", "two taps, odd size", (2, 3, 2), (13,)),
    Layer("1-d beyond the kernel", "windows that see padding only", (2, 3, 4), (11,),
          {"padding": 6}),
    Layer("1-d valid", "padding by name", (2, 3, 4), (11,), {"padding": "valid"}),
    Layer("1-d same, dilated", "half of what the dilated kernel reaches", (2, 3, 5), (39,),
          {"padding": "same", "dilation": 2}),
    Layer("1-d mixed", ROOM, (2, 3, 4), (91,), {"stride": 2, "padding": 2, "dilation": 3}),
    Layer("1-d mixed, beyond the kernel", ROOM, (2, 3, 4), (91,),
          {"stride": 2, "padding": 20, "dilation": 3}),
    # two axes
    Layer("2-d", "rows and columns", (4, 3, 5, 5), (20, 16)),
    Layer("2-d stride", ROOM, (4, 3, 5, 5), (20, 16), {"stride": 2}),
    Layer("2-d stride 3, groups 2", GROUPS, (6, 2, 5, 5), (20, 16), {"stride": 3, "groups": 2}),
    Layer("2-d padding, even kernel", AXES, (4, 3, 5, 6), (20, 16), {"padding": 2}),
    Layer("2-d per axis", AXES, (4, 3, 5, 3), (20, 16),
          {"padding": (2, 1), "stride": (3, 2), "dilation": (1, 2)}),
    Layer("2-d per axis, groups 2", GROUPS, (6, 2, 5, 3), (20, 16),
          {"padding": (2, 1), "stride": (3, 2), "dilation": (1, 2), "groups": 2}),
    Layer("2-d dilation", AXES, (4, 3, 5, 6), (20, 16), {"dilation": 2}),
    Layer("2-d same, dilated", "'same' is another padding on each axis", (4, 3, 5, 3), (20, 16),
          {"padding": "same", "dilation": (1, 2)}),
    Layer("2-d same, dilation 2, groups 2", GROUPS, (4, 2, 4, 3), (9, 8),
          {"padding": "same", "dilation": 2, "groups": 2}),
    Layer("2-d beyond the kernel", "windows that see padding only", (4, 3, 2, 3), (7, 6),
          {"padding": (6, 4), "stride": (3, 2)}),
    Layer("2-d depthwise", GROUPS, (6, 1, 3, 2), (9, 8),
          {"padding": (2, 0), "stride": (2, 1), "groups": 6}),
    # three axes
    Layer("3-d", "three axes", (4, 3, 5, 5, 5), (10, 9, 8)),
    Layer("3-d stride", ROOM, (4, 3, 5, 5, 5), (10, 9, 8), {"stride": 2}),
    Layer("3-d stride 3, groups 2", GROUPS, (6, 2, 5, 5, 5), (10, 9, 8),
          {"stride": 3, "groups": 2}),
    Layer("3-d padding", AXES, (4, 3, 5, 6, 7), (10, 9, 8), {"padding": 2}),
    Layer("3-d per axis", AXES, (4, 3, 5, 3, 2), (10, 9, 8),
          {"padding": (2, 1, 0), "stride": (3, 2, 1), "dilation": (1, 2, 3)}),
    Layer("3-d per axis, groups 2", GROUPS, (4, 2, 5, 3, 2), (10, 9, 8),
          {"padding": (2, 1, 0), "stride": (3, 2, 1), "dilation": (1, 2, 3), "groups": 2}),
    Layer("3-d dilation", AXES, (2, 3, 2, 3, 4), (10, 9, 8), {"dilation": 2}),
    Layer("3-d same, dilated", "'same' is another padding on each axis", (4, 3, 5, 3, 2),
          (10, 9, 8), {"padding": "same", "dilation": (1, 2, 2)}),
]  # fmt: skip


def per_axis(value: Any, axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


def ends(layer: Layer) -> list[tuple[int, int]]:
    """Padding at both ends of every axis."""
    axes, padding = len(layer.size), layer.options.get("padding", 0)
    dilation = per_axis(layer.options.get("dilation", 1), axes)
    if padding == "same":
        spans = [d * (k - 1) for d, k in zip(dilation, layer.weight[2:], strict=True)]
        return [(span // 2, span - span // 2) for span in spans]
    return [(p, p) for p in per_axis(0 if padding == "valid" else padding, axes)]


def input_gradient(layer: Layer, weight: Tensor, rows: Tensor) -> Tensor:
    """torch's, of the padded input, whose padding is then cut off; `rows` as images."""
    options = {k: v for k, v in layer.options.items() if k != "padding"}
    padded = [size + sum(pair) for size, pair in zip(layer.size, ends(layer), strict=True)]
    channels = weight.shape[1] * options.get("groups", 1)
    full = GRADIENTS[len(layer.size)]((rows.shape[0], channels, *padded), weight, rows, **options)
    for axis, (size, (low, _)) in enumerate(zip(layer.size, ends(layer), strict=True), start=2):
        full = full.narrow(axis, low, size)
    return full.flatten(1)


def output_size(layer: Layer) -> tuple[int, ...]:
    image = torch.zeros(1, layer.weight[1] * layer.options.get("groups", 1), *layer.size)
    return tuple(
        FORWARD[len(layer.size)](image, torch.zeros(layer.weight), **layer.options).shape[2:]
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@every(LAYERS)
def test_the_weight_is_torchs_input_gradient(case: Layer, dtype: torch.dtype) -> None:
    out = output_size(case)
    positions, channels = math.prod(out), case.weight[0]
    weight, bias = drawn(*case.weight, name="w").to(dtype), drawn(channels, name="b").to(dtype)
    linear = drawn(3, channels * positions, name="l").to(dtype)
    shift = drawn(3, name="s").to(dtype)
    got_weight, got_bias = functional.fuse_conv_linear(
        weight, bias, linear, shift, case.size, **case.options
    )
    operands = [tensor.double() for tensor in (weight, bias, linear, shift)]
    wanted = expected(case, out, *operands)
    most = expected(case, out, *(tensor.abs() for tensor in operands))
    for got, want, size in zip((got_weight, got_bias), wanted, most, strict=True):
        try:
            assert_close(got, want, size, channels * positions)
        except AssertionError as error:
            raise AssertionError(f"{case.trap}: {error}") from None


def expected(
    layer: Layer, out: tuple[int, ...], weight: Tensor, bias: Tensor, linear: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    rows = linear.view(-1, weight.shape[0], *out)
    return input_gradient(layer, weight, rows), shift + rows.flatten(2).sum(2) @ bias


@every(LAYERS)
def test_the_bias_alone(case: Layer) -> None:
    """Without its weight a layer puts out its bias everywhere, padding or not."""
    out = output_size(case)
    weight, bias = torch.zeros(case.weight).double(), drawn(case.weight[0], name="b")
    linear = drawn(3, case.weight[0] * math.prod(out), name="l")
    none, got = functional.fuse_conv_linear(weight, bias, linear, None, case.size, **case.options)
    want = (linear.view(3, -1, math.prod(out)) * bias.view(1, -1, 1)).sum((1, 2))
    assert not none.any()
    # Sums of as many normal numbers as the Linear has columns.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-15 * linear.shape[1] * 4)


# A transposed convolution goes back through the convolution of its weight -------------------------

TRANSPOSED_LAYERS = [
    Layer("1-d, kernel 1", "nothing to turn around", (3, 4, 1), (50,)),
    Layer("1-d mixed", "output_padding is at the high end only", (2, 3, 3), (9,),
          {"stride": 2, "padding": 1, "output_padding": 1, "dilation": 2}),
    Layer("2-d, kernel 1", "nothing to turn around", (3, 2, 1, 1), (10, 10)),
    Layer("2-d mixed", AXES, (2, 3, 3, 2), (9, 7),
          {"stride": (2, 1), "padding": (1, 0), "output_padding": (1, 0), "dilation": (2, 2)}),
    Layer("2-d mixed, groups 2", GROUPS, (4, 3, 3, 2), (9, 7),
          {"stride": (2, 1), "padding": (1, 0), "output_padding": (1, 0), "groups": 2}),
    Layer("3-d, kernel 1", "nothing to turn around", (3, 2, 1, 1, 1), (5, 6, 4)),
    Layer("3-d mixed", AXES, (2, 3, 3, 2, 4), (6, 5, 4),
          {"stride": (2, 1, 3), "padding": (1, 0, 2), "output_padding": (1, 0, 2),
           "dilation": (2, 2, 1)}),
]  # fmt: skip


@every(TRANSPOSED_LAYERS)
def test_the_input_gradient_of_a_transposed_convolution_is_a_convolution(case: Layer) -> None:
    axes, groups = len(case.size), case.options.get("groups", 1)
    weight, channels = drawn(*case.weight, name="w"), case.weight[1] * groups
    bias, shift = drawn(channels, name="b"), drawn(3, name="s")
    image = torch.zeros(1, case.weight[0], *case.size).double()
    out = TRANSPOSED[axes](image, weight, **case.options).shape[2:]
    linear = drawn(3, channels * math.prod(out), name="l")
    back = {key: value for key, value in case.options.items() if key != "output_padding"}

    def gradient(weight: Tensor, linear: Tensor) -> Tensor:
        return FORWARD[axes](linear.view(3, channels, *out), weight, **back).flatten(1)

    got, got_bias = functional.fuse_conv_linear(
        weight, bias, linear, shift, case.size, transposed=True, **case.options
    )
    most = gradient(weight.abs(), linear.abs())
    assert_close(got, gradient(weight, linear), most, channels * math.prod(case.weight[2:]))
    rows = linear.view(3, channels, -1).sum(2)
    size = linear.abs().view(3, channels, -1).sum(2) @ bias.abs() + shift.abs()
    assert_close(got_bias, shift + rows @ bias, size, linear.shape[1] + channels)
