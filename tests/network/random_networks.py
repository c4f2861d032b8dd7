"""Random small networks as data, which print as something that can be read and pasted.

    network = Network(
        inputs=((2, 5, 4),),
        ops=(
            Op("Conv2d", (0,), {"in_channels": 2, "out_channels": 3, "kernel_size": (3, 1)}),
            Op("flatten", (1,), {"start_dim": 1}),
            Op("Linear", (2,), {"in_features": 36, "out_features": 5}),
        ),
        outputs=(3,),
    )
    model, x = network.build(), network.example(batch=2)

The values are numbered: the inputs come first, then what each operation puts out, in order.
`networks()` draws such networks, valid by construction: every parameter is drawn with the shape of
the value at hand in view, and the operation is run on meta tensors to know the next shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

BATCH = 2  # of the tensors on which shapes are found, and of the examples that models are traced on
MOST_TRIES = 15  # of an operation; about a quarter of them do not fit
MOST_ELEMENTS = 300  # of a value, per sample
DTYPE = torch.float64


class Op(NamedTuple):
    """One operation of a network.

    Attributes:
        kind: The name of a class of torch.nn, of a function below, or of a method of Tensor.
        takes: The numbers of the values that it is applied to.
        args: Its keyword arguments. `constant` is the shape of a tensor that the network holds.
        held: How it holds that tensor: "buffer" or "parameter".
        shares: The number of an earlier operation whose layer is used once more.
    """

    kind: str
    takes: tuple[int, ...]
    args: dict[str, Any]
    held: str = ""
    shares: int | None = None

    def __repr__(self) -> str:
        words = [repr(self.kind), repr(self.takes), repr(self.args)]
        words += [f"held={self.held!r}"] if self.held else []
        words += [f"shares={self.shares}"] if self.shares is not None else []
        return f"Op({', '.join(words)})"

    @property
    def is_layer(self) -> bool:
        return self.kind[0].isupper()


class Network(NamedTuple):
    """A network: the shapes of its inputs without the batch, its operations, what it returns."""

    inputs: tuple[tuple[int, ...], ...]
    ops: tuple[Op, ...]
    outputs: tuple[int, ...]
    form: str = "tuple"  # of the outputs: "one", "tuple" or "dict"
    seed: int = 0

    def build(self) -> Model:
        """The network in float64 and in eval mode, every parameter and statistic random."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return Model(self).to(DTYPE).eval()

    def example(self, batch: int = BATCH, seed: int = 0) -> tuple[Tensor, ...]:
        """Inputs of `batch` samples."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(
            torch.randn(batch, *shape, dtype=DTYPE, generator=generator) for shape in self.inputs
        )

    @property
    def mixes_samples(self) -> bool:
        return any(op.kind in ACROSS_SAMPLES or op.args.get("dim0") == 0 for op in self.ops)


class Model(nn.Module):
    """A network as a module: layers by the number of their operation, constants beside them."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.layers = nn.ModuleDict()
        for number, op in enumerate(network.ops):
            if op.is_layer and op.shares is None:
                self.layers[f"{number}"] = _layer(op)
            elif op.held:
                self._hold(f"constant{number}", op)

    def _hold(self, name: str, op: Op) -> None:
        if "indices" in op.args:
            self.register_buffer(name, torch.tensor(op.args["indices"]))
            return
        value = torch.randn(op.args["constant"], dtype=DTYPE)
        if op.kind == "div":
            value = value.abs() + 0.5
        if op.held == "parameter":
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    def values(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        values = list(inputs)
        for number, op in enumerate(self.network.ops):
            layer = None
            if op.is_layer:
                layer = self.layers[f"{number if op.shares is None else op.shares}"]
            constant = getattr(self, f"constant{number}") if op.held else None
            made = apply(op, [values[take] for take in op.takes], layer, constant)
            values += made if isinstance(made, (tuple, list)) else [made]
        return values

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        values = self.values([x] if y is None else [x, y])
        outputs = [values[number] for number in self.network.outputs]
        if self.network.form == "one":
            return outputs[0]
        if self.network.form == "dict":
            return {f"out{place}": output for place, output in enumerate(outputs)}
        return tuple(outputs)

    @torch.no_grad()
    def trace(self, inputs: Sequence[Tensor]) -> float:
        """The largest absolute value that the network goes through."""
        values = self.values([x.clone() for x in inputs])
        return max(value.abs().max().item() for value in values)


@torch.no_grad()
def _layer(op: Op) -> nn.Module:
    """The layer of an operation; the values that go through it stay of the size that they are."""
    layer: nn.Module = getattr(nn, op.kind)(**op.args)
    for name, parameter in layer.named_parameters():
        parameter.normal_()
        if name == "weight" and parameter.dim() > 1:
            parameter /= math.sqrt(parameter[0].numel())
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    return layer


# Operations that are neither layers nor methods of Tensor.


def _slice(x: Tensor, dim: int, start: int | None, stop: int | None, step: int) -> Tensor:
    return x[(slice(None),) * dim + (slice(start, stop, step),)]


def _index(x: Tensor, dim: int, indices: list[int]) -> Tensor:
    return x[(slice(None),) * dim + (indices,)]


def _reshape(x: Tensor, shape: tuple[int, ...], batch: str) -> Tensor:
    """Writes the batch's size as -1, or as that of the input."""
    return x.reshape(-1 if batch == "-1" else x.shape[0], *shape)


def _cat_constant(x: Tensor, constant: Tensor, dim: int) -> Tensor:
    """Puts a learned token beside every sample."""
    return torch.cat([constant.expand(x.shape[0], *constant.shape), x], dim)


def _expand(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x.expand(-1, *shape)


ACROSS_SAMPLES: dict[str, Callable[..., Tensor]] = {
    "centered": lambda x: x - x.mean(0),
    "flipped_samples": lambda x: x.flip(0),
    "rolled_samples": lambda x: x.roll(1, 0),
    "softmax_over_samples": lambda x: x.softmax(0),
    "summed_over_samples": lambda x: x.cumsum(0),
    "minus_first_sample": lambda x: x - x[:1],
    "into_samples": lambda x: x.flatten(0, 1),
    "out_of_samples": lambda x, pieces: x.unflatten(0, (-1, pieces)),
}

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "slice": _slice,
    "index": _index,
    "reshape": _reshape,
    "cat_constant": _cat_constant,
    "expand": _expand,
    "cat": lambda *values, dim: torch.cat(values, dim),
    "stack": lambda *values, dim: torch.stack(values, dim),
    "pad": F.pad,
    "interpolate": F.interpolate,
    "rsub": torch.rsub,
    "max_pool1d": F.max_pool1d,
    "twice_plus": lambda x, y: 2 * x + y,
    **ACROSS_SAMPLES,
}


def apply(op: Op, values: Sequence[Tensor], layer: nn.Module | None, constant: Any) -> Any:
    """Runs one operation."""
    if layer is not None:
        return layer(*values)
    call = FUNCTIONS.get(op.kind) or getattr(Tensor, op.kind)
    if constant is None:
        return call(*values, **op.args)
    args = {name: arg for name, arg in op.args.items() if name not in ("constant", "indices")}
    if op.kind == "index_select":
        return call(*values, index=constant, **args)
    return call(*values, constant, **args)


# From here on: drawing.


class Value(NamedTuple):
    """What is known of a value while a network is drawn."""

    shape: tuple[int, ...]  # at BATCH samples
    samples: int = 0  # the axis of the samples
    per_sample: int = 1  # positions along that axis that one sample takes
    writable: bool = False  # in place: no input, and no memory that is seen more than once

    @property
    def rest(self) -> tuple[int, ...]:
        """The shape without the samples, which come first."""
        return self.shape[1:]

    @property
    def size(self) -> tuple[int, ...]:
        """The positions of a value of shape [N, C, ...]."""
        return self.shape[2:]


class Drawer:
    """Short words for drawing."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw

    def whole(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def pick(self, choices: Iterable[Any]) -> Any:
        return self.draw(st.sampled_from(list(choices)))

    def coin(self) -> bool:
        return self.draw(st.booleans())

    def rarely(self) -> bool:
        return self.whole(0, 4) == 4

    def axis(self, x: Value) -> int:
        """Any but that of the samples."""
        return self.whole(1, len(x.shape) - 1)

    def either_sign(self, axis: int, axes: int) -> int:
        """The same axis, sometimes counted from the end."""
        return axis - axes if self.rarely() else axis

    def subset(self, choices: Sequence[int]) -> tuple[int, ...]:
        chosen = self.draw(st.lists(st.sampled_from(choices), min_size=1, unique=True))
        return tuple(sorted(chosen))


Drawn = tuple[str, dict[str, Any]] | tuple[str, dict[str, Any], str] | None
"""The kind and the arguments of an operation, and how its constant is held; None: none fits."""


def divisors(number: int, most: int = 10**9) -> list[int]:
    return [d for d in range(1, min(number, most) + 1) if number % d == 0]


def conv(d: Drawer, x: Value) -> Drawn:
    axes = len(x.size)
    if not 1 <= axes <= 3:
        return None
    mode = d.pick(["zeros", "zeros", "zeros", "reflect", "replicate", "circular"])
    if d.rarely():
        # torch pads "same" as much as the kernel asks for, whether the mode allows it or not.
        mode = "zeros"
        padding: Any = "same"
        stride = (1,) * axes
        kernel = tuple(d.whole(1, 3) for _ in x.size)
        dilation = tuple(d.whole(1, 2) for _ in x.size)
    else:
        room = [{"reflect": size - 1, "circular": size}.get(mode, 2) for size in x.size]
        padding = tuple(d.whole(0, min(2, most)) for most in room)
        stride = tuple(d.whole(1, 3) for _ in x.size)
        padded = [size + 2 * pad for size, pad in zip(x.size, padding, strict=True)]
        kernel = tuple(d.whole(1, min(3, size)) for size in padded)
        dilation = tuple(
            d.whole(1, 2) if 2 * (k - 1) < size else 1
            for k, size in zip(kernel, padded, strict=True)
        )
    groups = d.pick(divisors(x.shape[1], 4))
    return f"Conv{axes}d", {
        "in_channels": x.shape[1],
        "out_channels": groups * d.whole(1, 4 // groups),
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "bias": d.coin(),
        "padding_mode": mode,
    }


def conv_transpose(d: Drawer, x: Value) -> Drawn:
    axes = len(x.size)
    if not 1 <= axes <= 3:
        return None
    kernel = tuple(d.whole(1, 3) for _ in x.size)
    stride = tuple(d.whole(1, 2) for _ in x.size)
    dilation = tuple(d.whole(1, 2) for _ in x.size)
    extra = tuple(d.whole(0, max(s, t) - 1) for s, t in zip(stride, dilation, strict=True))
    full = [
        (size - 1) * s + t * (k - 1) + e + 1
        for size, s, t, k, e in zip(x.size, stride, dilation, kernel, extra, strict=True)
    ]
    groups = d.pick(divisors(x.shape[1], 4))
    return f"ConvTranspose{axes}d", {
        "in_channels": x.shape[1],
        "out_channels": groups * d.whole(1, 4 // groups),
        "kernel_size": kernel,
        "stride": stride,
        "padding": tuple(d.whole(0, min(2, (size - 1) // 2)) for size in full),
        "output_padding": extra,
        "dilation": dilation,
        "groups": groups,
        "bias": d.coin(),
    }


def linear(d: Drawer, x: Value) -> Drawn:
    if x.samples == len(x.shape) - 1:
        return None
    features = {"in_features": x.shape[-1], "out_features": d.whole(1, 6)}
    return "Linear", {**features, "bias": d.coin()}


def batch_norm(d: Drawer, x: Value) -> Drawn:
    axes = max(1, len(x.size))
    return f"BatchNorm{axes}d", {"num_features": x.shape[1], "affine": d.coin()}


def avg_pool(d: Drawer, x: Value) -> Drawn:
    axes = len(x.size)
    if not 1 <= axes <= 3:
        return None
    # In three dimensions torch wants the window to fit without the padding.
    padding = tuple(d.whole(0, 1) if axes < 3 or size > 1 else 0 for size in x.size)
    kernel = tuple(
        d.whole(2 * pad or 1, max(2 * pad, min(3, size + 2 * pad * (axes < 3))))
        for size, pad in zip(x.size, padding, strict=True)
    )
    args = {
        "kernel_size": kernel,
        "stride": tuple(d.whole(1, 3) for _ in x.size),
        "padding": padding,
        "ceil_mode": d.coin(),
        "count_include_pad": d.coin(),
    }
    if axes > 1 and d.rarely():
        args["divisor_override"] = d.whole(1, 5)
    return f"AvgPool{axes}d", args


def adaptive_avg_pool(d: Drawer, x: Value) -> Drawn:
    axes = len(x.size)
    if not 1 <= axes <= 3:
        return None
    sizes = tuple(d.whole(1, min(size + 1, 4)) for size in x.size)
    if d.rarely() and axes > 1:
        sizes = (None, *sizes[1:])
    return f"AdaptiveAvgPool{axes}d", {"output_size": sizes}


def mean(d: Drawer, x: Value) -> Drawn:
    axes = len(x.shape)
    dims = d.subset(range(1, axes))
    keepdim = d.coin() or len(dims) == axes - 1
    dims = tuple(d.either_sign(dim, axes) for dim in dims)
    return d.pick(["mean", "mean", "sum"]), {"dim": dims, "keepdim": keepdim}


def flatten(d: Drawer, x: Value) -> Drawn:
    start = d.axis(x) if d.rarely() else 1
    if d.rarely():
        return "Flatten", {"start_dim": start}
    return "flatten", {"start_dim": start}


def reshape(d: Drawer, x: Value) -> Drawn:
    left, shape = math.prod(x.rest), []
    for _ in range(d.whole(0, 3)):
        shape.append(d.pick(divisors(left, 7)))
        left //= shape[-1]
    shape.insert(d.whole(0, len(shape)), left)
    return "reshape", {"shape": tuple(shape), "batch": d.pick(["shape[0]", "-1"])}


def reorder(d: Drawer, x: Value) -> Drawn:
    axes = len(x.shape)
    if axes < 3:
        return None
    if d.coin():
        return "transpose", {"dim0": d.axis(x), "dim1": d.either_sign(d.axis(x), axes)}
    return "permute", {"dims": (0, *d.draw(st.permutations(range(1, axes))))}


def squeeze(d: Drawer, x: Value) -> Drawn:
    ones = [axis for axis, size in enumerate(x.shape) if axis and size == 1]
    if ones and len(x.shape) > 2:
        return "squeeze", {"dim": d.pick(ones)}
    return ("unsqueeze", {"dim": d.whole(1, len(x.shape))}) if len(x.shape) < 5 else None


def shuffle(d: Drawer, x: Value) -> Drawn:
    fitting: list[Drawn] = []
    if len(x.size) == 2 and x.shape[1] % 4 == 0:
        fitting.append(("PixelShuffle", {"upscale_factor": 2}))
    if len(x.size) == 2 and all(size % 2 == 0 for size in x.size):
        fitting.append(("PixelUnshuffle", {"downscale_factor": 2}))
    if len(x.size) == 2 and x.shape[1] % 2 == 0:
        fitting.append(("ChannelShuffle", {"groups": 2}))
    return d.pick(fitting) if fitting else None


def pad(d: Drawer, x: Value) -> Drawn:
    mode = d.pick(["constant", "constant", "reflect", "replicate", "circular"])
    if mode == "constant":
        sizes = x.rest[-d.whole(1, len(x.rest)) :]
        room, least = [2] * len(sizes), [max(-2, -((size - 1) // 2)) for size in sizes]
    else:
        if not 1 <= len(x.size) <= 3:
            return None
        sizes = x.size
        room = [{"reflect": size - 1, "circular": size}.get(mode, 2) for size in sizes]
        least = [0] * len(sizes)
    pads: list[int] = []
    for most, low in zip(reversed(room), reversed(least), strict=True):
        pads += [d.whole(low, min(2, most)), d.whole(low, min(2, most))]
    args: dict[str, Any] = {"pad": tuple(pads), "mode": mode}
    if mode == "constant" and d.rarely():
        args["value"] = d.pick([1.5, -2.0])
    return "pad", args


def upsample(d: Drawer, x: Value) -> Drawn:
    axes = len(x.size)
    if not 1 <= axes <= 3:
        return None
    smooth = {1: ["linear"], 2: ["bilinear", "bicubic"], 3: ["trilinear"]}[axes]
    args: dict[str, Any] = {"mode": d.pick(["nearest", "nearest-exact", "area", *smooth])}
    if args["mode"] in smooth:
        args["align_corners"] = d.coin()
    if args["mode"] != "area" and d.coin():
        args["scale_factor"] = d.pick([2.0, 1.5] if min(x.size) > 1 else [2.0])
    else:
        args["size"] = tuple(d.whole(1, 6) for _ in x.size)
    if d.coin():
        return "Upsample", args
    return "interpolate", args


def constant_shape(d: Drawer, x: Value) -> tuple[int, ...]:
    """One that broadcasts against the value: scalar, per channel, per position or of any axes."""
    shape = tuple(size if d.coin() else 1 for size in x.rest)
    while shape and shape[0] == 1 and d.coin():
        shape = shape[1:]
    return shape


def scale_or_shift(d: Drawer, x: Value) -> Drawn:
    kind = d.pick(["mul", "add", "sub", "div", "rsub"])
    if x.samples or d.coin():
        scalar = d.pick([2.0, -0.5, 3, 1.0] if kind == "div" else [2.0, -0.5, 3, 1.0, 0.0])
        return kind, {"other": scalar}
    return kind, {"constant": constant_shape(d, x)}, d.pick(["buffer", "parameter"])


def spread_by_constant(d: Drawer, x: Value) -> Drawn:
    """A constant that the value is broadcast against."""
    if 1 not in x.rest:
        return None
    shape = tuple(d.whole(1, 3) if size == 1 else size for size in x.rest)
    return d.pick(["mul", "add"]), {"constant": shape}, "parameter"


def token(d: Drawer, x: Value) -> Drawn:
    dim = d.axis(x)
    shape = (*x.rest[: dim - 1], d.whole(1, 2), *x.rest[dim:])
    return "cat_constant", {"dim": dim, "constant": shape}, "parameter"


def product_with_constant(d: Drawer, x: Value) -> Drawn:
    return "matmul", {"constant": (x.shape[-1], d.whole(1, 4))}, d.pick(["buffer", "parameter"])


def nothing(d: Drawer, x: Value) -> Drawn:
    return d.pick(
        [
            ("Identity", {}),
            ("Dropout", {"p": 0.5}),
            ("Dropout1d", {"p": 0.5}) if len(x.shape) == 3 else ("Dropout", {"p": 0.1}),
            ("clone", {}),
            ("contiguous", {}),
        ]
    )


def piece(d: Drawer, x: Value) -> Drawn:
    axes, axis = len(x.shape), d.axis(x)
    size, dim = x.shape[axis], d.either_sign(axis, axes)
    kind = d.pick(["slice", "narrow", "select", "chunk", "flip", "roll", "index", "index_select"])
    start = d.whole(0, size - 1)
    if kind == "select":
        at = d.pick([start, start - size])
        return (kind, {"dim": dim, "index": at}) if axes > 2 else None
    if kind == "slice":
        stop = d.pick([None, d.whole(start + 1, size), size + 3])
        return kind, {"dim": axis, "start": start, "stop": stop, "step": d.whole(1, 2)}
    if kind == "narrow":
        return kind, {"dim": dim, "start": start, "length": d.whole(1, size - start)}
    if kind == "chunk":
        return kind, {"chunks": d.whole(1, 3), "dim": dim}
    if kind == "flip":
        return kind, {"dims": d.subset(range(1, axes))}
    if kind == "roll":
        return kind, {"shifts": d.whole(-2, 2), "dims": dim}
    indices = d.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=4))
    return kind, {"dim": axis, "indices": indices}, "buffer" if kind == "index_select" else ""


def repeated(d: Drawer, x: Value) -> Drawn:
    if d.coin() and 1 in x.rest:
        return "expand", {"shape": tuple(d.whole(2, 3) if n == 1 else n for n in x.rest)}
    if d.coin():
        return "repeat_interleave", {"repeats": 2, "dim": d.axis(x)}
    return "repeat", {"repeats": (1, *(d.whole(1, 2) for _ in x.rest))}


def bend(d: Drawer, x: Value) -> Drawn:
    """Not affine."""
    fitting: list[Drawn] = [("ReLU", {}), ("relu", {}), ("square", {}), ("softmax", {"dim": -1})]
    if len(x.size) == 1 and x.size[0] > 1:
        fitting.append(("max_pool1d", {"kernel_size": 2}))
    return d.pick(fitting)


def in_place(d: Drawer, x: Value) -> Drawn:
    if not x.writable:
        return None
    kind = d.pick(["add_", "mul_", "sub_", "relu_", "ReLU"])
    if kind == "ReLU":
        return kind, {"inplace": True}
    if kind == "relu_":
        return kind, {}
    if d.coin():
        return kind, {"other": d.pick([2.0, -0.5])}
    return kind, {"constant": constant_shape(d, x)}, "buffer"


def across_samples(d: Drawer, x: Value) -> Drawn:
    kind = d.pick([*ACROSS_SAMPLES, "transpose"])
    axes = len(x.shape)
    if kind == "transpose":
        return (kind, {"dim0": 0, "dim1": d.axis(x)}) if axes > 2 else None
    if kind == "out_of_samples":
        return (kind, {"pieces": x.per_sample}) if x.per_sample > 1 and axes < 5 else None
    if kind == "into_samples" and axes < 3:
        return None
    return kind, {}


ONE_VALUE: list[tuple[int, Callable[[Drawer, Value], Drawn]]] = [
    (9, conv),
    (3, conv_transpose),
    (7, linear),
    (3, batch_norm),
    (3, avg_pool),
    (1, adaptive_avg_pool),
    (2, mean),
    (3, flatten),
    (2, reshape),
    (2, reorder),
    (1, squeeze),
    (2, shuffle),
    (3, pad),
    (2, upsample),
    (4, scale_or_shift),
    (1, spread_by_constant),
    (1, token),
    (1, product_with_constant),
    (1, nothing),
    (4, piece),
    (1, repeated),
    (1, bend),
    (1, in_place),
]


def combine(d: Drawer, values: Sequence[Value], first: int) -> Op | None:
    """Two or three values into one."""
    x = values[first]
    alike = [
        number
        for number, y in enumerate(values)
        if (y.samples, y.per_sample) == (x.samples, x.per_sample)
    ]
    kind = d.pick(["add", "add", "add", "sub", "twice_plus", "add_", "cat", "cat", "stack", "mul"])
    if kind in ("cat", "stack") and x.samples:
        return None
    if kind == "stack":
        others = [number for number in alike if values[number].shape == x.shape]
        dim = d.either_sign(d.whole(1, len(x.shape)), len(x.shape) + 1)
        many = d.whole(1, 2)
        takes = (first, *(d.pick(others) for _ in range(many)))
        return Op(kind, takes, {"dim": dim}) if len(x.shape) < 5 else None
    if kind == "cat":
        axis = d.axis(x)
        others = [
            number
            for number in alike
            if len(values[number].shape) == len(x.shape)
            and all(
                mine == other or place == axis
                for place, (mine, other) in enumerate(
                    zip(x.shape, values[number].shape, strict=True)
                )
            )
        ]
        takes = (first, *(d.pick(others) for _ in range(d.whole(1, 2))))
        takes = takes[::-1] if d.coin() else takes
        return Op(kind, takes, {"dim": d.either_sign(axis, len(x.shape))})
    others = [number for number in alike if _broadcast(x.shape, values[number].shape)]
    other = d.pick(others)
    y = values[other]
    if kind == "mul" and not d.rarely():
        kind = "add"  # products bend
    if kind == "add_":
        grows = _broadcast(x.shape, y.shape) != x.shape
        return None if grows or not x.writable else Op(kind, (first, other), {})
    takes = (other, first) if d.coin() else (first, other)
    scaled = kind in ("add", "sub") and d.rarely()
    return Op(kind, takes, {"alpha": d.pick([2, -0.5])} if scaled else {})


def _broadcast(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of a sum of two values of the same number of axes, so that samples meet samples."""
    if len(left) != len(right):
        return None
    if any(a != b and 1 not in (a, b) for a, b in zip(left, right, strict=True)):
        return None
    return tuple(max(a, b) for a, b in zip(left, right, strict=True))


VIEWS = {
    "flatten", "Flatten", "reshape", "transpose", "permute", "squeeze", "unsqueeze", "slice",
    "narrow", "select", "Identity", "Dropout", "Dropout1d", "contiguous", "into_samples",
    "out_of_samples", "Upsample", "interpolate", "pad", "repeat_interleave", "repeat",
}  # fmt: skip
"""Those that may return the memory that they are given, so that writing there shows."""

SEEN_TWICE = {"expand", "chunk"}
"""Those whose results autograd or torch forbids to be written to."""


def _result(op: Op, takes: list[Value], shape: tuple[int, ...]) -> Value:
    x = takes[0]
    samples, per_sample = x.samples, x.per_sample
    if op.args.get("dim0") == 0:
        samples = op.args["dim1"] if samples == 0 else 0
    if op.kind == "into_samples":
        per_sample *= x.shape[1]
    if op.kind == "out_of_samples":
        per_sample = 1
    writable = x.writable if op.kind in VIEWS or op.kind.endswith("_") else True
    if op.args.get("inplace"):
        writable = x.writable
    return Value(shape, samples, per_sample, writable and op.kind not in SEEN_TWICE)


def _shapes(op: Op, takes: list[Value]) -> list[tuple[int, ...]]:
    """Of what the operation puts out, found by running it without data."""
    with torch.device("meta"):
        values = [torch.empty(x.shape) for x in takes]
        if "indices" in op.args:
            constant = torch.zeros(len(op.args["indices"]), dtype=torch.int64) if op.held else None
        else:
            constant = torch.empty(op.args["constant"]) if op.held else None
        layer = getattr(nn, op.kind)(**op.args).eval() if op.is_layer else None
        made = apply(op, values, layer, constant)
    return [tuple(y.shape) for y in (made if isinstance(made, (tuple, list)) else [made])]


def _draw_op(d: Drawer, ops: list[Op], values: list[Value], mixing: bool) -> Op | None:
    back = d.pick([0, 0, 0, 0, 0, 1, 1, 2, 3, 5])
    first = max(0, len(values) - 1 - back)
    x = values[first]
    if len(values) > 1 and d.whole(0, 5) == 5:
        return combine(d, values, first)
    if x.samples:  # behind other axes: what treats all axes alike, and the way back
        choices = [linear, scale_or_shift, None, None]
        family = d.pick(choices)
        if family is None:
            return Op("transpose", (first,), {"dim0": 0, "dim1": x.samples})
    elif mixing and d.whole(0, 3) == 3:
        family = across_samples
    else:
        earlier = [
            number
            for number, op in enumerate(ops)
            if op.is_layer and op.shares is None and not op.args.get("inplace")
        ]
        if earlier and d.whole(0, 11) == 11:
            number = d.pick(earlier)
            op = ops[number]._replace(takes=(first,), shares=number)
            return op if _takes(op, values[ops[number].takes[0]], x) else None
        family = d.pick([family for weight, family in ONE_VALUE for _ in range(weight)])
    drawn = family(d, x)
    if drawn is None:
        return None
    kind, args, *held = drawn
    return Op(kind, (first,), args, *held)


def _takes(op: Op, first: Value, again: Value) -> bool:
    """Whether a layer that was made for one value takes another."""
    axis = -1 if op.kind == "Linear" else 1
    alike = {"in_channels", "in_features", "num_features"} & op.args.keys()
    # Layers take samples without a batch as well, which is not what is meant.
    if len(first.shape) != len(again.shape) or (alike and first.shape[axis] != again.shape[axis]):
        return False
    try:
        shapes = _shapes(op, [again])
    except (RuntimeError, ValueError):  # too small
        return False
    return all(0 not in shape for shape in shapes)


@st.composite
def _appended(draw: st.DrawFn, ops: list[Op], values: list[Value], mixing: bool) -> None:
    """One more operation; none where what was drawn does not fit."""
    op = _draw_op(Drawer(draw), ops, values, mixing)
    if op is None:
        return
    takes = [values[take] for take in op.takes]
    shapes = _shapes(op, takes)
    if any(math.prod(shape) > BATCH * MOST_ELEMENTS or len(shape) > 5 for shape in shapes):
        return
    ops.append(op)
    values += [_result(op, takes, shape) for shape in shapes]


@st.composite
def networks(draw: st.DrawFn, mixing: bool | None = None) -> Network:
    """Networks of up to MOST_TRIES operations.

    Args:
        draw: Given by hypothesis.
        mixing: Whether operations that mix the samples of a batch may occur; None: sometimes.
    """
    d = Drawer(draw)
    if mixing is None:
        mixing = d.rarely()
    inputs = []
    for _ in range(2 if d.rarely() else 1):
        most = {0: 7, 1: 7, 2: 7, 3: 3}
        axes = d.pick([2, 2, 2, 1, 1, 0, 3])
        size = tuple(d.whole(1, most[axes]) for _ in range(axes))
        inputs.append((d.whole(1, 4), *size))
    values = [Value((BATCH, *shape)) for shape in inputs]
    ops: list[Op] = []
    for _ in range(MOST_TRIES):
        draw(_appended(ops, values, mixing))
        if d.whole(0, 14) == 0:  # no length drawn first: so hypothesis can leave out any of them
            break
    last = len(values) - 1
    outputs = [last, *draw(st.lists(st.integers(0, last), max_size=2))]
    form = d.pick(["one", "tuple", "dict"]) if len(outputs) == 1 else d.pick(["tuple", "dict"])
    return Network(tuple(inputs), tuple(ops), tuple(outputs), form, d.whole(0, 3))
