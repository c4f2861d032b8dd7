"""Convolutions, Linears, matrix products with constants, and BatchNorm."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.fx import Node

from ...composition import Conv
from ...geometry import make_settings
from ..costs import flops_of
from ..maps import Convolution, Deferred, Dense, Diagonal, Operator, deferred_full
from ..operations import Call, Reading, reads


def _convolution(call: Call, transposed: bool, output_padding: Any = 0) -> Reading | None:
    weight_node = call["weight"]
    if not call.are_constants("weight", "bias") or call.in_shape is None:
        return None
    names = [n for n in ("stride", "padding", "dilation", "groups") if n in call.arguments]
    if not call.are_numbers(*names):
        return None
    weight = call.constants.deferred(weight_node)
    axes = len(weight.shape) - 2
    if len(call.in_shape) != axes + 1:
        return None
    settings = Conv.of(
        make_settings(
            "collapse",
            weight.shape,
            call["stride"],
            call["padding"],
            call["dilation"],
            call["groups"],
            transposed,
            output_padding,
        ),
        False,
    )
    bias = call.constant("bias", (settings.out_channels, *[1] * axes))
    return call.through(Convolution(call.in_shape, call.out_shape, bias, settings, weight))


@reads("conv1d", "conv2d", "conv3d")
def _conv(call: Call) -> Reading | None:
    return _convolution(call, False)


@reads("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(call: Call) -> Reading | None:
    return _convolution(call, True, call["output_padding"])


@reads("convolution")
def _any_convolution(call: Call) -> Reading | None:
    extra = call["output_padding"] if call["transposed"] else 0
    return _convolution(call, call["transposed"], extra)


def _linear(call: Call, value: Node, weight: Deferred, bias: Deferred | None) -> Reading | None:
    shape = call.shape_of(value)
    if not shape or len(weight.shape) != 2:
        return None
    affine = Dense(shape, (*shape[:-1], weight.shape[0]), bias, weight, shape[:-1])
    flops = flops_of(affine)
    return Reading([(value, [affine])], None, flops, True)


def _transposed(weight: Deferred) -> Deferred:
    return Deferred(weight.shape[::-1], lambda: weight.value.T)


def _scaled(factor: Deferred, by: float) -> Deferred:
    """By zero it is zero: torch does not look at what it would multiply."""
    if by == 1:
        return factor
    return (
        Deferred(factor.shape, lambda: factor.value * by) if by else deferred_full(factor.shape, 0)
    )


@reads("linear")
def _linear_layer(call: Call) -> Reading | None:
    if not call.are_constants("weight", "bias") or len(call.out_shape) < 1:
        return None
    weight = call.constants.deferred(call["weight"])
    if call["bias"] is None:
        return _linear(call, call["input"], weight, None)
    bias = _bias_of_features(call, call.constants.deferred(call["bias"]))
    return None if bias is None else _linear(call, call["input"], weight, bias)


def _bias_of_features(call: Call, bias: Deferred) -> Deferred | None:
    """A bias that every sample meets alike, one value for each feature."""
    features = call.out_shape[-1]
    if any(size != 1 for size in bias.shape[:-1]) or bias.size not in (1, features):
        return None
    shape = (*[1] * (len(call.out_shape) - 1), features)
    return Deferred(shape, lambda: bias.value.flatten().expand(features).reshape(shape))


@reads("addmm")
def _addmm(call: Call) -> Reading | None:
    if not call.are_numbers("alpha", "beta") or not call.are_constants("self", "mat2"):
        return None
    bias = _bias_of_features(call, call.constants.deferred(call["self"]))
    if bias is None:
        return None
    weight = _scaled(_transposed(call.constants.deferred(call["mat2"])), call["alpha"])
    return _linear(call, call["mat1"], weight, _scaled(bias, call["beta"]))


@reads("mm", "matmul")
def _matmul(call: Call) -> Reading | None:
    left, right = list(call.arguments.values())[:2]
    if right in call.constants:
        weight = call.constants.deferred(right)
        return _linear(call, left, _transposed(weight), None) if len(weight.shape) == 2 else None
    shape = call.shape_of(right)
    if left not in call.constants or shape is None or len(shape) < 2:
        return None
    matrix = call.constants.deferred(left)
    if len(matrix.shape) != 2:
        return None
    operator = Operator(shape, call.out_shape, None, lambda samples: matrix.value @ samples)
    flops = 2 * matrix.shape[1] * math.prod(call.out_shape)
    return Reading([(right, [operator])], None, flops, True)


@reads("batch_norm", "_native_batch_norm_legit_no_training")
def _batch_norm(call: Call) -> Reading | None:
    names = ("weight", "bias", "running_mean", "running_var")
    shape = call.in_shape
    if call.arguments.get("training") or not call.are_constants(*names) or not shape:
        return None
    if call["running_mean"] is None or call["running_var"] is None:
        return None
    channels = (shape[0], *[1] * (len(shape) - 1))
    mean, var = call.constant("running_mean"), call.constant("running_var")
    weight, bias = call.constant("weight"), call.constant("bias")
    eps = call["eps"]
    assert mean is not None and var is not None

    def make_scale() -> Tensor:
        scale: Tensor = (var.value + eps).rsqrt()
        return (scale if weight is None else scale * weight.value).reshape(channels)

    scale = Deferred(channels, make_scale)

    def make_shift() -> Tensor:
        shift = -mean.value * scale.value.reshape(-1)
        return (shift if bias is None else shift + bias.value).reshape(channels)

    return call.through(Diagonal(shape, shape, Deferred(channels, make_shift), scale))
