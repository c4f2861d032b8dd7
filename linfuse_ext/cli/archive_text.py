"""What may stand in the texts of an archive: only what cannot run code when torch loads it.

An archive has its graph as JSON. torch.export.load and ExportedProgram.module() turn parts of that
into Python, so that a text can do whatever a pickle can:

    expr_str             a symbolic size: sympy.sympify evaluates it
    guards_code          conditions on sizes: the lines of a function that is made by exec
    target, as_operator  any attribute of torch, operator or math that can be called
    in_spec, out_spec    the nesting of inputs and outputs: may name an enum or the factory of a
                         defaultdict, whose module is imported
    names                become variables and arguments of the code that torch.fx generates
    other strings        stand there between quotes, which they could end

Each must have one of the forms below, and what has another is refused. Of the metadata of a node,
only the names of modules get into code.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["ArchiveError", "check_example", "check_graph", "check_payloads"]


class ArchiveError(ValueError):
    """An archive that is not loaded, and why."""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# Strings and names -------------------------------------------------------------------------------

# No quotes, backslashes or brackets: neither part of a string literal's end nor a call.
_PLAIN = re.compile(r"[\w .,:+\-<>/@|*]*")


def _check_plain(value: Any) -> None:
    # A name of two underscores would reach for the inside of Python's objects.
    if not _PLAIN.fullmatch(value) or re.search(r"(^|\.)__", value):
        raise ArchiveError(f"it has a string that might be run as code, {_short(value)}")


def _check_names(value: Any) -> None:
    """One name or several, of variables in generated code."""
    for name in value if isinstance(value, (list, dict)) else [value]:
        if name is None or name == "":
            continue
        if not isinstance(name, str) or not name.isidentifier():
            raise ArchiveError(f"it has a name that might be run as code, {_short(name)}")


def _check_named(value: Any) -> None:
    _check_names(value)
    for item in value.values():
        _check_value(item)


def _check_metadata(value: Any) -> None:
    """Texts that are not run; but the names of layers come from here, and are printed."""
    for name, text in value.items():
        if re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text):
            raise ArchiveError(f"it has control characters in a text, {_short(text)}")
        if name == "nn_module_stack" and re.search(r'["\\\n]', text):
            # torch.fx puts the name of a module between double quotes, as it is.
            raise ArchiveError(f"it has a name that might be run as code, {_short(text)}")


def _check_no_objects(value: Any) -> None:
    if value:
        raise ArchiveError("it has objects of a custom class, which are not loaded")


# Operators ---------------------------------------------------------------------------------------

_TENSOR_OPERATOR = re.compile(r"torch\.ops\.((?:aten|prims|linfuse)\.\w+)\.(\w+)")
_NOT_ON_TENSORS = {"aten.from_file", "aten._print"}  # the only ones that touch files or terminal
_CONTROL_FLOW = {
    f"torch.ops.higher_order.{name}"
    for name in (
        "associative_scan",
        "cond",
        "map_impl",
        "scan",
        "while_loop",
        "wrap_with_autocast",
        "wrap_with_set_grad_enabled",
    )
}
_ON_SIZES = {
    *(
        f"_operator.{name}"
        for name in [
            "abs",
            "add",
            "and_",
            "eq",
            "floordiv",
            "ge",
            "getitem",
            "gt",
            "le",
            "lt",
            "mod",
            "mul",
            "ne",
            "neg",
            "not_",
            "or_",
            "pos",
            "pow",
            "sub",
            "truediv",
        ]
    ),
    *(f"math.{name}" for name in ("ceil", "floor", "trunc")),
    *(f"torch.sym_{name}" for name in ["float", "int", "ite", "max", "min", "not", "sqrt", "sum"]),
}


def _check_operator(target: Any) -> None:
    if target in _ON_SIZES or target in _CONTROL_FLOW:
        return
    found = _TENSOR_OPERATOR.fullmatch(target)
    if found and found[1] not in _NOT_ON_TENSORS:
        overload = "" if found[2] == "default" else f".{found[2]}"
        # Others of these names are TorchScript's, some of which write files.
        if torch._C._dispatch_has_kernel(found[1].replace(".", "::") + overload):
            return
    raise ArchiveError(f"it uses the operator {_short(target)}, which is not run here")


# Expressions -------------------------------------------------------------------------------------

_LONGEST_EXPRESSION = 10_000
_LARGEST_NUMBER = 2**64
_LARGEST_POWER = 64
_LONGEST_FLOAT = 100  # in bits
_OPERATIONS = (
    *(ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod),
    *(ast.And, ast.Or, ast.Not, ast.UAdd, ast.USub),
    *(ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE),
)
# Of sympy, torch.utils._sympy.functions and Python. Not the shifts: they could fill the memory.
_FUNCTIONS = set(
    [
        "Abs",
        "Add",
        "And",
        "Equality",
        "Float",
        "GreaterThan",
        "Integer",
        "LessThan",
        "Max",
        "Min",
        "Mod",
        "Mul",
        "Not",
        "Or",
        "Rational",
        "StrictGreaterThan",
        "StrictLessThan",
        "Symbol",
        "Unequality",
        "ceiling",
        "floor",
        "CeilDiv",
        "CeilToInt",
        "CleanDiv",
        "FloatTrueDiv",
        "FloorDiv",
        "FloorToInt",
        "Identity",
        "IntTrueDiv",
        "IsNonOverlappingAndDenseIndicator",
        "ModularIndexing",
        "PythonMod",
        "RoundToInt",
        "ToFloat",
        "TruncToFloat",
        "TruncToInt",
        "Where",
        "abs",
        "bool",
        "cast_symbool_to_symint_guardless",
        "float",
        "int",
        "max",
        "min",
        "round",
        "math.ceil",
        "math.floor",
        "math.trunc",
    ]
)
_POWERS = {"Pow", "PowByNatural", "FloatPow"}
_METHODS = {"dim", "size", "storage_offset", "stride"}


def _check_power(base: ast.expr, exponent: ast.expr, power: int) -> None:
    """A power by a number; powers of powers multiply, and would be computed however large."""
    number = _integer(exponent)
    if number is None:
        raise ArchiveError("a power in it is not by a number")
    _check_expression(base, power * max(abs(number), 1))


def _integer(node: ast.expr) -> int | None:
    """The value of `3`, `-3`, `Integer(3)` and `Integer(-3)`."""
    match node:
        case ast.Constant(value=int() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as value)):
            return -value
        case ast.Call(func=ast.Name(id="Integer"), args=[inner], keywords=[]):
            return _integer(inner)
    return None


def _check_expression(node: ast.expr, power: int = 1) -> None:
    """Numbers, symbols, sizes of inputs, and sums, comparisons and known functions of these."""
    if power > _LARGEST_POWER:
        raise ArchiveError("a power in it is too large")
    inner: list[ast.expr] = []
    match node:
        case ast.Constant(value=bool() | None):
            pass
        case ast.Constant(value=int() | float() as value) if not abs(value) > _LARGEST_NUMBER:
            pass
        case ast.Name(id=name) if re.fullmatch(r"L|true|false|[a-z]+\d+", name):
            pass
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            _check_power(left, right, power)
        case ast.Call(func=ast.Name(id=name), args=[left, right], keywords=[]) if name in _POWERS:
            _check_power(left, right, power)
        case ast.BinOp(left=left, op=op, right=right) if isinstance(op, _OPERATIONS):
            inner = [left, right]
        case ast.UnaryOp(op=op, operand=operand) if isinstance(op, _OPERATIONS):
            inner = [operand]
        case ast.BoolOp(op=op, values=values) if isinstance(op, _OPERATIONS):
            inner = values
        case ast.Compare(left=left, ops=ops, comparators=rest) if all(
            isinstance(op, _OPERATIONS) for op in ops
        ):
            inner = [left, *rest]
        case ast.Call(
            func=ast.Name(id="Symbol" | "Float"),
            args=[ast.Constant(value=str() as text)],
            keywords=words,
        ) if all(_integer(word.value) in range(_LONGEST_FLOAT) for word in words):
            _check_plain(text)
        case ast.Call(func=function, args=inner, keywords=[]) if (
            ast.unparse(function) in _FUNCTIONS
        ):
            pass
        case ast.Call(func=ast.Attribute(value=value, attr=name), args=[], keywords=[]) if (
            name in _METHODS
        ):
            inner = [value]
        case ast.Subscript(value=value, slice=ast.Constant(value=str() as text)):
            _check_plain(text)
            inner = [value]
        case ast.Subscript(value=value, slice=ast.Constant(value=int())):
            inner = [value]
        case _:
            raise ArchiveError(f"{_short(ast.unparse(node))} is no sum or comparison of sizes")
    for item in inner:
        _check_expression(item, power)


def _check_expressions(value: Any) -> None:
    """One text or several."""
    for text in value if isinstance(value, list) else [value]:
        try:
            if len(text) > _LONGEST_EXPRESSION:
                raise ArchiveError("it is too long")
            _check_expression(ast.parse(text, mode="eval").body)
        except (ArchiveError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ArchiveError(
                f"it has an expression that might be run as code, {_short(text)}: {error}"
            ) from None


# Nesting of inputs and outputs -------------------------------------------------------------------

_CONTAINERS = {
    None,
    "builtins.dict",
    "builtins.list",
    "builtins.tuple",
    "collections.OrderedDict",
    "collections.deque",
}


def _check_nesting(value: Any) -> None:
    if value is None:
        return
    _, spec = json.loads(value)
    todo = [spec]
    while todo:
        spec = todo.pop()
        if spec["type"] not in _CONTAINERS:
            raise ArchiveError(
                f"its inputs or outputs are in a {_short(spec['type'])}, which is not loaded here; "
                "tuples, lists and dicts are"
            )
        if spec["context"] is not None:
            check_example(json.loads(spec["context"]))
        todo += spec["children_spec"]


def check_example(value: Any) -> None:
    """Refuses example inputs that are more than tensors, numbers and strings in containers.

    Args:
        value: What was loaded; keys of dicts become part of generated code.

    Raises:
        ArchiveError: There is something else, or a string that might be run as code.
    """
    if isinstance(value, str):
        _check_plain(value)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            check_example(name)
            check_example(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            check_example(item)
    elif type(value) not in (torch.Tensor, torch.nn.Parameter, *_SCALARS):
        raise ArchiveError(f"its example inputs have a {type(value).__name__}, which is not loaded")


_SCALARS = (bool, int, float, complex, type(None), torch.dtype, torch.device, torch.layout)


# The whole ---------------------------------------------------------------------------------------

_RULES: dict[str, Callable[[Any], None]] = {
    "as_custom_obj": _check_no_objects,
    "as_name": _check_names,
    "as_operator": _check_operator,
    "custom_obj": _check_no_objects,
    "custom_obj_values": _check_no_objects,
    "expr_str": _check_expressions,
    "forward_arg_names": _check_names,
    "guards_code": _check_expressions,
    "in_spec": _check_nesting,
    "metadata": _check_metadata,
    "name": _check_names,
    "out_spec": _check_nesting,
    "range_constraints": _check_named,
    "sym_bool_values": _check_named,
    "sym_float_values": _check_named,
    "sym_int_values": _check_named,
    "target": _check_operator,
    "tensor_values": _check_named,
}


def _check_value(value: Any) -> None:
    if isinstance(value, str):
        _check_plain(value)
    elif isinstance(value, list):
        for item in value:
            _check_value(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_plain(key)
            if key == "arg" and value.get("name") == "assert_msg" and item.keys() == {"as_string"}:
                continue  # the message of an assertion, which generated code has as repr gives it
            _RULES.get(key, _check_value)(item)


def check_graph(text: bytes) -> None:
    """Refuses a models/*.json that could run code.

    Args:
        text: The member of the archive.

    Raises:
        ArchiveError: Something in it has none of the forms that cannot.
    """
    graph = json.loads(text)
    if not isinstance(graph, dict):
        raise ArchiveError("its graph is no JSON object")
    _check_value(graph)


def check_payloads(text: bytes, sizes: Mapping[str, int], prefix: str) -> None:
    """Refuses a table of weights or constants that names anything but plain tensors.

    Args:
        text: The member of the archive, a *_config.json.
        sizes: Bytes of each tensor's member, by name.
        prefix: What the names begin with: "weight_" or "tensor_".

    Raises:
        ArchiveError: A tensor is a pickle, is not there, or would be made of nothing.
    """
    for name, payload in json.loads(text)["config"].items():
        _check_plain(name)
        member = payload["path_name"]
        if payload["use_pickle"] or not member.startswith(prefix):
            raise ArchiveError(
                f"{name} is stored as a pickle, which is never loaded: only plain tensors are"
            )
        if member not in sizes:
            raise ArchiveError(f"the values of {name} are missing")
        count = math.prod(size["as_int"] for size in payload["tensor_meta"]["sizes"])
        if sizes[member] == 0 and count > 0:
            raise ArchiveError(f"{name} has {count} elements, of which none is stored")
