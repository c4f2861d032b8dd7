"""csrc/geometry in C++ under the sanitizers, on any numbers that 64 bits hold."""

from __future__ import annotations

from typing import Any

import pytest
from fuzz.sanitized_geometry import Missing, Result, run_geometry

COUNT = 60_000


def run(count: int, **options: Any) -> Result:
    try:
        return run_geometry(count, seed=0, seconds=300, **options)
    except Missing as missing:
        pytest.skip(str(missing))


def test_no_number_overflows_and_every_tap_is_in_its_place() -> None:
    result = run(COUNT)
    assert result.is_right, result.said
    counts = result.counts
    assert counts["accepted"] + counts["rejected"] == COUNT
    # A search that is always refused, or never, would show nothing; so for every requirement.
    assert counts["accepted"] > COUNT // 10 and counts["walked"] > COUNT // 20
    for argument in ("input_size", "stride", "padding", "dilation", "groups", "output_padding"):
        assert counts[f"`{argument}`"] > COUNT // 100, result.said
    assert counts["`padding_mode`"] > COUNT // 200
    assert counts["the"] > COUNT // 100  # the sizes, the output, the weight


FAULTS = {
    "an unchecked product": (
        "make_geometry.h",
        "checked.multiply(axis.kernel - 1, axis.dilation)",
        "((axis.kernel - 1) * axis.dilation)",
        "signed integer overflow",
    ),
    "a bound that is not kept": (
        "make_geometry.h",
        "axis.pad_low > axis.in || axis.pad_high > axis.in",
        "false",
        "broken, ",
    ),
    "a row's elements counted wrong": (
        "stored_taps.h",
        "const int64_t planes = c_out * total(0) + before(0, o.at[0]);",
        "const int64_t planes = c_out * total(0);",
        "broken, ",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str) -> None:
    header, before, after, says = FAULTS[name]
    result = run(COUNT, changes={header: (before, after)})
    assert not result.is_right
    assert says in result.said and "make_geometry(" in result.said, result.said
