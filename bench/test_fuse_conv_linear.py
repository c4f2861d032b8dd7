"""Conv + Linear into one Linear: ours and the other ways, one group per layer and dtype."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.cases import Case, devices, fuse_cases
from bench.measure import CLOCK

pytestmark = pytest.mark.benchmark(timer=CLOCK)


def cases(quick: bool) -> Iterator[Case]:
    """The groups of this file."""
    return (case for device in devices() for case in fuse_cases(device, quick))


def test_fuse_conv_linear(run, case: Case, entrant: str) -> None:
    run(case, entrant)
