"""What a call must come to: the values of the float64 reference, or an error that says why not.

Every function here is multilinear in its operands: a sum of products of one element of each. So one
function gives the exact values on the operands, the sum of the absolute products on their absolute
values, and the number of products on ones: all that tests/tolerance.py needs, per element. The same
holds for derivatives.
"""

from __future__ import annotations

import itertools
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tolerance import ACCUMULATE, assert_close
from torch import Tensor

from linfuse_ext import FusionError, reference
from linfuse_ext.composition import Conv, common_divisor, compose, tap_spacing
from linfuse_ext.geometry import make_geometry, make_settings

from .calls import FUNCTIONAL, OPS, Call

Values = dict[str, Any]

RIGHT, REFUSED, NOT_EXACT, TOO_LARGE = (
    "right values", "refused with a clear error", "refused as not exact", "too large to check",
)  # fmt: skip

_PLAIN = 100  # up to here the settings are given to torch's convolution
_MOST_ELEMENTS = 10**6  # of a matrix that is written down
_ENORMOUS = 2**16  # with a number like that in it, a result may be too large for the machine
_UNITS = 24  # unit images on which two convolutions are compared with one


class TooLarge(Exception):
    """The oracle would have to write down a matrix that no machine holds."""


# --- the convolution of a call

_PER_AXIS = {"input_size": 1, "stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}


def _ints(value: Any) -> list[int]:
    # What is no int at all was refused before this is asked; torch.ops takes np.float32(2) for an
    # int, and for a list of ints whatever can be iterated over.
    try:
        return [int(each) for each in value]
    except TypeError:
        return [int(value)]


def _settings(values: Values, axes: int, prefix: str = "") -> Values:
    """The arguments of a convolution as plain ints and one number per axis, defaults included."""
    settings: Values = {
        "groups": int(values.get(f"{prefix}groups", 1)),
        "transposed": bool(values.get(f"{prefix}transposed", False)),
        "padding_mode": values.get(f"{prefix}padding_mode", "zeros"),
    }
    if isinstance(settings["padding_mode"], bytes):  # torch.ops takes these
        settings["padding_mode"] = settings["padding_mode"].decode()
    for name, default in _PER_AXIS.items():
        value = values.get(f"{prefix}{name}", default)
        if not isinstance(value, str):
            value = _ints(value)
            value = value * axes if len(value) == 1 else value
        settings[name] = value
    return settings


def _is_plain(settings: Values) -> bool:
    numbers = (n for value in settings.values() if isinstance(value, list) for n in value)
    return max(numbers) <= _PLAIN


def _affine(weight: Tensor, bias: Tensor | None, values: Values) -> tuple[Tensor, Tensor]:
    """The rows of the matrix and the offset that are asked for."""
    settings = _settings(values, weight.dim() - 2)
    geometry = make_geometry("oracle", weight.shape, **settings)
    rows = values.get("rows")
    start, stop = (0, geometry.rows) if rows is None or isinstance(rows, Tensor) else _ints(rows)
    if (stop - start) * geometry.cols > _MOST_ELEMENTS:
        raise TooLarge
    if _is_plain(settings) and geometry.rows * geometry.cols <= _MOST_ELEMENTS:
        matrix, offset = reference.conv_to_affine(weight, bias, **settings)
        return matrix[start:stop], offset[start:stop]
    return _tap_by_tap(weight, bias, geometry, range(start, stop))


def _fold(position: int, size: int, mode: str) -> int | None:
    """What a position of the padded axis reads, by the words of torch.nn.Conv2d."""
    if 0 <= position < size:
        return position
    if mode == "reflect":
        return -position if position < 0 else 2 * (size - 1) - position
    if mode == "replicate":
        return 0 if position < 0 else size - 1
    return position % size if mode == "circular" else None


def _tap_by_tap(weight: Tensor, bias: Tensor | None, g: Any, rows: range) -> tuple[Tensor, Tensor]:
    """The same for steps and paddings of any size, on which torch's convolution overflows."""
    if len(rows) * math.prod(g.kernel_size) > 10**5:
        raise TooLarge
    per_group = g.in_channels // g.groups
    # Where no tap is, the matrix still is a function of the weight.
    matrix = weight.new_zeros(len(rows), per_group * g.groups, *g.input_size) + 0 * weight.sum()
    offset = weight.new_zeros(len(rows))
    for number, row in enumerate(rows):
        c_out, o = row // math.prod(g.output_size), []
        for axis, size in enumerate(g.output_size):
            o.append(row // math.prod(g.output_size[axis + 1 :]) % size)
        group, within = divmod(c_out, g.out_channels // g.groups)
        channels = range(group * per_group, (group + 1) * per_group)
        for k in itertools.product(*map(range, g.kernel_size)):
            place = []
            for axis, size in enumerate(g.input_size):
                low, step, spread = g.padding[axis][0], g.stride[axis], g.dilation[axis]
                if g.transposed:
                    i, rest = divmod(o[axis] + low - k[axis] * spread, step)
                    place.append(i if rest == 0 and 0 <= i < size else None)
                else:
                    padded = o[axis] * step + k[axis] * spread - low
                    place.append(_fold(padded, size, g.padding_mode))
            if None in place:
                continue
            for n, channel in enumerate(channels):
                tap = (channel, within, *k) if g.transposed else (c_out, n, *k)
                matrix[(number, channel, *place)] += weight[tap]
        if bias is not None:
            offset[number] = bias[c_out]
    return matrix.flatten(1), offset


# --- what each op computes, on operands of float64


def _or_zero(vector: Tensor | None) -> Tensor | int:
    return 0 if vector is None else vector


def _to_affine(v: Values) -> tuple[Tensor, ...]:
    return _affine(v["weight"], v["bias"], v)


def _conv_linear(v: Values) -> tuple[Tensor, ...]:
    matrix, offset = _affine(v["conv_weight"], v["conv_bias"], v)
    bias = v["linear_weight"] @ offset + _or_zero(v["linear_bias"])
    return v["linear_weight"] @ matrix, bias


def _linear_conv(v: Values) -> tuple[Tensor, ...]:
    matrix, offset = _affine(v["conv_weight"], v["conv_bias"], v)
    bias = offset if v["linear_bias"] is None else matrix @ v["linear_bias"] + offset
    return matrix @ v["linear_weight"], bias


def _two_linears(v: Values) -> tuple[Tensor, ...]:
    first, second = v["first_weight"], v["second_weight"]
    bias = first.new_zeros(second.shape[0]) + _or_zero(v["second_bias"])
    if v["first_bias"] is not None:
        bias = bias + second @ v["first_bias"]
    return second @ first, bias


def _by_weight(v: Values, of_matrix: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """The derivative in the weight of what is linear in the matrix."""
    weight = torch.ones(_ints(v["weight_size"]), dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        matrix, _ = _affine(weight, None, v)
        return torch.autograd.grad(of_matrix(matrix), weight, create_graph=True)


def _affine_backward(v: Values) -> tuple[Tensor, ...]:
    return _by_weight(v, lambda matrix: (matrix * v["grad_matrix"]).sum())


def _csr_backward(v: Values) -> tuple[Tensor, ...]:
    return _by_weight(v, lambda matrix: (matrix[matrix > 0] * v["grad_values"]).sum())


def _conv_linear_backward(v: Values) -> tuple[Tensor, ...]:
    return _by_weight(v, lambda matrix: ((v["linear_weight"] @ matrix) * v["grad_weight"]).sum())


def _convolve_rows(v: Values) -> tuple[Tensor, ...]:
    return (v["rows"] @ _affine(v["conv_weight"], None, v)[0].T,)


def _two_convolutions(v: Values) -> tuple[Tensor, ...]:
    """The values of the two layers on some unit images, of which there are two sizes."""
    first, second, _ = _layers(v)
    outputs = []
    for x in _unit_images(v):
        between = reference.convolve(x, v["first_weight"], v["first_bias"], **first)
        outputs.append(reference.convolve(between, v["second_weight"], v["second_bias"], **second))
    return tuple(outputs)


EXPECTED: dict[str, Callable[[Values], tuple[Tensor, ...]]] = {
    "conv_to_affine": _to_affine,
    "conv_to_diagonals": _to_affine,
    "conv_to_csr": lambda v: _to_affine({**v, "bias": None})[:1],
    "conv_to_affine_backward": _affine_backward,
    "conv_to_csr_backward": _csr_backward,
    "fuse_conv_linear": _conv_linear,
    "fuse_conv_linear_by_torch": _conv_linear,
    "fuse_linear_conv": _linear_conv,
    "fuse_linear_conv_by_torch": _linear_conv,
    "convolve_rows": _convolve_rows,
    "fuse_conv_linear_backward_conv": _conv_linear_backward,
    "fuse_linear_linear": _two_linears,
    "fuse_conv_conv": _two_convolutions,
}


# --- two convolutions in one: which settings the result has is no argument of it


def _layers(v: Values) -> tuple[Values, Values, Values]:
    """The settings of both layers and of the merged one, as reference.convolve takes them."""
    sizes = v["first_weight"].shape, v["second_weight"].shape
    axes = len(sizes[0]) - 2
    layers = [_settings(v, axes, prefix) for prefix in ("first_", "second_")]
    if not all(map(_is_plain, layers)):
        raise TooLarge
    for layer in layers:
        del layer["input_size"]
    if v["where"] == OPS:  # which is of two convolutions without padding and knows but one stride
        first, second = layers
        steps = first["dilation"], list(map(operator.mul, first["stride"], second["dilation"]))
        merged = {
            **first,
            "dilation": list(tap_spacing((sizes[0][2:], sizes[1][2:]), steps)),
            "groups": common_divisor(first["groups"], second["groups"]),
        }
        return first, second, merged
    convs = [
        Conv.of(make_settings("oracle", size, **layer), v[f"{which}_bias"] is not None)
        for which, size, layer in zip(("first", "second"), sizes, layers, strict=True)
    ]
    result = compose("oracle", *convs).result
    merged = {name: getattr(result, name) for name in layers[0]}
    merged["padding"] = [value for pair in result.padding for value in pair]
    return layers[0], layers[1], merged


def _unit_images(v: Values) -> list[Tensor]:
    """Unit images of the two smallest sizes that both layers take, more than one where possible."""
    first, second, _ = _layers(v)
    weights = v["first_weight"], v["second_weight"]
    axes = weights[0].dim() - 2
    found: list[Tensor] = []
    for length in range(1, 60):
        size = [length + axis for axis in range(axes)]
        try:
            inner = make_geometry("oracle", weights[0].shape, size, **first)
            outer = make_geometry("oracle", weights[1].shape, inner.output_size, **second)
        except ValueError:
            continue
        if found and inner.cols * inner.rows + outer.cols * outer.rows > _MOST_ELEMENTS:
            break
        generator = torch.Generator().manual_seed(length)
        chosen = torch.randperm(inner.cols, generator=generator)[:_UNITS]
        units = torch.zeros(len(chosen), inner.cols, dtype=torch.float64)
        units[torch.arange(len(chosen)), chosen] = 1
        found.append(units.view(-1, inner.in_channels, *size))
        if len(found) == 2:
            break
    if not found:  # steps of dozens, which only a broken call has
        raise TooLarge
    return found


# --- what was computed, in the form of the above


def _observed(call: Call, values: Values, result: Any) -> tuple[Tensor, ...]:
    """The result as dense tensors; its structure is checked on the way."""
    if call.op == "fuse_conv_conv":
        weight, bias = result
        _, _, merged = _layers(values)
        return tuple(
            reference.convolve(x, weight.double(), bias.double(), **merged).to(weight.dtype)
            for x in _unit_images(values)
        )
    if call.op == "conv_to_diagonals":
        return _from_diagonals(values, result)
    if call.op == "conv_to_csr":
        return (_from_csr(values, *result),)
    outputs = (result,) if isinstance(result, Tensor) else tuple(result)
    if outputs[0].layout == torch.strided:
        return outputs
    matrix, offset = outputs
    if matrix.layout == torch.sparse_csr:
        assert matrix.col_indices().dtype == values.get("index_dtype", torch.int64)
        torch.sparse_csr_tensor(
            matrix.crow_indices(), matrix.col_indices(), matrix.values().detach(), matrix.shape,
            check_invariants=True,
        )  # fmt: skip
    else:
        assert matrix.is_coalesced()
        indices = matrix.indices()
        flat = indices[0] * matrix.shape[1] + indices[1]
        assert (flat.diff() > 0).all(), "coalesced means ascending, and none twice"
    assert matrix.values().shape[0] == _count(values), "the taps and nothing else"
    return matrix.to_dense(), offset


def _count(values: Values) -> int:
    """Elements of the matrix that are taps."""
    matrix, _ = _affine(torch.ones(values["weight"].shape, dtype=torch.float64), None, values)
    return int((matrix > 0).sum())


def _from_csr(v: Values, values: Tensor, columns: Tensor, row_pointers: Tensor) -> Tensor:
    cols = make_geometry("oracle", v["weight"].shape, **_settings(v, v["weight"].dim() - 2)).cols
    assert columns.dtype == row_pointers.dtype
    assert columns.dtype == (torch.int32 if v.get("index32") else torch.int64)
    assert values.shape[0] == _count(v), "the taps and nothing else"
    torch.sparse_csr_tensor(
        row_pointers, columns, values.detach(), (len(row_pointers) - 1, cols), check_invariants=True
    )
    rows = torch.arange(len(row_pointers) - 1).repeat_interleave(row_pointers.diff())
    dense = values.new_zeros(len(row_pointers) - 1, cols)
    return dense.index_put((rows, columns.long()), values)


def _from_diagonals(v: Values, result: Any) -> tuple[Tensor, ...]:
    n, vectors, offset = result
    weight = v["weight"]
    g = make_geometry("oracle", weight.shape, **_settings(v, weight.dim() - 2))
    assert n >= max(g.rows, g.cols) > n // 2 and n & (n - 1) == 0, "the next power of two"
    assert list(vectors) == sorted(vectors) and all(0 <= d < n for d in vectors)
    assert offset.shape == (n,) and not offset[g.rows :].any()
    rows = torch.arange(n)
    matrix = offset.new_zeros(g.rows, g.cols)
    for d, vector in vectors.items():
        assert vector.shape == (n,)
        columns = (rows + d) % n
        inside = (rows < g.rows) & (columns < g.cols)
        assert not vector[~inside].any(), "zeros around the matrix"
        matrix = matrix.index_put((rows[inside], columns[inside]), vector[inside])
    return matrix, offset[: g.rows]


# --- the check of a call


def _is_operand(value: Any) -> bool:
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and value.dtype in ACCUMULATE
        and value.layout == torch.strided
        and value.dim() > 0
    )


def _values(call: Call, arguments: Values, change: Callable[[Tensor], Tensor]) -> Values:
    """The arguments with the operands in float64 and changed; what wants a gradient does so yet."""
    values: Values = {"where": call.where, **arguments}
    for name, value in arguments.items():
        if _is_operand(value):
            made = change(value.detach().resolve_neg().double().contiguous())
            values[name] = made.requires_grad_(value.requires_grad)
    return values


def _with_gradients(
    outputs: Sequence[Tensor], values: Values, cotangents: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The outputs, and behind them the derivatives of their weighted sum in each operand."""
    wanted = [value for value in values.values() if _is_operand(value) and value.requires_grad]
    weighted = [
        (y * c.to(y.dtype)).sum()
        for y, c in zip(outputs, cotangents, strict=True)
        if y.requires_grad
    ]
    gradients: Sequence[Tensor | None] = [None] * len(wanted)
    if weighted and wanted:
        gradients = torch.autograd.grad(sum(weighted[1:], weighted[0]), wanted, allow_unused=True)
    filled = [
        torch.zeros_like(x) if g is None else g for x, g in zip(wanted, gradients, strict=True)
    ]
    return (*(y.detach() for y in outputs), *filled)


def _assert_right(call: Call, arguments: Values, result: Any) -> None:
    operands = [value for value in arguments.values() if _is_operand(value)]
    leaves = torch.utils._pytree.tree_leaves(result)
    dense = [y for y in leaves if isinstance(y, Tensor) and y.layout == torch.strided]
    for y in dense:
        assert y.is_contiguous() and not y.is_neg()
        if call.op != "conv_to_diagonals" and y.numel():
            stored = y.untyped_storage().data_ptr()
            assert stored not in {x.untyped_storage().data_ptr() for x in operands}, "an alias"
    values = _values(call, arguments, lambda x: x)
    observed = _observed(call, values, result)
    assert {y.dtype for y in observed} == {operands[0].dtype}

    exact = EXPECTED[call.op](values)
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in exact]
    cotangents = [c.to(operands[0].dtype).double() for c in cotangents]
    expected = _with_gradients(exact, values, cotangents)
    bounds = []
    for change in (Tensor.abs, torch.ones_like):
        changed = _values(call, arguments, change)
        outputs = EXPECTED[call.op](changed)
        bounds.append(_with_gradients(outputs, changed, [change(c) for c in cotangents]))
    actual = _with_gradients(observed, arguments, cotangents)
    for one, two, magnitude, terms in zip(actual, expected, *bounds, strict=True):
        # fuse_conv_conv is promised to be computed in float64 and rounded once.
        once = call.op == "fuse_conv_conv" and ACCUMULATE[one.dtype] != torch.float64
        most = 1 if once or not terms.numel() else int(terms.max()) + 1
        assert_close(one, two.detach(), magnitude.detach(), most)


def _assert_right_shapes(call: Call, arguments: Values, result: Any) -> None:
    """For tensors without numbers, on the meta device."""

    def ones(value: Any) -> Any:
        return torch.ones(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value

    if call.op in ("conv_to_csr", "fuse_conv_conv", "conv_to_diagonals"):
        raise TooLarge
    values = _values(call, {name: ones(value) for name, value in arguments.items()}, ones)
    expected = EXPECTED[call.op](values)
    outputs = (result,) if isinstance(result, Tensor) else result
    assert [y.shape for y in outputs] == [y.shape for y in expected]
    assert all(y.device.type == "meta" for y in outputs if y.layout == torch.strided)


def _is_enormous(arguments: Values) -> bool:
    numbers = []
    for value in arguments.values():
        if isinstance(value, Tensor):
            numbers += value.shape if not value.is_nested else []
        elif isinstance(value, (int, Sequence)) and not isinstance(value, (str, bytes)):
            flat = value if isinstance(value, Sequence) else [value]
            numbers += [each for each in flat if isinstance(each, int)]
    return any(number >= _ENORMOUS for number in numbers)


def is_clear(call: Call, arguments: Values, error: Exception) -> bool:
    """Whether an error is one that a caller can read: of the right kind, and naming the op."""
    # torch's own words where a result does not fit; the numbers ask for that
    if type(error) is RuntimeError and re.search("memory|alloc", str(error)):
        return _is_enormous(arguments)
    if call.where == FUNCTIONAL:
        named = re.match(rf"{call.op}(, (first|second) layer)?: ", str(error))
        return isinstance(error, (ValueError, TypeError)) and named is not None
    # Arguments of a wrong type are refused by torch, before they come to us.
    return isinstance(error, (ValueError, TypeError, RuntimeError)) and len(str(error)) > 0


def check(call: Call, arguments: Values, valid: bool) -> str:
    """Makes a call and says what came of it; AssertionError where that is not as it must be."""
    operands = [value for value in arguments.values() if _is_operand(value)]
    small = [value for value in operands if value.numel() <= _MOST_ELEMENTS]
    before = [value.detach().clone() for value in small]
    try:
        result = call.function()(**arguments)
    except FusionError as error:
        assert call.op == "fuse_conv_conv" and is_clear(call, arguments, error), error
        return NOT_EXACT
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        assert not valid, message
        assert is_clear(call, arguments, error), message
        return REFUSED
    for one, two in zip(before, small, strict=True):
        assert one.is_meta or torch.equal(one, two.detach()), "an operand was written to"
    try:
        if any(value.is_meta for value in operands):
            _assert_right_shapes(call, arguments, result)
        else:
            _assert_right(call, arguments, result)
    except TooLarge:
        assert not valid, "a valid call is never too large to check"
        return TOO_LARGE
    return RIGHT
