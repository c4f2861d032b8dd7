"""Which two convolutions are one convolution, and with which settings: the rules, in one place.

Along each axis a convolution reads `i = o s + k d - p`, a transposed one writes
`o = i s + k d - p`. Put one behind the other and the indices combine to the same form again, so
that the merged kernel and settings are always

    convolution . convolution    kernel k1 d1 + k2 (s1 d2),  stride s1 s2,  padding p1 + s1 p2
    transposed . transposed      kernel k1 (d1 s2) + k2 d2,  stride s1 s2,  padding p1 s2 + p2

What can go wrong is the border between the two: the second layer must not read, in place of values
of the first that its padding hides, something else. That is what the rules below say. A layer of
stride 1 can be written either way, with its kernel turned around and padding d (k - 1) - p, which
reduces the mixed pairs to these two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .errors import FusionError
from .geometry import Geometry

Pair = tuple[int, int]


class Conv(NamedTuple):
    """The settings of a convolution layer; one entry per axis in every tuple."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[Pair, ...]  # (low, high)
    dilation: tuple[int, ...]
    groups: int
    transposed: bool
    output_padding: tuple[int, ...]
    padding_mode: str
    in_channels: int
    out_channels: int
    bias: bool

    @classmethod
    def of(cls, settings: Geometry, bias: bool) -> Conv:
        """From what geometry.make_settings returns."""
        return cls(
            settings.kernel_size,
            settings.stride,
            settings.padding,
            settings.dilation,
            settings.groups,
            settings.transposed,
            settings.output_padding,
            settings.padding_mode,
            settings.in_channels,
            settings.out_channels,
            bias,
        )

    @property
    def span(self) -> tuple[int, ...]:
        """How far the kernel reaches beyond its first element, d (k - 1)."""
        return tuple(d * (k - 1) for k, d in zip(self.kernel_size, self.dilation, strict=True))

    @property
    def pads(self) -> tuple[bool, ...]:
        """On which axes there is padding."""
        return tuple(low > 0 or high > 0 for low, high in self.padding)

    def __str__(self) -> str:
        """The numbers that the rules speak of."""
        kind = "transposed convolution" if self.transposed else "convolution"
        words = [
            f"{kind} {self.in_channels} -> {self.out_channels}",
            f"kernel {self.kernel_size}",
            f"stride {self.stride}",
            f"padding {_short(self.padding)}",
            f"dilation {self.dilation}",
            f"groups {self.groups}",
            "with bias" if self.bias else "without bias",
        ]
        if self.padding_mode != "zeros":
            words.append(f"padding mode {self.padding_mode}")
        if any(self.output_padding):
            words.append(f"output padding {self.output_padding}")
        return ", ".join(words)


class Merge(NamedTuple):
    """How two layers become one: which is turned around before, and the result's settings."""

    first: Conv
    second: Conv
    turn_first: bool
    turn_second: bool
    result: Conv


class Refusal(NamedTuple):
    """A rule that a pair breaks, and what would work instead."""

    rule: str
    instead: str


_LINEAR = "merge into a Linear (conv_to_linear of the first, then fuse_linear_conv)"
_BIAS_MAP = "add the second layer's image of that bias, a map, behind the merged layer"


def _short(padding: tuple[Pair, ...]) -> tuple[int, ...] | tuple[Pair, ...]:
    """One number per axis where low and high are the same."""
    same = all(low == high for low, high in padding)
    return tuple(low for low, _ in padding) if same else padding


def turned(layer: Conv) -> Conv | None:
    """The same map written the other way, convolution as transposed or back; None where impossible.

    Needs stride 1, zero padding of at most d (k - 1), and no output padding. The weight changes
    its layout and its kernel is turned around (torch_engine.turn).
    """
    padding = tuple(
        (span - low, span - high)
        for span, (low, high) in zip(layer.span, layer.padding, strict=True)
    )
    possible = (
        layer.padding_mode == "zeros"
        and all(step == 1 for step in layer.stride)
        and not any(layer.output_padding)
        and all(low >= 0 and high >= 0 for low, high in padding)
    )
    return layer._replace(padding=padding, transposed=not layer.transposed) if possible else None


def common_divisor(left: int, right: int) -> int:
    """The greatest common divisor; torch.compile cannot trace math.gcd on symbolic sizes."""
    while right:
        left, right = right, left % right
    return left


def tap_spacing(
    kernel_sizes: tuple[Sequence[int], Sequence[int]], steps: tuple[Sequence[int], Sequence[int]]
) -> tuple[int, ...]:
    """How far apart the taps `k1 step1 + k2 step2` of a merged kernel are, per axis.

    The greatest common divisor of the steps that matter, so that no element between the taps is
    stored that could be left out: the merged dilation.
    """
    return tuple(
        common_divisor(step1 if k1 > 1 else 0, step2 if k2 > 1 else 0) or 1
        for k1, k2, step1, step2 in zip(*kernel_sizes, *steps, strict=True)
    )


def merged_size(
    kernel_sizes: tuple[Sequence[int], Sequence[int]], steps: tuple[Sequence[int], Sequence[int]]
) -> tuple[int, ...]:
    """The size of a merged kernel whose taps lie tap_spacing apart, per axis."""
    return tuple(
        ((k1 - 1) * step1 + (k2 - 1) * step2) // apart + 1
        for k1, k2, step1, step2, apart in zip(
            *kernel_sizes, *steps, tap_spacing(kernel_sizes, steps), strict=True
        )
    )


def _merged_kernel(first: Conv, second: Conv, steps: tuple[Sequence[int], Sequence[int]]) -> Conv:
    """`first` with the kernel size and dilation of the merged kernel."""
    sizes = (first.kernel_size, second.kernel_size)
    return first._replace(kernel_size=merged_size(sizes, steps), dilation=tap_spacing(sizes, steps))


def _times(left: Sequence[int], right: Sequence[int]) -> tuple[int, ...]:
    return tuple(a * b for a, b in zip(left, right, strict=True))


def _sum_of_paddings(
    first: Sequence[Pair], second: Sequence[Pair], stride: Sequence[int]
) -> tuple[Pair, ...]:
    """The padding of the first plus stride times that of the second, per axis and end."""
    return tuple(
        (low1 + step * low2, high1 + step * high2)
        for (low1, high1), (low2, high2), step in zip(first, second, stride, strict=True)
    )


def _zero_padding_between(first: Conv, second: Conv) -> Refusal | None:
    """Zeros that the second layer pads with must be what the first would have put out there."""
    for span, padding, pads in zip(first.span, first.padding, second.pads, strict=True):
        full = min(padding) >= span and (first.padding_mode == "zeros" or padding == (0, 0))
        if pads and not full:
            return Refusal(
                "padding between the layers hides values of the first layer that one convolution "
                "would read",
                f"move the padding to the first layer (which changes the function), or {_LINEAR}",
            )
    if first.bias and any(second.pads):
        return Refusal(
            "the second layer pads with zeros where the first would have put out its bias",
            f"{_BIAS_MAP}; or {_LINEAR}",
        )
    return None


def _repeating_padding_between(first: Conv, second: Conv) -> Refusal | None:
    """Padding that repeats the output of the first layer must repeat its input in the same way."""
    steps = zip(first.span, first.padding, first.stride, second.pads, strict=True)
    for span, padding, stride, pads in steps:
        if not pads:
            continue
        pointwise = span == 0 and padding == (0, 0)
        round_trip = (
            first.padding_mode == second.padding_mode == "circular" and sum(padding) == span
        )
        if stride != 1 or not (pointwise or round_trip):
            return Refusal(
                f"{second.padding_mode} padding between the layers repeats values of the first "
                "layer that no padding of its input repeats (both circular, stride 1 and the size "
                "kept by the first, or a first layer of kernel 1, would do)",
                _LINEAR,
            )
    return None


def _compose_convolutions(first: Conv, second: Conv) -> Conv | Refusal:
    if any(second.pads):
        zeros = second.padding_mode == "zeros"
        between = _zero_padding_between if zeros else _repeating_padding_between
        refusal = between(first, second)
        if refusal is not None:
            return refusal
    if any(first.pads) and any(second.pads) and first.padding_mode != second.padding_mode:
        return Refusal("one convolution has one padding mode, the two layers have two", _LINEAR)
    merged = _merged_kernel(first, second, (first.dilation, _times(first.stride, second.dilation)))
    return merged._replace(
        stride=_times(first.stride, second.stride),
        padding=_sum_of_paddings(first.padding, second.padding, first.stride),
        padding_mode=second.padding_mode if any(second.pads) else first.padding_mode,
    )


def _compose_transposed(first: Conv, second: Conv) -> Conv | Refusal:
    axes = zip(
        first.padding,
        second.span,
        second.padding,
        second.stride,
        second.output_padding,
        strict=True,
    )
    for cut, span, (low, high), stride, extra in axes:
        unseen = low > span - stride and high > span + extra - stride
        if cut != (0, 0) and not unseen:
            return Refusal(
                "the padding of the first layer cuts values off that one transposed convolution "
                "would still spread",
                _LINEAR,
            )
        if first.bias and not (stride == 1 and low >= span and high >= span + extra):
            return Refusal(
                "the bias of the first layer does not reach all output positions alike",
                f"{_BIAS_MAP}; or {_LINEAR}",
            )
    merged = _merged_kernel(first, second, (_times(first.dilation, second.stride), second.dilation))
    merged = merged._replace(
        stride=_times(first.stride, second.stride),
        padding=_sum_of_paddings(second.padding, first.padding, second.stride),
        output_padding=tuple(
            extra2 + step * extra1
            for extra1, extra2, step in zip(
                first.output_padding, second.output_padding, second.stride, strict=True
            )
        ),
    )
    limits = zip(merged.output_padding, merged.stride, merged.dilation, strict=True)
    if any(extra >= max(stride, dilation) for extra, stride, dilation in limits):
        return Refusal("the merged layer would need more output padding than torch allows", _LINEAR)
    return merged


def _compose(first: Conv, second: Conv, symmetric: bool) -> Conv | Refusal:
    merge = _compose_transposed if first.transposed else _compose_convolutions
    result = merge(first, second)
    if isinstance(result, Refusal):
        return result
    if symmetric and any(low != high for low, high in result.padding):
        return Refusal(
            "the merged layer would need different padding at the two ends of an axis, which no "
            "torch layer has",
            "linfuse_ext.functional, which takes (low, high) pairs; or " + _LINEAR,
        )
    return result._replace(
        groups=common_divisor(first.groups, second.groups),
        in_channels=first.in_channels,
        out_channels=second.out_channels,
        bias=first.bias or second.bias,
    )


def find_merge(first: Conv, second: Conv, symmetric: bool = True) -> Merge | Refusal:
    """The merge of two layers of as many axes and fitting channels, or the rule it breaks.

    Args:
        first: Settings of the layer that comes first.
        second: Settings of the layer behind it.
        symmetric: Whether the result must be a layer of torch, with one padding per axis.

    Returns:
        What to do, and the settings of the merged layer; exact for every input and input size.
    """
    ways = [(first, second)]
    if first.transposed != second.transposed:
        # Written as two layers of one kind, wherever one of them can be turned around.
        ways = [
            (one, two)
            for one, two in ((first, turned(second)), (turned(first), second))
            if one is not None and two is not None
        ]
        ways.sort(key=lambda way: way[0].transposed)  # a convolution is the simpler result
    refusal = Refusal(
        "a strided convolution and a strided transposed one are no convolution of either kind",
        _LINEAR,
    )
    for one, two in ways:
        result = _compose(one, two, symmetric)
        if isinstance(result, Conv):
            return Merge(one, two, one is not first, two is not second, result)
        refusal = result
        if (one, two) != (first, second):  # the rule speaks of settings that nobody wrote
            kind = "transposed convolutions" if one.transposed else "convolutions"
            refusal = Refusal(f"with both written as {kind}, {result.rule}", result.instead)
    return refusal


def compose(op: str, first: Conv, second: Conv) -> Merge:
    """Merges the settings of two layers into those of one layer of torch, or says why not.

    Args:
        op: The caller, for the message.
        first: Settings of the layer that comes first.
        second: Settings of the layer behind it.

    Returns:
        What to do, and the settings of the merged layer; exact for every input and input size.

    Raises:
        ValueError: The layers do not fit behind each other.
        FusionError: They have no exact merge.
    """
    if len(first.kernel_size) != len(second.kernel_size):
        raise ValueError(
            f"{op}: `second` must have the {len(first.kernel_size)} spatial axes of `first`, "
            f"got {len(second.kernel_size)}"
        )
    if first.out_channels != second.in_channels:
        raise ValueError(
            f"{op}: `second` must have the {first.out_channels} input channels that `first` puts "
            f"out, got {second.in_channels}"
        )
    merge = find_merge(first, second)
    if isinstance(merge, Merge):
        return merge
    raise FusionError(
        f"{op}: not exact as one convolution, because {merge.rule}. First: {first}. "
        f"Second: {second}. Instead: {merge.instead}."
    )
