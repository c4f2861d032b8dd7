"""The matrix without its zeros: ours, other ways, and torch.zeros of its bytes as floor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.cases import Case, csr_cases
from bench.measure import CLOCK

pytestmark = pytest.mark.benchmark(timer=CLOCK)


def cases(quick: bool) -> Iterator[Case]:
    """The groups of this file."""
    return csr_cases("cpu", quick)


def test_conv_to_csr(run, case: Case, entrant: str) -> None:
    run(case, entrant)
