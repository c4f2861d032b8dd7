"""Which of two layers comes first, and what stands at the rim: the puzzles of merged blocks.

After the reports of re-parametrised networks: DBB#9, OREPA#9, MobileIE#6, SESR#14 and forum 50946,
and the ways around them of ECBSR, FMEN, SPAN, ExpandNets and LayerMerge.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conformance_nets import (
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

# Enough for any convolution here with a bias for each position, too little for a Linear.
FEW_BYTES = 60_000


def pair(first: nn.Module, second: nn.Module, name: str) -> Any:
    return filled(nn.Sequential(first, second), name)


def with_padding_moved(model: Any) -> nn.Module:
    """What many do: the merged kernel with the padding of both layers, and one bias."""
    bare = [
        nn.Conv2d(c.in_channels, c.out_channels, c.kernel_size, bias=c.bias is not None).double()
        for c in model
    ]
    for without, layer in zip(bare, model, strict=True):
        without.load_state_dict(layer.state_dict())
    merged: Any = lf.fuse_conv_conv(*bare)
    merged.padding = tuple(a + b for a, b in zip(model[0].padding, model[1].padding, strict=True))
    return merged


def test_a_bias_before_padding_is_a_map() -> None:
    """1x1 with bias, then 3x3 padded: of 24 x 24 positions the outermost 92 are off."""
    model, x = pair(nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 3, padding=1), "map"), drawn(2, 3, 24, 24)
    error = (with_padding_moved(model)(x) - model(x)).abs().amax((0, 1)).detach()
    rim = torch.ones(24, 24, dtype=torch.bool)
    rim[1:-1, 1:-1] = False
    assert rim.sum() == 92
    assert (error[rim] > 1e-3).all() and (error[~rim] < 1e-12).all()
    with pytest.raises(lf.FusionError, match="pads with zeros where the first would have put"):
        lf.fuse_conv_conv(*model)
    out = collapsed(model, x)
    assert left(out.model) == ["BiasMap"]
    (row,) = out.report
    assert row.verdict == "fused" and "bias for each position" in row.reason
    assert_equals(out.model(x), model, x, "the bias is missing where the zeros are")


def test_values_before_padding_are_hidden() -> None:
    """3x3 padded, twice: an error in the same 92 positions, and it depends on the image."""
    model = pair(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), "hidden")
    x, y = drawn(1, 3, 24, 24, name="x"), drawn(1, 3, 24, 24, name="y")
    wrong = with_padding_moved(model)
    errors = [(wrong(image) - model(image)).detach() for image in (x, y)]
    inside = (..., slice(1, -1), slice(1, -1))
    assert all(error[inside].abs().max() < 1e-12 for error in errors)
    assert_differs(errors[0], errors[1], "no bias map makes up for it")
    with pytest.raises(lf.FusionError, match="padding between the layers"):
        lf.fuse_conv_conv(*model)
    small = drawn(2, 3, 9, 8)
    out = collapsed(model, small)
    assert left(out.model) == ["Linear"]
    assert_equals(out.model(small), model, small, "the ring that padding hides")
    kept = collapsed(model, small, max_bytes=FEW_BYTES)
    assert left(kept.model) == ["Conv2d", "Conv2d"]
    (row,) = kept.report
    assert row.verdict == "refused" and "padding between the layers" in row.reason


def test_the_second_kernel_is_turned_around() -> None:
    """OREPA#9, forum 50946: kernels that are not symmetric show which way they were composed."""
    model, x = pair(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 3), "turned"), drawn(2, 2, 9, 8)
    first, second = model
    fused = lf.fuse_conv_conv(first, second)
    images = first.weight.permute(1, 0, 2, 3)
    turned = F.conv2d(images, second.weight.flip(2, 3), padding=2).permute(1, 0, 2, 3)
    torch.testing.assert_close(fused.weight, turned, rtol=1e-12, atol=1e-13)
    as_it_is = F.conv2d(images, second.weight, padding=2).permute(1, 0, 2, 3)
    wrong = F.conv2d(x, as_it_is, fused.bias)
    assert_differs(wrong, model(x), "a convolution routine turns no kernel around")
    assert_equals(fused(x), model, x, "the kernel is not turned around")


def test_by_hand_on_one_axis() -> None:
    first, second = nn.Conv1d(1, 1, 2).double(), nn.Conv1d(1, 1, 3).double()
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[[2.0, 3.0]]]))
        first.bias.fill_(10)
        second.weight.copy_(torch.tensor([[[5.0, 7.0, 11.0]]]))
        second.bias.fill_(1)
    fused = lf.fuse_conv_conv(first, second)
    # 2*5, 2*7 + 3*5, 2*11 + 3*7, 3*11;  1 + 10 * (5 + 7 + 11)
    assert fused.weight.flatten().tolist() == [10, 29, 43, 33] and fused.bias.item() == 231


ONE = "exact as one convolution, yet passed over by tools that know kxk, then 1x1, only"
CASES = [
    Case("kxk, then 1x1", "the one order that most tools know",
         lambda: nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 2, 1)), (3, 9, 8)),
    Case("1x1 without bias, then kxk padded", ONE,
         lambda: nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 2, 3, 2, 1)),
         (3, 9, 8)),
    Case("1x1 with bias, then kxk", ONE,
         lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, (3, 2))), (3, 9, 8)),
    Case("1x1 padded, then kxk", "padding on a 1x1 puts out its bias: moved to the front by hand",
         lambda: nn.Sequential(nn.Conv2d(3, 8, 1, padding=1), nn.Conv2d(8, 2, 3)), (3, 9, 8)),
    Case("1x1-3x3-1x1, padded in front", "ExpandNets' CL: the first layer carries the padding",
         lambda: nn.Sequential(nn.Conv2d(3, 12, 1, padding=1), nn.Conv2d(12, 12, 3),
                               nn.Conv2d(12, 4, 1)), (3, 9, 8)),
    Case("3x3-3x3, padded in front", "ExpandNets' CK: 5x5 by two 3x3, padding 2 first",
         lambda: nn.Sequential(nn.Conv2d(3, 12, 3, padding=2), nn.Conv2d(12, 4, 3)), (3, 9, 8)),
    Case("full, then padded", "zeros that are already there may be padded again",
         lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=2, bias=False),
                               nn.Conv2d(4, 2, 3, padding=1)), (3, 9, 8)),
    Case("circular, twice", "padding that wraps around adds up if the size is kept",
         lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
                               nn.Conv2d(4, 2, 5, padding=2, padding_mode="circular")), (3, 9, 8)),
    Case("1x1 with bias, then replicate", "padding that repeats sees the bias as well",
         lambda: nn.Sequential(nn.Conv2d(3, 8, 1),
                               nn.Conv2d(8, 2, 3, padding=1, padding_mode="replicate")),
         (3, 9, 8)),
    Case("depthwise, then depthwise", "depthwise twice is depthwise",
         lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
                               nn.Conv2d(4, 4, 3, groups=4)), (4, 9, 8)),
]  # fmt: skip


@every(CASES)
def test_what_is_exact_is_one_convolution(case: Case) -> None:
    model, x = case.model(), case.samples()
    fused = model[0]
    for layer in list(model)[1:]:
        fused = lf.fuse_conv_conv(fused, layer)
    assert_equals(fused(x), model, x, case.trap)
    out = collapsed(model, x, max_bytes=8 * sum(p.numel() for p in fused.parameters()))
    assert left(out.model) == ["Conv2d"], case.trap
    assert_equals(out.model(x), model, x, case.trap)


def test_depthwise_twice_stays_depthwise() -> None:
    case = next(case for case in CASES if case.name == "depthwise, then depthwise")
    fused = lf.fuse_conv_conv(*case.model())
    assert fused.groups == 4 and fused.weight.shape == (4, 1, 5, 5)


INEXACT = [
    Case("reflect inside", "padding that mirrors the first layer's values mirrors no input",
         lambda: nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"),
                               nn.Conv2d(3, 2, 3, padding=1, padding_mode="reflect")), (3, 6, 7)),
    Case("replicate inside", "padding that repeats the rim repeats no input",
         lambda: nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, padding_mode="replicate"),
                               nn.Conv2d(3, 2, 3, padding=1, padding_mode="replicate")),
         (3, 6, 7)),
    Case("circular, then zeros", "two padding modes in one layer",
         lambda: nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"),
                               nn.Conv2d(3, 2, 3, padding=1)), (3, 6, 7)),
    Case("zeros, then circular", "what wraps around is not what is padded with zeros",
         lambda: nn.Sequential(nn.Conv2d(3, 3, 3, padding=1),
                               nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular")),
         (3, 6, 7)),
    Case("circular, strided, then circular", "the wrap is by the strided image's size",
         lambda: nn.Sequential(nn.Conv2d(3, 3, 3, 2, 1, padding_mode="circular"),
                               nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular")),
         (3, 7, 6)),
    Case("padded 1x1, then padded", "the 1x1's own padding is hidden by the second layer's",
         lambda: nn.Sequential(nn.Conv2d(3, 3, 1, padding=1, bias=True),
                               nn.Conv2d(3, 2, 3, padding=1)), (3, 6, 7)),
    Case("same size, three times", "DepthShrinker's and LayerMerge's blocks before any training",
         lambda: nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 5, padding=2),
                               nn.Conv2d(3, 3, 3, padding=1)), (3, 6, 7)),
    Case("even kernels, 'same'", "the padding between is longer at one end",
         lambda: nn.Sequential(nn.Conv2d(3, 3, 2, padding="same"),
                               nn.Conv2d(3, 3, 4, padding="same")), (3, 6, 7)),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@every(INEXACT)
def test_what_is_not_exact_is_refused_and_computed(case: Case) -> None:
    model, x = case.model(), case.samples()
    with pytest.raises(lf.FusionError) as refusal:
        fused = model[0]
        for layer in list(model)[1:]:
            fused = lf.fuse_conv_conv(fused, layer)
    assert "Instead:" in str(refusal.value)
    out = collapsed(model, x)
    assert len(left(out.model)) == 1, case.trap
    assert_equals(out.model(x), model, x, case.trap)


# Ways around the rim ------------------------------------------------------------------------------


class PaddedFirst(nn.Module):
    """SPAN's block: the input is padded, 1x1-3x3-1x1 pads nowhere, and there is a 1x1 beside."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 3, 1))
        self.skip = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.chain(F.pad(x, (1, 1, 1, 1))) + self.skip(x)


class PaddedByBias(nn.Module):
    """ECBSR's and FMEN's way: a 1x1, padded by its own bias, then a 3x3."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(self.first(x), (1, 1, 1, 1))
        bias = self.first.bias.view(1, -1, 1, 1)
        y[:, :, :1, :] = bias
        y[:, :, -1:, :] = bias
        y[:, :, :, :1] = bias
        y[:, :, :, -1:] = bias
        return self.second(y)


class Collapsible(nn.Module):
    """SESR's block: kxk wide, 1x1 narrow, both with bias, and the input added."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 32, kernel, padding=kernel // 2)
        self.narrow = nn.Conv2d(32, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(self.wide(x))


BLOCKS = [
    Case("SPAN", "the 1x1 beside belongs in the middle of the 3x3", PaddedFirst, (3, 9, 8)),
    Case("SESR, 3x3", "the bias of the wide layer is dropped (SESR#14)", lambda: Collapsible(3),
         (3, 9, 8)),
    Case("SESR, 5x5", "the residual is the identity in the middle of the 5x5",
         lambda: Collapsible(5), (3, 9, 8)),
    Case("two of SESR's blocks", "the second block pads behind the first",
         lambda: nn.Sequential(Collapsible(5), nn.ReLU(), Collapsible(3)), (3, 9, 8)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@every(BLOCKS)
def test_a_block_is_one_convolution(case: Case, dtype: torch.dtype) -> None:
    model, x = case.model(dtype), case.samples(dtype)
    out = lf.collapse(model, x, policy="cheaper")
    assert left(out.model) == ["Conv2d"] * (2 if "two" in case.name else 1), case.trap
    assert_equals(out.model(x), model, x, case.trap)


def test_padding_by_the_bias_is_computed_as_written() -> None:
    trap = "rows that are written into a padded image in place are passed over"
    model, x = filled(PaddedByBias(), trap), drawn(2, 3, 9, 8, name=trap)
    assert_equals(collapsed(model, x).model(x), model, x, trap)
    # The same function as a padding of the input, which is one convolution.
    moved = nn.Sequential(nn.ZeroPad2d(1), model.first, model.second).eval()
    out = collapsed(moved, x, max_bytes=8 * (3 * 3 * 9 + 3))
    assert left(out.model) == ["Conv2d"]
    assert_equals(out.model(x), model, x, trap)


def test_a_stride_scales_the_padding_behind_it() -> None:
    """LayerMerge adds the paddings as they are, which is right for stride 1 only."""
    model = pair(nn.Conv2d(2, 3, 1, 2, bias=False), nn.Conv2d(3, 2, 3, padding=1), "scaled")
    x = drawn(2, 2, 11, 10)
    fused: Any = lf.fuse_conv_conv(*model)
    assert fused.padding == (2, 2) and fused.stride == (2, 2) and fused.dilation == (2, 2)
    assert fused.kernel_size == (3, 3), "no zeros are stored between the taps"
    assert_equals(fused(x), model, x, "padding of 1 in place of 2")
