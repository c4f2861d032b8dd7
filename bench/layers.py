"""The layers of ``layers.json``: their tensors, their index map and the work they stand for.

Every size and index formula of the benchmarks is in this file.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
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

    `dense` is the number of rows F of that Linear's weight ``[F, C_out * prod(out)]``; where the
    Linear comes first, the number of columns D of its weight ``[C_in * prod(in), D]``. `block` is
    how many rows of the matrix are made: the first ones, or all of them if it is None.
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
    block: int | None = None

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
            dense=row.get("linear", 0),
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

        prod(in) takes the place of prod(out) for a transposed convolution. The same for
        `fuse_linear_conv`, whose D images go the other way.

        Args:
            valid_only: Leave out the taps on padding, which need no arithmetic.
        """
        taps = self.valid_taps if valid_only else self.nominal_taps
        return 2 * self.dense * self.channel_pairs * taps

    def matrix_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the matrix, or of its block: ``[rows, cols]``."""
        return self.made_rows * self.cols * dtype.itemsize

    @property
    def made_rows(self) -> int:
        """Rows of the matrix that are made."""
        return self.rows if self.block is None else self.block

    def in_blocks(self, dtype: torch.dtype, size: float) -> Layer:
        """The layer with a block of its matrix of about `size` bytes in place of the whole."""
        rows = round(size / (self.cols * dtype.itemsize))
        return replace(self, block=max(1, min(rows, self.rows)))

    @property
    def stored(self) -> int:
        """Elements of the matrix that are not zero by its geometry."""
        return self.channel_pairs * self.valid_taps

    def csr_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the matrix in CSR: values, int64 columns, int64 row pointers."""
        return self.stored * (dtype.itemsize + 8) + 8 * (self.rows + 1)

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

    def front_tensors(
        self, dtype: torch.dtype, device: str = "cpu", seed: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Weight ``[cols, D]`` and bias ``[cols]`` of a Linear in front of the convolution."""
        generator = torch.Generator(device).manual_seed(seed)
        return (
            _normal((self.cols, self.dense), self.dense, dtype, generator),
            _normal((self.cols,), 1.0, dtype, generator),
        )


@dataclass(frozen=True)
class Pair:
    """Two convolutions in a row, neither transposed; the second takes what the first puts out."""

    name: str
    first: Layer
    second: Layer
    tier: str = "cpu"

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Pair:
        """Builds a pair from its row in ``layers.json``."""
        common = {"name": row["name"], "tier": row["tier"]}
        first = Layer.from_json({**common, "conv": row["first"], "input": row["input"]})
        second = {**common, "conv": row["second"], "input": first.output_size}
        return cls(first=first, second=Layer.from_json(second), **common)

    @property
    def second_step(self) -> Sizes:
        """How far apart the second kernel's taps lie in the first one's input, per axis."""
        return tuple(s * d for s, d in zip(self.first.stride, self.second.dilation, strict=True))

    @property
    def merged(self) -> Layer:
        """The one convolution that does the same; needs a second one that does not pad."""
        first, second = self.first, self.second
        spans = zip(first.kernel, first.dilation, second.kernel, self.second_step, strict=True)
        return replace(
            first,
            out_channels=second.out_channels,
            kernel=tuple((k1 - 1) * d1 + (k2 - 1) * s2 + 1 for k1, d1, k2, s2 in spans),
            dilation=(1,) * first.axes,
            stride=tuple(a * b for a, b in zip(first.stride, second.stride, strict=True)),
            groups=math.gcd(first.groups, second.groups),
        )

    def flops(self) -> int:
        """FLOPs of `fuse_conv_conv`: ``2 C_mid C_in/g1 C_out/g2 prod(kernel1) prod(kernel2)``."""
        first, second = self.first, self.second
        paths = first.channel_pairs * second.out_channels // second.groups
        return 2 * paths * math.prod(first.kernel) * math.prod(second.kernel)

    def tensors(
        self, dtype: torch.dtype, device: str = "cpu", seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight and bias of the first and of the second, the same for the same seed."""
        first = self.first.conv_tensors(dtype, device, 2 * seed)
        return *first, *self.second.conv_tensors(dtype, device, 2 * seed + 1)


def _normal(shape: Sizes, fan_in: float, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal values scaled as a trained layer's are, so that half types do not overflow."""
    values = torch.empty(shape, dtype=dtype, device=generator.device)
    return values.normal_(0.0, fan_in**-0.5, generator=generator)


def _table() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("layers.json").read_text())


def load_layers() -> dict[str, Layer]:
    """All layers by name, in the order of the file."""
    return {row["name"]: Layer.from_json(row) for row in _table()["layers"]}


def load_pairs() -> dict[str, Pair]:
    """All pairs of convolutions by name, in the order of the file."""
    return {row["name"]: Pair.from_json(row) for row in _table()["pairs"]}


def load_matrices() -> list[tuple[str, str, str]]:
    """The matrices to build: (layer name, dtype name, tier)."""
    return [(row["layer"], row["dtype"], row["tier"]) for row in _table()["matrices"]]
