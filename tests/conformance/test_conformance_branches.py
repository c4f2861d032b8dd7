"""Parallel branches of one input: sums and concatenations that are one convolution.

RepVGG (arXiv:2101.03697), MobileOne (2206.04040), ACNet (1908.03930), DBB (2103.13425), ECBSR and
TVM's combined convolutions (#2089). Kernels that are not square, or even, are where pads of the
small kernels land on the wrong axis or half a position off.
"""

from __future__ import annotations

from typing import Any

import torch
from conformance_nets import Case, assert_equals, collapsed, drawn, every, filled, left
from torch import Tensor, nn

import linfuse_ext as lf


class Sum(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        total = self.branches[0](x)
        for branch in list(self.branches)[1:]:
            total = total + branch(x)
        return total


class Stack(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Fixed(nn.Module):
    """A 1x1 and a scaled fixed 3x3 on each channel: Sobel's and Laplace's edges, as ECBSR's."""

    def __init__(self, channels: int, mask: list[list[float]]) -> None:
        super().__init__()
        self.mix = nn.Conv2d(channels, channels, 1)
        self.scale = nn.Parameter(torch.zeros(channels, 1, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("fixed_mask", torch.tensor(mask).repeat(channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        # The input is padded, so that the 1x1 puts out its bias around as well.
        y = self.mix(nn.functional.pad(x, (1, 1, 1, 1)))
        weight = self.scale * self.fixed_mask
        return nn.functional.conv2d(y, weight, self.bias, groups=y.shape[1])


def norm(*arguments: Any, **options: Any) -> nn.Module:
    conv = nn.Conv2d(*arguments, **options, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels))


def repvgg(channels: tuple[int, int], stride: int = 1, groups: int = 1) -> nn.Module:
    branches = [
        norm(*channels, 3, stride, 1, groups=groups),
        norm(*channels, 1, stride, groups=groups),
    ]
    if channels[0] == channels[1] and stride == 1:
        branches.append(nn.BatchNorm2d(channels[0]))
    return Sum(*branches)


SOBEL = [[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]]
UPRIGHT = [list(row) for row in zip(*SOBEL, strict=True)]
LAPLACE = [[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]

ONE = [
    Case("RepVGG", "a bare BatchNorm is a branch: the identity, scaled and shifted",
         lambda: repvgg((4, 4)), (4, 9, 8)),
    Case("RepVGG, stride 2", "the 1x1 is padded to a 3x3 whose middle the stride must meet",
         lambda: repvgg((3, 4), 2), (3, 9, 8)),
    Case("RepVGG, groups 2", "the identity of a group is that of its own channels",
         lambda: repvgg((4, 4), groups=2), (4, 9, 8)),
    Case("MobileOne", "many branches of one kind", lambda: Sum(*(norm(4, 4, 3, padding=1, groups=4)
         for _ in range(4)), norm(4, 4, 1, groups=4), nn.BatchNorm2d(4)), (4, 9, 8)),
    Case("ACNet", "1x3 and 3x1 get their paddings on the wrong axes",
         lambda: Sum(norm(3, 4, 3, padding=1), norm(3, 4, (1, 3), padding=(0, 1)),
                     norm(3, 4, (3, 1), padding=(1, 0))), (3, 8, 9)),
    Case("ACNet, 5x5, strides differ", "1x5 and 5x1 under a stride of each axis its own",
         lambda: Sum(norm(3, 4, 5, (2, 1), 2), norm(3, 4, (1, 5), (2, 1), (0, 2)),
                     norm(3, 4, (5, 1), (2, 1), (2, 0))), (3, 9, 8)),
    Case("rectangular", "a 1x3 in a 3x5: its pads have the axes the other way (DBB, transform VI)",
         lambda: Sum(nn.Conv2d(3, 4, (3, 5), padding=(1, 2)), nn.Conv2d(3, 4, (1, 3),
                     padding=(0, 1)), nn.Conv2d(3, 4, (3, 1), padding=(1, 0))), (3, 8, 9)),
    Case("even", "a 2x2 in a 4x4 lies in no middle but where its padding says",
         lambda: Sum(nn.Conv2d(3, 4, 4, 2, 2), nn.Conv2d(3, 4, 2, 2, 1), nn.Conv2d(3, 4, (4, 2), 2,
                     (2, 1))), (3, 8, 10)),
    Case("dilated beside dense", "a dilated branch lies on a finer grid",
         lambda: Sum(nn.Conv2d(3, 4, 3, padding=2, dilation=2), nn.Conv2d(3, 4, 3, padding=1)),
         (3, 9, 8)),
    Case("groups beside dense", "the sum has the groups that both have",
         lambda: Sum(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 1, groups=2)),
         (4, 9, 8)),
    Case("DBB, transforms I, II, III and V", "1x1 without bias, then kxk; and a 1x1, then a mean",
         lambda: Sum(norm(4, 4, 3, padding=1), nn.Sequential(nn.Conv2d(4, 4, 1, bias=False),
                     *norm(4, 4, 3, padding=1)), nn.Sequential(nn.Conv2d(4, 4, 1, bias=False),
                     nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(4)), norm(4, 4, 1)), (4, 9, 8)),
    Case("DBB, transform III in groups", "the 1x1 of each group belongs to that group's slices",
         lambda: Sum(norm(4, 4, 3, padding=1, groups=2), nn.Sequential(nn.Conv2d(4, 8, 1, groups=2,
                     bias=False), *norm(8, 4, 3, padding=1, groups=2))), (4, 9, 8)),
    Case("ECBSR", "fixed masks behind a 1x1 on each channel; forks lose the bias around",
         lambda: Sum(nn.Conv2d(4, 4, 3, padding=1), Fixed(4, SOBEL), Fixed(4, UPRIGHT),
                     Fixed(4, LAPLACE), nn.Identity()), (4, 9, 8)),
    Case("1-d", "branches along one axis", lambda: Sum(nn.Conv1d(3, 3, 5, padding=2),
         nn.Conv1d(3, 3, 1), nn.Identity()), (3, 17)),
    Case("3-d", "branches along three axes", lambda: Sum(nn.Conv3d(2, 2, 3, padding=1),
         nn.Conv3d(2, 2, (1, 3, 1), padding=(0, 1, 0)), nn.Identity()), (2, 4, 3, 5)),
    Case("concatenation", "parallel convolutions of other kernels, stacked (TVM #2089)",
         lambda: Stack(nn.Conv2d(3, 2, 1), nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 1, (1, 5),
                       padding=(0, 2))), (3, 9, 8)),
    Case("concatenation, then a 1x1", "DBB, transform IV: a stack and what mixes it",
         lambda: nn.Sequential(Stack(nn.Conv2d(3, 2, 1), norm(3, 3, 3, padding=1)),
                               nn.Conv2d(5, 2, 1)), (3, 9, 8)),
    Case("a block of blocks", "sums inside of sums",
         lambda: Sum(Sum(nn.Conv2d(3, 3, 3, padding=1), nn.Identity()), nn.Conv2d(3, 3, 1)),
         (3, 9, 8)),
]  # fmt: skip


def widest(model: nn.Module, case: Case) -> int:
    """Bytes of a dense convolution over the largest kernel: any Linear here takes more."""
    convs = [m for m in model.modules() if hasattr(m, "kernel_size") and hasattr(m, "weight")]
    axes = len(case.size) - 1
    spans = [max(c.dilation[n] * (c.kernel_size[n] - 1) + 2 for c in convs) for n in range(axes)]
    outs = model(case.samples()).shape[1]
    return 8 * (outs * case.size[0] * torch.Size(spans).numel() + outs)


def assert_one_convolution(case: Case, dtype: torch.dtype) -> None:
    largest = widest(case.model(), case)
    model, x = case.model(dtype), case.samples(dtype)
    out = collapsed(model, x, max_bytes=largest)
    assert left(out.model) == [f"Conv{len(case.size) - 1}d"], case.trap
    assert_equals(out.model(x), model, x, case.trap)


@every(ONE)
def test_branches_are_one_convolution(case: Case) -> None:
    assert_one_convolution(case, torch.float64)


@every([case for case in ONE if case.name in ("RepVGG", "ACNet", "ECBSR", "concatenation")])
def test_branches_are_rounded_once(case: Case) -> None:
    assert_one_convolution(case, torch.float32)


MAPS = [
    Case("DBB as torch pads it", "the shift of the inner norms does not reach the zeros (DBB#9)",
         lambda: Sum(norm(4, 4, 3, padding=1), nn.Sequential(*norm(4, 4, 1),
                     *norm(4, 4, 3, padding=1)), nn.Sequential(*norm(4, 4, 1),
                     nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(4)), norm(4, 4, 1)), (4, 9, 8)),
    Case("a biased 1x1 inside", "MobileIE#6: training and deployed network differ at the rim",
         lambda: Sum(nn.Conv2d(3, 3, 3, padding=1), nn.Sequential(nn.Conv2d(3, 6, 1),
                     nn.Conv2d(6, 3, 3, padding=1)), nn.Identity()), (3, 9, 8)),
]  # fmt: skip


@every(MAPS)
def test_branches_with_a_bias_before_padding_are_one_convolution_and_a_map(case: Case) -> None:
    model, x = case.model(), case.samples()
    out = collapsed(model, x, max_bytes=8 * (4 * 4 * 9 + 4 * 72))
    assert left(out.model) == ["BiasMap"], case.trap
    assert_equals(out.model(x), model, x, case.trap)


def test_a_pool_beside_a_strided_convolution() -> None:
    trap = "the last window of a pool in ceil_mode reaches beyond what a convolution reads"
    pooled = nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True), nn.Conv2d(3, 3, 1))
    model = filled(Sum(nn.Conv2d(3, 3, 3, 2, 1), pooled), trap)
    x = drawn(2, 3, 9, 8, name=trap)
    out = collapsed(model, x)
    assert len(left(out.model)) == 1
    assert_equals(out.model(x), model, x, trap)


def test_whole_stages_of_blocks() -> None:
    trap = "each block is merged, and nothing across the activations"
    stages = [repvgg((3, 6), 2), repvgg((6, 6)), repvgg((6, 6), groups=2)]
    model = nn.Sequential(*(layer for block in stages for layer in (block, nn.ReLU())))
    model, x = filled(model, trap), drawn(2, 3, 17, 14, name=trap)
    out = lf.collapse(model, x)
    assert left(out.model) == ["Conv2d"] * 3, trap
    convs = [layer for layer in out.model.modules() if isinstance(layer, nn.Conv2d)]
    assert [conv.groups for conv in convs] == [1, 1, 2], trap
    assert_equals(out.model(x), model, x, trap)


def test_branches_of_linears() -> None:
    trap = "weights are added in the wrong place of a stack, or the identity is forgotten"
    add = Sum(nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Identity(), nn.BatchNorm1d(6))
    model = filled(nn.Sequential(add, Stack(nn.Linear(6, 2), nn.Linear(6, 3))), trap)
    x = drawn(7, 6, name=trap)
    out = collapsed(model, x)
    assert left(out.model) == ["Linear"], trap
    assert_equals(out.model(x), model, x, trap)
