"""Low-rank adapters on convolutions: `base(x) + scale * up(down(x))` as one convolution.

peft#2549, #2403, #2567 and #3440, LyCORIS#285 and microsoft/LoRA#67: with groups the delta was of
the wrong shape or composed of the wrong channels, for years.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance_nets import (
    CONVOLUTIONS,
    Case,
    assert_equals,
    collapsed,
    drawn,
    every,
    filled,
    left,
)
from torch import Tensor, nn

import linfuse_ext as lf


class Adapted(nn.Module):
    """A convolution and its adapter: down by the base's kernel, up by 1x1."""

    def __init__(
        self,
        axes: int,
        channels: tuple[int, int],
        kernel: Any,
        rank: int,
        groups: int,
        adapter_groups: tuple[int, int],
        **options: Any,
    ) -> None:
        super().__init__()
        bias = options.pop("bias", True)
        kind, (down, up) = CONVOLUTIONS[axes], adapter_groups
        self.base = kind(*channels, kernel, groups=groups, bias=bias, **options)
        self.down = kind(channels[0], rank, kernel, groups=down, bias=False, **options)
        self.up = kind(rank, channels[1], 1, groups=up, bias=False)
        self.scale = 1.75

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * self.up(self.down(x))


def adapted(name: str, trap: str, size: tuple[int, ...], *arguments: Any, **options: Any) -> Case:
    axes = len(size) - 1
    return Case(name, trap, lambda: Adapted(axes, *arguments, **dict(options)), size)


SHAPE = "the delta is multiplied out for all channels and does not fit the grouped weight"
SLICE = "one rank slice is summed over the groups where each group has its own"
DENSE = "an adapter without groups makes the merged layer dense"
CASES = [
    adapted("dense", "the product of the flattened weights, and its order", (4, 8, 9), (4, 6), 3, 2,
            1, (1, 1), padding=1),
    adapted("the report's 96 -> 192", SHAPE, (96, 6, 5), (96, 192), 3, 16, 2, (2, 2), stride=2,
            padding=1, bias=False),
    adapted("two groups", SHAPE, (4, 8, 9), (4, 6), (3, 2), 4, 2, (2, 2), stride=(2, 1),
            padding=(2, 0)),
    adapted("as many groups as ranks", SLICE, (8, 6, 5), (8, 8), 3, 4, 4, (4, 4), padding=1),
    adapted("depthwise", SLICE, (6, 6, 5), (6, 6), 3, 6, 6, (6, 6), padding=1),
    adapted("depthwise with multiplier", SLICE, (3, 6, 5), (3, 6), 3, 6, 3, (3, 3), padding=1),
    adapted("grouped base, dense adapter", DENSE, (4, 6, 5), (4, 6), 3, 2, 2, (1, 1), padding=1),
    adapted("grouped base, dense down", DENSE, (4, 6, 5), (4, 6), 3, 4, 2, (1, 2), padding=1),
    adapted("depthwise base, dense adapter", DENSE, (4, 6, 5), (4, 4), 3, 2, 4, (1, 1), padding=1),
    adapted("dilated", "the delta takes no dilation over", (4, 9, 8), (4, 4), 3, 2, 2, (2, 2),
            padding=2, dilation=2),
    adapted("circular", "the delta takes no padding mode over", (4, 6, 5), (4, 4), 3, 2, 1, (1, 1),
            padding=1, padding_mode="circular"),
    adapted("1-d", SHAPE, (4, 11), (4, 6), 5, 4, 2, (2, 2), stride=2, padding=3),
    adapted("3-d", SHAPE, (4, 4, 3, 5), (4, 2), (2, 3, 1), 2, 2, (2, 2), padding=(1, 0, 1)),
]  # fmt: skip


def dense_weight(conv: nn.Module) -> Tensor:
    """The weight of the same layer with one group: zeros beside the blocks."""
    weight, groups = conv.weight.detach(), conv.groups
    outs, ins = weight.shape[0] // groups, weight.shape[1]
    dense = weight.new_zeros(weight.shape[0], ins * groups, *weight.shape[2:])
    for g in range(groups):
        dense[g * outs : (g + 1) * outs, g * ins : (g + 1) * ins] = weight[
            g * outs : (g + 1) * outs
        ]
    return dense


@every(CASES)
def test_the_delta_added_to_the_base_is_the_sum(case: Case) -> None:
    model, x = case.model(), case.samples()
    base = model.base
    delta = lf.fuse_conv_conv(model.down, model.up)
    assert delta.bias is None and delta.stride == base.stride and delta.padding == base.padding
    if delta.groups == base.groups:
        assert delta.weight.shape == base.weight.shape, case.trap
        weight, groups = base.weight + model.scale * delta.weight, base.groups
    else:
        assert delta.groups == 1, case.trap
        weight, groups = dense_weight(base) + model.scale * delta.weight, 1
    merged = CONVOLUTIONS[len(base.kernel_size)](
        base.in_channels, base.out_channels, base.kernel_size, base.stride, base.padding,
        base.dilation, groups, base.bias is not None, base.padding_mode,
    ).double()  # fmt: skip
    with torch.no_grad():
        merged.weight.copy_(weight)
        if base.bias is not None:
            merged.bias.copy_(base.bias)
    assert_equals(merged(x), model, x, case.trap)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@every(CASES)
def test_a_network_with_an_adapter_is_one_convolution(case: Case, dtype: torch.dtype) -> None:
    model, x = case.model(dtype), case.samples(dtype)
    dense = dense_weight(model.base)
    allowed = (dense.numel() + dense.shape[0]) * dense.element_size()
    out = collapsed(model, x, max_bytes=allowed)
    assert left(out.model) == [type(model.base).__name__], case.trap
    assert_equals(out.model(x), model, x, case.trap)
    (merged,) = (layer for layer in out.model.modules() if hasattr(layer, "groups"))
    grouped = model.down.groups == model.up.groups == model.base.groups
    assert merged.groups == (model.base.groups if grouped else 1), case.trap


def test_two_adapters_on_one_layer() -> None:
    trap = "the second adapter's delta is added to the unmerged weight"

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = Adapted(2, (4, 4), 3, 2, 2, (2, 2), padding=1)
            self.down = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
            self.up = nn.Conv2d(4, 4, 1, groups=2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + 0.5 * self.up(self.down(x))

    model, x = filled(Twice(), trap), drawn(3, 4, 6, 5, name=trap)
    out = collapsed(model, x, max_bytes=8 * (4 * 2 * 9 + 4))
    assert left(out.model) == ["Conv2d"], trap
    assert_equals(out.model(x), model, x, trap)


def test_an_adapter_on_a_linear() -> None:
    trap = "the order of up and down: the transposed product fits a square base"

    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(8, 8)
            self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + 2 * self.up(self.down(x))

    model, x = filled(Adapter(), trap), drawn(5, 8, name=trap)
    out = collapsed(model, x)
    assert left(out.model) == ["Linear"]
    assert_equals(out.model(x), model, x, trap)
    delta = lf.fuse_linear_linear(model.down, model.up)
    torch.testing.assert_close(
        delta.weight.data, model.up.weight.data @ model.down.weight.data, rtol=1e-13, atol=1e-13
    )
