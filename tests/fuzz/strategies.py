"""What is drawn: geometries, dtypes, layouts of operands, whole calls, and calls that are broken.

A valid call is drawn from a geometry that is valid by construction. A broken one is a valid call
with one or two of its arguments replaced from the pools at the end of this file; it may still be
valid, which its check finds out.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from cases import Case
from hypothesis import strategies as st
from tolerance import DTYPES

from linfuse_ext import functional
from linfuse_ext.geometry import PADDING_MODES, Geometry
from linfuse_ext.sparse import count_stored

from .calls import FUNCTIONAL, OPS, Call

MOST_ELEMENTS = 30_000  # of a matrix: the oracle builds it three times

# --- geometries


def _fits(case: Case) -> bool:
    """The kernel may be larger than the padded image, and nothing be left of the output."""
    try:
        geometry = case.geometry()
    except ValueError:
        return False
    return geometry.rows * geometry.cols <= MOST_ELEMENTS


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Geometries of every kind. Few are filtered out: see _fits."""
    axes = draw(st.integers(1, 3))
    most = {1: 14, 2: 8, 3: 5}[axes]

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    transposed = draw(st.booleans())
    mode = "zeros" if transposed else draw(st.sampled_from(PADDING_MODES))
    groups = draw(st.integers(1, 3))
    channels = (groups * draw(st.integers(1, 3)), draw(st.integers(1, 4)))
    if draw(st.integers(0, 9)) == 9:  # beyond a tile of registers; the image is small then
        channels, most = (groups * draw(st.integers(4, 12)), draw(st.integers(5, 19))), 3
    input_size, kernel = each(1, most), each(1, 4)
    stride, dilation = each(1, 4), each(1, 3)
    highest = {"reflect": min(input_size) - 1, "circular": min(input_size)}.get(mode, 5)
    extra = tuple(
        draw(st.integers(0, max(s, d) - 1)) if transposed else 0
        for s, d in zip(stride, dilation, strict=True)
    )
    padding: Any = tuple(draw(st.integers(0, min(5, highest))) for _ in range(2 * axes))
    by_name = ["valid"]
    if not transposed and mode in ("zeros", "replicate"):  # the others may have too little to read
        by_name.append("same")
    if draw(st.integers(0, 9)) == 9:
        padding = draw(st.sampled_from(by_name))
        stride = (1,) * axes if padding == "same" else stride
    return Case(
        "random", "", (*channels, *kernel), input_size, stride, padding, dilation, groups,
        transposed, extra, mode, draw(st.booleans()),
    )  # fmt: skip


@st.composite
def far_cases(draw: st.DrawFn) -> Case:
    """Steps and paddings that are huge, and next to no output: indices of far more than 32 bits."""
    axes = draw(st.integers(1, 2))
    far = 2 ** draw(st.integers(16, 40))
    transposed = draw(st.booleans())
    mode = "zeros" if transposed else draw(st.sampled_from(["zeros", "replicate"]))
    stride, dilation, padding = [], [], []
    kernel = [draw(st.integers(1, 3)) for _ in range(axes)]
    input_size = [draw(st.integers(1, 4)) for _ in range(axes)]
    for k, size in zip(kernel, input_size, strict=True):
        stride.append(far + draw(st.integers(-1, 1)))
        dilation.append(draw(st.sampled_from([1, 2, far - 1, far, far + 1])))
        if transposed:
            full = (size - 1) * stride[-1] + (k - 1) * dilation[-1] + 1
            cut = max(0, full - draw(st.integers(1, 4)))
            low = draw(st.sampled_from([0, 1, cut // 2, cut])) if cut else 0
            padding += [low, cut - low]
        else:
            padding += [draw(st.sampled_from([0, 1, far - 1, far, far + 1])) for _ in range(2)]
    channels = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    return Case(
        "far", "", (*channels, *kernel), tuple(input_size), tuple(stride), tuple(padding),
        tuple(dilation), 1, transposed, (0,) * axes, mode, draw(st.booleans()),
    )  # fmt: skip


@st.composite
def spelled(draw: st.DrawFn, case: Case, for_op: bool) -> dict[str, str]:
    """The code of the geometry's arguments, defaults left out or not, lists and single numbers."""
    axes = len(case.weight_size) - 2

    def numbers(values: Any, length: int = axes) -> str:
        values = tuple(values)
        if len(set(values)) == 1 and draw(st.booleans()):
            return f"[{values[0]}]" if for_op or length == 1 else f"{values[0]}"
        forms = ["{list}"] if for_op else ["{list}", "{tuple}", "torch.Size({list})"]
        form = draw(st.sampled_from(forms))
        return form.format(list=list(values), tuple=values)

    padding = case.padding
    if for_op and isinstance(padding, str):
        padding = [value for pair in case.geometry().padding for value in pair]
    if not isinstance(padding, str):
        pairs = list(zip(padding[::2], padding[1::2], strict=True))
        if all(low == high for low, high in pairs) and draw(st.booleans()):
            padding = [low for low, _ in pairs]
    code = {
        "input_size": numbers(case.input_size),
        "stride": numbers(case.stride),
        "padding": repr(padding)
        if isinstance(padding, str)
        else numbers(padding, length=len(padding)),
        "dilation": numbers(case.dilation),
        "groups": repr(case.groups),
        "transposed": repr(case.transposed),
        "output_padding": numbers(case.output_padding),
        "padding_mode": repr(case.padding_mode),
    }
    defaults = {
        "stride": {1}, "padding": {0}, "dilation": {1}, "output_padding": {0},
    }  # fmt: skip
    for name, values in defaults.items():
        if set(getattr(case, name)) == values and draw(st.booleans()):
            del code[name]
    for name, value in (("groups", 1), ("transposed", False), ("padding_mode", "zeros")):
        if getattr(case, name) == value and draw(st.booleans()):
            del code[name]
    return code


# --- operands

# How a tensor of a shape lies in memory. In all of them `{made}` are its elements in order.
LAYOUTS: dict[str, Callable[[tuple[int, ...]], tuple[tuple[int, ...], str]]] = {
    # the shape of what is made, and the code behind it that makes the operand of it
    "contiguous": lambda shape: (shape, ""),
    "turned": lambda shape: (shape[::-1], f".permute({[*range(len(shape))][::-1]})"),
    "every second": lambda shape: (
        tuple(2 * size for size in shape),
        f"[{', '.join(['1::2'] * len(shape))}]",
    ),
    "inside": lambda shape: (
        tuple(size + 2 for size in shape),
        f"[{', '.join(['1:-1'] * len(shape))}]",
    ),
    "repeated": lambda shape: ((1, *shape[1:]), f".expand({list(shape)})"),
    "one number": lambda shape: ((1,) * len(shape), f".expand({list(shape)})"),
    "off its alignment": lambda shape: ((math.prod(shape) + 1,), f"[1:].view({list(shape)})"),
    # A tensor whose numbers stand in memory with the other sign: torch's neg bit.
    "negative view": lambda shape: ((*shape, 2), ".view_as_complex.conj().imag"),
}


@st.composite
def operands(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, gradient: bool) -> str:
    """The code of a tensor of random numbers, of any layout in memory."""
    layouts = [*LAYOUTS] if dtype in (torch.float32, torch.float64) else [*LAYOUTS][:-1]
    if math.prod(shape) == 0:
        layouts = ["contiguous", "turned"]
    layout = draw(st.sampled_from(["contiguous"] * len(layouts) + layouts))
    size, view = LAYOUTS[layout](shape)
    number = draw(st.integers(0, 99))
    code = (
        f"torch.randn({list(size)}, generator=torch.Generator().manual_seed({number}), "
        f"dtype=torch.float64).to({dtype})"
    )
    if view.startswith(".view_as_complex"):
        code = f"torch.view_as_complex({code}){view.removeprefix('.view_as_complex')}"
    else:
        code += view
    # What wants a gradient must be a leaf, which the number of a view is as well.
    return f"{code}.requires_grad_()" if gradient else code


# The shapes of an op's operands from its geometry and the other size of a Linear. Those with a
# question mark may be None.
def _affine(g: Geometry, case: Case, f: int) -> dict[str, tuple[int, ...]]:
    return {"weight": case.weight_size, "bias?": (g.out_channels,)}


def _conv_linear(g: Geometry, case: Case, f: int) -> dict[str, tuple[int, ...]]:
    return {
        "conv_weight": case.weight_size,
        "conv_bias?": (g.out_channels,),
        "linear_weight": (f, g.rows),
        "linear_bias?": (f,),
    }


def _linear_conv(g: Geometry, case: Case, f: int) -> dict[str, tuple[int, ...]]:
    return {
        "linear_weight": (g.cols, f),
        "linear_bias?": (g.cols,),
        "conv_weight": case.weight_size,
        "conv_bias?": (g.out_channels,),
    }


def _backward_conv(g: Geometry, case: Case, f: int) -> dict[str, tuple[int, ...]]:
    return {"grad_weight": (f, g.cols), "linear_weight": (f, g.rows)}


SHAPES: dict[str, Callable[[Geometry, Case, int], dict[str, tuple[int, ...]]]] = {
    "conv_to_affine": _affine,
    "conv_to_diagonals": _affine,
    "conv_to_csr": lambda g, case, f: {"weight": case.weight_size},
    "conv_to_affine_backward": lambda g, case, f: {},  # depends on the rows that are asked for
    "conv_to_csr_backward": lambda g, case, f: {},
    "fuse_conv_linear": _conv_linear,
    "fuse_conv_linear_by_torch": _conv_linear,
    "fuse_linear_conv": _linear_conv,
    "fuse_linear_conv_by_torch": _linear_conv,
    "convolve_rows": lambda g, case, f: {"rows": (f, g.cols), "conv_weight": case.weight_size},
    "fuse_conv_linear_backward_conv": _backward_conv,
}
NAMES = {
    FUNCTIONAL: (
        "conv_to_affine", "conv_to_diagonals", "fuse_conv_linear", "fuse_linear_conv",
        "fuse_linear_linear", "fuse_conv_conv",
    ),
    OPS: (*(name for name in SHAPES if name != "conv_to_diagonals"), "fuse_conv_conv"),
}  # fmt: skip
# What torch's convolution computes, within the 32 bits of its settings; so are the derivatives of
# the ops whose names begin with "fuse". The first has no derivative: it stands behind an op.
_BY_TORCH = ("_by_torch", "convolve_rows", "_backward_conv")

# --- valid calls


@st.composite
def _operands_of(
    draw: st.DrawFn,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    may_have_gradient: bool,
) -> dict[str, str]:
    # Gradients of half types are sums of several rounded ones, for which there is no one bound.
    wide = dtype in (torch.float32, torch.float64)
    gradient = wide and may_have_gradient and draw(st.booleans())
    code = {}
    for name, shape in shapes.items():
        if name.endswith("?") and draw(st.booleans()):
            code[name[:-1]] = "None"
            continue
        wanted = gradient and draw(st.integers(0, 3)) > 0
        code[name.removesuffix("?")] = draw(operands(shape, dtype, wanted))
    return code


@st.composite
def _rows(draw: st.DrawFn, geometry: Geometry) -> tuple[int, int] | None:
    if draw(st.booleans()):
        return None
    start = draw(st.integers(0, geometry.rows))
    return start, draw(st.integers(start, geometry.rows))


@st.composite
def _of_one_convolution(draw: st.DrawFn, where: str, op: str) -> Call:
    is_far = not op.endswith(_BY_TORCH) and draw(st.integers(0, 11)) == 11
    case = draw((far_cases() if is_far else cases()).filter(_fits))
    geometry = case.geometry()
    code = draw(spelled(case, where == OPS))
    dtype = draw(st.sampled_from(DTYPES))
    features = draw(st.integers(0, 40) if draw(st.booleans()) else st.integers(0, 4))
    shapes = SHAPES[op](geometry, case, features)
    rows = None
    if op in ("conv_to_affine", "conv_to_affine_backward", "conv_to_csr", "conv_to_csr_backward"):
        rows = draw(_rows(geometry))
        if rows is not None:
            code["rows"] = repr(list(rows))
    start, stop = rows or (0, geometry.rows)
    if op == "conv_to_affine_backward":
        shapes = {"grad_matrix": (stop - start, geometry.cols)}
    if op == "conv_to_csr_backward":
        shapes = {"grad_values": (count_stored(geometry, rows) or 0,)}
    if op.endswith(("backward", "backward_conv")):
        code["weight_size"] = repr(list(case.weight_size))
    if op == "conv_to_csr" and draw(st.booleans()):
        code["index32"] = repr(draw(st.booleans()))
    if op == "conv_to_affine" and where == FUNCTIONAL:
        layout = draw(st.sampled_from(["torch.strided", "torch.sparse_csr", "torch.sparse_coo"]))
        code["layout"] = layout
        if layout == "torch.sparse_csr" and draw(st.booleans()):
            code["index_dtype"] = "torch.int32"
    may_have_gradient = not op.endswith("_by_torch") and not (is_far and op.startswith("fuse"))
    return Call(where, op, {**draw(_operands_of(shapes, dtype, may_have_gradient)), **code})


@st.composite
def _of_two_linears(draw: st.DrawFn) -> Call:
    inside, middle, out = (draw(st.integers(0, 20)) for _ in range(3))
    shapes = {
        "first_weight": (middle, inside),
        "first_bias?": (middle,),
        "second_weight": (out, middle),
        "second_bias?": (out,),
    }
    dtype = draw(st.sampled_from(DTYPES))
    return Call(FUNCTIONAL, "fuse_linear_linear", draw(_operands_of(shapes, dtype, True)))


@st.composite
def _of_two_convolutions(draw: st.DrawFn, where: str) -> Call:
    """Two convolutions that fit; whether one computes the same is left open."""
    axes = draw(st.integers(1, 3))
    most = {1: 4, 2: 3, 3: 2}[axes]

    def each(low: int, high: int) -> list[int]:
        value = draw(st.integers(low, high))
        if draw(st.booleans()):
            return [value] * axes
        return [draw(st.integers(low, high)) for _ in range(axes)]

    code: dict[str, str] = {}
    groups = [draw(st.integers(1, 3)), draw(st.integers(1, 3))]
    middle = math.lcm(*groups) * draw(st.integers(1, 2))
    for_op = where == OPS
    transposed = [False, False]
    if not for_op and draw(st.booleans()):
        transposed = [draw(st.booleans()), draw(st.booleans())]
    weights = []
    for which in (0, 1):
        kernel = each(1, most)
        if which == 0:
            inside = draw(st.integers(1, 3))
            size = (groups[0] * inside, middle // groups[0]) if transposed[0] else (middle, inside)
        else:
            out = draw(st.integers(1, 3))
            size = (middle, out) if transposed[1] else (groups[1] * out, middle // groups[1])
        weights.append((*size, *kernel))
        prefix = ("first", "second")[which]
        stride, dilation = each(1, 3), each(1, 3)
        if not for_op or which == 0:
            code[f"{prefix}_stride"] = repr(stride)
        code[f"{prefix}_dilation"] = repr(dilation)
        code[f"{prefix}_groups"] = repr(groups[which])
        if for_op:
            continue
        kind = draw(st.integers(0, 3))
        span = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        # The few that merge are mostly those without padding between the layers, and full ones.
        padding = [0] * axes if kind < 2 else span if kind == 2 else each(0, 3)
        code[f"{prefix}_padding"] = repr(padding)
        if transposed[which]:
            code[f"{prefix}_transposed"] = "True"
            extra = [
                draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
            ]
            code[f"{prefix}_output_padding"] = repr(extra)
        elif draw(st.integers(0, 3)) == 3:
            code[f"{prefix}_padding_mode"] = repr(draw(st.sampled_from(PADDING_MODES)))
    shapes = {
        "first_weight": weights[0],
        "first_bias?": (middle,),
        "second_weight": weights[1],
        "second_bias?": (out * groups[1],),
    }
    dtype = draw(st.sampled_from(DTYPES))
    return Call(where, "fuse_conv_conv", {**draw(_operands_of(shapes, dtype, True)), **code})


@st.composite
def valid_calls(draw: st.DrawFn, where: str) -> Call:
    """Calls of the public functions, or of the ops below them."""
    op = draw(st.sampled_from(NAMES[where]))
    if op == "fuse_linear_linear":
        return draw(_of_two_linears())
    if op == "fuse_conv_conv":
        return draw(_of_two_convolutions(where))
    return draw(_of_one_convolution(where, op))


# --- broken calls. `{it}` is the code of the argument that is replaced.

TENSORS = (
    "None", "1.0", "'x'", "[{it}]", "object()", "float('nan')", "({it}).tolist()",
    "({it}).detach().numpy()", "torch.Size([2])", "torch.nn.parameter.UninitializedParameter()",
    # rank and shape
    "({it})[None]", "({it})[0]", "({it}).flatten()", "({it})[..., :0]", "({it})[:-1]",
    "torch.cat([{it}, {it}])", "torch.cat([{it}, {it}], -1)", "torch.ones(())", "torch.ones(0)",
    "torch.ones(2, 3, 4)", "torch.ones(1, 1, 1, 1, 1, 1)", "({it}).mT",
    "torch.ones(()).expand(2**40, 2**20)", "torch.ones(()).expand(2**62)",
    "torch.ones(()).expand(2**31, 1, 1)", "({it}).expand(2**45, *({it}).shape)",
    "torch.ones(0, 2**62)", "torch.ones(2**62, 0)", "torch.ones(()).expand(2**61, 2)",
    # dtype
    "({it}).int()", "({it}).bool()", "({it}).half()", "({it}).bfloat16()", "({it}).float()",
    "({it}).double()", "({it}).to(torch.complex64)", "({it}).to(torch.float8_e4m3fn)",
    "torch.quantize_per_tensor(({it}).detach().float(), 0.1, 0, torch.qint8)",
    # another kind of tensor
    "({it}).to('meta')", "({it}).to_sparse()", "torch.ones(3, 3).to_sparse_csr()",
    "torch.ones(4, 2, 3, 3).to_mkldnn()", "torch.nested.nested_tensor([torch.ones(2)])",
    "torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)",
    "torch.nn.Parameter(({it}).detach(), False)", "({it}).detach().masked_fill(({it}) > 0, 0)",
)  # fmt: skip

_EXTREME = (
    "0", "-1", "1", "2", "3", "7", "2**16", "2**31 - 1", "2**31", "2**32", "2**62", "2**63 - 1",
    "2**63", "2**64", "10**30", "-(2**31)", "-(2**63)", "-(2**63) - 1",
)  # fmt: skip
_NO_NUMBERS = (
    "True", "False", "1.0", "1.5", "float('nan')", "float('inf')", "None", "'x'", "''", "b'1'",
    "1j", "object()", "torch.tensor(2)", "torch.tensor(1.5)", "torch.tensor([1, 1])",
    "torch.tensor(2, device='meta')", "np.int64(2)", "np.float32(2)", "np.array([1, 1])",
    "torch.float32", "int", "torch.tensor([])",
)  # fmt: skip
INTS = (*_EXTREME, *_NO_NUMBERS, "[1]", "(1, 1)")
LISTS = (
    *_EXTREME, *_NO_NUMBERS,
    "[]", "()", "[1]", "[1, 1]", "[1, 1, 1]", "[1] * 4", "[1] * 6", "[1] * 7", "range(1, 3)",
    "{1: 1}", "{1}", "[[1]]", "[(1, 1)]", "[None]", "['1']", "[1.0]", "[True]", "[1, 1.5]",
    "[float('nan')]", "[2**63]", "[-1]", "[0]", "[2**62]", "[2**63 - 1]", "[-(2**63)]", "[2**31]",
    "[1, 2**62]", "[2**40, 1]", "({it}) * 2", "({it}) * 100000", "({it})[1:]", "iter([1])",
    "'same'", "'valid'", "'full'", "torch.Size([2])", "slice(1)", "[np.int64(1)]",
)  # fmt: skip
ROWS = (
    *LISTS, "(0, 0)", "(0, 1)", "(1, 0)", "(-1, 1)", "(0, 2**63 - 1)", "(2**63, 2**64)",
    "(0, 10**6)", "(-(2**63), 0)", "(0, 1.5)", "(False, True)", "(0, 1, 2)", "((0, 1), 2)", "'ab'",
)  # fmt: skip
FLAGS = ("None", "0", "1", "'no'", "np.True_", "torch.tensor(True)", "[True]", "True", "False")
MODES = (
    "None", "3", "''", "'mirror'", "'ZEROS'", "b'zeros'", "'zeros\\0'", "'\\ud800'", "['zeros']",
    "'reflect'", "'replicate'", "'circular'", "'zeros'", "'x' * 10**5",
)  # fmt: skip
MEMORY_LAYOUTS = ("None", "'dense'", "torch.sparse_bsr", "torch.jagged", "torch.float32", "0")
DTYPE_ARGUMENTS = ("None", "torch.int32", "torch.float32", "'int64'", "int", "32")


def pool_of(name: str, code: str) -> tuple[str, ...]:
    """What an argument may be replaced by."""
    if "torch.randn(" in code or name.endswith("bias"):
        return TENSORS
    if name == "rows":
        return ROWS
    if name.endswith("padding_mode"):
        return MODES
    if name.endswith("transposed") or name == "index32":
        return FLAGS
    if name == "layout":
        return MEMORY_LAYOUTS
    if name == "index_dtype":
        return DTYPE_ARGUMENTS
    return INTS if name.endswith("groups") else LISTS


def arguments_of(where: str, op: str) -> list[str]:
    """The names of all arguments that a function takes."""
    if where == FUNCTIONAL:
        return list(inspect.signature(getattr(functional, op)).parameters)
    return [argument.name for argument in getattr(torch.ops.linfuse, op).default._schema.arguments]


@st.composite
def broken_calls(draw: st.DrawFn, where: str) -> Call:
    """A valid call with one argument replaced, or two."""
    call = draw(valid_calls(where))
    names = arguments_of(where, call.op)
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)):
        it = call.code.get(name, "[1]")
        pool = [code for code in pool_of(name, it) if it != "None" or "{it}" not in code]
        code = draw(st.sampled_from(pool))
        call = call.replace(**{name: code.replace("{it}", it)})
    return call
