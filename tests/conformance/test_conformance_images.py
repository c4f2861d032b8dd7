"""Images that are not square and paddings that differ at the ends: where verifiers trip.

The settings are those of the tests of auto_LiRPA (rectangle, distinct patches, conv, conv1d), whose
matrices by strides are right on square images only, and of pytorch#26781.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from conformance_nets import Case, assert_equals, collapsed, drawn, every, filled, left
from torch import Tensor, nn

import linfuse_ext as lf
from linfuse_ext import functional

IMAGES = [(8, 9), (9, 8)]
LAYERS = {
    "padded": ("rows step by the padded height in place of the width", {"padding": 1}, 3),
    "stride 2x1": ("one stride is taken for both axes", {"stride": (2, 1), "padding": 1}, 3),
    "kernel 3x2": ("kernel height and width change places", {"padding": (2, 0)}, (3, 2)),
    "kernel 3x2, stride 2x1": (
        "the axes of kernel, stride and padding are not the same ones",
        {"stride": (2, 1), "padding": (2, 0)},
        (3, 2),
    ),
    "dilated on one axis": (
        "the first dilation is taken for both axes",
        {"dilation": (2, 1), "padding": (0, 2)},
        (2, 3),
    ),
    "grouped": (
        "channels of the other group are read",
        {"groups": 2, "stride": (1, 2), "padding": (2, 1)},
        (3, 2),
    ),
}
RECTANGLES = [
    Case(
        f"{name} on {size[0]}x{size[1]}",
        trap,
        lambda kernel=kernel, options=options: nn.Conv2d(2, 4, kernel, **options),
        (2, *size),
    )
    for name, (trap, options, kernel) in LAYERS.items()
    for size in IMAGES
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@every(RECTANGLES)
def test_a_rectangular_image_keeps_its_axes(case: Case, dtype: torch.dtype) -> None:
    conv, x = case.model(dtype), case.samples(dtype)
    y = lf.conv_to_linear(conv, case.size[1:])(x.flatten(1))
    assert_equals(y, nn.Sequential(conv, nn.Flatten()), x, case.trap)


@every(RECTANGLES)
def test_the_columns_are_the_images_of_the_unit_vectors(case: Case) -> None:
    conv = case.model()
    unit = torch.eye(2 * 8 * 9, dtype=torch.float64).view(-1, *case.size)
    with torch.no_grad():
        zero = conv(torch.zeros_like(unit[:1]))
        columns = F.conv2d(
            unit, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups
        )
    linear = lf.conv_to_linear(conv, case.size[1:])
    # An element of the matrix is an element of the kernel or zero: nothing is rounded.
    assert torch.equal(linear.weight, columns.flatten(1).T), case.trap
    assert torch.equal(linear.bias, zero.flatten()), case.trap


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@every(RECTANGLES)
def test_a_head_behind_a_rectangular_image(case: Case, dtype: torch.dtype) -> None:
    conv, x = case.model(dtype), case.samples(dtype)
    linear = filled(nn.Linear(conv(x).flatten(1).shape[1], 5)).to(dtype)
    fused = lf.fuse_conv_linear(conv, linear, case.size[1:])
    chain = nn.Sequential(conv, nn.Flatten(), linear)
    assert_equals(fused(x.flatten(1)), chain, x, case.trap)


@pytest.mark.parametrize("name", LAYERS)
def test_turning_image_and_layer_only_renumbers_the_matrix(name: str) -> None:
    trap, options, kernel = LAYERS[name]
    groups = options.get("groups", 1)
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    weight = drawn(4, 2 // groups, *kernel, name=name)

    def turned(value: int | tuple[int, int]) -> int | tuple[int, ...]:
        return value if isinstance(value, int) else value[::-1]

    upright, _ = functional.conv_to_affine(weight, None, (8, 9), **options)
    lying, _ = functional.conv_to_affine(
        weight.mT, None, (9, 8), **{key: turned(value) for key, value in options.items()}
    )
    out = F.conv2d(torch.zeros(1, 2, 8, 9).double(), weight, **options).shape[2:]
    lying = lying.view(4, *reversed(out), 2, 9, 8).permute(0, 2, 1, 3, 5, 4)
    assert torch.equal(upright, lying.reshape(upright.shape)), trap


def test_the_assertion_of_the_request_for_convmtx2() -> None:
    """pytorch#26781: unfolding gives the matrix of the images, and one-hot images take an age."""
    kernel, image = drawn(5, 3, 4, 6, name="kernel"), drawn(3, 10, 20, name="image")
    matrix, offset = functional.conv_to_affine(kernel, None, image.shape[1:])
    want = F.conv2d(image[None], kernel)[0].flatten()
    torch.testing.assert_close(matrix @ image.flatten(), want, rtol=1e-13, atol=1e-13)
    assert not offset.any()


# Padding that is not alike at the ends ------------------------------------------------------------

# (left, right, top, bottom), as nn.ZeroPad2d has them
PADDINGS = [(2, 1, 2, 1), (0, 0, 0, 0), (1, 3, 3, 1), (2, 2, 3, 1)]


@pytest.mark.parametrize("stride", [1, 2, (2, 1)], ids=str)
@pytest.mark.parametrize("kernel", [5, (4, 3), (3, 2)], ids=str)
@pytest.mark.parametrize("padding", PADDINGS, ids=str)
def test_each_end_has_its_own_padding(padding, kernel, stride) -> None:
    trap = "one padding is asserted for both ends, or the ends change places"
    before, after, top, bottom = padding
    conv = filled(nn.Conv2d(3, 4, kernel, stride), trap)
    x = drawn(3, 3, 9, 8, name=trap)
    matrix, offset = functional.conv_to_affine(
        conv.weight, conv.bias, (9, 8), stride, (top, bottom, before, after)
    )
    chain = nn.Sequential(nn.ZeroPad2d(padding), conv, nn.Flatten())
    assert_equals(x.flatten(1) @ matrix.T + offset, chain, x, trap)
    linear = filled(nn.Linear(offset.numel(), 4))
    weight, bias = functional.fuse_conv_linear(
        conv.weight, conv.bias, linear.weight, linear.bias, (9, 8), stride,
        (top, bottom, before, after),
    )  # fmt: skip
    assert_equals(x.flatten(1) @ weight.T + bias, nn.Sequential(*chain, linear), x, trap)


def distinct_paddings(first, second) -> nn.Module:
    return nn.Sequential(
        nn.ZeroPad2d(first), nn.Conv2d(3, 4, 5, stride=2), nn.ReLU(),
        nn.ZeroPad2d(second), nn.Conv2d(4, 5, 4, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.LazyLinear(6), nn.ReLU(), nn.Linear(6, 3),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("first", "second", "rectified"),
    [
        *((first, second, False) for first in PADDINGS for second in PADDINGS),
        *((first, second, True) for first, second in itertools.pairwise([*PADDINGS, PADDINGS[0]])),
    ],
    ids=str,
)
def test_pads_of_their_own_cost_no_layer(first, second, rectified: bool) -> None:
    trap = "a pad layer that is not alike at the ends has no place in a layer with one padding"
    model, x = distinct_paddings(first, second), drawn(2, 3, 14, 12, name=trap)
    model(x.float())
    if not rectified:  # all of it is one map then, pads included
        model = nn.Sequential(*(layer for layer in model if not isinstance(layer, nn.ReLU)))
    model = filled(model, trap)
    out = collapsed(model, x)
    assert left(out.model) == (["Conv2d"] * 2 + ["Linear"] * 2 if rectified else ["Linear"]), trap
    assert_equals(out.model(x), model, x, trap)


# One axis -----------------------------------------------------------------------------------------

AUDIO = [
    Case(
        f"kernel {kernel}, padding {padding}, stride {stride}",
        "one axis is treated as an image of height one, and its padding lands on the wrong axis",
        lambda layer=(1, 1, kernel, stride, padding): nn.Sequential(
            nn.Conv1d(*layer), nn.ReLU(), nn.Conv1d(*layer), nn.ReLU(), nn.Conv1d(*layer),
            nn.Flatten(), nn.LazyLinear(2),
        ),
        (1, 173),
    )
    for kernel, padding, stride in itertools.product((3, 4), (0, 1), (2, 3))
]  # fmt: skip


def built(case: Case) -> tuple[nn.Module, Tensor]:
    """A network whose head takes its size from the samples."""
    model, x = case.build(), case.samples()
    model(x.float())
    return filled(model, case.name), x


@every(AUDIO)
def test_audio(case: Case) -> None:
    model, x = built(case)
    first, third, head = model[0], model[4], model[6]
    y = lf.conv_to_linear(first, 173)(x.flatten(1))
    assert_equals(y, nn.Sequential(first, nn.Flatten()), x, case.trap)
    inner = model[:4](x).detach()
    fused = lf.fuse_conv_linear(third, head, inner.shape[2])
    assert_equals(fused(inner.flatten(1)), model[4:], inner, case.trap)
    out = collapsed(model, x)
    assert left(out.model)[-1] == "Linear" and len(left(out.model)) == 3, case.trap
    assert_equals(out.model(x), model, x, case.trap)


# Networks -----------------------------------------------------------------------------------------


def network(layers: int, padding: int, stride: int, head: bool) -> nn.Module:
    channels = [1, *[3] * layers]
    convs = [nn.Conv2d(i, o, 4, stride, padding) for i, o in itertools.pairwise(channels)]
    tail = [nn.LazyLinear(16), nn.Linear(16, 10)] if head else []
    return nn.Sequential(*convs, nn.Flatten(), *tail)


NETWORKS = [
    Case(
        f"{layers} layers, padding {padding}, stride {stride}{', head' if head else ''}",
        "strides multiply and padding is scaled by the stride before it, at the rim as well",
        lambda arguments=(layers, padding, stride, head): network(*arguments),
        (1, 20, 17),
    )
    for layers, padding, stride, head in itertools.product((1, 2, 3), (1, 2), (1, 3), (False, True))
]


@every(NETWORKS)
def test_a_linear_network_is_one_layer(case: Case) -> None:
    model, x = built(case)
    out = collapsed(model, x)
    assert len(left(out.model)) == 1, case.trap
    assert_equals(out.model(x), model, x, case.trap)


class ShortCut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.first = nn.Conv2d(3, 3, 4, stride=2, padding=1)
        self.short = nn.Conv2d(3, 3, 4, stride=2, padding=1)
        self.second = nn.Conv2d(3, 3, 4, stride=2, padding=1)
        self.head = nn.Linear(3 * 3 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(self.norm(x)))
        y += self.short(x)
        return self.head(F.relu(self.second(F.relu(y))).flatten(1))


def test_a_residual_network_on_a_rectangle() -> None:
    trap = "a sum in place writes over what the ReLU put out; the norm's shift meets padding"
    model, x = filled(ShortCut(), trap), drawn(3, 3, 14, 16, name=trap)
    out = collapsed(model, x)
    assert left(out.model) == ["BiasMap", "Conv2d", "add", "Conv2d", "Linear"], trap
    assert_equals(out.model(x), model, x, trap)
