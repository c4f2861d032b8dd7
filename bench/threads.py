"""Whether a result has the same bits for one thread and for two."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.cases import OURS, Case
from bench.layers import load_layers, load_pairs
from bench.ops import CONV_CONV, CSR, FUSE, LINEAR_CONV, MATRIX

_NAMES = {
    FUSE: ("gist", "lenet5", "same3x3", "grouped", "voxels", "dcgan_up"),
    MATRIX: ("gist", "cifar_verify"),
    CSR: ("lenet5", "dcgan_up"),
    LINEAR_CONV: ("lenet5", "same3x3", "dcgan_up"),
    CONV_CONV: ("3x3_3x3", "mobilenet", "sesr_head"),
}
_DTYPES = ("float32", "float64", "bfloat16")


def _parts(result: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.values() if t.layout == torch.sparse_csr else t for t in result]


def _same(case: Case) -> bool:
    call = case.call(OURS, case.inputs())
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(_parts(call()))
    return all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def compare() -> dict[str, bool]:
    """By op, layer and dtype whether the bits are the same."""
    before = torch.get_num_threads()
    tables = {**load_layers(), **load_pairs()}
    try:
        return {
            f"{op} {name} {dtype}": _same(Case(op, tables[name], dtype))
            for op, names in _NAMES.items()
            for name in names
            for dtype in _DTYPES
        }
    finally:
        torch.set_num_threads(before)
