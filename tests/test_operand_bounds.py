"""Nothing is read beyond an operand: each one ends where a page that may not be touched begins."""

from __future__ import annotations

import ctypes
import math
import mmap
import sys

import pytest
import torch
from test_fuse_conv_linear import CUTS, going_by, make_cut

from linfuse_ext import functional

PROT_NONE = 0

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are protected by mprotect")


def fenced(values: torch.Tensor) -> torch.Tensor:
    """A copy in memory of its own, with a page behind it that faults."""
    size = math.ceil(values.nbytes / mmap.PAGESIZE) * mmap.PAGESIZE
    block = mmap.mmap(-1, size + mmap.PAGESIZE)
    fence = ctypes.addressof(ctypes.c_char.from_buffer(block)) + size
    libc = ctypes.CDLL(None, use_errno=True)
    protected = libc.mprotect(ctypes.c_void_p(fence), mmap.PAGESIZE, PROT_NONE)
    assert protected == 0, ctypes.get_errno()
    offset = size - values.nbytes
    copy = torch.frombuffer(block, dtype=values.dtype, count=values.numel(), offset=offset)
    return copy.view(values.shape).copy_(values)


@pytest.mark.parametrize(("way", "cut", "dtype"), CUTS, ids=str)
def test_fuse_conv_linear(way: str, cut: str, dtype: torch.dtype) -> None:
    _, operands, input_size, rest = make_cut(way, cut, dtype)
    with going_by(way):
        weight, bias = functional.fuse_conv_linear(*map(fenced, operands), input_size, **rest)
        expected = functional.fuse_conv_linear(*operands, input_size, **rest)
    assert torch.equal(weight, expected[0]) and torch.equal(bias, expected[1])
