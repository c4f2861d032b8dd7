"""On every rank: the peak of its memory is that of its shard.

Sizes at which the whole could not hide: a rank's part is tens of megabytes.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from sharding import COLUMNS, ROWS, WHOLE, collectives
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement

import linfuse_ext as lf
from linfuse_ext import functional

MIB = 2**20


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


def _peak(call: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes by which the process grows at most during a call, and what the call returns."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts anew
    before = _status("VmRSS")
    result = call()
    return _status("VmHWM") - before, result


def _made(mesh: Any, size: tuple[int, int], placement: Placement) -> Any:
    """A sharded matrix of which no rank ever has more than its part."""
    local = list(size)
    if placement != WHOLE:
        local[placement.dim] //= mesh.size()
    part = torch.randn(local).div_(100)
    return DTensor.from_local(part, mesh, [placement], run_check=False)


def _kernel(mesh: Any, *size: int) -> Any:
    return DTensor.from_local(torch.randn(size), mesh, [WHOLE], run_check=False)


def _bytes(tensors: tuple[Any, ...]) -> Iterator[int]:
    for tensor in tensors:
        yield tensor.to_local().numel() * tensor.element_size()


def _check(call: Callable[[], tuple[Tensor, Tensor]], whole: int, mesh: Any) -> None:
    call()  # threads, caches and code that is read at the first call
    with collectives(0):
        peak, outputs = _peak(call)
    own = sum(_bytes(outputs))
    assert abs(own - whole / mesh.size()) < MIB
    # On these layers the scratch of an op is a few panels.
    assert peak < own + 12 * MIB < whole * 0.8, (peak / MIB, own / MIB, whole / MIB)
    gathering, _ = _peak(outputs[0].full_tensor)
    assert gathering > whole * 0.8, "the measure would not see a rank that has the whole"


def merging_rows_of_a_linear(mesh: Any) -> None:
    linear = _made(mesh, (2560, 8192), ROWS)
    conv = _kernel(mesh, 8, 8, 3, 3)
    call = lambda: functional.fuse_conv_linear(conv, None, linear, None, 32, padding=1)  # noqa: E731
    _check(call, 4 * 2560 * 8192, mesh)


def merging_columns_of_a_linear(mesh: Any) -> None:
    linear = _made(mesh, (8192, 2560), COLUMNS)
    conv = _kernel(mesh, 8, 8, 3, 3)
    call = lambda: functional.fuse_linear_conv(linear, None, conv, None, 32, padding=1)  # noqa: E731
    _check(call, 4 * 2560 * 8192, mesh)


def writing_rows_of_a_matrix(mesh: Any) -> None:
    positions = 24 * 24
    for groups in (1, 2):
        part = torch.randn(16 // mesh.size(), 4 // groups, 3, 3)
        conv = DTensor.from_local(part, mesh, [ROWS], run_check=False)
        call = lambda c=conv, g=groups: functional.conv_to_affine(c, None, (24, 24), 1, 1, 1, g)  # noqa: E731
        _check(call, 4 * 16 * positions * 4 * positions, mesh)


def merging_layers_under_fsdp(mesh: Any) -> None:
    linear = nn.Linear(8192, 2560, bias=False, device="meta")
    conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    for layer in (conv, linear):
        fully_shard(layer, mesh=mesh)
    linear.to_empty(device="cpu")
    nn.init.normal_(linear.weight)
    merge = lambda: lf.fuse_conv_linear(conv, linear, (32, 32))  # noqa: E731
    merge()
    peak, merged = _peak(merge)
    own, whole = sum(_bytes(tuple(merged.parameters()))), 4 * 2560 * 8192
    assert own == whole // mesh.size()
    assert peak < own + 12 * MIB < whole * 0.8, (peak / MIB, own / MIB, whole / MIB)


def collapsing_one_layer_after_the_other(mesh: Any) -> None:
    """Of many layers the largest is gathered at most, and one merge is held in float64."""
    size, count = 1024, 16
    with torch.device("meta"):
        pairs = [nn.Linear(size, size, bias=False) for _ in range(2 * count)]
    parts = [part for n, each in enumerate(pairs) for part in ((each, nn.ReLU())[: 1 + n % 2])]
    network = nn.Sequential(*parts).eval()
    for part in pairs:
        fully_shard(part, mesh=mesh)
    network.to_empty(device="cpu")
    for part in pairs:
        nn.init.normal_(part.weight, std=size**-0.5)
    x = torch.randn(2, size)
    # Blocks of this size go back to the system when they are freed, and are not seen as held.
    ctypes.CDLL(None).mallopt(-3, 2**20)
    lf.collapse(network[:3].eval(), x)
    peak, out = _peak(lambda: lf.collapse(network, x))
    merged, one = list(out.model.parameters()), 4 * size**2
    own, whole = sum(_bytes(tuple(merged))), one * len(merged)
    assert len(merged) == count and own == whole // mesh.size()
    # Two weights and what they become in float64, of a network of 128 MB.
    assert peak < own + 10 * one < whole + 8 * one, (peak / MIB, own / MIB, whole / MIB)
