"""The table of composition rules: (second, first) -> the one map that does both, or why not.

To add a rule: write a function that takes the two maps and returns a map or a Refusal, enter it in
RULES under the kinds it is for, and give it a test in tests/network/test_rules.py. What no rule
composes still has a matrix (maps.dense), so that a Refusal here only says that no smaller form
exists.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..composition import Conv, Pair, Refusal, find_merge
from ..torch_engine import merged_bias, turn
from .alignment import padding_too_wide, refusal, weight_shape
from .maps import (
    AffineMap,
    Convolution,
    Deferred,
    Dense,
    Diagonal,
    Shape,
    View,
    as_diagonal,
    is_identity,
)

Rule = Callable[[Any, Any], "AffineMap | Refusal"]


def _broadcast(*shapes: Shape) -> Shape:
    return tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]


def sum_of_offsets(*offsets: Deferred | None) -> Deferred | None:
    """The sum of what there is, broadcast."""
    there = [offset for offset in offsets if offset is not None]
    if len(there) < 2:
        return there[0] if there else None
    shape = _broadcast(*(offset.shape for offset in there))
    return Deferred(shape, lambda: sum((o.value for o in there), torch.zeros(())).expand(shape))


def carried_offset(second: AffineMap, first: AffineMap) -> Deferred | None:
    """The offset of both maps, one value per element."""
    if first.offset is None:
        return second.offset

    def make() -> Tensor:
        flat = first.flat_offset()
        assert flat is not None
        carried = second.apply(flat.unsqueeze(1)).reshape(second.out_shape)
        return carried if second.offset is None else carried + second.offset.value

    return Deferred(second.out_shape, make)


# --- a scale and a shift


def by_channel(value: Deferred) -> bool:
    """Whether a tensor `[C, ...]` is the same at all positions."""
    return all(size == 1 for size in value.shape[1:])


def _channels(value: Deferred, channels: int) -> Tensor:
    return value.value.expand(channels, *value.shape[1:]).reshape(channels)


def _scale_offset(second: Diagonal, first: AffineMap) -> Deferred | None:
    if first.offset is None:
        return second.offset
    shape = _broadcast(second.scale.shape, first.offset.shape)
    offset = first.offset
    scaled = Deferred(shape, lambda: second.scale.value * offset.value)
    return sum_of_offsets(scaled, second.offset)


def _diagonal_diagonal(second: Diagonal, first: Diagonal) -> AffineMap:
    shape = _broadcast(second.scale.shape, first.scale.shape)
    scale = Deferred(shape, lambda: second.scale.value * first.scale.value)
    return Diagonal(first.in_shape, second.out_shape, _scale_offset(second, first), scale)


def _scaled(convolution: Convolution, scale: Deferred, side: str) -> Deferred:
    """The weight of a convolution whose channels at the `side`, 'in' or 'out', are scaled."""

    def make() -> Tensor:
        settings, weight = convolution.settings, convolution.weight.value
        ones = [1] * (weight.dim() - 2)
        each = _channels(scale, settings.out_channels if side == "out" else settings.in_channels)
        if (side == "out") != settings.transposed:
            return weight * each.reshape(-1, 1, *ones)
        grouped = weight.reshape(settings.groups, -1, *weight.shape[1:])
        return (grouped * each.reshape(settings.groups, 1, -1, *ones)).reshape(weight.shape)

    return Deferred(convolution.weight.shape, make)


def _scale_of(convolution: Convolution) -> Deferred | None:
    """What a convolution scales each channel by, if at every position it does only that."""
    settings, weight = convolution.settings, convolution.weight
    one_tap = all(size == 1 for size in settings.kernel_size) and not settings.transposed
    each = settings.groups == settings.in_channels == settings.out_channels
    shape = (weight.shape[0], *[1] * len(settings.kernel_size))
    return Deferred(shape, lambda: weight.value.reshape(shape)) if one_tap and each else None


def _diagonal_convolution(second: Diagonal, first: Convolution) -> AffineMap | Refusal:
    if not by_channel(second.scale):
        return refusal("the scale behind a convolution differs between positions")
    return replace(
        first,
        offset=_scale_offset(second, first),
        weight=_scaled(first, second.scale, "out"),
    )


def _convolution_diagonal(second: Convolution, first: Diagonal) -> AffineMap | Refusal:
    pointwise = as_convolution(first)  # for the rules of what happens to the shift
    if not isinstance(pointwise, Convolution):
        return refusal("the scale before a convolution differs between positions")
    offset, weight = _merged_offset(pointwise, second), _scaled(second, first.scale, "in")
    return replace(second, in_shape=first.in_shape, offset=offset, weight=weight)


# --- two convolutions


def _merged_offset(first: Convolution, second: Convolution) -> Deferred | None:
    """One value per channel where the rules allow it, else one per position: a bias map."""
    offset = first.offset
    if offset is None:
        return second.offset
    biased = find_merge(first.settings._replace(bias=True), second.settings, symmetric=False)
    if isinstance(biased, Refusal) or not by_channel(offset):
        return carried_offset(second, first)
    settings = second.settings

    def make() -> Tensor:
        bias, weight = _channels(offset, settings.in_channels), second.weight.value
        forward = turn(weight, settings.groups) if settings.transposed else weight
        return merged_bias(bias, forward, None, settings.groups).reshape(carried.shape)

    carried = Deferred((settings.out_channels, *[1] * len(settings.kernel_size)), make)
    return sum_of_offsets(carried, second.offset)


def _convolution_convolution(second: Convolution, first: Convolution) -> AffineMap | Refusal:
    if len(first.settings.kernel_size) != len(second.settings.kernel_size):
        return refusal("the two convolutions have different numbers of axes")
    merge = find_merge(first.settings, second.settings, symmetric=False)
    if isinstance(merge, Refusal):
        return merge
    settings = merge.result
    too_wide = padding_too_wide(settings, first.in_shape[1:])
    if too_wide is not None:
        return too_wide

    scale = _scale_of(first)
    offset = _merged_offset(first, second)
    same = weight_shape(settings) == second.weight.shape and not merge.turn_second
    if scale is not None and same:
        # Padding, or a choice of positions: nothing to multiply but channels.
        weight = _scaled(second, scale, "in")
        return Convolution(first.in_shape, second.out_shape, offset, settings, weight)

    def make() -> Tensor:
        weights = (first.weight.value.contiguous(), None, second.weight.value.contiguous(), None)
        return functional.merge_weights(merge, *weights)[0]

    weight = Deferred(weight_shape(settings), make)
    return Convolution(first.in_shape, second.out_shape, offset, settings, weight)


# --- matrices and views


def _view_view(second: View, first: View) -> AffineMap:
    return View(first.in_shape, second.out_shape, None)


def _dense_dense(second: Dense, first: Dense) -> AffineMap | Refusal:
    if second.lead != first.lead:
        return refusal("two Linears work on different axes")
    weight = Deferred(
        (second.weight.shape[0], first.weight.shape[1]),
        lambda: second.weight.value @ first.weight.value,
    )
    offset: Deferred | None
    if first.offset is None:
        offset = second.offset
    else:
        tail = (second.weight.shape[0],)
        own = first.offset

        def carry() -> Tensor:
            each = own.value.expand(*own.shape[:-1], first.out_shape[-1])
            return each @ second.weight.value.T

        if len(first.out_shape) == len(first.lead) + 1 == len(second.out_shape):
            shape = (*own.shape[:-1], *tail)
            offset = sum_of_offsets(Deferred(shape, carry), second.offset)
        else:
            offset = carried_offset(second, first)
    return Dense(first.in_shape, second.out_shape, offset, weight, first.lead)


def _tail_only(value: Deferred, lead: Shape) -> bool:
    """Whether a tensor is the same at all leading positions."""
    return all(size == 1 for size in value.shape[: len(lead)])


def _tail(value: Deferred, affine_shape: Shape, lead: Shape) -> Tensor:
    shape = affine_shape[len(lead) :]
    return value.value.reshape(value.shape[len(lead) :]).expand(shape).flatten()


def _diagonal_dense(second: Diagonal, first: Dense) -> AffineMap | Refusal:
    if not _tail_only(second.scale, first.lead):
        return refusal("the scale behind a Linear differs between positions")

    def make() -> Tensor:
        return first.weight.value * _tail(second.scale, first.out_shape, first.lead).unsqueeze(1)

    weight = Deferred(first.weight.shape, make)
    return replace(first, offset=_scale_offset(second, first), weight=weight)


def _dense_diagonal(second: Dense, first: Diagonal) -> AffineMap | Refusal:
    if not _tail_only(first.scale, second.lead):
        return refusal("the scale before a Linear differs between positions")

    def make() -> Tensor:
        return second.weight.value * _tail(first.scale, first.out_shape, second.lead)

    weight = Deferred(second.weight.shape, make)
    scaled = replace(second, in_shape=first.in_shape, weight=weight)
    if first.offset is None:
        return scaled
    size = second.weight.shape[1]
    unit = Deferred((size, size), lambda: torch.eye(size, dtype=torch.float64))
    shift = Dense(first.in_shape, first.out_shape, first.offset, unit, second.lead)
    return replace(scaled, offset=_dense_dense(second, shift).offset)  # type: ignore[union-attr]


def _dense_view(second: Dense, first: View) -> AffineMap | Refusal:
    if second.lead:
        return refusal("a Linear works on the last axis of what is reshaped before it")
    return replace(second, in_shape=first.in_shape)


def _view_dense(second: View, first: Dense) -> AffineMap | Refusal:
    if first.lead:
        return refusal("a Linear works on the last axis of what is reshaped behind it")
    offset = first.offset
    if offset is not None:
        own = offset
        offset = Deferred(
            second.out_shape, lambda: own.value.expand(first.out_shape).reshape(second.out_shape)
        )
    return replace(first, out_shape=second.out_shape, offset=offset)


RULES: dict[tuple[type[AffineMap], type[AffineMap]], Rule] = {
    (Convolution, Convolution): _convolution_convolution,
    (Convolution, Diagonal): _convolution_diagonal,
    (Diagonal, Convolution): _diagonal_convolution,
    (Diagonal, Diagonal): _diagonal_diagonal,
    (Dense, Dense): _dense_dense,
    (Dense, Diagonal): _dense_diagonal,
    (Dense, View): _dense_view,
    (Diagonal, Dense): _diagonal_dense,
    (View, Dense): _view_dense,
    (View, View): _view_view,
}

_NAMES = {Convolution: "a convolution", Dense: "a Linear", Diagonal: "a scale", View: "a reshape"}


def name_of(affine: AffineMap) -> str:
    """What a map is called in a report."""
    return _NAMES.get(type(affine), "a rearrangement")


def compose(second: AffineMap, first: AffineMap) -> AffineMap | Refusal:
    """The map that does `first` and then `second`, in one of the small forms.

    Args:
        second: What comes second.
        first: What comes first; its `out_shape` is the `in_shape` of `second`.

    Returns:
        The map; or the rule that no such form exists, in which case the matrix of both does.
    """
    if is_identity(first):
        return second
    if is_identity(second):
        return first
    rule = RULES.get((type(second), type(first)))
    if rule is None:
        return refusal(f"{name_of(first)} and then {name_of(second)} have no form but a matrix")
    return rule(second, first)


# --- the same map in another form


def as_convolution(affine: AffineMap) -> AffineMap:
    """A scale per channel, or the identity, as the depthwise convolution of one element."""
    axes = len(affine.in_shape) - 1
    affine = as_diagonal(affine)
    if not isinstance(affine, Diagonal) or not by_channel(affine.scale) or not 1 <= axes <= 3:
        return affine
    channels, scale = affine.in_shape[0], affine.scale
    shape = (channels, *[1] * (axes + 1))
    weight = Deferred(shape, lambda: _channels(scale, channels).reshape(shape))
    pointwise = depthwise(affine.in_shape, affine.out_shape, (1,) * axes, weight)
    return replace(pointwise, offset=affine.offset)


def depthwise(
    in_shape: Shape,
    out_shape: Shape,
    kernel_size: Shape,
    weight: Deferred,
    stride: Shape | None = None,
    padding: tuple[Pair, ...] | None = None,
    transposed: bool = False,
    padding_mode: str = "zeros",
) -> Convolution:
    """A convolution of each channel by itself."""
    axes, channels = len(kernel_size), in_shape[0]
    settings = Conv(
        kernel_size,
        stride or (1,) * axes,
        padding or ((0, 0),) * axes,
        (1,) * axes,
        channels,
        transposed,
        (0,) * axes,
        padding_mode,
        channels,
        channels,
        False,
    )
    return Convolution(in_shape, out_shape, None, settings, weight)


def as_dense(affine: AffineMap, lead: Shape) -> AffineMap:
    """A scale, or the identity, as a matrix on the last axis."""
    size = math.prod(affine.in_shape[len(lead) :])
    affine = as_diagonal(affine)
    if not isinstance(affine, Diagonal) or not _tail_only(affine.scale, lead):
        return affine
    scale, shape = affine.scale, affine.in_shape
    weight = Deferred((size, size), lambda: torch.diag(_tail(scale, shape, lead)))
    return Dense(affine.in_shape, affine.out_shape, affine.offset, weight, lead)
