"""What a peer would take on a layer, estimated before it is run.

The slow ways grow as the square of the image. They are measured on small layers, where they end
soon, and left out, with the reason, where the estimate says that they would not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch

from bench.layers import Layer

MAX_BYTES = {"cpu": 8e9, "cuda": 32e9}

# Round figures of what torch reaches in these ways: they decide what is tried, not what is
# reported.
_FLOPS_PER_SECOND = {
    ("cpu", torch.float32): 75e9,
    ("cpu", torch.float64): 25e9,
    ("cuda", torch.float32): 20e12,
    ("cuda", torch.float64): 20e12,
}
_BYTES_PER_SECOND = {"cpu": 2e9, "cuda": 500e9}
_BYTES_PER_SORTED_ELEMENT = 150
_PYTHON_STEP_SECONDS = {"cpu": 8e-6, "cuda": 30e-6}


@dataclass(frozen=True)
class Cost:
    """FLOPs, bytes held at the peak, and iterations of Python loops."""

    flops: float = 0.0
    bytes: float = 0.0
    steps: float = 0.0

    def seconds(self, device: str, dtype: torch.dtype) -> float:
        """About how long that takes."""
        rate = _FLOPS_PER_SECOND.get((device, dtype), 50e9)
        return (
            self.flops / rate
            + self.bytes / _BYTES_PER_SECOND[device]
            + self.steps * _PYTHON_STEP_SECONDS[device]
        )

    def too_much(self, device: str, dtype: torch.dtype, patience: float) -> str | None:
        """Why it is not worth running, or None where it is; patience is in seconds."""
        if self.bytes > MAX_BYTES[device]:
            return f"would hold about {self.bytes / 1e9:.0f} GB"
        if self.seconds(device, dtype) > patience:
            return f"would take more than {patience:g} s a call"
        return None


Rule = Callable[[Layer, torch.dtype], Cost]


def _image_flops(layer: Layer) -> int:
    """FLOPs of the convolution, or of its adjoint, on one image."""
    return 2 * layer.channel_pairs * layer.nominal_taps


def _product_flops(layer: Layer) -> int:
    """FLOPs of linear weight @ matrix."""
    return 2 * layer.dense * layer.rows * layer.cols


def matrix_adjoint(layer: Layer, dtype: torch.dtype) -> Cost:
    """An identity of `rows`, and the matrix."""
    held = dtype.itemsize * layer.rows * (layer.rows + layer.cols)
    return Cost(layer.rows * _image_flops(layer), held)


def matrix_jacrev(layer: Layer, dtype: torch.dtype) -> Cost:
    """As the adjoint; vmap and the contiguous result each hold one more copy."""
    held = dtype.itemsize * layer.rows * (layer.rows + 2 * layer.cols)
    return Cost(layer.rows * _image_flops(layer), held)


def matrix_one_hot(layer: Layer, dtype: torch.dtype) -> Cost:
    """An identity of `cols`, the transposed matrix, and the matrix."""
    held = dtype.itemsize * layer.cols * (layer.cols + 2 * layer.rows)
    return Cost(layer.cols * _image_flops(layer), held)


def matrix_gist_loops(layer: Layer, dtype: torch.dtype) -> Cost:
    """A Python step per element that is not zero."""
    steps = layer.channel_pairs * layer.valid_taps
    return Cost(bytes=layer.matrix_bytes(dtype), steps=steps)


def matrix_indexed_write(layer: Layer, dtype: torch.dtype) -> Cost:
    """The matrix, and two int64 indices per element that is not zero."""
    indices = 16 * layer.channel_pairs * layer.valid_taps
    return Cost(bytes=layer.matrix_bytes(dtype) + indices)


def matrix_einconv(layer: Layer, dtype: torch.dtype) -> Cost:
    """The matrix twice: einsum's order of axes, then ours."""
    far = layer.output_size if layer.transposed else layer.input_size
    flops = 2 * layer.rows * layer.cols * layer.kernel[-1]
    return Cost(flops, layer.matrix_bytes(dtype) * (2 + layer.kernel[-1] / far[-1]))


def csr_dense(layer: Layer, dtype: torch.dtype) -> Cost:
    """The indexed write, then a pass over the matrix that marks what is not zero."""
    built = matrix_indexed_write(layer, dtype).bytes
    return Cost(bytes=built + layer.rows * layer.cols + layer.csr_bytes(dtype))


def csr_coalesce(layer: Layer, dtype: torch.dtype) -> Cost:
    """A sort of all elements by int64 keys."""
    return Cost(bytes=(_BYTES_PER_SORTED_ELEMENT + dtype.itemsize) * layer.stored)


def fuse_one_hot(layer: Layer, dtype: torch.dtype) -> Cost:
    """Every pixel through both layers."""
    held = dtype.itemsize * layer.cols * (layer.cols + layer.rows + 2 * layer.dense)
    return Cost(layer.cols * _image_flops(layer) + _product_flops(layer), held)


def fuse_jacrev(layer: Layer, dtype: torch.dtype) -> Cost:
    """The adjoint of both layers: an identity of F through the Linear, then the convolution."""
    through_linear = 2 * layer.dense * layer.dense * layer.rows
    held = dtype.itemsize * layer.dense * (layer.dense + layer.rows + 2 * layer.cols)
    return Cost(layer.fuse_flops() + through_linear, held)


def fuse_einconv(layer: Layer, dtype: torch.dtype) -> Cost:
    """The Linear's rows unfolded to one value per tap and input position, copied once."""
    unfolded = layer.dense * layer.out_channels * prod(layer.kernel) * prod(layer.input_size)
    flops = 2 * unfolded * (layer.in_channels / layer.groups + layer.output_size[-1])
    return Cost(flops, 2 * dtype.itemsize * unfolded)


def fuse_gist_loops(layer: Layer, dtype: torch.dtype) -> Cost:
    """The loops, then the product."""
    built = matrix_gist_loops(layer, dtype)
    return Cost(_product_flops(layer), built.bytes, built.steps)


def fuse_indexed_write(layer: Layer, dtype: torch.dtype) -> Cost:
    """The write, then the product."""
    return Cost(_product_flops(layer), matrix_indexed_write(layer, dtype).bytes)
