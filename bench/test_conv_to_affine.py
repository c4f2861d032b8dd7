"""The matrix of a convolution: ours, the other ways, and `torch.zeros` of its shape as floor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.cases import Case, devices, matrix_cases
from bench.measure import CLOCK

pytestmark = pytest.mark.benchmark(timer=CLOCK)


def cases(quick: bool) -> Iterator[Case]:
    """The groups of this file."""
    return (case for device in devices() for case in matrix_cases(device, quick))


def test_conv_to_affine(run, case: Case, entrant: str) -> None:
    run(case, entrant)
