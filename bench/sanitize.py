"""Every CUDA kernel on a few small cases, for compute-sanitizer to watch.

The shapes are odd on purpose: sizes that no tile divides, taps on padding, groups, every number
of axes. Values are checked by the tests; here each result is only read back. A new op goes into
`_results`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from linfuse_ext import functional

# weight shape, input size, settings
CASES: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((5, 3, 3, 2), (7, 6), {"stride": (2, 1), "padding": (1, 0)}),
    ((6, 2, 3, 3), (5, 9), {"groups": 2, "padding": 2, "dilation": (1, 2)}),
    ((4, 1, 3, 3), (6, 5), {"groups": 4, "padding": 1, "padding_mode": "replicate"}),
    ((7, 5, 1, 1), (5, 3), {}),
    ((3, 4, 5), (23,), {"stride": 3, "padding": 2, "padding_mode": "circular"}),
    ((3, 2, 2, 3, 2), (4, 5, 3), {"stride": (2, 1, 1), "padding": (0, 1, 1)}),
    ((4, 3, 4, 3), (5, 4), {"transposed": True, "stride": 2, "padding": 1}),
    ((33, 17, 3, 3), (9, 9), {"padding": 1}),
]
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_DENSE = 11  # rows of the Linear


def _gradients(outputs: tuple[Tensor, Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    ones = [torch.ones_like(output) for output in outputs]
    return torch.autograd.grad(outputs, inputs, ones)


def _results(
    shape: tuple[int, ...], size: tuple[int, ...], settings: dict[str, Any], dtype: torch.dtype,
    device: str,
) -> Iterator[tuple[Tensor, ...]]:  # fmt: skip
    """What each op gives on one case, forward and backward."""

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=device, dtype=dtype, requires_grad=True)

    transposed = settings.get("transposed", False)
    conv = [normal(*shape), normal(shape[1] if transposed else shape[0])]
    affine = functional.conv_to_affine(*conv, size, **settings)
    yield affine
    yield _gradients(affine, conv)
    rows = affine[0].shape[0]
    block = functional.conv_to_affine(*conv, size, **settings, rows=(rows // 3, rows - 1))
    yield block
    yield _gradients(block, conv)
    both = [*conv, normal(_DENSE, rows), normal(_DENSE)]
    fused = functional.fuse_conv_linear(*both, size, **settings)
    yield fused
    yield _gradients(fused, both)


def main(device: str = "cuda") -> None:
    """Runs them all; an error on the device surfaces as an exception."""
    torch.manual_seed(0)
    for shape, size, settings in CASES:
        for dtype in DTYPES:
            for tensors in _results(shape, size, settings, dtype, device):
                for tensor in tensors:
                    tensor.cpu()
    print(f"sanitize: {len(CASES) * len(DTYPES)} cases ran")


if __name__ == "__main__":
    main()
