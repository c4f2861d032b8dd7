"""Chains of two to six convolutions: one of them is left, or the rule is named that forbids it.

The lists of kernels, and what lies between the layers, follow the tests of overparam
(github.com/minyoungg/overparam), of Sony's model_optimization and of LayerMerge, all of which hold
for square kernels with all padding in the first layer and all stride in the last.
"""

from __future__ import annotations

import functools
import itertools
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

KERNELS = {
    "1-3": (1, 3),
    "3-1": (3, 1),
    "5-3-1": (5, 3, 1),
    "1-3-5": (1, 3, 5),
    "3-3-3-3": (3, 3, 3, 3),
    "3-1-1-1-1": (3, 1, 1, 1, 1),
    "six of 3": (3,) * 6,
    "even 2-4": (2, 4),
    "asymmetric 3x2-1x4-2": ((3, 2), (1, 4), 2),
    "1x3-3x1": ((1, 3), (3, 1)),
}
PADDINGS = {
    "none": lambda kernel, number: 0,
    "all in the first": lambda kernel, number: 0 if number else 3,
    "everywhere": lambda kernel, number: kernel // 2,
    "full": lambda kernel, number: kernel - 1,
}
STRIDES = {
    "none": lambda number, last: 1,
    "first": lambda number, last: 1 if number else 2,
    "last": lambda number, last: 2 if number == last else 1,
    "first and last": lambda number, last: 2 if number in (0, last) else 1,
}
TRAP = "padding is scaled by the strides before it, and hides values that one layer would read"


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def chain(kernels: str, padding: str, stride: str, bias: bool, channels: int = 2) -> list[Any]:
    """Convolutions on few channels, so that long chains stay small."""
    sizes = [pair(kernel) for kernel in KERNELS[kernels]]
    layers = [
        nn.Conv2d(
            channels,
            channels,
            size,
            stride=STRIDES[stride](number, len(sizes) - 1),
            padding=tuple(PADDINGS[padding](kernel, number) for kernel in size),
            bias=bias,
        )
        for number, size in enumerate(sizes)
    ]
    return list(filled(nn.Sequential(*layers), f"{kernels} {padding} {stride}"))


def one_by_hand(layers: list[Any]) -> tuple[bool, list[int], list[int]]:
    """Whether the rules call a chain one convolution, and its padding and stride per axis.

    A layer may pad only behind layers that already put out, beyond their rim, the zeros that it
    pads with: those without bias that pad by all that their kernels reach.
    """
    exact = True
    padding, reach, step, bias = [0, 0], [0, 0], [1, 1], False
    for layer in layers:
        for axis in (0, 1):
            if layer.padding[axis] and (bias or padding[axis] < reach[axis]):
                exact = False
            padding[axis] += step[axis] * layer.padding[axis]
            reach[axis] += step[axis] * (layer.kernel_size[axis] - 1) * layer.dilation[axis]
            step[axis] *= layer.stride[axis]
        bias = bias or layer.bias is not None
    return exact, padding, step


GRID = list(itertools.product(KERNELS, PADDINGS, STRIDES, (True, False)))


@pytest.mark.parametrize(
    ("kernels", "padding", "stride", "bias"),
    [pytest.param(*row, id=", ".join(map(str, row))) for row in GRID],
)
def test_a_chain_is_one_convolution_or_the_rule_is_named(kernels, padding, stride, bias) -> None:
    layers = chain(kernels, padding, stride, bias)
    exact, merged_padding, merged_stride = one_by_hand(layers)
    model, x = nn.Sequential(*layers), drawn(2, 2, 28, 27)
    if exact:
        fused = functools.reduce(lf.fuse_conv_conv, layers)
        assert type(fused) is nn.Conv2d and (fused.bias is not None) == bias
        assert fused.stride == tuple(merged_stride) and fused.padding == tuple(merged_padding)
        assert_equals(fused(x), model, x, TRAP)
        return
    with pytest.raises(lf.FusionError, match=r"padding between the layers|pads with zeros where"):
        functools.reduce(lf.fuse_conv_conv, layers)
    # The refusal is needed: the kernel and padding that the sums give are wrong at the rim.
    bare = [nn.Conv2d(2, 2, c.kernel_size, c.stride, bias=bias).double() for c in layers]
    for without, layer in zip(bare, layers, strict=True):
        without.load_state_dict(layer.state_dict())
    merged: Any = functools.reduce(lf.fuse_conv_conv, bare)
    wrong = F.conv2d(x, merged.weight, merged.bias, merged.stride, merged_padding, merged.dilation)
    right = model(x)
    if wrong.shape == right.shape:
        assert_differs(wrong, right, TRAP)


def test_the_grid_meets_both_answers_for_every_padding_but_two() -> None:
    found = {row: one_by_hand(chain(*row))[0] for row in GRID}
    for padding in PADDINGS:
        answers = {exact for row, exact in found.items() if row[1] == padding}
        never_refused = padding in ("none", "all in the first")
        assert answers == ({True} if never_refused else {True, False}), padding


# In six layers of float32 the bound grows beyond what it could find.
@pytest.mark.parametrize("kernels", [name for name in KERNELS if name != "six of 3"])
def test_float32_is_rounded_once_in_a_merge(kernels: str) -> None:
    trap = "the difference of two float32 computations is blamed on the merge (forum, 50946)"
    layers = [layer.float() for layer in chain(kernels, "all in the first", "last", True)]
    x = drawn(2, 2, 17, 16).float()
    fused = functools.reduce(lf.fuse_conv_conv, layers)
    assert fused.weight.dtype == torch.float32
    assert_equals(fused(x), nn.Sequential(*layers), x, trap)


# Settings that a chain of the plain kind does not have --------------------------------------------

SPECIAL = [
    Case(
        "stride, then padding",
        "the paddings are added without the stride between them",
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 1, stride=(3, 2), bias=False), nn.Conv2d(3, 2, 3, padding=(1, 2))
        ),
        (2, 13, 12),
    ),
    Case(
        "dilations 2 and 3",
        "the merged kernel is laid out with one of the two dilations",
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, dilation=2, padding=4), nn.Conv2d(3, 2, (2, 3), dilation=3)
        ),
        (2, 13, 12),
    ),
    Case(
        "stride 2 under dilation 2",
        "the second kernel's taps are the first's stride apart, times its own dilation",
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Conv2d(3, 2, 3, dilation=2)
        ),
        (2, 15, 14),
    ),
    Case(
        "groups 4 and 6",
        "the merged layer has the groups that both have, 2, and not those of one",
        lambda: nn.Sequential(nn.Conv2d(4, 12, 3, groups=4), nn.Conv2d(12, 6, 2, groups=6)),
        (4, 9, 8),
    ),
    Case(
        "depthwise, then pointwise",
        "a separable convolution merged as if its first layer were dense",
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 5, 1)),
        (4, 9, 8),
    ),
    Case(
        "1-d",
        "the kernel is composed as an image of height one, transposed",
        lambda: nn.Sequential(
            nn.Conv1d(2, 3, 4, 2, padding=3), nn.Conv1d(3, 4, 3), nn.Conv1d(4, 2, 2, 3)
        ),
        (2, 61),
    ),
    Case(
        "3-d",
        "axes that are looped over by name: the third is forgotten",
        lambda: nn.Sequential(
            nn.Conv3d(2, 3, (1, 2, 3), (1, 2, 1), padding=(0, 1, 2)), nn.Conv3d(3, 2, (3, 2, 1))
        ),
        (2, 6, 7, 5),
    ),
    Case(
        "transposed, twice",
        "the kernel is composed in the order of convolutions, not of their adjoints",
        lambda: nn.Sequential(
            nn.ConvTranspose2d(2, 3, 3, 2, bias=False), nn.ConvTranspose2d(3, 2, (4, 3), 2, (1, 0))
        ),
        (2, 5, 4),
    ),
]


@every(SPECIAL)
def test_a_pair_with_settings_of_its_own(case: Case) -> None:
    model, x = case.model(), case.samples()
    fused = functools.reduce(lf.fuse_conv_conv, model)
    assert_equals(fused(x), model, x, case.trap)
    allowed = sum(p.numel() * p.element_size() for p in fused.parameters())
    out = collapsed(model, x, max_bytes=allowed)
    assert left(out.model) == [type(fused).__name__], case.trap
    assert_equals(out.model(x), model, x, case.trap)


# What lies between --------------------------------------------------------------------------------


class Between(nn.Module):
    """Convolutions with what overparam puts between them: BatchNorms and residual sums.

    An interval of n adds the input of each block of n layers to its output; -1 that of the network.
    """

    def __init__(self, layers: list[Any], norms: bool, intervals: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        channels = layers[0].out_channels
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(channels) if norms else nn.Identity() for _ in layers
        )
        self.intervals = intervals

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for number, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True), start=1):
            y = norm(layer(values[-1]))
            for interval in self.intervals:
                if interval == -1 and number == len(self.layers):
                    y = y + x
                elif interval > 0 and number % interval == 0:
                    y = y + values[number - interval]
            values.append(y)
        return values[-1]


def merged_bytes(layers: list[Any]) -> int:
    """Of the merged convolution in float64: what a Linear in its place would exceed."""
    reach, step = [1, 1], [1, 1]
    for layer in layers:
        for axis in (0, 1):
            reach[axis] += step[axis] * (layer.kernel_size[axis] - 1)
            step[axis] *= layer.stride[axis]
    channels = layers[0].in_channels, layers[-1].out_channels
    return 8 * (reach[0] * reach[1] * channels[0] * channels[1] + channels[1])


NETS = [
    pytest.param(kernels, padding, stride, bias, not bias, id=f"{kernels}, {padding}, {stride}")
    for kernels in KERNELS
    for padding in ("all in the first", "everywhere")
    for stride, bias in (("first", True), ("last", False))
    if (kernels, stride) != ("six of 3", "first")  # whose image would be too large for a matrix
]


@pytest.mark.parametrize(("kernels", "padding", "stride", "bias", "norms"), NETS)
def test_a_network_of_a_chain_is_one_layer(kernels, padding, stride, bias, norms) -> None:
    trap = "an inexact merge is taken where padding lies between, or an exact one is passed over"
    model = Between(chain(kernels, padding, stride, bias), norms)
    model, x = filled(model, trap), drawn(2, 2, 17, 16)
    layers = list(model.layers)
    # A BatchNorm is a bias as well.
    exact = one_by_hand(layers)[0] and not (norms and any(any(c.padding) for c in layers[1:]))
    out = collapsed(model, x, **({"max_bytes": merged_bytes(layers)} if exact else {}))
    assert left(out.model) == ["Conv2d"] if exact else len(left(out.model)) == 1, trap
    assert_equals(out.model(x), model, x, trap)


INTERVALS = [(1,), (2,), (4,), (-1,), (1, 2), (2, -1), (1, 2, 3), (1, 2, 4, -1)]


@pytest.mark.parametrize("kernels", ["3-1-1-1", "3-3-3-3"])
@pytest.mark.parametrize(
    ("intervals", "norms"),
    [pytest.param(row, n % 2 == 1, id=str(row)) for n, row in enumerate(INTERVALS)],
)
def test_residuals_between_cost_no_layer(intervals, norms: bool, kernels: str) -> None:
    trap = "a residual is the identity kernel in the middle of a padded one, at every depth"
    sizes = [int(size) for size in kernels.split("-")]
    layers = [nn.Conv2d(3, 3, k, padding=k // 2, bias=not norms) for k in sizes]
    model, x = filled(Between(layers, norms, intervals), trap), drawn(2, 3, 9, 8, name=trap)
    exact = kernels == "3-1-1-1"  # only the first pads
    out = collapsed(model, x, **({"max_bytes": merged_bytes(layers)} if exact else {}))
    assert left(out.model) == ["Conv2d"] if exact else len(left(out.model)) == 1, trap
    assert_equals(out.model(x), model, x, trap)


def relu_net(*stages: list[nn.Module]) -> nn.Module:
    return nn.Sequential(*(layer for stage in stages for layer in [*stage, nn.ReLU()]))


SONY = [
    Case(
        "two",
        "the padding of the first layer is lost in the merge",
        lambda: nn.Sequential(nn.Conv2d(16, 256, 5, padding=1), nn.Conv2d(256, 4, 1)),
        (16, 12, 11),
    ),
    Case(
        "three",
        "a chain of layers without bias gets one that was never there",
        lambda: relu_net([nn.Conv2d(16, 128, 3, bias=False), nn.Conv2d(128, 64, 1, bias=False),
                          nn.Conv2d(64, 16, 1, bias=False)]),
        (16, 12, 11),
    ),
    Case(
        "four",
        "merging stops at the first pair",
        lambda: relu_net([nn.Conv2d(16, 128, 3), nn.Conv2d(128, 64, 1), nn.Conv2d(64, 64, 1),
                          nn.Conv2d(64, 4, 1)]),
        (16, 12, 11),
    ),
    Case(
        "six",
        "a merge across the activation, or a 1x1 before a 3x3 that is passed over",
        lambda: relu_net(
            [nn.Conv2d(16, 32, 5), nn.Conv2d(32, 4, 1, bias=False)],
            [nn.Conv2d(4, 128, 1), nn.Conv2d(128, 16, 3), nn.Conv2d(16, 64, 1, bias=False),
             nn.Conv2d(64, 8, 1)],
        ),
        (16, 12, 11),
    ),
]  # fmt: skip


@pytest.mark.parametrize("policy", ["cheaper", "always"])
@every(SONY)
def test_wide_chains_become_narrow(case: Case, policy: str) -> None:
    model, x = case.model(), case.samples()
    out = lf.collapse(model, x, policy=policy)
    assert left(out.model) == ["Conv2d"] * (2 if case.name == "six" else 1), case.trap
    if case.name == "three":
        assert all(name.endswith("weight") for name, _ in out.model.named_parameters()), case.trap
    assert out.report.totals["flops_saved"] > 0 and not out.report.totals["refused"]
    assert_equals(out.model(x), model, x, case.trap)
    narrow = case.model(torch.float32)
    got = lf.collapse(narrow, x.float(), policy=policy).model(x.float())
    assert_equals(got, narrow, x.float(), case.trap)
