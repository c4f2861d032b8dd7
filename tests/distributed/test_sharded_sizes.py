"""The table of the README: worked out on paper, and by running the merge on shapes alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch.distributed as dist

if not dist.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from sharded_sizes import (  # noqa: E402
    CARDS,
    LAYOUTS,
    STEM,
    VGG,
    Pair,
    on_paper,
    simulated,
    spelled,
    table,
)

ROWS = [(pair, layout, cards) for pair in (VGG, STEM) for layout in LAYOUTS for cards in CARDS]


@pytest.mark.parametrize(
    ("pair", "layout", "cards"),
    [pytest.param(*row, id=f"{row[0].name.split()[0]}-{row[1]}-{row[2]}") for row in ROWS],
)
def test_shapes_alone_give_the_numbers_of_the_paper(pair: Pair, layout: str, cards: int) -> None:
    assert simulated(pair, layout, cards) == on_paper(pair, layout, cards)


def test_the_numbers_are_those_of_the_layers() -> None:
    one, many = on_paper(STEM, "rows", 1), on_paper(STEM, "rows", 8)
    assert one.linear == 4 * (100_000 * 64 * 112 * 112 + 100_000)
    assert one.merged == 4 * (100_000 * 3 * 224 * 224 + 100_000)
    assert one.flops == 2 * 100_000 * 64 * 112 * 112 * 3 * 7 * 7
    assert one.flops == 8 * many.flops and one.linear == 8 * many.linear
    assert many.received == 0


def test_the_readme_has_this_table() -> None:
    readme = (ROOT / "README.md").read_text()
    for line in table().splitlines():
        assert line in readme, line


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (411_058_176, "411 MB"),
        (60_211_600_000, "60.2 GB"),
    ],
)
def test_sizes_are_spelled(number: int, text: str) -> None:
    assert spelled(number, "B") == text
