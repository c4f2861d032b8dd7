"""The layers of ``layers.json``: their tensors, their index map and the work they stand for.

Every size and index formula of the benchmarks is in this file.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Sizes = tuple[int, ...]

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Layer:
    """One convolution, the size of its input, and the Linear that follows it.

    `dense` is the number of rows F of that Linear's weight ``[F, C_out * prod(out)]``.
    """

    name: str
    in_channels: int
    out_channels: int
    kernel: Sizes
    stride: Sizes
    padding: Sizes
    dilation: Sizes
    groups: int
    transposed: bool
    input_size: Sizes
    dense: int
    tier: str = "cpu"

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Layer:
        """Builds a layer from its row in ``layers.json``."""
        conv = row["conv"]
        kernel = tuple(conv["kernel"])
        return cls(
            name=row["name"],
            in_channels=conv["in"],
            out_channels=conv["out"],
            kernel=kernel,
            stride=tuple(conv["stride"]),
            padding=tuple(conv["padding"]),
            dilation=tuple(conv.get("dilation", [1] * len(kernel))),
            groups=conv.get("groups", 1),
            transposed=conv.get("transposed", False),
            input_size=tuple(row["input"]),
            dense=row["linear"],
            tier=row["tier"],
        )

    @property
    def axes(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel)

    @cached_property
    def output_size(self) -> Sizes:
        """Spatial size of the convolution's output (output_padding 0)."""
        reach = [d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]
        per_axis = zip(self.input_size, reach, self.stride, self.padding, strict=True)
        if self.transposed:
            return tuple((i - 1) * s - 2 * p + r for i, r, s, p in per_axis)
        return tuple((i + 2 * p - r) // s + 1 for i, r, s, p in per_axis)

    @cached_property
    def adjoint_output_padding(self) -> Sizes:
        """The `output_padding` with which conv_transposeNd gives back exactly `input_size`.

        These are the inputs at the high end that a strided convolution never reaches.
        """
        per_axis = zip(
            self.input_size, self.output_size, self.kernel, self.stride, self.padding,
            self.dilation, strict=True,
        )  # fmt: skip
        return tuple(i - ((o - 1) * s - 2 * p + d * (k - 1) + 1) for i, o, k, s, p, d in per_axis)

    @property
    def rows(self) -> int:
        """Rows of the matrix: C_out * prod(out)."""
        return self.out_channels * math.prod(self.output_size)

    @property
    def cols(self) -> int:
        """Columns of the matrix: C_in * prod(in)."""
        return self.in_channels * math.prod(self.input_size)

    @property
    def weight_shape(self) -> Sizes:
        """Shape of the convolution's weight, as torch lays it out."""
        if self.transposed:
            return (self.in_channels, self.out_channels // self.groups, *self.kernel)
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    def taps(self, axis: int) -> list[tuple[int, int, int]]:
        """The index map of one axis: every (out, tap, in) that does not fall on padding."""
        stride, padding, dilation = self.stride[axis], self.padding[axis], self.dilation[axis]
        sizes = self.output_size[axis], self.input_size[axis]
        near, far = reversed(sizes) if self.transposed else sizes
        triples = []
        for a in range(near):
            for k in range(self.kernel[axis]):
                b = a * stride - padding + k * dilation
                if 0 <= b < far:
                    triples.append((b, k, a) if self.transposed else (a, k, b))
        return triples

    @cached_property
    def valid_taps(self) -> int:
        """Taps of one (output channel, input channel) pair that read an input, not padding."""
        return math.prod(len(self.taps(axis)) for axis in range(self.axes))

    @property
    def nominal_taps(self) -> int:
        """As `valid_taps`, with those on padding counted too: prod(kernel) * prod(out)."""
        swept = self.input_size if self.transposed else self.output_size
        return math.prod(self.kernel) * math.prod(swept)

    @property
    def channel_pairs(self) -> int:
        """(output channel, input channel) pairs that are connected."""
        return self.out_channels * self.in_channels // self.groups

    def fuse_flops(self, valid_only: bool = False) -> int:
        """FLOPs of `fuse_conv_linear`: ``2 F C_in/g C_out prod(kernel) prod(out)``.

        prod(in) takes the place of prod(out) for a transposed convolution.

        Args:
            valid_only: Leave out the taps on padding, which need no arithmetic.
        """
        taps = self.valid_taps if valid_only else self.nominal_taps
        return 2 * self.dense * self.channel_pairs * taps

    def matrix_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the matrix ``[rows, cols]``."""
        return self.rows * self.cols * dtype.itemsize

    def conv_tensors(
        self, dtype: torch.dtype, device: str = "cpu", seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Weight and bias ``[C_out]`` of the convolution, the same for the same seed."""
        generator = torch.Generator(device).manual_seed(seed)
        fan_in = math.prod(self.kernel) * self.in_channels / self.groups
        return (
            _normal(self.weight_shape, fan_in, dtype, generator),
            _normal((self.out_channels,), 1.0, dtype, generator),
        )

    def linear_tensors(
        self, dtype: torch.dtype, device: str = "cpu", seed: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Weight ``[F, rows]`` and bias ``[F]`` of the Linear, the same for the same seed."""
        generator = torch.Generator(device).manual_seed(seed)
        return (
            _normal((self.dense, self.rows), self.rows, dtype, generator),
            _normal((self.dense,), 1.0, dtype, generator),
        )


def _normal(shape: Sizes, fan_in: float, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal values scaled as a trained layer's are, so that half types do not overflow."""
    values = torch.empty(shape, dtype=dtype, device=generator.device)
    return values.normal_(0.0, fan_in**-0.5, generator=generator)


def _table() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("layers.json").read_text())


def load_layers() -> dict[str, Layer]:
    """All layers by name, in the order of the file."""
    return {row["name"]: Layer.from_json(row) for row in _table()["layers"]}


def load_matrices() -> list[tuple[str, str, str]]:
    """The matrices to build: (layer name, dtype name, tier)."""
    return [(row["layer"], row["dtype"], row["tier"]) for row in _table()["matrices"]]
