"""BatchNorm in eval mode, merged into the layer before it or behind it.

With its running statistics a BatchNorm is an affine map per channel, `y = scale x + shift` where
`scale = weight / sqrt(running_var + eps)` and `shift = bias - running_mean * scale`: S. Ioffe and
C. Szegedy, "Batch Normalization", arXiv:1502.03167, algorithm 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .errors import FusionError
from .geometry import HALF_TYPES
from .meshes import check_rules, gathered, on_one_mesh, placed_as_layers
from .modules import (
    _CONVOLUTIONS,
    _TRANSPOSED,
    _check_module,
    _conv_keywords,
    _conv_settings,
    _make_linear,
    _parameters,
    _requires_grad,
)
from .operands import check_tensor

__all__ = ["fuse_bn", "fuse_bn_into"]

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _check_pair(op: str, layer: Any, bn: Any, side: str) -> None:
    """Accepts a layer and an eval BatchNorm over the channels at its `side`, 'in' or 'out'."""
    _check_module(op, "layer", layer, (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED))
    linear = isinstance(layer, nn.Linear)
    axes = 1 if linear else len(layer.kernel_size)  # BatchNorm1d also takes [N, features]
    # In eval mode a SyncBatchNorm has nothing to synchronise, and it takes any number of axes.
    _check_module(op, "bn", bn, (_BATCH_NORMS[axes - 1], nn.SyncBatchNorm))
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError(
            f"{op}: `bn` must have running statistics, got track_running_stats="
            f"{bn.track_running_stats}; without them it depends on the whole batch"
        )
    if bn.training:
        raise ValueError(
            f"{op}: `bn` must be in eval mode, call bn.eval() first; in training mode it depends "
            "on the whole batch"
        )
    kind = "features" if linear else "channels"
    channels = getattr(layer, f"{side}_{kind}")
    if bn.num_features != channels:
        raise ValueError(
            f"{op}: `bn` must have the {channels} {side}put {kind} of `layer`, "
            f"got {bn.num_features}"
        )


def _check_tensors(op: str, weight: Tensor, bn: Any) -> None:
    """Dtypes and devices are such that torch would run the two layers."""
    check_tensor(op, "layer.weight", weight)
    check_rules(op, "layer.weight", weight)
    half = weight.dtype in HALF_TYPES
    dtypes = (weight.dtype, torch.float32) if half else (weight.dtype,)
    for name in ("running_mean", "running_var", "weight", "bias"):
        tensor = getattr(bn, name)
        if tensor is None:
            continue
        check_rules(op, f"bn.{name}", tensor)
        if tensor.dtype not in dtypes:
            raise TypeError(
                f"{op}: `bn.{name}` must be {' or '.join(map(str, dtypes))} for this layer, "
                f"got {tensor.dtype}"
            )
        if tensor.device != weight.device:
            raise ValueError(
                f"{op}: `bn.{name}` must be on the device of the layer ({weight.device}), "
                f"got {tensor.device}"
            )


def _scale_and_shift(bn: Any) -> tuple[Tensor, Tensor]:
    """The affine map of a BatchNorm in eval mode, in float64, each `[num_features]`."""
    weight, bias = (gathered(parameter) for parameter in _parameters(bn))
    scale = (gathered(bn.running_var).double() + bn.eps).rsqrt()
    if weight is not None:
        scale = scale * weight.double()
    shift = -gathered(bn.running_mean).double() * scale
    if bias is not None:
        shift = shift + bias.double()
    return scale, shift


def _operands(layer: Any, old: tuple[Tensor, Tensor | None], *maps: Tensor) -> tuple[Any, ...]:
    """Weight and bias of a layer beside a BatchNorm's map: a sharded Linear is left where it is.

    The kernels of a convolution are small, and groups cut them across their shards.
    """
    if isinstance(layer, nn.Linear):
        return on_one_mesh(*old, *maps)
    return (*(gathered(parameter) for parameter in old), *maps)


def _in_groups(layer: Any, weight: Tensor) -> Tensor:
    """A weight in float64 as `[groups, A, B, *kernel]`, one connected block per group.

    A is the output channels of a group and B its input channels; in a transposed convolution they
    have changed places.
    """
    return weight.double().reshape(getattr(layer, "groups", 1), -1, *weight.shape[1:])


def _per_channel(layer: Any, values: Tensor, grouped: Tensor, side: str) -> Tensor:
    """One value per channel at the `side` of a layer, shaped to multiply its weight in groups."""
    size = [grouped.shape[0], *[1] * (grouped.dim() - 1)]
    size[1 if (side == "out") != isinstance(layer, _TRANSPOSED) else 2] = -1
    return values.reshape(size)


def _sum_to_out_channels(layer: Any, grouped: Tensor) -> Tensor:
    """Sums a weight in groups over kernel and input channels, `[C_out]`."""
    in_channels = 1 if isinstance(layer, _TRANSPOSED) else 2
    return grouped.sum([in_channels, *range(3, grouped.dim())]).flatten()


def _remade(
    layer: Any, bn: Any, old: tuple[Tensor, Tensor | None], grouped: Tensor, bias: Tensor
) -> nn.Module:
    """A layer of the kind and settings of `layer` with a new weight, in groups, and bias."""
    old_weight, old_bias = old
    weight, bias = grouped.flatten(0, 1).to(old_weight.dtype), bias.to(old_weight.dtype)
    weight, bias = placed_as_layers(weight, bias, [old])
    weight_grad = _requires_grad(old_weight, bn.weight)
    bias_grad = _requires_grad(old_bias, bn.bias)
    if isinstance(layer, nn.Linear):
        return _make_linear(weight, bias, weight_grad, bias_grad, layer.training)
    kind = next(kind for kind in _CONVOLUTIONS + _TRANSPOSED if isinstance(layer, kind))
    settings: dict[str, Any] = _conv_keywords(layer)
    settings.pop("transposed", None)
    # On the meta device nothing is allocated and no random number is drawn.
    made: nn.Module = kind(
        layer.in_channels, layer.out_channels, layer.kernel_size, **settings, device="meta"
    )
    made.weight = nn.Parameter(weight, requires_grad=weight_grad)
    made.bias = nn.Parameter(bias, requires_grad=bias_grad)
    return made.train(layer.training)


def _check_shift_is_exact(op: str, layer: Any, weight: Tensor, bn: Any, shift: Tensor) -> None:
    """A shift before a layer is a bias behind it only if every output position sees all of it.

    A convolution does unless it pads with zeros: those are not shifted, but padding that repeats
    positions is. A transposed convolution spreads the shift unevenly wherever the kernels of
    neighbouring positions interleave (a stride) or end (the rim), so that it needs stride 1 and a
    padding that cuts off the whole rim.
    """
    if isinstance(layer, nn.Linear):
        return
    conv = _conv_settings(op, layer, weight, None)
    if conv.transposed:
        rule = (
            "have stride 1 and padding of at least dilation * (kernel_size - 1) + output_padding "
            "where `bn` shifts, as the shift otherwise reaches its output positions unevenly"
        )
        repair = ""
        axes = zip(conv.stride, conv.padding, conv.span, conv.output_padding, strict=True)
        exact = all(stride == 1 and low >= span + extra for stride, (low, _), span, extra in axes)
    else:
        rule = "read no zero padding where `bn` shifts, as the zeros are not shifted"
        repair = "pad the input by -shift / scale of its channel, with padding=0 in the layer; or "
        exact = conv.padding_mode != "zeros" or not any(conv.pads)
    # What a meta tensor holds is not known.
    if exact or (not shift.is_meta and not shift.any()):
        return
    most = "unknown size" if shift.is_meta else f"up to {shift.abs().max().item():.3g}"
    raise FusionError(
        f"{op}: `layer` must {rule}; got {layer} behind {bn} with shifts of {most}. Exact instead: "
        f"{repair}merge the scale only and add the layer's answer to the shift as a bias per "
        "output position, which the Linear of conv_to_linear(layer, input_size) can hold"
    )


def fuse_bn(layer: nn.Module, bn: nn.Module) -> nn.Module:
    """Merges a layer and the BatchNorm behind it into one layer of the same kind.

    `bn(layer(x)) == fused(x)`, always exact: the scale multiplies the rows of the layer that belong
    to a channel, the shift joins the bias. Computed in float64 and rounded once.

    Args:
        layer: A Linear (on `[N, features]`), Conv1d, Conv2d, Conv3d, ConvTranspose1d,
            ConvTranspose2d or ConvTranspose3d with any settings. Subclasses are accepted where they
            compute the same.
        bn: The BatchNorm behind it, in eval mode and with running statistics: BatchNorm1d for a
            Linear or 1-d layers, BatchNorm2d, BatchNorm3d, or SyncBatchNorm; with or without weight
            and bias. Its dtype is the layer's, or float32 where the layer has a half type.

    Returns:
        A layer with the kind, settings, dtype, device and `training` of `layer`, always with bias.
        Its weight requires a gradient if one of the weights does, its bias if one of the biases.

    Raises:
        TypeError: An argument is no such layer, overrides its forward, or has an unsupported dtype.
        ValueError: `bn` is in training mode, has no running statistics, or does not have as many
            features as `layer` has outputs; a layer has hooks, is not initialised, or the devices
            differ.

    Examples:
        >>> conv = torch.nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=False)
        >>> bn = torch.nn.BatchNorm2d(6, affine=False).eval()
        >>> fused = fuse_bn(conv, bn)
        >>> x = torch.rand(5, 4, 7, 8)
        >>> torch.allclose(bn(conv(x)), fused(x), atol=1e-5)
        True
    """
    op = "fuse_bn"
    _check_pair(op, layer, bn, "out")
    weight, bias = _parameters(layer)
    _check_tensors(op, weight, bn)
    with torch.no_grad():
        whole, old_bias, scale, shift = _operands(layer, (weight, bias), *_scale_and_shift(bn))
        grouped = _in_groups(layer, whole)
        merged = grouped * _per_channel(layer, scale, grouped, "out")
        merged_bias = shift if old_bias is None else shift + scale * old_bias.double()
        return _remade(layer, bn, (weight, bias), merged, merged_bias)


def fuse_bn_into(bn: nn.Module, layer: nn.Module) -> nn.Module:
    """Merges a BatchNorm and the layer behind it into one layer of the same kind, where exact.

    `layer(bn(x)) == fused(x)`. The scale is always exact. The shift is a bias per channel only if
    every output position sees all of it:

    - Linear: always.
    - Convolution: without padding, or with padding that repeats positions ('reflect', 'replicate',
      'circular'). Zero padding is not shifted.
    - Transposed convolution: stride 1 and `padding >= dilation * (kernel_size - 1) +
      output_padding`; elsewhere the shift reaches the output positions unevenly.
    - A shift that is zero in every channel: always.

    Computed in float64 and rounded once.

    Args:
        bn: A BatchNorm in eval mode and with running statistics: BatchNorm1d for a Linear or 1-d
            layers, BatchNorm2d, BatchNorm3d, or SyncBatchNorm; with or without weight and bias. Its
            dtype is the layer's, or float32 where the layer has a half type.
        layer: The Linear (on `[N, features]`), Conv1d, Conv2d, Conv3d, ConvTranspose1d,
            ConvTranspose2d or ConvTranspose3d behind it. Subclasses are accepted where they compute
            the same.

    Returns:
        A layer with the kind, settings, dtype, device and `training` of `layer`, always with bias.
        Its weight requires a gradient if one of the weights does, its bias if one of the biases.

    Raises:
        FusionError: The shift has no exact place in the layer; the message says what would work.
        TypeError: An argument is no such layer, overrides its forward, or has an unsupported dtype.
        ValueError: `bn` is in training mode, has no running statistics, or does not have as many
            features as `layer` has inputs; a layer has hooks, is not initialised, or the devices
            differ.

    Examples:
        >>> bn = torch.nn.BatchNorm1d(6).eval()
        >>> linear = torch.nn.Linear(6, 3)
        >>> fused = fuse_bn_into(bn, linear)
        >>> x = torch.rand(5, 6)
        >>> torch.allclose(linear(bn(x)), fused(x), atol=1e-6)
        True
    """
    op = "fuse_bn_into"
    _check_pair(op, layer, bn, "in")
    weight, bias = _parameters(layer)
    _check_tensors(op, weight, bn)
    with torch.no_grad():
        scale, shift = _scale_and_shift(bn)
        _check_shift_is_exact(op, layer, weight, bn, shift)
        whole, old_bias, scale, shift = _operands(layer, (weight, bias), scale, shift)
        grouped = _in_groups(layer, whole)
        merged = grouped * _per_channel(layer, scale, grouped, "in")
        added = _sum_to_out_channels(layer, grouped * _per_channel(layer, shift, grouped, "in"))
        merged_bias = added if old_bias is None else added + old_bias.double()
        return _remade(layer, bn, (weight, bias), merged, merged_bias)
