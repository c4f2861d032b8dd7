"""The convolutions and Linears of an exported program, as layers with their weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from ..geometry import make_geometry
from ..matrix_files import BlockedMatrix
from ..modules import _CONVOLUTIONS, _TRANSPOSED, _conv_keywords
from ..network.constants import Constants
from ..network.naming import qualified_name
from ..network.operations import arguments_of

__all__ = ["Layer", "find_layers"]


class Layer(NamedTuple):
    """One call of a layer.

    Attributes:
        name: As the report of `collapse` has it, the qualified name of its module; the second call
            has `@1` behind it, and so on.
        node: The name of its node in the graph.
        what: The layer as torch prints it.
        conv: The layer as a convolution without values: a Linear is one of kernel 1 on one
            position. None if it has no matrix.
        input_size: Spatial size of its input.
        values: Makes the weight and bias of `conv`, of its shapes.
        remark: What the matrix leaves out, or why there is none.
    """

    name: str
    node: str
    what: str
    conv: Any = None
    input_size: tuple[int, ...] = ()
    values: Callable[[], tuple[Tensor, Tensor | None]] | None = None
    remark: str = ""

    @property
    def title(self) -> str:
        """What it is, with the remark."""
        return f"{self.what}, {self.remark}" if self.remark else self.what

    def matrix(self, sparse: bool, dtype: torch.dtype | None = None) -> BlockedMatrix:
        """Its matrix: the sizes, without values."""
        weight = self.conv.weight if dtype is None else self.conv.weight.to(dtype)
        settings = _conv_keywords(self.conv)
        geometry = make_geometry("matrix", weight.shape, self.input_size, **settings)
        return BlockedMatrix(weight, self.conv.bias, geometry, sparse, 0)

    def with_values(self) -> nn.Module:
        """The convolution with its weight and bias."""
        assert self.values is not None, "one without a matrix has none"
        conv: nn.Module = self.conv
        for name, value in zip(("weight", "bias"), self.values(), strict=True):
            if value is not None:
                setattr(conv, name, nn.Parameter(value, requires_grad=False))
        return conv


class _NoMatrix(ValueError):
    """Why a layer has none."""


def find_layers(program: ExportedProgram) -> list[Layer]:
    """Finds the convolutions and Linears of a program, in the order of their calls.

    Args:
        program: Exported in any way, decomposed or not.

    Returns:
        The layers; those without a matrix say why.
    """
    module = program.module(check_guards=False)
    assert isinstance(module, GraphModule)
    constants = Constants(module)
    calls: Counter[str] = Counter()
    layers = []
    for node in module.graph.nodes:
        make = _MAKERS.get(_operation(node))
        if make is None or (make is _product and node.args[-1] not in constants):
            continue
        name = qualified_name(node)
        number = calls[name]
        calls[name] += 1
        layer = Layer(f"{name}@{number}" if number else name, node.name, _operation(node))
        layers.append(_described(layer, make, node, constants))
    return layers


# Nodes -------------------------------------------------------------------------------------------


def _operation(node: Any) -> str:
    """The name of an ATen operation, without its overload; else nothing."""
    target = getattr(node, "target", None)
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return ""
    return target._schema.name.removeprefix("aten::")


def _call(node: Node) -> str:
    """Which call of which module the node is in; nothing in the forward of the whole model."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack)[-1]) if len(stack) > 1 else ""


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _spatial_size(node: Node, axes: int) -> tuple[int, ...]:
    size = _shape(node)[-axes:]
    if not all(isinstance(length, int) for length in size):
        raise _NoMatrix(
            f"its input has no fixed size ({' x '.join(map(str, size))}): export it with one"
        )
    return size


# Layers ------------------------------------------------------------------------------------------


class _Found(NamedTuple):
    """A layer on meta, its input and the nodes of its weight and bias."""

    layer: Any
    input_size: tuple[int, ...]
    weight: Node
    bias: Node | None
    turned: bool = False  # the node has the weight transposed
    remark: str = ""


_Maker = Callable[[dict[str, Any], Node], _Found]


def _described(layer: Layer, make: _Maker, node: Node, constants: Constants) -> Layer:
    try:
        found = make(arguments_of(node), node)
        layer = layer._replace(what=str(found.layer))
        for part, source in (("weight", found.weight), ("bias", found.bias)):
            if source is not None and source not in constants:
                raise _NoMatrix(f"its {part} depends on the input, or is changed")
        conv = found.layer
        if isinstance(conv, nn.Linear):
            conv = _as_convolution(conv)
        whole = layer._replace(
            conv=conv,
            input_size=found.input_size,
            values=lambda: _values(found, conv, constants),
            remark=found.remark,
        )
        whole.matrix(sparse=False)  # is there one?
    except (TypeError, ValueError, RuntimeError) as error:  # torch's, of settings that do not fit
        return layer._replace(remark=str(error).splitlines()[0])
    return whole


def _values(found: _Found, conv: Any, constants: Constants) -> tuple[Tensor, Tensor | None]:
    weight = constants[found.weight].to(conv.weight.dtype)  # as it was: they come in float64
    weight = (weight.T if found.turned else weight).reshape(conv.weight.shape)
    if found.bias is None:
        return weight, None
    return weight, constants[found.bias].to(conv.weight.dtype).reshape(conv.bias.shape)


def _as_convolution(linear: nn.Linear) -> nn.Conv1d:
    return nn.Conv1d(
        linear.in_features,
        linear.out_features,
        1,
        bias=linear.bias is not None,
        device="meta",
        dtype=linear.weight.dtype,
    )


def _new_linear(shape: Sequence[int], dtype: torch.dtype, bias: Node | None) -> nn.Linear:
    return nn.Linear(shape[1], shape[0], bias is not None, device="meta", dtype=dtype)


def _linear(arguments: dict[str, Any], node: Node) -> _Found:
    weight, bias = arguments["weight"], arguments["bias"]
    linear = _new_linear(_shape(weight), weight.meta["val"].dtype, bias)
    return _Found(linear, (1,), weight, bias)


def _product(arguments: dict[str, Any], node: Node) -> _Found:
    """What a Linear is decomposed into."""
    weight = arguments["mat2"]
    bias = arguments["self"] if "mat1" in arguments else None
    if arguments.get("alpha", 1) != 1 or arguments.get("beta", 1) != 1:
        raise _NoMatrix("it scales its product or its bias")
    if bias is not None and _shape(bias) != _shape(weight)[1:]:
        raise _NoMatrix("its bias is not one value per feature")
    linear = _new_linear(_shape(weight)[::-1], weight.meta["val"].dtype, bias)
    return _Found(linear, (1,), weight, bias, turned=True)


def _convolution(arguments: dict[str, Any], node: Node) -> _Found:
    weight, bias, source = arguments["weight"], arguments["bias"], arguments["input"]
    transposed = arguments.get("transposed", "transpose" in _operation(node))
    out_channels, in_channels, *kernel_size = _shape(weight)
    axes, groups = len(kernel_size), arguments["groups"]
    if transposed:
        in_channels, out_channels = out_channels, in_channels * groups
    else:
        in_channels *= groups

    def per_axis(value: Any) -> Any:
        return value if isinstance(value, str) else tuple(value) * (axes if len(value) == 1 else 1)

    settings = {name: per_axis(arguments[name]) for name in ("stride", "padding", "dilation")}
    if transposed:
        settings["output_padding"] = per_axis(arguments["output_padding"])
    kind: Any = (_TRANSPOSED if transposed else _CONVOLUTIONS)[axes - 1]

    def make(**more: Any) -> Any:
        return kind(
            in_channels,
            out_channels,
            tuple(kernel_size),
            groups=groups,
            bias=bias is not None,
            device="meta",
            dtype=weight.meta["val"].dtype,
            **(settings | more),
        )

    conv, remark = make(), ""
    if _call(source) == _call(node) != "" and _operation(source) not in _MAKERS:
        # This is not all that the module does.
        padded = _with_padding(conv, make, source)
        if padded is None:
            remark = f"alone, behind the {_operation(source)} in its module"
        else:
            conv, source = padded, arguments_of(source)["self"]
    return _Found(conv, _spatial_size(source, axes), weight, bias, remark=remark)


# Padding -----------------------------------------------------------------------------------------

# Layers with a padding mode, or padded differently at the two ends of an axis, are exported as
# padding and a convolution behind it.
_PADDINGS = {
    "pad": "",  # an argument says
    "constant_pad_nd": "constant",
    **{f"reflection_pad{axes}d": "reflect" for axes in (1, 2, 3)},
    **{f"replication_pad{axes}d": "replicate" for axes in (1, 2, 3)},
}


def _with_padding(conv: Any, make: Callable[..., Any], node: Node) -> Any:
    """The layer that is `node`, a padding, and `conv` behind it, if there is one."""
    if _operation(node) not in _PADDINGS or isinstance(conv, _TRANSPOSED):
        return None
    arguments = arguments_of(node)
    mode = _PADDINGS[_operation(node)] or arguments["mode"]
    # (low, high) for each axis, the last first
    amounts = list(arguments["pad" if "pad" in arguments else "padding"])
    own = list(conv._reversed_padding_repeated_twice)
    if mode == "constant" and not arguments["value"]:
        mode = "zeros"
        amounts += [0] * (len(own) - len(amounts))
        amounts = [pad + more for pad, more in zip(amounts, own, strict=True)]
    elif any(own):
        return None
    for padding in (tuple(amounts[::-2]), "same"):
        try:
            padded = make(padding=padding, padding_mode=mode)
        except ValueError:
            continue
        if list(padded._reversed_padding_repeated_twice) == amounts:
            return padded
    return None


_MAKERS: dict[str, _Maker] = {
    "linear": _linear,
    "addmm": _product,
    "mm": _product,
    "convolution": _convolution,
    **{f"conv{axes}d": _convolution for axes in (1, 2, 3)},
    **{f"conv_transpose{axes}d": _convolution for axes in (1, 2, 3)},
}
