"""Two convolutions into one: ours and the convolution of the kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.cases import Case, conv_conv_cases
from bench.measure import CLOCK

pytestmark = pytest.mark.benchmark(timer=CLOCK)


def cases(quick: bool) -> Iterator[Case]:
    """The groups of this file."""
    return conv_conv_cases(quick)


def test_fuse_conv_conv(run, case: Case, entrant: str) -> None:
    run(case, entrant)
