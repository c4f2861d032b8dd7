"""The geometry of a convolution in Python, for sizes that may be symbolic.

Mirrors csrc/geometry/make_geometry.h: the same checks and the same output sizes, in terms of Python
ints and torch.SymInt alike. tests/test_geometry.py holds the two together.
"""

from __future__ import annotations

import functools
import marshal
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch

# What the kernels compute on, whatever the geometry.
HALF_TYPES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, torch.float64, *HALF_TYPES)
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
_LARGEST = 2**63 - 1


_Checks = TypeVar("_Checks", bound=Callable[..., Any])


def remembered(checks: _Checks) -> _Checks:
    """Remembers what checks of plain numbers and strings returned: they outlast a small op.

    Errors are not remembered: they are raised each time. Shapes are best given as tuples.
    """
    memory: dict[bytes, Any] = {}

    @functools.wraps(checks)
    def check(*arguments: Any, **named: Any) -> Any:
        # What torch.compile traces has symbols in it, and ints that stand for symbols.
        if torch.compiler.is_compiling():
            return checks(*arguments, **named)
        try:
            spelled = marshal.dumps((arguments, named), _BY_VALUE)
        except ValueError:  # something else than numbers and strings: a torch.Size, a SymInt
            if torch.Size in map(type, arguments):
                sizes = (tuple(a) if type(a) is torch.Size else a for a in arguments)
                return check(*sizes, **named)
            return checks(*arguments, **named)
        found = memory.get(spelled)
        if found is None:
            found = checks(*arguments, **named)
            if _are_plain(arguments) and _are_plain(named.values()):
                if len(memory) >= _MOST_REMEMBERED:
                    memory.clear()
                memory[spelled] = found
        return found

    return cast(_Checks, check)


# Equal arguments may be of other types, as 1, 1.0 and True are. marshal spells a value and all that
# it holds by type and content, faster than Python could compare them; in this version of its
# format regardless of who else holds them.
_BY_VALUE = 2
_MOST_REMEMBERED = 256


def _are_plain(arguments: Iterable[Any]) -> bool:
    """Whether the spelling of arguments is theirs alone.

    Whatever shows its memory, an array or a scalar of NumPy, is spelled as the bytes in it.
    """
    for argument in arguments:
        kind = type(argument)
        if kind in (tuple, list):
            if not all(type(item) is int for item in argument):
                return False
        elif kind not in (int, str, bool):
            return False
    return True


class Geometry(NamedTuple):
    """What fixes the index map of a convolution; one entry per spatial axis in every tuple."""

    input_size: tuple[int, ...]
    kernel_size: tuple[int, ...]
    output_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # (low, high)
    dilation: tuple[int, ...]
    groups: int
    transposed: bool
    output_padding: tuple[int, ...]
    padding_mode: str
    in_channels: int
    out_channels: int

    @property
    def rows(self) -> int:
        """Rows of the matrix, C_out * prod(out)."""
        return self.out_channels * math.prod(self.output_size)

    @property
    def cols(self) -> int:
        """Columns of the matrix, C_in * prod(in)."""
        return self.in_channels * math.prod(self.input_size)

    @property
    def op_arguments(self) -> tuple[Any, ...]:
        """The positional geometry arguments of the ops, from input_size to groups."""
        flat = [value for pair in self.padding for value in pair]
        return (self.input_size, self.stride, flat, self.dilation, self.groups)

    @property
    def op_keywords(self) -> dict[str, Any]:
        """The keyword geometry arguments of the ops, without the defaults of their schemas."""
        if self.transposed:
            return {"transposed": True, "output_padding": self.output_padding}
        return {} if self.padding_mode == "zeros" else {"padding_mode": self.padding_mode}


def as_int(op: str, name: str, value: Any) -> int:
    """Returns `value` as an int or SymInt; bools, floats and the rest are a TypeError."""
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if isinstance(value, bool):
        raise TypeError(f"{op}: `{name}` must be an int, got {value}")
    if not isinstance(value, int):
        try:
            value = operator.index(value)
        except (TypeError, RuntimeError):  # the latter of a tensor on meta, which has no value
            raise TypeError(
                f"{op}: `{name}` must be an int, got {value!r} ({type(value).__name__})"
            ) from None
    return value  # type: ignore[no-any-return]


def _as_ints(op: str, name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)):
        raise TypeError(f"{op}: `{name}` must be an int or a sequence of ints, got {value!r}")
    if isinstance(value, Sequence):
        return tuple(as_int(op, name, item) for item in value)
    return (as_int(op, name, value),)


def per_axis(op: str, name: str, value: Any, axes: int, least: int) -> tuple[int, ...]:
    """One value of at least `least` for each axis, of an int or a sequence."""
    values = _as_ints(op, name, value)
    if len(values) != axes and len(values) != 1:
        raise ValueError(f"{op}: `{name}` must have one value or {axes}, got {values}")
    for item in values:
        if item < least:
            kind = "positive" if least > 0 else "non-negative"
            raise ValueError(f"{op}: `{name}` must be {kind}, got {values}")
    return values if len(values) == axes else values * axes


def _padding_pairs(
    op: str,
    padding: Any,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    transposed: bool,
) -> tuple[tuple[int, int], ...]:
    axes = len(kernel_size)
    if isinstance(padding, str):
        if padding == "valid":
            return ((0, 0),) * axes
        if padding != "same":
            raise ValueError(f"{op}: `padding` must be 'same', 'valid' or numbers, got {padding!r}")
        if transposed:
            raise ValueError(f"{op}: `padding` must not be 'same' for a transposed convolution")
        if any(step != 1 for step in stride):
            raise ValueError(
                f"{op}: `padding` must not be 'same' for a strided convolution, got stride {stride}"
            )
        totals = [(k - 1) * d for k, d in zip(kernel_size, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    values = _as_ints(op, "padding", padding)
    if len(values) == 2 * axes:
        values = per_axis(op, "padding", values, 2 * axes, 0)
        return tuple(zip(values[::2], values[1::2], strict=True))
    return tuple((value, value) for value in per_axis(op, "padding", values, axes, 0))


def _output_size(
    op: str,
    geometry: Geometry,
) -> tuple[int, ...]:
    sizes = []
    for size, kernel, stride, (low, high), dilation, extra in zip(
        geometry.input_size,
        geometry.kernel_size,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.output_padding,
        strict=True,
    ):
        extent = (kernel - 1) * dilation + 1
        if geometry.transposed:
            out = (size - 1) * stride + extent - low - high + extra
            fits = out >= 1
        else:
            room = size + low + high - extent
            fits = room >= 0
            out = room // stride + 1
        if not fits:
            raise ValueError(
                f"{op}: the output must have at least one position per axis, but `input_size` "
                f"{geometry.input_size} leaves none for a kernel that spans {extent} with padding "
                f"{geometry.padding}"
            )
        sizes.append(out)
    return tuple(sizes)


def make_settings(
    op: str,
    weight_size: Sequence[int],
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: Any = 0,
    padding_mode: str = "zeros",
) -> Geometry:
    """Checks the settings of a convolution, all that is fixed before its input size is.

    Args:
        op: The op's name, for messages.
        weight_size: Shape of the convolution's weight, channels first.
        stride: An int or one per axis.
        padding: An int, one per axis, a (low, high) pair per axis flattened, 'same' or 'valid'.
        dilation: An int or one per axis.
        groups: Groups of the convolution.
        transposed: Whether it is a transposed convolution.
        output_padding: As torch.nn.ConvTranspose2d has it; an int or one per axis.
        padding_mode: 'zeros', 'reflect', 'replicate' or 'circular'.

    Returns:
        A geometry spelled out per axis, with empty input_size and output_size.

    Raises:
        TypeError: An argument is not of the type said above.
        ValueError: An argument breaks a requirement; the message names it and its value.
    """
    shape = tuple(weight_size)
    if not 3 <= len(shape) <= 5:
        raise ValueError(
            f"{op}: the convolution's weight must have 3, 4 or 5 dimensions, got shape {shape}"
        )
    if any(size < 1 for size in shape):
        raise ValueError(
            f"{op}: the convolution's weight must have no empty dimension, got shape {shape}"
        )
    if not isinstance(transposed, bool):
        raise TypeError(f"{op}: `transposed` must be a bool, got {transposed!r}")
    if not isinstance(padding_mode, str):
        raise TypeError(f"{op}: `padding_mode` must be a str, got {padding_mode!r}")
    kernel_size = shape[2:]
    axes = len(kernel_size)
    groups = as_int(op, "groups", groups)
    if groups < 1:
        raise ValueError(f"{op}: `groups` must be positive, got {groups}")
    if shape[0] % groups != 0:
        side = "input" if transposed else "output"
        raise ValueError(
            f"{op}: `groups` must divide the {side} channels ({shape[0]}), got {groups}"
        )
    if padding_mode not in PADDING_MODES:
        raise ValueError(
            f"{op}: `padding_mode` must be 'zeros', 'reflect', 'replicate' or 'circular', "
            f"got {padding_mode!r}"
        )
    if transposed and padding_mode != "zeros":
        raise ValueError(
            f"{op}: `padding_mode` must be 'zeros' for a transposed convolution, "
            f"got {padding_mode!r}"
        )
    steps = per_axis(op, "stride", stride, axes, 1)
    spread = per_axis(op, "dilation", dilation, axes, 1)
    geometry = Geometry(
        input_size=(),
        kernel_size=kernel_size,
        output_size=(),
        stride=steps,
        padding=_padding_pairs(op, padding, kernel_size, steps, spread, transposed),
        dilation=spread,
        groups=groups,
        transposed=transposed,
        output_padding=per_axis(op, "output_padding", output_padding, axes, 0),
        padding_mode=padding_mode,
        in_channels=shape[0] if transposed else shape[1] * groups,
        out_channels=shape[1] * groups if transposed else shape[0],
    )
    _check_output_padding(op, geometry)
    return geometry


@remembered
def make_geometry(
    op: str, weight_size: Sequence[int], input_size: Any, *settings: Any, **named: Any
) -> Geometry:
    """Checks the arguments of an op and spells them out per axis.

    Args:
        op: The op's name, for messages.
        weight_size: Shape of the convolution's weight, channels first.
        input_size: Spatial size of the convolution's input, an int or one per axis.
        *settings: As make_settings takes them, from `stride` on.
        **named: Likewise, by name.

    Returns:
        The geometry, output size included.

    Raises:
        TypeError: An argument is not of the type that it must be.
        ValueError: An argument breaks a requirement; the message names it and its value.
    """
    geometry = make_settings(op, weight_size, *settings, **named)
    axes = len(geometry.kernel_size)
    geometry = geometry._replace(input_size=per_axis(op, "input_size", input_size, axes, 1))
    _check_padding(op, geometry)
    geometry = geometry._replace(output_size=_output_size(op, geometry))
    _check_geometry_fits(op, geometry)
    return geometry


def _check_output_padding(op: str, geometry: Geometry) -> None:
    for stride, dilation, extra in zip(
        geometry.stride, geometry.dilation, geometry.output_padding, strict=True
    ):
        if geometry.transposed and extra >= stride and extra >= dilation:
            raise ValueError(
                f"{op}: `output_padding` must be smaller than the stride or the dilation, "
                f"got {geometry.output_padding}"
            )
        if not geometry.transposed and extra != 0:
            raise ValueError(
                f"{op}: `output_padding` must be 0 unless the convolution is transposed, "
                f"got {geometry.output_padding}"
            )


def _check_padding(op: str, geometry: Geometry) -> None:
    for size, (low, high) in zip(geometry.input_size, geometry.padding, strict=True):
        if geometry.padding_mode == "reflect" and (low >= size or high >= size):
            raise ValueError(
                f"{op}: `padding` must be smaller than `input_size` in this padding mode, "
                f"got {geometry.padding} for {geometry.input_size}"
            )
        if geometry.padding_mode == "circular" and (low > size or high > size):
            raise ValueError(
                f"{op}: `padding` must be at most `input_size` in this padding mode, "
                f"got {geometry.padding} for {geometry.input_size}"
            )


def _check_geometry_fits(op: str, geometry: Geometry) -> None:
    """Sizes are 64-bit, and so is the number of bytes of the widest matrix."""
    numbers = [
        *geometry.stride,
        *geometry.dilation,
        *(value for pair in geometry.padding for value in pair),
        *((k - 1) * d for k, d in zip(geometry.kernel_size, geometry.dilation, strict=True)),
        geometry.rows * geometry.cols * 8,
    ]
    check_fits(op, numbers)


def check_fits(op: str, numbers: Sequence[int]) -> None:
    """Sizes, and the bytes of a result, are 64-bit everywhere.

    What is compiled is not looked at: a condition on symbols would be one on all its callers.
    """
    if torch.compiler.is_compiling():
        return
    if any(isinstance(n, int) and n > _LARGEST for n in numbers):
        raise ValueError(f"{op}: the sizes must fit in 63 bits, they do not")
