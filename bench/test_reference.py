"""What this machine's arithmetic gives today: a large `torch.matmul` per dtype."""

from __future__ import annotations

import pytest

from bench.cases import devices
from bench.layers import DTYPES
from bench.measure import CLOCK
from bench.race import matmul


@pytest.mark.benchmark(timer=CLOCK, group="matmul")
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("device", devices())
def test_matmul(replay, share: float, device: str, dtype: str) -> None:
    gflop, samples = matmul(device, DTYPES[dtype], 2 * share)
    replay(samples, {"op": "matmul", "device": device, "dtype": dtype, "gflop": gflop})
