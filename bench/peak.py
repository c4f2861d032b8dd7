"""The peak rate of fused multiply-adds, as far as a program can see it.

That is the largest rate that well-shaped matrix products of oneMKL show at any time of the run: at
its start, in its middle and at its end, because the clock of a machine changes with its load and
its neighbours. It is a lower bound of what the cores could do (some 90 to 95 % of it), needs no
code of ours, and is the same on every CPU that torch runs on.
"""

from __future__ import annotations

import torch

from bench.measure import interleaved, prepare

MOMENTS = ("start", "middle", "end")
DTYPES = ("float32", "float64")
# rows, inner, columns; which of them is fastest depends on the machine
SHAPES = ((2048, 2048, 2048), (4096, 512, 4096), (1024, 1024, 1024))


def products(dtype: torch.dtype, seconds: float) -> list[tuple[float, list[float]]]:
    """For each shape its GFLOP, and seconds per product, one per round."""
    prepare("cpu")
    calls, gflop = {}, {}
    for rows, inner, columns in SHAPES:
        a, b = torch.randn(rows, inner, dtype=dtype), torch.randn(inner, columns, dtype=dtype)
        out = torch.empty(rows, columns, dtype=dtype)
        name = f"{rows}x{inner}x{columns}"
        calls[name] = lambda a=a, b=b, out=out: torch.mm(a, b, out=out)
        calls[name]()
        gflop[name] = 2 * rows * inner * columns / 1e9
    samples = interleaved(calls, "cpu", seconds)
    return [(gflop[name], samples[name]) for name in calls]
