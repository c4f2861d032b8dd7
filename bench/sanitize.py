"""Every CUDA kernel on a few small cases, for compute-sanitizer to watch.

The shapes are odd on purpose: sizes that no tile divides, taps on padding, groups, every number
of axes. Values are checked by the tests; here each result is only read back. A new op is one more
function for the loop in `main`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import engines
from linfuse_ext import functional
from linfuse_ext.geometry import make_geometry

Size = tuple[int, ...]
Settings = dict[str, Any]

# weight shape, input size, settings
CASES: list[tuple[Size, Size, Settings]] = [
    ((5, 3, 3, 2), (7, 6), {"stride": (2, 1), "padding": (1, 0)}),
    ((6, 2, 3, 3), (5, 9), {"groups": 2, "padding": 2, "dilation": (1, 2)}),
    ((4, 1, 3, 3), (6, 5), {"groups": 4, "padding": 1, "padding_mode": "replicate"}),
    ((7, 5, 1, 1), (5, 3), {}),
    ((3, 4, 5), (23,), {"stride": 3, "padding": 2, "padding_mode": "circular"}),
    ((3, 2, 2, 3, 2), (4, 5, 3), {"stride": (2, 1, 1), "padding": (0, 1, 1)}),
    ((4, 3, 4, 3), (5, 4), {"transposed": True, "stride": 2, "padding": 1}),
    ((33, 17, 3, 3), (9, 9), {"padding": 1}),
]
# Enough items and groups for the large tiles of our own fuse_conv_linear, and for packing.
FUSED_CASES = [
    *CASES,
    ((128, 8, 1, 1), (15, 15), {"groups": 16}),
    ((48, 20, 3, 3), (56, 56), {"padding": 1}),
    ((48, 40, 1, 1), (55, 56), {}),
    ((48, 70, 1, 1), (57, 55), {}),
]
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_DENSE = 11  # rows of the Linear


def _gradients(outputs: Sequence[Tensor], inputs: list[Tensor]) -> Sequence[Tensor]:
    ones = [torch.ones_like(output) for output in outputs]
    return torch.autograd.grad(outputs, inputs, ones)


def _affine(conv: list[Tensor], size: Size, settings: Settings) -> Iterator[Sequence[Tensor]]:
    """The whole matrix, then a block of its rows."""
    matrix, offset = functional.conv_to_affine(*conv, size, **settings)
    yield matrix, offset
    yield _gradients((matrix, offset), conv)
    rows = (len(offset) // 3, len(offset) - 1)
    block = functional.conv_to_affine(*conv, size, **settings, rows=rows)
    yield block
    yield _gradients(block, conv)


def _sparse(conv: list[Tensor], size: Size, settings: Settings) -> Iterator[Sequence[Tensor]]:
    """The same in CSR."""
    rows = make_geometry("sanitize", tuple(conv[0].shape), size, **settings).rows
    for block in (None, (rows // 3, rows - 1)):
        matrix, offset = functional.conv_to_affine(
            *conv, size, **settings, layout=torch.sparse_csr, rows=block
        )
        yield matrix.crow_indices(), matrix.col_indices(), matrix.values(), offset
        yield _gradients((matrix.values(), offset), conv)


def _fused(conv: list[Tensor], size: Size, settings: Settings) -> Iterator[Sequence[Tensor]]:
    """The convolution merged into a Linear by our own kernels; its gradients are torch's."""
    rows = make_geometry("sanitize", tuple(conv[0].shape), size, **settings).rows
    both = [*conv, *(_normal(shape, conv[0]) for shape in [(_DENSE, rows), (_DENSE,)])]
    with engines.forced("own"):
        yield functional.fuse_conv_linear(*both, size, **settings)


def _normal(shape: Size, like: Tensor) -> Tensor:
    return torch.randn(shape, device=like.device, dtype=like.dtype, requires_grad=True)


def main(device: str = "cuda", dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    """Runs every op on every case; an error on the device surfaces as an exception."""
    torch.manual_seed(0)
    for op, cases in ((_affine, CASES), (_sparse, CASES), (_fused, FUSED_CASES)):
        for dtype in dtypes:
            for shape, size, settings in cases:
                like = torch.empty(0, device=device, dtype=dtype)
                channels = shape[1 if settings.get("transposed") else 0]
                conv = [_normal(shape, like), _normal((channels,), like)]
                for tensors in op(conv, size, settings):
                    for tensor in tensors:
                        tensor.cpu()
            print(f"sanitize: {op.__name__.strip('_')} {dtype}: {len(cases)} cases ran", flush=True)


if __name__ == "__main__":
    main(dtypes=DTYPES[:1] if "--quick" in sys.argv else DTYPES)
