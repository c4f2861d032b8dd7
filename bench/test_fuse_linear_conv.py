"""Linear + conv into one Linear: ours and the convolution of its columns as images."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.cases import Case, linear_conv_cases
from bench.measure import CLOCK

pytestmark = pytest.mark.benchmark(timer=CLOCK)


def cases(quick: bool) -> Iterator[Case]:
    """The groups of this file."""
    return linear_conv_cases(quick)


def test_fuse_linear_conv(run, case: Case, entrant: str) -> None:
    run(case, entrant)
