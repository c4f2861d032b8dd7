"""Average pooling in all its modes: a depthwise convolution, or affine and no convolution.

After the average-pooling tests of auto_LiRPA, AMDMIGraphX#2867 (a pool in front of a 1x1) and
transform V of the diverse branch block. Which windows a pool has is asked of torch itself.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conformance_nets import (
    CONVOLUTIONS,
    Case,
    assert_differs,
    assert_equals,
    collapsed,
    drawn,
    every,
    filled,
    left,
)
from torch import Tensor, nn

import linfuse_ext as lf

POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
SIZES = {1: [(11,), (12,)], 2: [(8, 9), (9, 8)], 3: [(5, 4, 6)]}
WINDOWS: dict[int, list[tuple[Any, Any, Any]]] = {
    1: [(2, 2, 0), (3, 1, 1), (3, 2, 1), (2, 3, 0), (4, 3, 2)],
    2: [(2, 2, 0), (3, 1, 1), (3, 2, 1), ((3, 2), (2, 3), (1, 0)), ((2, 4), 3, (1, 2))],
    3: [(2, 2, 0), (3, 2, 1), ((2, 3, 1), (1, 2, 1), (1, 0, 0))],
}


def modes(axes: int) -> list[dict[str, Any]]:
    divisors: list[int | None] = [None] if axes == 1 else [None, 3]
    return [
        {"ceil_mode": ceil, "count_include_pad": counts}
        | ({} if axes == 1 else {"divisor_override": divisor})
        for ceil, counts, divisor in itertools.product((False, True), (True, False), divisors)
    ]


GRID = [
    pytest.param(axes, window, mode, id=f"{axes}-d {window} {list(mode.values())}")
    for axes in WINDOWS
    for window in WINDOWS[axes]
    for mode in modes(axes)
]


def windows(pool: Any, size: tuple[int, ...]) -> torch.Size:
    return pool(torch.zeros(1, 1, *size)).shape[2:]


@pytest.mark.parametrize(("axes", "window", "mode"), GRID)
def test_a_pool_is_a_convolution_or_says_why_not(axes: int, window: Any, mode: Any) -> None:
    trap = "one divisor for all windows, and no window beyond the padding: else no convolution"
    pool = POOLS[axes](*window, **mode)
    pads = any(window[2]) if isinstance(window[2], tuple) else window[2] > 0
    uneven = pads and not mode["count_include_pad"] and mode.get("divisor_override") is None
    for size in SIZES[axes]:
        without = POOLS[axes](*window, **(mode | {"ceil_mode": False}))
        beyond = windows(pool, size) != windows(without, size)
        if uneven or beyond:
            words = "must count its padding" if uneven else "must not reach beyond"
            with pytest.raises(lf.FusionError, match=words):
                lf.pool_to_conv(pool, 3, size)
            continue
        for dtype in (torch.float64, torch.float32):
            conv = lf.pool_to_conv(pool, 3, size, dtype=dtype)
            assert type(conv) is CONVOLUTIONS[axes] and conv.groups == 3 and conv.bias is None
            x = drawn(2, 3, *size, name=trap).to(dtype)
            assert_equals(conv(x), pool, x, trap)


def test_the_grid_meets_both_answers_on_every_number_of_axes() -> None:
    answers = {axes: set() for axes in POOLS}
    for axes, window, mode in (param.values for param in GRID):
        try:
            lf.pool_to_conv(POOLS[axes](*window, **mode), 3, SIZES[axes][0])
            answers[axes].add("convolution")
        except lf.FusionError as error:
            answers[axes].add("uneven" if "count its padding" in str(error) else "beyond")
    assert all(found == {"convolution", "uneven", "beyond"} for found in answers.values())


def test_what_is_not_counted_makes_the_border_larger() -> None:
    """Who takes count_include_pad=False for True is off at the border and nowhere else."""
    x = drawn(2, 3, 8, 9, name="border")
    right = nn.AvgPool2d(3, 1, 1, count_include_pad=False)(x)
    wrong = lf.pool_to_conv(nn.AvgPool2d(3, 1, 1), 3, dtype=torch.float64)(x)
    assert_differs(wrong, right, "the divisor at the border")
    torch.testing.assert_close(wrong[..., 1:-1, 1:-1], right[..., 1:-1, 1:-1])


# In networks --------------------------------------------------------------------------------------


def between(pool: nn.Module, axes: int) -> nn.Module:
    conv = CONVOLUTIONS[axes]
    return nn.Sequential(conv(2, 3, 3, padding=1), pool, conv(3, 2, 1))


# A few windows are enough here: the grid above has all of them.
NETWORKS = [
    pytest.param(axes, window, mode, id=f"{axes}-d {window} {list(mode.values())}")
    for axes, chosen in {1: [2], 2: [2, 3], 3: [1]}.items()
    for window in [WINDOWS[axes][number] for number in chosen]
    for mode in modes(axes)
    if axes == 2 or mode.get("divisor_override") is None
]


@pytest.mark.parametrize(("axes", "window", "mode"), NETWORKS)
def test_a_pool_in_a_network_costs_no_layer(axes: int, window: Any, mode: Any) -> None:
    trap = "a pool that is no convolution is merged as if it were one, or ends the stretch"
    model = filled(between(POOLS[axes](*window, **mode), axes), trap)
    x = drawn(2, 2, *SIZES[axes][0], name=trap)
    out = collapsed(model, x)
    assert len(left(out.model)) == 1, trap
    assert_equals(out.model(x), model, x, trap)


class Means(nn.Module):
    """Global pooling as it is written by hand."""

    def __init__(self, axes: tuple[int, ...], keep: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.axes, self.keep = axes, keep

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean(self.axes, keepdim=self.keep)


class WholeImage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 3), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.head(F.avg_pool2d(y, y.shape[2:]).flatten(1))


ADAPTIVE = "adaptive windows differ in size and overlap where the sizes do not divide"
OTHERS = [
    Case("adaptive, even", ADAPTIVE, lambda: between(nn.AdaptiveAvgPool2d((2, 3)), 2), (2, 8, 9)),
    Case("adaptive, uneven", ADAPTIVE, lambda: between(nn.AdaptiveAvgPool2d((3, 4)), 2), (2, 8, 9)),
    Case("adaptive, one axis stays", ADAPTIVE,
         lambda: between(nn.AdaptiveAvgPool2d((None, 4)), 2), (2, 8, 9)),
    Case("adaptive, more than there is", ADAPTIVE,
         lambda: between(nn.AdaptiveAvgPool2d((11, 10)), 2), (2, 8, 9)),
    Case("adaptive 1-d", ADAPTIVE, lambda: between(nn.AdaptiveAvgPool1d(4), 1), (2, 11)),
    Case("adaptive 3-d", ADAPTIVE, lambda: between(nn.AdaptiveAvgPool3d((2, 3, 1)), 3),
         (2, 5, 4, 6)),
    Case("global", "a mean over positions is a Linear of equal weights a channel",
         lambda: between(nn.AdaptiveAvgPool2d(1), 2), (2, 8, 9)),
    Case("twice adaptive", "windows of windows",
         lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(2),
                               nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)),
         (3, 9, 12)),
    Case("mean over rows and columns", "the axes of the mean count from the end",
         lambda: Means((-2, -1), False), (2, 8, 9)),
    Case("mean over columns", "one axis of two", lambda: Means((3,), True), (2, 8, 9)),
    Case("the whole image", "a window of the size that was seen", WholeImage, (2, 8, 9)),
    Case("padded, then a padded convolution",
         "a pool's padding inside the convolution's: bounds differed by the form of the layer",
         lambda: nn.Sequential(nn.AvgPool2d(2, 2, 1), nn.Conv2d(1, 1, 3, padding=1)), (1, 4, 4)),
    Case("padded, then a convolution", "padding of the pool becomes that of the merged layer",
         lambda: nn.Sequential(nn.AvgPool2d(2, 2, 1), nn.Conv2d(1, 1, 2)), (1, 3, 3)),
    Case("a sum", "a divisor of 1 makes a sum of it, and no mean",
         lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.AvgPool2d(2, divisor_override=1)), (2, 4, 6)),
]  # fmt: skip


@every(OTHERS)
def test_every_other_average(case: Case) -> None:
    model, x = case.model(), case.samples()
    out = collapsed(model, x)
    assert len(left(out.model)) == 1, case.trap
    assert_equals(out.model(x), model, x, case.trap)


@pytest.mark.parametrize("order", ["pool first", "pool last"])
def test_a_pool_and_a_1x1_are_one_convolution(order: str) -> None:
    trap = "exporters leave the pool of an inception block in front of its 1x1 (AMDMIGraphX#2867)"
    layers = [nn.AvgPool2d(3, 1, 1), nn.Conv2d(4, 3, 1)]
    model = nn.Sequential(*(layers if order == "pool first" else layers[::-1]))
    model, x = filled(model, trap), drawn(2, 4, 6, 7, name=trap)
    out = collapsed(model, x, max_bytes=8 * (3 * 4 * 9 + 3 * 6 * 7))
    # Behind a bias the pool's zeros are a border that a bias of a channel cannot hold.
    assert left(out.model) == ["Conv2d" if order == "pool first" else "BiasMap"], trap
    assert_equals(out.model(x), model, x, trap)
    pool, conv = (model[0], model[1]) if order == "pool first" else (model[1], model[0])
    if order == "pool first":
        merged = lf.fuse_conv_conv(lf.pool_to_conv(pool, 4, dtype=torch.float64), conv)
        assert merged.kernel_size == (3, 3) and merged.padding == (1, 1)
        assert_equals(merged(x), model, x, trap)


def test_what_is_not_counted_is_still_one_linear() -> None:
    trap = "no convolution, but affine: refused as one, and exact as a Linear or sparse matrix"
    pool = nn.AvgPool2d(3, 2, 1, count_include_pad=False)
    model = filled(nn.Sequential(pool, nn.Flatten(), nn.Linear(3 * 4 * 5, 4)), trap)
    x = drawn(2, 3, 8, 9, name=trap)
    with pytest.raises(lf.FusionError, match="a Linear, which has a row for each position"):
        lf.pool_to_conv(pool, 3, (8, 9))
    out = collapsed(model, x)
    assert left(out.model) == ["Linear"]
    assert_equals(out.model(x), model, x, trap)
