"""The peak rate of the cores at the start of a run, in its middle and at its end."""

from __future__ import annotations

import pytest

from bench import peak
from bench.layers import DTYPES
from bench.measure import CLOCK


@pytest.mark.benchmark(timer=CLOCK, group="peak")
@pytest.mark.parametrize("dtype", peak.DTYPES)
@pytest.mark.parametrize("moment", peak.MOMENTS)
def test_peak(replay, share: float, moment: str, dtype: str) -> None:
    """Every round as the time that one GFLOP took."""
    products = peak.products(DTYPES[dtype], 2 * share)
    rounds = [seconds / gflop for gflop, samples in products for seconds in samples]
    replay(rounds, {"op": "peak", "device": "cpu", "dtype": dtype, "gflop": 1.0})
