"""How close is close: rounding errors that arithmetic explains, and not what happened to pass.

A sum of n products in precision eps, rounded once more to the element type's eps_out, differs from
the exact sum by at most  (n * eps + eps_out) * sum |a_n b_n|  (N. J. Higham, Accuracy and Stability
of Numerical Algorithms, section 3.1). The sum of the absolute products is computed by the reference
on the operands' absolute values, so that the bound is per element.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Half types accumulate in float32 and round once to their own precision.
ACCUMULATE = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}

DTYPES = list(ACCUMULATE)


def assert_close(actual: Tensor, exact: Tensor, magnitude: Tensor, terms: int) -> None:
    """Checks `actual` against the float64 value.

    Args:
        actual: What the op computed, of any dtype.
        exact: The reference in float64, on the same (already rounded) operands.
        magnitude: The reference on the operands' absolute values.
        terms: Products in the longest sum.
    """
    assert actual.shape == exact.shape
    eps = torch.finfo(ACCUMULATE[actual.dtype]).eps
    smallest = torch.finfo(actual.dtype).smallest_normal
    bound = (terms * eps + torch.finfo(actual.dtype).eps) * magnitude.abs() + smallest
    # float64 is held against float64: the reference rounds as well.
    bound = bound * 2 if actual.dtype == torch.float64 else bound
    error = (actual.to(dtype=torch.float64, device="cpu") - exact).abs()
    worst = (error / bound).max().item() if error.numel() else 0.0
    assert not torch.isnan(error).any(), "NaN where the reference has none"
    assert worst <= 1, f"error is {worst:.2f} x the bound; largest error {error.max().item():.3e}"
