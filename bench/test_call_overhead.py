"""What a call costs on layers of a few kilobytes, for every op."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.cases import Case, tiny_cases
from bench.measure import CLOCK

pytestmark = pytest.mark.benchmark(timer=CLOCK)


def cases(quick: bool) -> Iterator[Case]:
    """The groups of this file."""
    return tiny_cases(quick)


def test_call_overhead(run, case: Case, entrant: str) -> None:
    run(case, entrant)
