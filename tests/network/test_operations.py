"""Every operation that READERS knows computes what torch computes, as maps of one sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linfuse_ext.network.capture import capture
from linfuse_ext.network.constants import Constants
from linfuse_ext.network.maps import Convolution, Dense, Diagonal, Operator, View, dense
from linfuse_ext.network.stretches import Graph, Step

torch.manual_seed(0)


def random(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64) - 0.5


class Module(nn.Module):
    """A function with constants, which are buffers."""

    def __init__(self, function: Callable[..., Any], constants: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.function = function
        self.count = len(constants)
        for n, constant in enumerate(constants):
            self.register_buffer(f"c{n}", constant)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *(getattr(self, f"c{n}") for n in range(self.count)))


def steps_of(
    function: Callable[..., Any], shape: tuple[int, ...], *constants: Tensor
) -> list[Step]:
    module = Module(function, constants).double().eval()
    captured = capture(module, random(2, *shape))
    graph = Graph(captured.module, Constants(captured.module))
    return list(graph.steps.values())


def case(name: str, function: Any, shape: tuple[int, ...], kind: Any, *constants: Tensor) -> Any:
    return pytest.param(function, shape, kind, constants, id=name)


IMAGE = (6, 5, 4)
W3 = random(4, 6, 3, 2)
B4 = random(4)

ONE_OPERATION = [
    case("conv1d", lambda x, w: F.conv1d(x, w, stride=2), (3, 9), Convolution, random(4, 3, 3)),
    case("conv2d", lambda x, w, b: F.conv2d(x, w, b, padding=(1, 0)), IMAGE, Convolution, W3, B4),
    case("conv2d_same", lambda x, w: F.conv2d(x, w, padding="same"), IMAGE, Convolution, W3),
    case("conv2d_valid", lambda x, w: F.conv2d(x, w, padding="valid"), IMAGE, Convolution, W3),
    case("conv2d_groups", lambda x, w: F.conv2d(x, w, groups=2), IMAGE, Convolution,
         random(4, 3, 2, 2)),
    case("conv3d", lambda x, w: F.conv3d(x, w), (2, 3, 4, 5), Convolution, random(3, 2, 2, 2, 2)),
    case("conv_transpose1d", lambda x, w: F.conv_transpose1d(x, w, stride=2), (3, 4), Convolution,
         random(3, 2, 3)),
    case("conv_transpose2d",
         lambda x, w, b: F.conv_transpose2d(x, w, b, 2, 1, output_padding=1, groups=2), IMAGE,
         Convolution, random(6, 2, 3, 3), B4),
    case("conv_transpose3d", lambda x, w: F.conv_transpose3d(x, w), (2, 2, 2, 2), Convolution,
         random(2, 3, 2, 2, 2)),
    case("linear", lambda x, w, b: F.linear(x, w, b), (6,), Dense, random(3, 6), random(3)),
    case("linear_last_axis", lambda x, w: F.linear(x, w), (4, 6), Dense, random(3, 6)),
    case("matmul", lambda x, w: x @ w, (6,), Dense, random(6, 3)),
    case("matmul_last_axis", lambda x, w: x @ w, (2, 4, 6), Dense, random(6, 3)),
    case("matmul_from_left", lambda x, w: w @ x, (4, 6), Operator, random(3, 4)),
    case("addmm", lambda x, w, b: torch.addmm(b, x, w), (6,), Dense, random(6, 3), random(3)),
    case("batch_norm",
         lambda x, m, v, w, b: F.batch_norm(x, m, v + 1, w, b), IMAGE, Diagonal,
         *(random(6) for _ in range(4))),
    case("batch_norm_of_features", lambda x, m, v: F.batch_norm(x, m, v + 1), (6,), Diagonal,
         random(6), random(6)),
    case("avg_pool1d", lambda x: F.avg_pool1d(x, 3, 2, 1), (6, 9), Convolution),
    case("avg_pool2d", lambda x: F.avg_pool2d(x, (2, 3), 1, (0, 1)), IMAGE, Convolution),
    case("avg_pool3d", lambda x: F.avg_pool3d(x, 2), (2, 4, 4, 4), Convolution),
    case("avg_pool_divisor", lambda x: F.avg_pool2d(x, 2, 1, 1, False, False, 3), IMAGE,
         Convolution),
    case("avg_pool_not_counting", lambda x: F.avg_pool2d(x, 3, 1, 1, False, False), IMAGE,
         Operator),
    case("avg_pool_ceil", lambda x: F.avg_pool2d(x, 2, 2, 0, True), IMAGE, Operator),
    case("avg_pool_ceil_adds_none", lambda x: F.avg_pool2d(x, 2, 2, 0, True), (6, 4, 4),
         Convolution),
    case("adaptive", lambda x: F.adaptive_avg_pool2d(x, (5, 2)), IMAGE, Convolution),
    case("adaptive_uneven", lambda x: F.adaptive_avg_pool2d(x, (3, 3)), IMAGE, Operator),
    case("adaptive1d", lambda x: F.adaptive_avg_pool1d(x, 3), (6, 9), Convolution),
    case("mean_keepdim", lambda x: x.mean((2, 3), keepdim=True), IMAGE, Convolution),
    case("mean_of_one_axis", lambda x: x.mean(-1), IMAGE, Operator),
    case("sum", lambda x: x.sum((2, 3), keepdim=True), IMAGE, Convolution),
    case("flatten", lambda x: x.flatten(1), IMAGE, View),
    case("flatten_some", lambda x: x.flatten(2), IMAGE, View),
    case("reshape", lambda x: x.reshape(x.shape[0], 12, -1), IMAGE, View),
    case("view", lambda x: x.view(-1, 120), IMAGE, View),
    case("unflatten", lambda x: x.unflatten(1, (2, 3)), IMAGE, View),
    case("squeeze", lambda x: x.squeeze(2), (6, 1, 4), View),
    case("unsqueeze", lambda x: x.unsqueeze(1), IMAGE, View),
    case("permute", lambda x: x.permute(0, 2, 3, 1), IMAGE, Operator),
    case("permute_of_ones", lambda x: x.permute(0, 2, 3, 1), (6, 1, 1), View),
    case("transpose", lambda x: x.transpose(1, -1), IMAGE, Operator),
    case("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), (12, 3, 2), Convolution),
    case("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2), (3, 4, 6), Convolution),
    case("channel_shuffle", lambda x: F.channel_shuffle(x, 3), IMAGE, Convolution),
    case("pad", lambda x: F.pad(x, (1, 2, 0, 1)), IMAGE, Convolution),
    case("pad_one_axis", lambda x: F.pad(x, (1, 2)), IMAGE, Convolution),
    case("pad_channels", lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)), IMAGE, Operator),
    case("pad_negative", lambda x: F.pad(x, (-1, 2, 0, -1)), IMAGE, Operator),
    case("pad_value", lambda x: F.pad(x, (1, 2, 0, 1), value=3.0), IMAGE, Operator),
    case("pad_reflect", lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"), IMAGE, Convolution),
    case("pad_replicate", lambda x: F.pad(x, (1, 2, 0, 1), mode="replicate"), IMAGE, Convolution),
    case("pad_circular", lambda x: F.pad(x, (1, 2, 0, 1), mode="circular"), IMAGE, Convolution),
    case("nearest", lambda x: F.interpolate(x, scale_factor=(2, 3)), IMAGE, Convolution),
    case("nearest_uneven", lambda x: F.interpolate(x, size=(7, 9)), IMAGE, Operator),
    case("nearest_fraction", lambda x: F.interpolate(x, scale_factor=2.1), (2, 4, 4), Operator),
    case("nearest1d", lambda x: F.interpolate(x, scale_factor=2), (6, 4), Convolution),
    case("nearest_exact", lambda x: F.interpolate(x, size=(7, 9), mode="nearest-exact"), IMAGE,
         Operator),
    case("bilinear", lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), IMAGE, Operator),
    case("bilinear_corners",
         lambda x: F.interpolate(x, size=(7, 9), mode="bilinear", align_corners=True), IMAGE,
         Operator),
    case("bicubic", lambda x: F.interpolate(x, size=(7, 9), mode="bicubic"), IMAGE, Operator),
    case("linear1d", lambda x: F.interpolate(x, size=9, mode="linear"), (6, 4), Operator),
    case("trilinear", lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"), (2, 2, 3, 2),
         Operator),
    case("slice_of_channels", lambda x: x[:, 1:5:2], IMAGE, Convolution),
    case("slice_of_positions", lambda x: x[:, :, 1:-1], IMAGE, Operator),
    case("select_feature", lambda x: x[:, 2], (6,), Operator),
    case("select_position", lambda x: x[:, :, :, 0], IMAGE, Operator),
    case("index_select", lambda x, i: x.index_select(1, i), IMAGE, Convolution,
         torch.tensor([2, 0, 2])),
    case("index", lambda x, i: x[:, :, i], IMAGE, Operator, torch.tensor([2, 0])),
    case("index_of_channels", lambda x, i: x[:, i], IMAGE, Convolution, torch.tensor([2, 0])),
    case("repeat_interleave", lambda x: x.repeat_interleave(2, 3), IMAGE, Operator),
    case("repeat_interleave_of_channels", lambda x: x.repeat_interleave(2, 1), IMAGE, Convolution),
    case("flip", lambda x: x.flip(2, 3), IMAGE, Operator),
    case("flip_of_channels", lambda x: x.flip(1), IMAGE, Convolution),
    case("roll", lambda x: x.roll(1, 2), IMAGE, Operator),
    case("cumsum", lambda x: x.cumsum(2), IMAGE, Operator),
    case("expand", lambda x: x.expand(-1, 6, 5, 4), (6, 1, 4), Operator),
    case("repeat", lambda x: x.repeat(1, 2, 1, 3), IMAGE, Operator),
    case("add_number", lambda x: x + 3, IMAGE, Diagonal),
    case("add_channels", lambda x, c: c + x, IMAGE, Diagonal, random(6, 1, 1)),
    case("add_positions", lambda x, c: x + c, IMAGE, Diagonal, random(5, 4)),
    case("add_alpha", lambda x, c: torch.add(x, c, alpha=3), IMAGE, Diagonal, random(1, 6, 5, 4)),
    case("sub", lambda x, c: x - c, IMAGE, Diagonal, random(4)),
    case("rsub", lambda x: 2 - x, IMAGE, Diagonal),
    case("sub_from", lambda x, c: c - x, IMAGE, Diagonal, random(4)),
    case("mul", lambda x, c: x * c, IMAGE, Diagonal, random(6, 1, 4)),
    case("div", lambda x, c: x / c, IMAGE, Diagonal, random(6, 1, 1) + 2),
    case("div_number", lambda x: x / 3, IMAGE, Diagonal),
    case("neg", lambda x: -x, IMAGE, Diagonal),
    case("unfold", lambda x: F.unfold(x, 2), IMAGE, Operator),
    case("fold", lambda x: F.fold(x, (3, 3), 2), (12, 4), Operator),
]  # fmt: skip

SEVERAL = [
    case("mean", lambda x: x.mean((2, 3)), IMAGE, [Convolution, View]),
    case("select_channel", lambda x: x[:, 2], IMAGE, [Convolution, View]),
    case("mul_that_spreads", lambda x, c: x * c, (6, 1, 4), [Operator, Diagonal], random(5, 1)),
]


def holds(step: Step, function: Callable[..., Any], constants: tuple[Tensor, ...]) -> None:
    (_, maps), *others = step.operands
    assert not others
    matrix, offset = dense(maps)
    x = random(3, *maps[0].in_shape)
    want = function(x, *constants)
    got = x.flatten(1) @ matrix.T
    got = got if offset is None else got + offset
    torch.testing.assert_close(got.reshape(want.shape), want, rtol=1e-12, atol=1e-12)
    backward = torch.eye(maps[-1].rows, dtype=torch.float64)
    for affine in reversed(maps):
        backward = affine.apply_adjoint(backward)
    torch.testing.assert_close(backward, matrix, rtol=1e-12, atol=1e-12)
    assert maps[-1].out_shape == tuple(want.shape[1:])


@pytest.mark.parametrize(("function", "shape", "kind", "constants"), ONE_OPERATION)
def test_an_operation_is_one_map(
    function: Any, shape: tuple[int, ...], kind: Any, constants: tuple[Tensor, ...]
) -> None:
    *_, step = steps_of(function, shape, *constants)
    assert [type(affine) for affine in step.operands[0][1]] == [kind]
    holds(step, function, constants)


@pytest.mark.parametrize(("function", "shape", "kinds", "constants"), SEVERAL)
def test_an_operation_is_several_maps(
    function: Any, shape: tuple[int, ...], kinds: Any, constants: tuple[Tensor, ...]
) -> None:
    *_, step = steps_of(function, shape, *constants)
    assert [type(affine) for affine in step.operands[0][1]] == kinds
    holds(step, function, constants)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.dropout(x, 0.5, False),
        lambda x: x.contiguous().clone(),
        lambda x: x.to(torch.float64),
        lambda x: x[:],
        lambda x: F.pad(x, (0, 0)),
        lambda x: x.reshape(x.shape),
    ],
    ids=["dropout", "clone", "to", "slice", "pad", "reshape"],
)
def test_what_changes_nothing_is_known_to(function: Any) -> None:
    assert all(step.is_nothing for step in steps_of(function, IMAGE))


NOT_AFFINE = {
    "square": lambda x: x * x,
    "relu": lambda x: x.relu(),
    "softmax": lambda x: x.softmax(1),
    "divided_by": lambda x: x.reciprocal(),
    "max_pool": lambda x: F.max_pool2d(x, 2),
    "round": lambda x: torch.div(x, 2, rounding_mode="floor"),
    "batch_norm_of_the_batch": lambda x: F.batch_norm(x, None, None, training=True),
    "mean_of_the_batch": lambda x: x.mean(0, keepdim=True),
    "mean_of_all": lambda x: x.mean(),
    "flip_of_the_batch": lambda x: x.flip(0),
    "roll_of_all": lambda x: x.roll(1),
    "cumsum_over_the_batch": lambda x: x.cumsum(0),
    "transpose_with_the_batch": lambda x: x.transpose(0, 1),
    "batch_into_channels": lambda x: x.reshape(-1, 5, 4),
    "roll_of_the_batch": lambda x: x.roll(1, 0),
    "repeat_of_the_batch": lambda x: x.repeat(2, 1, 1, 1),
    "less_precise": lambda x: x.float(),
    "dropout_in_training": lambda x: F.dropout(x, 0.5, True),
}


@pytest.mark.parametrize("function", NOT_AFFINE.values(), ids=NOT_AFFINE)
def test_what_is_not_affine_in_each_sample_is_not_read(function: Any) -> None:
    assert steps_of(function, IMAGE) == []


def test_a_scale_for_each_sample_of_a_fixed_batch_is_not_read() -> None:
    module = Module(lambda x, c: x * c, (random(2, 1, 1, 1),)).eval()
    program = torch.export.export(module, (random(2, *IMAGE),))
    captured = capture(program, None)
    assert not Graph(captured.module, Constants(captured.module)).steps
