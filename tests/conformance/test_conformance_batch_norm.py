"""BatchNorm behind layers and in front of them, where the known folds break.

Grouped transposed convolutions: pytorch#180995, ultralytics#25364, onnx/optimizer#106, executorch
#22517. BatchNorm without weight and bias: the fold of torch.nn.utils.fusion for Linear takes both
for granted. In front of padding: SlimONNX calls the shift "not supported".
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conformance_nets import (
    BATCH_NORMS,
    CONVOLUTIONS,
    TRANSPOSED,
    assert_differs,
    assert_equals,
    collapsed,
    drawn,
    filled,
    left,
    parameter_bytes,
)
from torch import nn

import linfuse_ext as lf

SIZES = {1: (7,), 2: (5, 4), 3: (3, 4, 2)}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("extra", [0, 1], ids=["", "output_padding"])
@pytest.mark.parametrize(
    ("groups", "channels"), [(1, (4, 6)), (2, (4, 4)), (2, (4, 6)), (4, (4, 4)), (2, (4, 2))]
)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_grouped_transposed_convolution(axes, groups, channels, extra, bias) -> None:
    trap = "the scale goes along the weight's first axis, or along C_out / groups of the second"
    conv = TRANSPOSED[axes](*channels, 3, 2, 1, extra, groups, bias)
    model = filled(nn.Sequential(conv, BATCH_NORMS[axes](channels[1])), trap)
    x = drawn(2, channels[0], *SIZES[axes], name=trap)
    fused = lf.fuse_bn(*model)
    assert type(fused) is TRANSPOSED[axes] and fused.groups == groups and fused.bias is not None
    assert_equals(fused(x), model, x, trap)


def test_the_scale_along_the_first_axis_raises_no_error_and_is_wrong() -> None:
    """As many channels in as out: what a fold for convolutions does fits the weight's shape."""
    conv, bn = filled(
        nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=2), nn.BatchNorm2d(4)), "first axis"
    )
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    right = lf.fuse_bn(conv, bn).weight
    assert_differs(conv.weight * scale.view(-1, 1, 1, 1), right, "channels in scaled, not out")


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_network_with_a_transposed_convolution_and_a_norm(groups: int) -> None:
    trap = "the graph pass raises on groups, or takes the norm of one group for all (180995)"
    model = nn.Sequential(
        nn.ConvTranspose2d(4, 4, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(4)
    )
    model, x = filled(model, trap), drawn(2, 4, 6, 5, name=trap)
    out = collapsed(model, x, max_bytes=parameter_bytes(lf.fuse_bn(*model)))
    assert left(out.model) == ["ConvTranspose2d"], trap
    assert_equals(out.model(x), model, x, trap)


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(4, 6), ()),
    "Linear without bias": (lambda: nn.Linear(4, 6, bias=False), ()),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, 2, 2), (7,)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (2, 0)), (8, 9)),
    "Conv2d without bias, grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (9, 8)),
    "Conv2d, depthwise": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), (5, 6)),
    "Conv3d": (lambda: nn.Conv3d(4, 2, (2, 3, 1), padding=1), (4, 3, 5)),
}
NORMS: dict[str, dict[str, Any]] = {
    "affine": {},
    "affine=False": {"affine": False},
    "large eps": {"eps": 0.3},
    "affine=False, large eps": {"affine": False, "eps": 0.3},
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_norm_behind_a_layer(layer: str, norm: str) -> None:
    trap = "a norm without weight and bias has None there, and eps belongs under the root"
    build, size = LAYERS[layer]
    first = build()
    outs = first.out_features if isinstance(first, nn.Linear) else first.out_channels
    model = filled(nn.Sequential(first, BATCH_NORMS[max(1, len(size))](outs, **NORMS[norm])), trap)
    x = drawn(3, 4, *size, name=trap)
    fused = lf.fuse_bn(*model)
    assert type(fused) is type(first)
    assert_equals(fused(x), model, x, trap)
    single = lf.fuse_bn(*model.float())
    assert_equals(single(x.float()), model, x.float(), trap)


@pytest.mark.parametrize("layer", ["Linear", "Conv1d", "Conv2d", "Conv3d"])
def test_a_network_of_a_layer_and_a_norm_without_parameters(layer: str) -> None:
    trap = "the passes look for the norm's weight node and fail on None"
    build, size = LAYERS[layer]
    first = build()
    outs = first.out_features if layer == "Linear" else first.out_channels
    model = nn.Sequential(first, BATCH_NORMS[max(1, len(size))](outs, affine=False))
    model, x = filled(model, trap), drawn(3, 4, *size, name=trap)
    out = collapsed(model, x, max_bytes=parameter_bytes(lf.fuse_bn(*model)))
    assert left(out.model) == [layer], trap
    assert_equals(out.model(x), model, x, trap)


# In front -----------------------------------------------------------------------------------------


def behind_norm(padding: int, shifts: bool, mode: str = "zeros", axes: int = 2) -> nn.Module:
    """A norm and a convolution; without shift the running mean and the norm's bias are zero."""
    conv = CONVOLUTIONS[axes](4, 3, 3, padding=padding, padding_mode=mode)
    model = filled(nn.Sequential(BATCH_NORMS[axes](4), conv), f"{padding} {mode}")
    if not shifts:
        model[0].running_mean.zero_()
        model[0].bias.data.zero_()
    return model


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize(
    ("padding", "shifts", "mode", "exact"),
    [
        (0, True, "zeros", True),
        (1, False, "zeros", True),
        (1, True, "zeros", False),
        (2, True, "zeros", False),
        (1, True, "circular", True),
        (1, True, "replicate", True),
    ],
)
def test_a_norm_in_front_of_a_convolution(axes, padding, shifts, mode, exact) -> None:
    trap = "the scale is always exact; the shift is not where zeros are padded that it never saw"
    model = behind_norm(padding, shifts, mode, axes)
    x = drawn(2, 4, *(size + 2 for size in SIZES[axes]), name=trap)
    if exact:
        fused = lf.fuse_bn_into(*model)
        assert_equals(fused(x), model, x, trap)
    else:
        with pytest.raises(lf.FusionError, match="the zeros are not shifted"):
            lf.fuse_bn_into(*model)


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_a_network_with_a_norm_in_front_is_exact_at_the_rim(padding: int) -> None:
    trap = "a shift in front of padding is a bias for each position, and no bias of a channel"
    model, x = behind_norm(padding, True), drawn(2, 4, 9, 8, name=trap)
    largest = 8 * (3 * 4 * 9 + 3 * (7 + 2 * padding) * (6 + 2 * padding))
    out = collapsed(model, x, max_bytes=largest)
    assert left(out.model) == ["BiasMap" if padding else "Conv2d"], trap
    assert_equals(out.model(x), model, x, trap)
    if padding:
        norm, conv = model
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias - norm.running_mean * scale
        bias = conv.bias + torch.einsum("oikl,i->o", conv.weight, shift)
        naive = torch.conv2d(x, conv.weight * scale.view(1, -1, 1, 1), bias, padding=padding)
        assert_differs(naive, model(x), trap)
        inside = (..., slice(padding, -padding), slice(padding, -padding))
        torch.testing.assert_close(naive[inside], model(x)[inside], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_in_front_of_a_linear(affine: bool) -> None:
    trap = "the order norm, then Linear, is not one of the patterns (FocalNet#5, BSConv#4)"
    model = filled(nn.Sequential(nn.BatchNorm1d(5, affine=affine), nn.Linear(5, 3)), trap)
    x = drawn(7, 5, name=trap)
    assert_equals(lf.fuse_bn_into(*model)(x), model, x, trap)
    out = collapsed(model, x)
    assert left(out.model) == ["Linear"]
    assert_equals(out.model(x), model, x, trap)


@pytest.mark.parametrize("order", list(itertools.permutations("cnp")), ids="".join)
def test_a_norm_a_convolution_and_a_pad_in_every_order(order: tuple[str, ...]) -> None:
    trap = "the zeros of a pad layer are shifted if the norm stands behind it, and only then"
    layers = {"c": nn.Conv2d(3, 3, 3), "n": nn.BatchNorm2d(3), "p": nn.ZeroPad2d((1, 2, 0, 1))}
    model, x = filled(nn.Sequential(*map(layers.get, order)), trap), drawn(2, 3, 6, 5, name=trap)
    out = collapsed(model, x)
    assert len(left(out.model)) == 1, trap
    assert_equals(out.model(x), model, x, trap)


def test_a_norm_that_trains_is_refused() -> None:
    """Who forgets eval() merges statistics that are not in use (RepVGG#9, #19, #66)."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    for merge in (lambda: lf.fuse_bn(*model), lambda: lf.collapse(model, torch.rand(2, 3, 5, 5))):
        with pytest.raises(ValueError, match=r"eval\(\)"):
            merge()
