"""Convolutions of one input on one grid of taps, so that their kernels can be added or stacked.

Along an axis the taps of a convolution lie at `k d - p`, counted from `o s` (transposed: from
`i s`). On the common grid the padding is the largest, the dilation divides every distance between
taps, and the kernel reaches as far as any. Sizes before and behind are those of one input size:
they decide what padding the high end needs.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..composition import Conv, Refusal, common_divisor, turned
from ..torch_engine import as_one_group, turn
from .maps import Convolution, Deferred, Shape


class Grid(NamedTuple):
    """The common settings, and where each kernel lies on it: (start, step) per axis."""

    settings: Conv
    places: list[list[tuple[int, int]]]


class _Taps(NamedTuple):
    """One kernel along one axis."""

    padding: int  # at the low end
    dilation: int
    kernel_size: int


class _Axis(NamedTuple):
    kernel_size: int
    padding: tuple[int, int]
    dilation: int
    output_padding: int
    places: list[tuple[int, int]]


def _divisor(numbers: list[int]) -> int:
    found = 0
    for number in numbers:
        found = common_divisor(found, number)
    return found or 1


def _convolution_axis(
    taps: list[_Taps], sizes: tuple[int, int], stride: int, symmetric: bool
) -> _Axis:
    size, out = sizes
    low = max(kernel.padding for kernel in taps)
    span = max(low - kernel.padding + kernel.dilation * (kernel.kernel_size - 1) for kernel in taps)
    # The output has `out` positions for every high padding from `least` to `least + stride - 1`.
    least = stride * (out - 1) + span + 1 - size - low
    high = min(max(low, least), least + stride - 1)
    zeros: list[int] = []  # what the kernel grows by to make both ends alike
    if symmetric and high > low:
        zeros = [high - low]
        span, low = span + high - low, high
    elif symmetric and high < low:
        grid = _divisor(_distances(taps, low))
        shortest = low - high
        grown = -(-shortest // grid) * grid
        zeros = [grown if grown <= low - least else shortest]
        span, high = span + zeros[0], low
    return _on_grid(taps, (low, max(high, 0)), span, 0, zeros)


def _transposed_axis(
    taps: list[_Taps], sizes: tuple[int, int], stride: int, symmetric: bool
) -> _Axis:
    size, out = sizes
    low = max(kernel.padding for kernel in taps)
    span = max(low - kernel.padding + kernel.dilation * (kernel.kernel_size - 1) for kernel in taps)
    high = (size - 1) * stride + span + 1 - low - out  # less the output padding
    zeros: list[int] = []
    if 0 <= low - high < stride:
        return _on_grid(taps, (low, low), span, low - high, zeros)
    if high > low and symmetric:
        zeros = [high - low]
        span, low = span + high - low, high
    elif high < low and (symmetric or high <= -stride):
        zeros = [low - high]
        span, high = span + low - high, low
    return _on_grid(taps, (low, max(high, 0)), span, max(-high, 0), zeros)


def _distances(taps: list[_Taps], low: int) -> list[int]:
    steps = [kernel.dilation for kernel in taps if kernel.kernel_size > 1]
    return [low - kernel.padding for kernel in taps] + steps


def _on_grid(
    taps: list[_Taps], padding: tuple[int, int], span: int, output_padding: int, zeros: list[int]
) -> _Axis:
    low = padding[0]
    grid = _divisor(_distances(taps, low) + zeros)
    places = [((low - kernel.padding) // grid, max(1, kernel.dilation // grid)) for kernel in taps]
    return _Axis(span // grid + 1, padding, grid, output_padding, places)


def align(maps: list[Convolution], symmetric: bool = False) -> Grid | Refusal:
    """Puts convolutions with the same shapes before and behind on one grid.

    Args:
        maps: At least one.
        symmetric: Whether the padding must be the same at both ends, as torch's layers have it; the
            kernel then grows by zeros.

    Returns:
        The grid; or the rule that they have none.
    """
    first = maps[0].settings
    if any(affine.settings.transposed != first.transposed for affine in maps):
        return refusal("a strided convolution and a strided transposed one have no common form")
    modes = {affine.settings.padding_mode for affine in maps if any(affine.settings.pads)}
    if len(modes) > 1:
        return refusal("one convolution has one padding mode, the branches have several")
    axes = []
    strides = []
    for n in range(len(first.kernel_size)):
        sizes = (maps[0].in_shape[n + 1], maps[0].out_shape[n + 1])
        each = {affine.settings.stride[n] for affine in maps}
        if len(each) > 1 and sizes[0 if first.transposed else 1] > 1:
            return refusal(f"the branches have different strides, {sorted(each)}")
        taps = [
            _Taps(s.padding[n][0], s.dilation[n], s.kernel_size[n])
            for s in (affine.settings for affine in maps)
        ]
        strides.append(max(each))
        along = _transposed_axis if first.transposed else _convolution_axis
        axes.append(along(taps, sizes, strides[n], symmetric))
    settings = first._replace(
        kernel_size=tuple(axis.kernel_size for axis in axes),
        stride=tuple(strides),
        padding=tuple(axis.padding for axis in axes),
        dilation=tuple(axis.dilation for axis in axes),
        output_padding=tuple(axis.output_padding for axis in axes),
        groups=_divisor([affine.settings.groups for affine in maps]),
        padding_mode=modes.pop() if modes else "zeros",
    )
    too_wide = padding_too_wide(settings, maps[0].in_shape[1:])
    if too_wide is not None:
        return too_wide
    return Grid(settings, [[axis.places[m] for axis in axes] for m in range(len(maps))])


def refusal(rule: str) -> Refusal:
    """What no small form does, a Linear does."""
    return Refusal(rule, "merge into a Linear")


def padding_too_wide(settings: Conv, input_size: Shape) -> Refusal | None:
    """Padding that repeats the input can only repeat what there is: torch's own limits."""
    most = {"circular": 0, "reflect": 1}.get(settings.padding_mode)
    if most is None:
        return None
    for size, pads in zip(input_size, settings.padding, strict=True):
        if max(pads) > size - most:
            return refusal(
                f"{settings.padding_mode} padding of {max(pads)} is wider than the input ({size})"
            )
    return None


def placed(affine: Convolution, grid: Grid, which: int) -> Tensor:
    """The weight of a convolution on the grid, with zeros between and around its elements."""
    groups = affine.settings.groups
    weight = as_one_group(affine.weight.value, groups, grid.settings.groups)
    on_grid = weight.new_zeros(*weight.shape[:2], *grid.settings.kernel_size)
    places = zip(grid.places[which], weight.shape[2:], strict=True)
    index = [slice(start, start + step * (size - 1) + 1, step) for (start, step), size in places]
    index.insert(0, slice(None))
    index.insert(0, slice(None))
    on_grid[tuple(index)] = weight
    return on_grid


def weight_shape(settings: Conv) -> Shape:
    """The shape of a convolution's weight, channels first."""
    ends = (settings.out_channels, settings.in_channels)
    rows, cols = ends[::-1] if settings.transposed else ends
    return (rows, cols // settings.groups, *settings.kernel_size)


def of_one_kind(maps: list[Convolution]) -> list[Convolution]:
    """The maps; where some are transposed and some not, those of stride 1 as convolutions."""
    if len({affine.settings.transposed for affine in maps}) == 1:
        return maps
    return [_as_plain(affine) if affine.settings.transposed else affine for affine in maps]


def _as_plain(affine: Convolution) -> Convolution:
    settings = turned(affine.settings)
    if settings is None:
        return affine
    weight, groups = affine.weight, affine.settings.groups
    turned_weight = Deferred(weight_shape(settings), lambda: turn(weight.value, groups))
    return Convolution(affine.in_shape, affine.out_shape, affine.offset, settings, turned_weight)


def symmetric(affine: Convolution) -> Convolution | Refusal:
    """The convolution with as much padding at both ends of an axis, as torch's layers want it."""
    if all(low == high for low, high in affine.settings.padding):
        return affine
    grid = align([affine], symmetric=True)
    if isinstance(grid, Refusal):
        return grid
    weight = Deferred(weight_shape(grid.settings), lambda: placed(affine, grid, 0))
    return Convolution(affine.in_shape, affine.out_shape, affine.offset, grid.settings, weight)
