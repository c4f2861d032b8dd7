"""The ops that are benchmarked: what each takes, who else does it, whether a result is right.

A result is right if it maps random inputs as the layers do that it stands for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor

from bench import costs, merge_peers, peers, sparse_peers
from bench.layers import Layer, Pair

FUSE, MATRIX, CSR = "fuse_conv_linear", "conv_to_affine", "conv_to_csr"
LINEAR_CONV, CONV_CONV = "fuse_linear_conv", "fuse_conv_conv"

Tensors = tuple[Tensor, ...]
_CHECK_CHUNK_BYTES = 256e6


@dataclass(frozen=True)
class Peer:
    """One way of doing an op; `cost` is None for the ways that are always worth measuring.

    A way that would take more than `patience` seconds a call is left out.
    """

    run: Callable[..., peers.Affine]
    cost: costs.Rule | None = None
    patience: float = inf
    package: str | None = None
    transposed: bool = True


@dataclass(frozen=True)
class Op:
    """An op of ours.

    Attributes:
        name: Of the op.
        tensors: ``(layer, dtype, device, seed)`` to its operands.
        ours: ``(layer, *operands)`` to its result.
        work: ``(layer, dtype)`` to what a row says about the work.
        features: ``layer`` to the shape of one input of the layers.
        layers: ``(layer, x, *operands)`` to what the layers make of a batch x.
        merged: ``(layer, x, *result)`` to what the result makes of it.
        peers: The other ways.
        rivals: Those of them that count; all of them if empty.
        floor: The same memory by torch.zeros, where that says something.
        seconds: How long a group of this op is measured on a CPU.
    """

    name: str
    tensors: Callable[[Any, torch.dtype, str, int], Tensors]
    ours: Callable[..., peers.Affine]
    work: Callable[[Any, torch.dtype], dict[str, float]]
    features: Callable[[Any], tuple[int, ...]]
    layers: Callable[..., Tensor]
    merged: Callable[..., Tensor]
    peers: Mapping[str, Peer]
    rivals: tuple[str, ...] = ()
    floor: Callable[..., Any] | None = None
    seconds: float = 1.2


# --- ours --------------------------------------------------------------------------------------


def _settings(layer: Layer) -> tuple[Any, ...]:
    return layer.input_size, layer.stride, layer.padding, layer.dilation, layer.groups


@functools.cache
def _function(name: str) -> Callable[..., peers.Affine]:
    """Found once: importing it takes a tenth of a call on a tiny layer."""
    from linfuse_ext import functional

    return getattr(functional, name)  # type: ignore[no-any-return]


def ours_on_layer(name: str, **more: Any) -> Callable[..., peers.Affine]:
    def run(layer: Layer, *tensors: Tensor) -> peers.Affine:
        settings = _settings(layer)
        return _function(name)(*tensors, *settings, transposed=layer.transposed, **more)

    return run


def _ours_matrix(layer: Layer, cw: Tensor, cb: Tensor) -> peers.Affine:
    return _function(MATRIX)(
        cw, cb, *_settings(layer), transposed=layer.transposed,
        rows=None if layer.block is None else (0, layer.block),
    )  # fmt: skip


def _ours_pair(pair: Pair, *tensors: Tensor) -> peers.Affine:
    one, two = pair.first, pair.second
    return _function(CONV_CONV)(
        *tensors,
        first_stride=one.stride, first_padding=one.padding, first_dilation=one.dilation,
        first_groups=one.groups, second_stride=two.stride, second_padding=two.padding,
        second_dilation=two.dilation, second_groups=two.groups,
    )  # fmt: skip


# --- what the layers, and what the results, make of a batch -------------------------------------


def _apply(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """``x @ weight.T + bias`` in the dtype of x, some rows at a time to hold no second copy."""
    if weight.layout == torch.sparse_csr:
        return (weight.to(x.dtype) @ x.T).T + bias.to(x.dtype)
    rows = max(1, int(_CHECK_CHUNK_BYTES / (weight.shape[1] * x.element_size())))
    parts = [x @ part.to(x.dtype).T for part in weight.split(rows)]
    return torch.cat(parts, 1) + bias.to(x.dtype)


def _conv(layer: Layer, x: Tensor, cw: Tensor, cb: Tensor) -> Tensor:
    y = peers.conv(layer, x, cw.to(x.dtype), cb.to(x.dtype)).flatten(1)
    return y[:, : layer.made_rows]


def _conv_linear(layer: Layer, x: Tensor, cw: Tensor, cb: Tensor, lw: Tensor, lb: Tensor) -> Tensor:
    return _apply(lw, lb, _conv(layer, x, cw, cb))


def _linear_conv(layer: Layer, x: Tensor, lw: Tensor, lb: Tensor, cw: Tensor, cb: Tensor) -> Tensor:
    images = _apply(lw, lb, x).view(-1, layer.in_channels, *layer.input_size)
    return _conv(layer, images, cw, cb)


def _conv_conv(pair: Pair, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    between = peers.conv(pair.first, x, w1.to(x.dtype), b1.to(x.dtype))
    return peers.conv(pair.second, between, w2.to(x.dtype), b2.to(x.dtype))


def _merged_linear(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _apply(weight, bias, x.flatten(1))


def _merged_conv(pair: Pair, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return peers.conv(pair.merged, x, weight.to(x.dtype), bias.to(x.dtype))


def _image(layer: Layer) -> tuple[int, ...]:
    return layer.in_channels, *layer.input_size


# --- the table ---------------------------------------------------------------------------------


def _fuse_work(layer: Layer, dtype: torch.dtype) -> dict[str, float]:
    return {
        "gflop": layer.fuse_flops() / 1e9,
        "gflop_valid": layer.fuse_flops(valid_only=True) / 1e9,
        "group_channels": min(layer.in_channels, layer.out_channels) // layer.groups,
    }


def _zeros(layer: Layer, cw: Tensor, cb: Tensor) -> Tensor:
    return torch.zeros(layer.made_rows, layer.cols, dtype=cw.dtype, device=cw.device)


# Seconds a call. Small layers show how slow the slow ways are; the gist's loops have few of them.
_SLOW, _SLOWEST = 0.1, 3.0

OPS = {
    op.name: op
    for op in (
        Op(
            name=FUSE,
            tensors=lambda layer, dtype, device, seed: (
                layer.conv_tensors(dtype, device, 2 * seed)
                + layer.linear_tensors(dtype, device, 2 * seed + 1)
            ),
            ours=ours_on_layer(FUSE),
            work=_fuse_work,
            features=_image,
            layers=_conv_linear,
            merged=_merged_linear,
            peers={
                "adjoint": Peer(peers.fuse_adjoint),
                "conv_input": Peer(peers.fuse_conv_input, transposed=False),
                "jacrev": Peer(peers.fuse_jacrev, costs.fuse_jacrev, _SLOW),
                "one_hot": Peer(peers.fuse_one_hot, costs.fuse_one_hot, _SLOW),
                "einconv": Peer(
                    peers.fuse_einconv, costs.fuse_einconv, _SLOW, "einconv", transposed=False
                ),
                "indexed_write": Peer(peers.fuse_indexed_write, costs.fuse_indexed_write, _SLOW),
                "gist_loops": Peer(peers.fuse_gist_loops, costs.fuse_gist_loops, _SLOWEST),
            },
            rivals=("adjoint", "conv_input"),
            seconds=3.0,
        ),
        Op(
            name=MATRIX,
            tensors=lambda layer, dtype, device, seed: layer.conv_tensors(dtype, device, 2 * seed),
            ours=_ours_matrix,
            work=lambda layer, dtype: {"gb": layer.matrix_bytes(dtype) / 1e9},
            features=_image,
            layers=_conv,
            merged=_merged_linear,
            peers={
                "indexed_write": Peer(
                    peers.matrix_indexed_write, costs.matrix_indexed_write, _SLOWEST
                ),
                "adjoint": Peer(peers.matrix_adjoint, costs.matrix_adjoint, _SLOW),
                "one_hot": Peer(peers.matrix_one_hot, costs.matrix_one_hot, _SLOW),
                "jacrev": Peer(peers.matrix_jacrev, costs.matrix_jacrev, _SLOW),
                "einconv": Peer(peers.matrix_einconv, costs.matrix_einconv, _SLOW, "einconv"),
                "gist_loops": Peer(peers.matrix_gist_loops, costs.matrix_gist_loops, _SLOWEST),
            },
            floor=_zeros,
            seconds=1.5,
        ),
        Op(
            name=CSR,
            tensors=lambda layer, dtype, device, seed: layer.conv_tensors(dtype, device, 2 * seed),
            ours=ours_on_layer(MATRIX, layout=torch.sparse_csr),
            work=lambda layer, dtype: {"gb": layer.csr_bytes(dtype) / 1e9},
            features=_image,
            layers=_conv,
            merged=_merged_linear,
            peers={
                "dense": Peer(sparse_peers.csr_dense, costs.csr_dense, _SLOW),
                "coalesce": Peer(sparse_peers.csr_coalesce, costs.csr_coalesce, 1.0),
            },
            floor=sparse_peers.csr_zeros,
            seconds=1.0,
        ),
        Op(
            name=LINEAR_CONV,
            tensors=lambda layer, dtype, device, seed: (
                layer.front_tensors(dtype, device, 2 * seed + 1)
                + layer.conv_tensors(dtype, device, 2 * seed)
            ),
            ours=ours_on_layer(LINEAR_CONV),
            work=_fuse_work,
            features=lambda layer: (layer.dense,),
            layers=_linear_conv,
            merged=_merged_linear,
            peers={"forward": Peer(merge_peers.linear_conv_forward)},
        ),
        Op(
            name=CONV_CONV,
            tensors=lambda pair, dtype, device, seed: pair.tensors(dtype, device, seed),
            ours=_ours_pair,
            work=lambda pair, dtype: {"gflop": pair.flops() / 1e9},
            features=lambda pair: _image(pair.first),
            layers=_conv_conv,
            merged=_merged_conv,
            peers={
                "float64": Peer(merge_peers.conv_conv_float64),
                "kernels": Peer(merge_peers.conv_conv_kernels),
            },
            rivals=("float64",),
            seconds=0.8,
        ),
    )
}
