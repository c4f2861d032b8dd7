"""What the checks on several ranks share: sharded operands, counted collectives, equal values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cases import CASES, Case
from tolerance import assert_close
from torch import Tensor
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.debug import CommDebugMode

BY_NAME = {case.name: case for case in CASES}

WHOLE, ROWS, COLUMNS, SUM = Replicate(), Shard(0), Shard(1), Partial()


def case_of(name: str, channels: int | None = None) -> Case:
    """A case of the table, with another number of output channels if given."""
    case = BY_NAME[name]
    if channels is None:
        return case
    size = list(case.weight_size)
    size[1 if case.transposed else 0] = channels
    fields = {**vars(case), "weight_size": tuple(size)}
    return Case(**fields)


def shard(tensor: Tensor | None, mesh: Any, *placements: Placement) -> Any:
    """A tensor that all ranks have alike, sharded without telling each other."""
    if tensor is None:
        return None
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def leaves(tensors: Sequence[Any]) -> list[Any]:
    """The same as leaves that want a gradient."""
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


@contextmanager
def collectives(wanted: int | None = None) -> Iterator[CommDebugMode]:
    """Counts what goes between ranks; it must be as many as wanted."""
    with CommDebugMode() as counted:
        yield counted
    if wanted is not None:
        assert counted.get_total_counts() == wanted, dict(counted.get_comm_counts())


def share(size: int, mesh: Any) -> int:
    """What a rank has of an axis that is sharded over the mesh, as torch.chunk cuts it."""
    piece = -(-size // mesh.size())
    return max(0, min(size, (mesh.get_local_rank() + 1) * piece) - mesh.get_local_rank() * piece)


def assert_same(
    sharded: Sequence[Any], op: Callable[..., Any], operands: Sequence[Any], terms: int
) -> None:
    """Results of DTensors against those of one process, within what the order of sums changes."""
    exact = op(*operands)
    magnitude = op(*(None if each is None else each.abs() for each in operands))
    for actual, want, size in zip(sharded, exact, magnitude, strict=True):
        assert isinstance(actual, DTensor)
        assert actual.shape == want.shape and actual.dtype == want.dtype
        assert_close(actual.full_tensor().detach(), want.detach(), size.detach(), terms)
