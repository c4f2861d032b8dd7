"""Whole networks collapsed: what that takes, and how they run before and after."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.collapse_cases import Making, Running, collapse_cases
from bench.measure import CLOCK

pytestmark = pytest.mark.benchmark(timer=CLOCK)


def cases(quick: bool) -> Iterator[Making | Running]:
    """The groups of this file."""
    return collapse_cases(quick)


def test_collapse(run, case: Making | Running, entrant: str) -> None:
    run(case, entrant)
