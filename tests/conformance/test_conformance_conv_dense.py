"""A convolution and the Linear behind it, for kernels of more than one element.

DNNV's SqueezeGemms merges such a pair whenever the convolution keeps the shape, and reads only the
kernel's first element: right for 1x1, silently wrong for a 3x3 with padding 1.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from conformance_nets import (
    CONVOLUTIONS,
    TRANSPOSED,
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
from linfuse_ext import functional


def headed(
    channels: tuple[int, int], kernel: Any, size: tuple[int, ...], features: int = 6, **options: Any
) -> nn.Module:
    kinds = TRANSPOSED if options.pop("transposed", False) else CONVOLUTIONS
    conv = kinds[len(size)](*channels, kernel, **options)
    numbers = math.prod(conv(torch.zeros(1, channels[0], *size)).shape)
    return nn.Sequential(conv, nn.Flatten(), nn.Linear(numbers, features))


def case(name: str, trap: str, channels, kernel, size, **options: Any) -> Case:
    return Case(
        name, trap, lambda: headed(channels, kernel, size, **dict(options)), (channels[0], *size)
    )


pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

CASES = [
    case("1x1", "the one kernel that the known merge is right for", (3, 3), 1, (4, 4)),
    case("3x3 that keeps the shape", "only the kernel's first element is read", (3, 3), 3, (4, 4),
         padding=1),
    case("the forum's pair", "one-hot images of 845 elements, one by one (forum, 170631)", (5, 50),
         5, (13, 13), stride=2, features=100),
    case("5x5 on a rectangle", "rows and columns of the image change places", (3, 3), 5, (8, 9),
         padding=2),
    case("grouped", "a block of the other group is read", (4, 6), 3, (5, 6), padding=1, groups=2),
    case("depthwise", "one channel a group", (4, 8), 3, (5, 6), padding=1, groups=4),
    case("dilated", "the taps are taken for neighbours", (3, 3), 3, (6, 7), padding=2, dilation=2),
    case("dilated and strided, grouped", "settings are right one by one only", (4, 4), (3, 2),
         (9, 8), stride=(2, 3), padding=(2, 1), dilation=(1, 2), groups=2),
    case("padding beyond the kernel", "outputs that read nothing but padding", (2, 3), 2, (3, 4),
         padding=(3, 2)),
    case("kernel as large as the image", "the one case that SlimONNX merges", (3, 8), (4, 5),
         (4, 5)),
    case("same, even kernel", "the padding is longer at the high end", (2, 3), (2, 4), (5, 6),
         padding="same"),
    case("circular", "taps that wrap around fall on the same column", (2, 3), 3, (4, 5), padding=2,
         padding_mode="circular"),
    case("reflect", "taps that are mirrored fall on the same column", (2, 3), 3, (4, 5), padding=2,
         padding_mode="reflect"),
    case("replicate", "many taps fall on the rim", (2, 3), 3, (4, 5), padding=2,
         padding_mode="replicate"),
    case("1-d", "the axis of time is taken for that of channels", (3, 4), 5, (20,), stride=3,
         padding=2),
    case("3-d", "voxels: a third axis", (2, 3), (3, 2, 3), (4, 5, 3), stride=(1, 2, 1),
         padding=(1, 0, 1)),
    case("transposed", "channels have changed places in the weight", (3, 2), 3, (4, 5), stride=2,
         padding=1, transposed=True),
    case("transposed, grouped", "groups lie along the other axis of the weight", (4, 6), (3, 2),
         (4, 3), stride=2, groups=2, output_padding=1, transposed=True),
    case("transposed 1-d", "output_padding beyond the stride, within the dilation", (3, 2), 3,
         (5,), dilation=3, output_padding=2, transposed=True),
    case("transposed 3-d", "three strides and two paddings", (2, 2), (2, 3, 2), (3, 2, 3),
         stride=(1, 2, 3), padding=(0, 1, 0), output_padding=(0, 1, 2), transposed=True),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@every(CASES)
def test_one_linear_computes_what_both_did(case: Case, dtype: torch.dtype) -> None:
    model, x = case.model(dtype), case.samples(dtype)
    fused = lf.fuse_conv_linear(model[0], model[2], case.size[1:])
    assert_equals(fused(x.flatten(1)), model, x, case.trap)


@every(CASES)
def test_the_weight_is_the_product_with_the_matrix(case: Case) -> None:
    model = case.model()
    conv, _, linear = model
    fused = lf.fuse_conv_linear(conv, linear, case.size[1:])
    unit = torch.eye(math.prod(case.size), dtype=torch.float64).view(-1, *case.size)
    with torch.no_grad():
        offset = conv(torch.zeros_like(unit[:1])).flatten()
        matrix = (conv(unit).flatten(1) - offset).T
    # Normal numbers over sums of a few hundred terms.
    torch.testing.assert_close(fused.weight.data, linear.weight @ matrix, rtol=1e-11, atol=1e-12)
    bias = linear.weight @ offset + linear.bias
    torch.testing.assert_close(fused.bias.data, bias.data, rtol=1e-11, atol=1e-12)


@every(CASES)
def test_the_network_is_one_linear(case: Case) -> None:
    model, x = case.model(), case.samples()
    out = collapsed(model, x)
    assert left(out.model) == ["Linear"], case.trap
    assert_equals(out.model(x), model, x, case.trap)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(
    ("conv_bias", "linear_bias"), list(itertools.product((False, True), repeat=2))
)
def test_every_combination_of_biases(kernel: int, conv_bias: bool, linear_bias: bool) -> None:
    trap = "the bias of the convolution goes through the Linear, at every position of a channel"
    model = headed((3, 3), kernel, (4, 4), 10, padding=kernel // 2, bias=conv_bias)
    if not linear_bias:
        model[2].bias = None
    model, x = filled(model, trap), drawn(100, 3, 4, 4, name=trap)
    fused = lf.fuse_conv_linear(model[0], model[2], 4)
    assert (fused.bias is not None) == (conv_bias or linear_bias)
    assert_equals(fused(x.flatten(1)), model, x, trap)
    assert_equals(collapsed(model, x).model(x), model, x, trap)


def test_reading_the_first_element_only_is_wrong_for_all_but_1x1() -> None:
    for kernel in (1, 3):
        model = filled(headed((3, 3), kernel, (4, 4), 10, padding=kernel // 2), "first element")
        conv, _, linear = model
        fused = lf.fuse_conv_linear(conv, linear, 4)
        rows = linear.weight.view(10, 3, 16)
        naive = torch.einsum("fcp,cd->fdp", rows, conv.weight[:, :, 0, 0]).flatten(1)
        if kernel == 1:
            torch.testing.assert_close(naive, fused.weight, rtol=1e-12, atol=1e-12)
        else:
            assert_differs(naive, fused.weight, "a kernel of one element in place of nine")


def test_the_forums_sizes() -> None:
    """discuss.pytorch.org/t/170631: 5 -> 50 on 13 x 13, then 1250 -> 100, is 845 -> 100."""
    model = headed((5, 50), 5, (13, 13), 100, stride=2)
    assert model[2].in_features == 1250
    fused = lf.fuse_conv_linear(model[0], model[2], (13, 13))
    assert (fused.in_features, fused.out_features) == (845, 100)


# In which order the numbers are flattened ---------------------------------------------------------


class Flattened(nn.Module):
    def __init__(self, order: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.linear = nn.Linear(3 * 4 * 5, 6)
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.order == "channels last":
            y = y.permute(0, 2, 3, 1)
        elif self.order == "axes swapped":
            y = y.transpose(2, 3)
        elif self.order == "twice":
            y = y.flatten(2).flatten(1)
        return self.linear(y.reshape(y.shape[0], -1))


@pytest.mark.parametrize("order", ["as it is", "channels last", "axes swapped", "twice"])
def test_the_order_of_flattening_is_that_of_the_network(order: str) -> None:
    trap = "the Linear's columns are taken in the order of channel, row, column whatever was done"
    model, x = filled(Flattened(order), trap), drawn(3, 2, 4, 5, name=trap)
    out = collapsed(model, x)
    assert left(out.model) == ["Linear"], trap
    assert_equals(out.model(x), model, x, trap)
    last = x.to(memory_format=torch.channels_last)
    assert_equals(out.model(last), model, last, trap)


@pytest.mark.parametrize("kind", ["conv", "transposed"])
def test_a_linear_in_front(kind: str) -> None:
    trap = "a decoder's first layers: the columns of the Linear are images that go forward"
    kinds = {"conv": nn.Conv2d, "transposed": nn.ConvTranspose2d}
    conv = kinds[kind](4, 3, (3, 2), stride=(2, 1), padding=(2, 0))
    model = filled(nn.Sequential(nn.Linear(7, 4 * 5 * 4), nn.Unflatten(1, (4, 5, 4)), conv), trap)
    x = drawn(5, 7, name=trap)
    fused = lf.fuse_linear_conv(model[0], model[2], (5, 4))
    assert_equals(fused(x), nn.Sequential(*model, nn.Flatten()), x, trap)
    out = collapsed(model, x)
    assert left(out.model) == ["Linear"], trap
    assert_equals(out.model(x), model, x, trap)


def test_a_block_of_rows_is_a_block_of_the_matrix() -> None:
    """Verifiers ask for the rows of unstable neurons only."""
    conv = filled(nn.Conv2d(3, 4, (3, 2), (2, 1), (2, 0)), "rows")
    whole, offset = functional.conv_to_affine(conv.weight, conv.bias, (9, 8), (2, 1), (2, 0))
    for start, stop in ((0, 0), (3, 50), (50, whole.shape[0])):
        rows, shift = functional.conv_to_affine(
            conv.weight, conv.bias, (9, 8), (2, 1), (2, 0), rows=(start, stop)
        )
        assert torch.equal(rows, whole[start:stop]) and torch.equal(shift, offset[start:stop])
