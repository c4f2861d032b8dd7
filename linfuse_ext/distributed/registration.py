"""Registers the rules with torch, and mends what its registration does not know of an op."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding

from .rules import MAKES_A_WEIGHT, RULES


def register_rules() -> None:
    """Tells torch how every op may be sharded."""
    for name, rule in RULES.items():
        op = getattr(torch.ops.linfuse, name).default
        register_sharding(op)(rule)
        _read_all_arguments(op)
        if name in MAKES_A_WEIGHT:
            _localise_size(op, MAKES_A_WEIGHT[name])


def _read_all_arguments(op: Any) -> None:
    """Lets every argument count where torch looks whether it has seen a call before.

    register_sharding lets only ints and what stands behind the first of them: the lists before it
    and keywords that are no ints would not, so that a call with another input_size or other rows
    would get the sharding, and the shape, of the first one.
    """
    arguments = op._schema.arguments
    first = next(n for n, each in enumerate(arguments) if "Tensor" not in str(each.type))
    keywords = [each.name for each in arguments if each.kwarg_only]
    _propagator().op_to_schema_info[op] = RuntimeSchemaInfo(first, keywords or None)


def _localise_size(op: Any, where: int) -> None:
    """Lets the op be called with the size of a rank's own part where its result is sharded."""
    _propagator().op_to_shape_and_stride_idx[op] = where


def _propagator() -> Any:
    return DTensor._op_dispatcher.sharding_propagator
