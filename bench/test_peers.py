"""Every peer computes what the layers compute, on tiny layers in float64."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from bench.cases import Case
from bench.layers import Layer, Pair, load_layers, load_pairs
from bench.ops import CONV_CONV, CSR, FUSE, LINEAR_CONV, MATRIX, OPS
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
ON_LAYERS = (FUSE, MATRIX, CSR, LINEAR_CONV)
WAYS = [(op, name) for op in ON_LAYERS for name in ("ours", *OPS[op].peers)]


def _shape(op: str, layer: Layer) -> tuple[int, int]:
    if op == FUSE:
        return layer.dense, layer.cols
    return layer.rows, layer.dense if op == LINEAR_CONV else layer.cols


@pytest.mark.parametrize(("op", "name"), WAYS, ids=[f"{op}-{name}" for op, name in WAYS])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_peer_is_exact(layer: Layer, op: str, name: str) -> None:
    peer, case = OPS[op].peers.get(name), Case(op, layer, "float64")
    if peer and layer.transposed and not peer.transposed:
        pytest.skip("not made for a transposed convolution")
    if peer and peer.package and importlib.util.find_spec(peer.package) is None:
        pytest.skip(f"{peer.package} is not installed")
    inputs = case.inputs()
    weight, bias = case.call(name, inputs)()
    assert weight.shape == _shape(op, layer) and bias.shape == weight.shape[:1]
    assert weight.layout == (torch.sparse_csr if op == CSR else torch.strided)
    assert op == CSR or weight.is_contiguous()
    assert weight.dtype == torch.float64
    case.check((weight, bias), inputs)


@pytest.mark.parametrize("name", ["ours", *OPS[CONV_CONV].peers])
@pytest.mark.parametrize("pair", load_pairs().values(), ids=lambda pair: pair.name)
def test_peer_of_pairs_is_exact(pair: Pair, name: str) -> None:
    case = Case(CONV_CONV, pair, "float64")
    inputs = case.inputs()
    weight, bias = case.call(name, inputs)()
    assert weight.shape == pair.merged.weight_shape and weight.is_contiguous()
    case.check((weight, bias), inputs)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_a_block_is_the_first_rows(layer: Layer) -> None:
    block = layer.in_blocks(torch.float64, layer.matrix_bytes(torch.float64) / 3)
    assert 0 < block.made_rows < layer.rows
    case, whole = Case(MATRIX, block, "float64"), Case(MATRIX, layer, "float64")
    result = case.call("ours", case.inputs())()
    assert torch.equal(result[0], whole.call("ours", case.inputs())()[0][: block.made_rows])
    assert case.call("zeros", case.inputs())().shape == result[0].shape
    case.check(result, case.inputs())


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_the_floor_of_csr_is_its_memory(layer: Layer) -> None:
    case = Case(CSR, layer, "float64")
    matrix, _ = case.call("ours", case.inputs())()
    made = (matrix.values(), matrix.col_indices(), matrix.crow_indices())
    floor = case.call("zeros", case.inputs())()
    assert [t.shape for t in made] == [t.shape for t in floor]
    assert [t.dtype for t in made] == [t.dtype for t in floor]
    assert sum(t.nbytes for t in made) == layer.csr_bytes(torch.float64)


@pytest.mark.parametrize("layer", [*LAYERS, *load_layers().values()], ids=lambda layer: layer.name)
def test_sizes_are_those_of_torch(layer: Layer) -> None:
    x = torch.empty(1, layer.in_channels, *layer.input_size, device="meta")
    weight = torch.empty(layer.weight_shape, device="meta")
    assert conv(layer, x, weight).shape == (1, layer.out_channels, *layer.output_size)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_valid_taps_are_the_elements_of_the_matrix(layer: Layer) -> None:
    case = Case(MATRIX, layer, "float64")
    matrix, _ = case.call("adjoint", case.inputs())()
    assert matrix.count_nonzero() == layer.channel_pairs * layer.valid_taps == layer.stored
    assert layer.valid_taps <= layer.nominal_taps
