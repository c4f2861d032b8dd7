"""What nodes and merged layers are called."""

from __future__ import annotations

from collections.abc import Container, Iterable

from torch.fx import Node

from .modules import module_of
from .stretches import Step, is_view


def qualified_name(node: Node) -> str:
    """The path of the module that is this operation, or that path and the node's own name."""
    path, kind = module_of(node)
    # A layer of torch is one operation; any other module holds several.
    own = kind.startswith("torch.nn.") and not kind.startswith("torch.nn.modules.container")
    if own and path:
        return path
    return f"{path}.{node.name}" if path else node.name


def names_of(steps: Iterable[Step]) -> tuple[str, ...]:
    """The layers that steps belong to, in order; what only reshapes is left out if it can be."""
    steps = list(steps)
    telling = [step for step in steps if not is_view(step)] or steps
    return tuple(dict.fromkeys(qualified_name(step.node) for step in telling))


def merged_name(steps: Iterable[Step], taken: Container[str]) -> str:
    """A name for what replaces steps: `block.conv_bn` for two layers, `block.a_to_z` for more."""
    steps = list(steps)
    names = names_of([step for step in steps if step.multiplies] or steps)
    parts = [name.split(".") for name in names]
    shared: list[str] = []
    for level in zip(*(path[:-1] for path in parts), strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    tails = ["_".join(path[len(shared) :]) for path in parts]
    tail = "_".join(tails) if len(tails) <= 2 else f"{tails[0]}_to_{tails[-1]}"
    name, count = ".".join([*shared, tail]), 1
    while name in taken:
        count += 1
        name = ".".join([*shared, f"{tail}_{count}"])
    return name
