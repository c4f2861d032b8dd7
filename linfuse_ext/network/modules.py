"""Which module of the model an operation is from."""

from __future__ import annotations

from torch.fx import Node


def module_of(node: Node) -> tuple[str, str]:
    """The path and the class of the innermost module that ran a node; empty where unknown."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path, kind = stack[-1] if stack else ("", "")
    kind = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    return str(path).removeprefix("L['self'].").removeprefix("L['self']"), kind
