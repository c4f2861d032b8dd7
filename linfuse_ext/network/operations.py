"""Operations of a captured graph as affine maps of one sample: the table READERS.

A reader takes a Call and returns a Reading, or None where the call is not affine in its input, or
does not treat each sample by itself. The batch is axis 0 of every value; a reader must refuse what
touches that axis. To add an operation: write a reader, name its ATen operations above it, and add a
line to tests/network/test_operations.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from ..composition import Conv, Pair
from ..geometry import make_settings
from .constants import Constants
from .costs import flops_of
from .maps import (
    AffineMap,
    Convolution,
    Deferred,
    Dense,
    Diagonal,
    Operator,
    Shape,
    View,
    deferred_full,
)
from .rules import depthwise


class Join(NamedTuple):
    """How an operation of several values puts them together: a sum, or stacked along an axis."""

    dim: int | None  # of the sample; None for a sum


class Reading(NamedTuple):
    """What an operation does to a sample."""

    operands: list[tuple[Node, list[AffineMap]]]  # each value, and the maps that it goes through
    join: Join | None
    flops: int
    multiplies: bool  # by weights of any kind; what only moves or adds is no layer


Reader = Callable[["Call"], Reading | None]
READERS: dict[Any, Reader] = {}

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _reads(*names: str) -> Callable[[Reader], Reader]:
    def enter(reader: Reader) -> Reader:
        for name in names:
            READERS[getattr(torch.ops.aten, name)] = reader
        return reader

    return enter


def is_same_size(one: Any, other: Any) -> bool:
    """Whether two sizes, ints or symbols, are known to be equal."""
    if isinstance(one, int) and isinstance(other, int):
        return one == other
    if isinstance(one, torch.SymInt) and isinstance(other, torch.SymInt):
        return bool(one.node.expr == other.node.expr)
    return False


def sample_shape(value: Any) -> Shape | None:
    """The shape of a sample of this value; None where it has no samples of one fixed shape."""
    tensor = value.meta.get("val") if isinstance(value, Node) else None
    if not isinstance(tensor, Tensor) or tensor.dim() < 1 or tensor.dtype not in _FLOATS:
        return None
    shape = tensor.shape[1:]
    if not all(isinstance(size, int) and size > 0 for size in shape):
        return None
    return tuple(shape)


class Call:
    """A node, its arguments by the names of its schema, and the shapes before and behind it."""

    def __init__(self, node: Node, constants: Constants) -> None:
        """For a node that calls an ATen operation with one result, a tensor with samples."""
        self.node = node
        self.constants = constants
        schema: Any = node.target._schema  # type: ignore[union-attr]
        self.arguments: dict[str, Any] = {}
        for n, argument in enumerate(schema.arguments):
            given = node.args[n] if n < len(node.args) else node.kwargs.get(argument.name)
            named = n < len(node.args) or argument.name in node.kwargs
            self.arguments[argument.name] = given if named else argument.default_value
        shape = sample_shape(node)
        assert shape is not None
        self.out_shape = shape

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def first(self) -> Any:
        """The first argument, in most operations the value."""
        return next(iter(self.arguments.values()))

    def shape_of(self, value: Any) -> Shape | None:
        """The shape of a sample, of a value with as many samples as the result."""
        shape = sample_shape(value)
        if shape is None or value in self.constants:
            return None
        before, behind = value.meta["val"], self.node.meta["val"]
        same = is_same_size(before.shape[0], behind.shape[0]) and before.dtype == behind.dtype
        return shape if same else None

    @property
    def in_shape(self) -> Shape | None:
        """The shape of a sample of the first argument."""
        return self.shape_of(self.first)

    def are_numbers(self, *names: str) -> bool:
        """Whether arguments hold no values of the graph."""
        return not any(
            isinstance(item, Node)
            for name in names
            for item in (self[name] if isinstance(self[name], (list, tuple)) else [self[name]])
        )

    def dims(self, given: int | Sequence[int]) -> list[int] | None:
        """Axes of the sample, from axes of the batch; None where the batch is among them."""
        axes = [given] if isinstance(given, int) else list(given)
        count = self.first.meta["val"].dim() if isinstance(self.first, Node) else 0
        axes = [axis % count for axis in axes]
        return None if 0 in axes else [axis - 1 for axis in axes]

    def constant(self, name: str, shape: Shape | None = None) -> Deferred | None:
        """An argument that is a constant tensor; None where it is None."""
        return None if self[name] is None else self.constants.deferred(self[name], shape)

    def are_constants(self, *names: str) -> bool:
        """Whether arguments are constant tensors, or left out."""
        return all(self[name] is None or self[name] in self.constants for name in names)

    def rerun(self, samples: Tensor) -> Tensor:
        """The operation itself, in float64, on other samples."""
        first = next(iter(self.arguments))
        arguments = {}
        for name, value in self.arguments.items():
            if name == first:
                value = samples
            elif isinstance(value, (list, tuple)):
                value = [self.constants[v] if isinstance(v, Node) else v for v in value]
            elif isinstance(value, Node):
                value = self.constants[value]
            arguments[name] = value
        result: Tensor = self.node.target(**arguments)  # type: ignore[operator]
        return result

    def through(self, *maps: AffineMap, flops: int | None = None) -> Reading:
        """The reading of an operation of one value; `flops` where the maps' own are not meant."""
        counted = sum(map(flops_of, maps)) if flops is None else flops
        return Reading([(self.first, list(maps))], None, counted, counted > 0)

    def moved(self, run: Callable[[Tensor], Tensor] | None = None, flops: int = 0) -> Reading:
        """The reading of an operation that is linear, and no more than that."""
        assert self.in_shape is not None
        operator = Operator(self.in_shape, self.out_shape, None, run or self.rerun)
        return self.through(operator, flops=flops)


def read(node: Node, constants: Constants) -> Reading | None:
    """What a node does to a sample, or None where that is not affine."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    reader = READERS.get(node.target.overloadpacket)
    if reader is None or node in constants or sample_shape(node) is None:
        return None
    return reader(Call(node, constants))


# --- layers


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


@_reads("conv1d", "conv2d", "conv3d")
def _conv(call: Call) -> Reading | None:
    return _convolution(call, False)


@_reads("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(call: Call) -> Reading | None:
    return _convolution(call, True, call["output_padding"])


@_reads("convolution")
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


@_reads("linear")
def _linear_layer(call: Call) -> Reading | None:
    if not call.are_constants("weight", "bias") or len(call.out_shape) < 1:
        return None
    bias = call.constant("bias", (*[1] * (len(call.out_shape) - 1), call.out_shape[-1]))
    return _linear(call, call["input"], call.constants.deferred(call["weight"]), bias)


@_reads("addmm")
def _addmm(call: Call) -> Reading | None:
    plain = call.are_numbers("alpha", "beta") and call["alpha"] == 1 and call["beta"] == 1
    if not plain or not call.are_constants("self", "mat2"):
        return None
    shift = call.constants.deferred(call["self"])
    if math.prod(shift.shape) not in (1, call.out_shape[-1]) or shift.shape[-1:] == ():
        return None
    bias = Deferred((shift.shape[-1],), lambda: shift.value.flatten())
    return _linear(call, call["mat1"], _transposed(call.constants.deferred(call["mat2"])), bias)


@_reads("mm", "matmul")
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


@_reads("batch_norm", "_native_batch_norm_legit_no_training")
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


# --- pooling


def _mean_kernel(in_shape: Shape, kernel: Shape, divisor: float) -> Deferred:
    return deferred_full((in_shape[0], 1, *kernel), 1 / divisor)


@_reads("avg_pool1d", "avg_pool2d", "avg_pool3d")
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


@_reads(
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


@_reads("mean", "sum")
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
    return call.through(pooled, *_view(one, call.out_shape), flops=flops)


# --- moving elements


@_reads("clone", "alias", "detach", "contiguous", "lift_fresh_copy")
def _same(call: Call) -> Reading | None:
    return None if call.in_shape is None else call.through()


@_reads("dropout", "feature_dropout", "alpha_dropout", "native_dropout")
def _dropout(call: Call) -> Reading | None:
    return None if call.in_shape is None or call["train"] is not False else call.through()


@_reads("to", "_to_copy", "type_as")
def _convert(call: Call) -> Reading | None:
    before, behind = call.first.meta["val"], call.node.meta["val"]
    same = before.dtype == behind.dtype and before.device == behind.device
    return None if call.in_shape is None or not same else call.through()


@_reads("view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")
def _reshape(call: Call) -> Reading | None:
    if call.in_shape is None:
        return None
    return call.through(*_view(call.in_shape, call.out_shape))


def _view(before: Shape, behind: Shape) -> list[AffineMap]:
    return [] if before == behind else [View(before, behind, None)]


@_reads("permute", "transpose", "movedim", "t", "swapaxes", "numpy_T", "adjoint", "mT")
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
    if [n for n in order[1:] if shape[n - 1] > 1] == [
        n for n in range(1, count) if shape[n - 1] > 1
    ]:
        return call.through(*_view(shape, call.out_shape))
    return call.moved()


def _chosen_channels(call: Call, shape: Shape) -> Reading:
    """Channels left out, doubled or in another order: a pointwise convolution that picks them."""
    axes = len(shape) - 1
    device = call.node.meta["val"].device
    numbers = torch.arange(shape[0], dtype=torch.float64, device=device)
    numbers = numbers.reshape(1, -1, *[1] * axes)
    picked = [int(n) for n in call.rerun(numbers).flatten().tolist()]
    if picked == list(range(shape[0])):
        return call.through(*_view(shape, call.out_shape))
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
    return call.through(picking, *_view(behind, call.out_shape), flops=0)


@_reads("slice", "narrow", "select", "index_select", "flip", "roll", "cumsum")
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


@_reads("index")
def _index(call: Call) -> Reading | None:
    indices = call["indices"]
    fixed = all(index is None or index in call.constants for index in indices)
    if call.in_shape is None or not fixed or indices[0] is not None:
        return None
    return call.moved()


@_reads("expand", "repeat", "tile")
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


@_reads("channel_shuffle")
def _channel_shuffle(call: Call) -> Reading | None:
    return None if not call.in_shape else _chosen_channels(call, call.in_shape)


@_reads("pixel_shuffle", "pixel_unshuffle")
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


_MODES = {
    "constant": "zeros",
    "reflect": "reflect",
    "replicate": "replicate",
    "circular": "circular",
}


@_reads("pad", "constant_pad_nd")
def _pad(call: Call) -> Reading | None:
    shape = call.in_shape
    if shape is None or not call.are_numbers("pad", "value"):
        return None
    flat = list(call["pad"])
    if len(flat) // 2 > len(shape):
        return None
    return _padded(call, shape, flat, call.arguments.get("mode", "constant"), call["value"] or 0)


@_reads("reflection_pad1d", "reflection_pad2d", "reflection_pad3d")
def _reflection_pad(call: Call) -> Reading | None:
    return _padded_by(call, "reflect")


@_reads("replication_pad1d", "replication_pad2d", "replication_pad3d")
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


@_reads("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d")
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


@_reads("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d")
def _nearest_exact(call: Call) -> Reading | None:
    fixed = call.in_shape is not None and call.are_numbers(*list(call.arguments)[1:])
    return call.moved() if fixed else None


@_reads("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d",
        "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")  # fmt: skip
def _interpolation(call: Call) -> Reading | None:
    if call.in_shape is None or not call.are_numbers(*list(call.arguments)[1:]):
        return None
    taps = 4 if "bicubic" in str(call.node.target) else 2
    return call.moved(flops=2 * taps ** (len(call.in_shape) - 1) * math.prod(call.out_shape))


@_reads("im2col", "col2im")
def _columns(call: Call) -> Reading | None:
    return None if call.in_shape is None else call.moved()


# --- arithmetic


def _constant_operand(call: Call, value: Any, shape: Shape) -> Deferred | None:
    """A number or a constant tensor that every sample meets alike, with the axes of a sample."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return deferred_full([1] * len(shape), float(value))
    if value not in call.constants:
        return None
    size = tuple(value.meta["val"].shape) if "val" in value.meta else None
    size = tuple(call.constants[value].shape) if size is None else size
    if len(size) > len(shape) + 1 or (len(size) == len(shape) + 1 and size[0] != 1):
        return None
    inner = size[-len(shape) :] if shape else ()
    return call.constants.deferred(value, (*[1] * (len(shape) - len(inner)), *inner))


def _spread(before: Shape, behind: Shape) -> list[AffineMap]:
    """What broadcasting does to a sample."""
    if before == behind:
        return []
    more = (1,) * (len(behind) - len(before))

    def run(samples: Tensor) -> Tensor:
        samples = samples.reshape(samples.shape[0], *more, *before)
        return samples.expand(samples.shape[0], *behind)

    return [Operator(before, behind, None, run)]


def _shift_or_scale(
    call: Call, value: Node, scale: Deferred | float | None, shift: Deferred | None
) -> Reading | None:
    shape, behind = call.shape_of(value), call.out_shape
    if shape is None or len(shape) != len(behind):
        return None
    size = math.prod(behind)
    ones = [1] * len(behind)
    if scale is None or isinstance(scale, float):
        factor = deferred_full(ones, 1.0 if scale is None else scale)
    else:
        factor = scale
    multiplies = scale is not None and scale != -1  # a sign goes with the sum
    flops = size * max(1, multiplies + (shift is not None))
    maps = [*_spread(shape, behind), Diagonal(behind, behind, shift, factor)]
    return Reading([(value, maps)], None, flops, multiplies)


def _operands(call: Call) -> tuple[Any, Any]:
    left, right = list(call.arguments.values())[:2]
    return left, right


def _sum(call: Call, left: Any, right: Any, signs: tuple[float, float]) -> Reading | None:
    """`signs[0] left + signs[1] right`, each a value or a constant."""
    behind = call.out_shape
    values = [
        (v, s) for v, s in ((left, signs[0]), (right, signs[1])) if call.shape_of(v) is not None
    ]
    if len(values) == 2:
        operands = []
        for value, sign in values:
            shape = call.shape_of(value)
            assert shape is not None
            if len(shape) != len(behind):
                return None
            maps = _spread(shape, behind)
            if sign != 1:
                ones = deferred_full([1] * len(behind), sign)
                maps.append(Diagonal(behind, behind, None, ones))
            operands.append((value, maps))
        scales = sum(sign not in (1, -1) for _, sign in values)
        flops = math.prod(behind) * (1 + scales)
        return Reading(operands, Join(None), flops, scales > 0)
    if len(values) == 0:
        return None
    value, sign = values[0]
    other, other_sign = (right, signs[1]) if value is left else (left, signs[0])
    constant = _constant_operand(call, other, behind)
    if constant is None:
        return None
    shift = Deferred(constant.shape, lambda: constant.value * other_sign)
    return _shift_or_scale(call, value, None if sign == 1 else sign, shift)


@_reads("add", "sub", "rsub")
def _add(call: Call) -> Reading | None:
    left, right = _operands(call)
    alpha = call.arguments.get("alpha", 1)
    if isinstance(alpha, Node):
        return None
    packet = call.node.target.overloadpacket  # type: ignore[union-attr]
    if packet is torch.ops.aten.add:
        return _sum(call, left, right, (1.0, float(alpha)))
    if packet is torch.ops.aten.sub:
        return _sum(call, left, right, (1.0, -float(alpha)))
    return _sum(call, left, right, (-float(alpha), 1.0))


@_reads("mul", "div", "true_divide")
def _mul(call: Call) -> Reading | None:
    left, right = _operands(call)
    divides = call.node.target.overloadpacket is not torch.ops.aten.mul  # type: ignore[union-attr]
    if divides and call.arguments.get("rounding_mode") is not None:
        return None
    value, other = (left, right) if call.shape_of(left) is not None else (right, left)
    if call.shape_of(value) is None or (divides and value is not left):
        return None
    constant = _constant_operand(call, other, call.out_shape)
    if constant is None:
        return None
    if divides:
        divisor = constant
        constant = Deferred(divisor.shape, lambda: 1 / divisor.value)
    return _shift_or_scale(call, value, constant, None)


@_reads("neg")
def _neg(call: Call) -> Reading | None:
    return None if call.in_shape is None else _shift_or_scale(call, call.first, -1.0, None)


@_reads("cat", "stack")
def _cat(call: Call) -> Reading | None:
    values = list(call["tensors"])
    stacked = call.node.target.overloadpacket is torch.ops.aten.stack  # type: ignore[union-attr]
    dim = call["dim"] % (len(call.out_shape) + 1)
    if dim == 0 or not values:
        return None
    operands: list[tuple[Node, list[AffineMap]]] = []
    for value in values:
        shape = call.shape_of(value)
        if shape is None:
            return None
        part = (*shape[: dim - 1], 1, *shape[dim - 1 :]) if stacked else shape
        if len(part) != len(call.out_shape):
            return None
        operands.append((value, _view(shape, part)))
    return Reading(operands, Join(dim - 1), 0, False)
