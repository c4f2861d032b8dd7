"""Every peer computes what the layers compute, on tiny layers in float64."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from bench.cases import FUSE, MATRIX, PEERS, Case
from bench.layers import Layer, load_layers
from bench.peers import conv


def _layer(name: str, size: tuple[int, ...], kernel: tuple[int, ...], **settings) -> Layer:
    axes = len(kernel)
    defaults = {
        "in_channels": 4, "out_channels": 6, "stride": (1,) * axes, "padding": (0,) * axes,
        "dilation": (1,) * axes, "groups": 1, "transposed": False, "dense": 3,
    }  # fmt: skip
    return Layer(name=name, kernel=kernel, input_size=size, **(defaults | settings))


LAYERS = [
    _layer("rectangular", (6, 7), (3, 2), stride=(2, 1), padding=(1, 0)),
    _layer("unreached_inputs", (8, 9), (3, 3), stride=(3, 2)),
    _layer("dilated", (9, 8), (3, 2), dilation=(2, 3), padding=(2, 1)),
    _layer("grouped", (5, 6), (3, 3), groups=2, padding=(1, 1)),
    _layer("depthwise", (5, 4), (2, 3), groups=4, out_channels=8, padding=(0, 1)),
    _layer("padding_beyond_kernel", (4, 5), (2, 2), padding=(3, 2), stride=(2, 2)),
    _layer("one_axis", (11,), (4,), stride=(3,), padding=(1,)),
    _layer("three_axes", (4, 5, 3), (2, 3, 2), stride=(2, 1, 1), padding=(0, 1, 1)),
    _layer("transposed", (3, 4), (4, 3), transposed=True, stride=(2, 1), padding=(1, 0)),
    _layer("transposed_grouped", (3, 4), (3, 2), transposed=True, groups=2, dilation=(1, 2)),
]
PAIRS = [(op, name) for op in (FUSE, MATRIX) for name in PEERS[op]]


@pytest.mark.parametrize(("op", "name"), PAIRS, ids=[f"{op}-{name}" for op, name in PAIRS])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_peer_is_exact(layer: Layer, op: str, name: str) -> None:
    peer, case = PEERS[op][name], Case(op, layer, "float64")
    if layer.transposed and not peer.transposed:
        pytest.skip("not made for a transposed convolution")
    if peer.package and importlib.util.find_spec(peer.package) is None:
        pytest.skip(f"{peer.package} is not installed")
    inputs = case.inputs()
    weight, bias = case.call(name, inputs)()
    features = layer.dense if op == FUSE else layer.rows
    assert weight.shape == (features, layer.cols) and bias.shape == (features,)
    assert weight.is_contiguous() and weight.dtype == torch.float64
    case.check((weight, bias), inputs)


@pytest.mark.parametrize("layer", [*LAYERS, *load_layers().values()], ids=lambda layer: layer.name)
def test_sizes_are_those_of_torch(layer: Layer) -> None:
    x = torch.empty(1, layer.in_channels, *layer.input_size, device="meta")
    weight = torch.empty(layer.weight_shape, device="meta")
    assert conv(layer, x, weight).shape == (1, layer.out_channels, *layer.output_size)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_valid_taps_are_the_elements_of_the_matrix(layer: Layer) -> None:
    case = Case(MATRIX, layer, "float64")
    matrix, _ = case.call("adjoint", case.inputs())()
    assert matrix.count_nonzero() == layer.channel_pairs * layer.valid_taps
    assert layer.valid_taps <= layer.nominal_taps
