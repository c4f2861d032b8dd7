"""Convolutions on packed, encrypted vectors: rotate, multiply by a diagonal, add.

After Orion's packing, HEIR #2900, #2919 and #2941, and the questions TenSEAL #356, #403, #435, #439
and #441, whose authors want a second convolution and are told to write its matrix by hand.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conformance_nets import Case, assert_equals, drawn, every, filled
from torch import Tensor, nn

import linfuse_ext as lf
from linfuse_ext import functional


def layer(kind: type[nn.Module], *arguments: Any, **options: Any) -> Any:
    return lambda: kind(*arguments, **options)


LAYERS = [
    Case("square", "as many outputs as inputs, but no power of two",
         layer(nn.Conv2d, 3, 3, 3, padding=1), (3, 5, 6)),
    Case("power of two", "nothing to pad", layer(nn.Conv2d, 2, 2, 3, padding=1), (2, 8, 8)),
    Case("more rows", "the slots behind the input must be zero and take part",
         layer(nn.Conv2d, 2, 7, 3, padding=1), (2, 5, 4)),
    Case("more columns", "the slots behind the output must stay zero", layer(nn.Conv2d, 5, 2, 3),
         (5, 8, 9)),
    Case("rectangular", "kernel height and width change places in the layout (HEIR #2941)",
         layer(nn.Conv2d, 2, 3, (3, 2), (2, 1), (2, 0)), (2, 8, 9)),
    Case("strided", "a stride makes many diagonals, all of which count (HEIR #2919)",
         layer(nn.Conv2d, 2, 4, 3, 2, 1), (2, 9, 8)),
    Case("grouped", "groups are made dense by a mask in Orion: diagonals of zeros",
         layer(nn.Conv2d, 4, 4, 3, padding=1, groups=2), (4, 5, 6)),
    Case("depthwise, strided", "one channel a group, and a stride",
         layer(nn.Conv2d, 3, 6, 3, 2, 1, groups=3), (3, 6, 7)),
    Case("dilated", "only the first dilation is read", layer(nn.Conv2d, 2, 2, 3, dilation=(1, 2)),
         (2, 6, 7)),
    Case("1-d", "the filter as a relation of rows and columns (HEIR #2900)",
         layer(nn.Conv1d, 2, 3, 5, 2, 3), (2, 21)),
    Case("3-d", "a third axis", layer(nn.Conv3d, 1, 2, (2, 3, 2), padding=(1, 0, 1)), (1, 3, 4, 3)),
    Case("transposed", "rows without a tap", layer(nn.ConvTranspose2d, 3, 2, 2, 3), (3, 3, 4)),
    Case("CryptoNets' second layer", "845 to 1250 in 2048 slots", layer(nn.Conv2d, 5, 50, 5, 2),
         (5, 13, 13)),
]  # fmt: skip


def diagonals(conv: Any, size: tuple[int, ...]) -> Any:
    extra = {}
    if isinstance(conv, nn.ConvTranspose2d):
        extra = {"transposed": True, "output_padding": conv.output_padding}
    return functional.conv_to_diagonals(
        conv.weight, conv.bias, size, conv.stride, conv.padding, conv.dilation, conv.groups, **extra
    )


def rotate_and_sum(made: Any, packed: Tensor) -> Tensor:
    """What is left to a server: rotations of slots, products with plain vectors, sums."""
    return made.offset + sum(vector * packed.roll(-d) for d, vector in made.vectors.items())


def packed(x: Tensor, slots: int) -> Tensor:
    return nn.functional.pad(x.flatten(), (0, slots - x.numel()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@every(LAYERS)
def test_rotate_and_sum_is_the_layer(case: Case, dtype: torch.dtype) -> None:
    conv, x = case.model(dtype), case.samples(dtype, count=1)
    made = diagonals(conv, case.size[1:])
    rows = conv(x).numel()
    assert made.size == 1 << (max(rows, x.numel()) - 1).bit_length()
    slots = rotate_and_sum(made, packed(x, made.size))
    assert_equals(slots[None, :rows], nn.Sequential(conv, nn.Flatten()), x, case.trap)
    assert not slots[rows:].any(), "what is behind the output would leak into the next layer"


@every(LAYERS)
def test_diagonals_are_those_on_which_taps_lie(case: Case) -> None:
    conv = case.model()
    made = diagonals(conv, case.size[1:])
    matrix = lf.conv_to_linear(conv, case.size[1:]).weight
    rows, columns = matrix.nonzero(as_tuple=True)
    wanted = ((columns - rows) % made.size).unique().tolist()
    assert list(made.vectors) == wanted, case.trap
    stored = sum(int(vector.count_nonzero()) for vector in made.vectors.values())
    assert stored == matrix.count_nonzero(), "every tap lies on one diagonal"
    for row, column in list(zip(rows.tolist(), columns.tolist(), strict=True))[:200]:
        assert made.vectors[(column - row) % made.size][row] == matrix[row, column], case.trap


def test_a_layer_that_keeps_its_size_has_as_many_diagonals_as_taps_at_most() -> None:
    """Stride 1: a tap reads at the same distance everywhere, so that its diagonal is one."""
    for groups in (1, 2):
        conv = filled(nn.Conv2d(4, 4, (3, 5), padding=(1, 2), groups=groups), "bound")
        made = diagonals(conv, (16, 16))
        assert len(made.vectors) <= conv.weight.numel()
        # Pairs of channels at the same distance share theirs: no more than 2 C - 1 distances.
        assert len(made.vectors) <= (2 * 4 // groups - 1) * 15
        assert made.size == 4 * 256


def test_a_stride_makes_more_diagonals_than_taps() -> None:
    """Who keeps a diagonal for each tap loses most of a strided layer."""
    conv = filled(nn.Conv2d(1, 1, 3, stride=2, padding=1), "stride")
    made = diagonals(conv, (16, 16))
    assert len(made.vectors) > 9 * 4
    x = drawn(1, 1, 16, 16, name="stride")
    whole = rotate_and_sum(made, packed(x, made.size))
    torch.testing.assert_close(whole[:64], conv(x).flatten().data, rtol=1e-12, atol=1e-12)


def test_a_second_convolution() -> None:
    """Convolution, square, convolution, all on slots: what was asked for again and again."""
    first = filled(nn.Conv2d(1, 5, 5, 2, 1), "first")
    second = filled(nn.Conv2d(5, 6, 5, 2), "second")
    x = drawn(1, 1, 16, 15, name="image")
    hidden = first(x)
    one, two = diagonals(first, (16, 15)), diagonals(second, tuple(hidden.shape[2:]))
    slots = rotate_and_sum(one, packed(x, one.size))
    slots = packed(slots[: hidden.numel()] ** 2, two.size)
    got = rotate_and_sum(two, slots)[: math.prod(second(hidden).shape)]
    torch.testing.assert_close(got, second(hidden**2).flatten(), rtol=1e-12, atol=1e-12)


def test_without_a_bias_the_offset_is_zero() -> None:
    conv = filled(nn.Conv2d(2, 3, 3, bias=False), "no bias")
    made = diagonals(conv, (6, 5))
    assert made.offset.shape == (made.size,) and not made.offset.any()


def test_diagonals_of_a_merged_pair() -> None:
    """Merging first saves a level: one product with diagonals computes both layers."""
    trap = "a level of multiplication for each of two layers without an activation between"
    model = filled(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 2)), trap)
    x = drawn(1, 2, 7, 6, name=trap)
    merged = lf.fuse_conv_conv(*model)
    made = diagonals(merged, (7, 6))
    got = rotate_and_sum(made, packed(x, made.size))[None, : model(x).numel()]
    assert_equals(got, nn.Sequential(model, nn.Flatten()), x, trap)
