"""What is benchmarked: an op on a layer in a dtype on a device, and who takes part."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import costs, peers
from bench.layers import DTYPES, Layer, load_layers, load_matrices

OURS = "ours"
FLOOR = "zeros"
FUSE, MATRIX = "fuse_conv_linear", "conv_to_affine"


@dataclass(frozen=True)
class Peer:
    """One way of doing an op; `cost` is None for the ways that are always worth measuring."""

    run: Callable[..., peers.Affine]
    cost: costs.Rule | None = None
    package: str | None = None
    transposed: bool = True


PEERS: dict[str, dict[str, Peer]] = {
    FUSE: {
        "adjoint": Peer(peers.fuse_adjoint),
        "conv_input": Peer(peers.fuse_conv_input, transposed=False),
        "jacrev": Peer(peers.fuse_jacrev, costs.fuse_jacrev),
        "one_hot": Peer(peers.fuse_one_hot, costs.fuse_one_hot),
        "einconv": Peer(peers.fuse_einconv, costs.fuse_einconv, "einconv", transposed=False),
        "indexed_write": Peer(peers.fuse_indexed_write, costs.fuse_indexed_write),
        "gist_loops": Peer(peers.fuse_gist_loops, costs.fuse_gist_loops),
    },
    MATRIX: {
        "indexed_write": Peer(peers.matrix_indexed_write, costs.matrix_indexed_write),
        "adjoint": Peer(peers.matrix_adjoint, costs.matrix_adjoint),
        "one_hot": Peer(peers.matrix_one_hot, costs.matrix_one_hot),
        "jacrev": Peer(peers.matrix_jacrev, costs.matrix_jacrev),
        "einconv": Peer(peers.matrix_einconv, costs.matrix_einconv, "einconv"),
        "gist_loops": Peer(peers.matrix_gist_loops, costs.matrix_gist_loops),
    },
}

# Largest relative error of A x + b on random x. Far above rounding (terms summed x epsilon), far
# below what one wrong tap gives; a half type's result is itself rounded to 8 (11) bits.
TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
_CHECK_CHUNK_BYTES = 256e6


@dataclass(frozen=True)
class Case:
    """One group of rows: the same work by everyone who takes part.

    A peer that would take more than `patience` seconds a call does not.
    """

    op: str
    layer: Layer
    dtype_name: str
    device: str = "cpu"
    patience: float = costs.MAX_SECONDS

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype."""
        return DTYPES[self.dtype_name]

    @property
    def group(self) -> str:
        """Name of the group."""
        return f"{self.op}/{self.layer.name}/{self.dtype_name}/{self.device}"

    @property
    def entrants(self) -> list[str]:
        """Everyone who could take part: ours, the floor where there is one, the peers."""
        floor = [FLOOR] if self.op == MATRIX else []
        return [OURS, *floor, *PEERS[self.op]]

    @property
    def facts(self) -> dict[str, Any]:
        """What a row says besides times. GB is 1e9 bytes of matrix."""
        work: dict[str, Any] = {"gb": self.layer.matrix_bytes(self.dtype) / 1e9}
        if self.op == FUSE:
            work = {
                "gflop": self.layer.fuse_flops() / 1e9,
                "gflop_valid": self.layer.fuse_flops(valid_only=True) / 1e9,
            }
        return {
            "op": self.op,
            "layer": self.layer.name,
            "dtype": self.dtype_name,
            "device": self.device,
            **work,
            "left_out": {n: why for n in self.entrants if (why := self.skip_reason(n))},
        }

    def skip_reason(self, entrant: str) -> str | None:
        """Why an entrant does not take part, or None."""
        if entrant in (OURS, FLOOR):
            return None
        peer = PEERS[self.op][entrant]
        if self.layer.transposed and not peer.transposed:
            return "not made for a transposed convolution"
        if peer.cost is None:
            return None
        if self.dtype.itemsize == 2:
            return "slow ways are not measured in half types"
        if peer.package and importlib.util.find_spec(peer.package) is None:
            return f"{peer.package} is not installed"
        return peer.cost(self.layer, self.dtype).too_much(self.device, self.dtype, self.patience)

    def inputs(self, seed: int = 0) -> tuple[Tensor, ...]:
        """The op's tensors: the convolution's, and the Linear's for `fuse_conv_linear`."""
        tensors = self.layer.conv_tensors(self.dtype, self.device, 2 * seed)
        if self.op == FUSE:
            tensors += self.layer.linear_tensors(self.dtype, self.device, 2 * seed + 1)
        return tensors

    def call(self, entrant: str, *copies: tuple[Tensor, ...]) -> Callable[[], Any]:
        """The entrant as a function of nothing, going round the copies of the inputs."""
        layer, run = self.layer, self._function(entrant)
        if len(copies) == 1:
            return lambda: run(layer, *copies[0])
        turn = itertools.cycle(copies)
        return lambda: run(layer, *next(turn))

    def _function(self, entrant: str) -> Callable[..., Any]:
        if entrant == OURS:
            return _ours(self.op)
        if entrant == FLOOR:
            return lambda layer, weight, bias: torch.zeros(
                layer.rows, layer.cols, dtype=weight.dtype, device=weight.device
            )
        return PEERS[self.op][entrant].run

    @torch.no_grad()
    def check(self, result: peers.Affine, inputs: tuple[Tensor, ...]) -> None:
        """Raises AssertionError unless the result maps random inputs as the layers do."""
        wide = torch.float32 if self.dtype.itemsize < 4 else self.dtype
        cw, cb = (t.to(wide) for t in inputs[:2])
        generator = torch.Generator(self.device).manual_seed(7)
        x = torch.randn(
            3, self.layer.in_channels, *self.layer.input_size,
            dtype=wide, device=self.device, generator=generator,
        )  # fmt: skip
        expected = peers.conv(self.layer, x, cw, cb).flatten(1)
        if self.op == FUSE:
            expected = _apply(inputs[2], inputs[3], expected)
        got = _apply(*result, x.flatten(1))
        error = float((got - expected).norm() / expected.norm())
        # written so that NaN fails
        assert error <= TOLERANCE[self.dtype], f"{self.group}: relative error {error:.1e}"


def _apply(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """``x @ weight.T + bias`` in the dtype of x, some rows at a time to hold no second copy."""
    rows = max(1, int(_CHECK_CHUNK_BYTES / (weight.shape[1] * x.element_size())))
    parts = [x @ part.to(x.dtype).T for part in weight.split(rows)]
    return torch.cat(parts, 1) + bias.to(x.dtype)


def _ours(op: str) -> Callable[..., peers.Affine]:
    from linfuse_ext import functional

    function = getattr(functional, op)

    def run(layer: Layer, *tensors: Tensor) -> peers.Affine:
        return function(
            *tensors, layer.input_size, layer.stride, layer.padding, layer.dilation, layer.groups,
            transposed=layer.transposed,
        )  # fmt: skip

    return run


# --- which cases -----------------------------------------------------------------------------

_HALF_ON_CPU = ("same3x3", "resnet_down", "vgg_tail_cpu", "pointwise", "dcgan_up")
_SMALL_MATRICES = ("gist", "forum", "lenet5", "cifar_verify")
_QUICK = ("gist", "forum", "cifar_verify", "same3x3", "grouped", "patch_embed", "dcgan_up",
          "vgg16_tail")  # fmt: skip
_QUICK_MATRIX_BYTES = {"cpu": 1.2e9, "cuda": 6e9}
# Seconds; on a card nothing that takes longer comes near.
_QUICK_PATIENCE = 1.0
_CUDA_PATIENCE = 0.5
_CUDA_FLOAT64_GFLOP = 1000


def devices() -> list[str]:
    """Where the benchmarks run here."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def fuse_cases(device: str, quick: bool = False) -> Iterator[Case]:
    """The layers of `fuse_conv_linear` in the order of the file, every dtype of one together."""
    for name, layer in load_layers().items():
        if (device == "cpu" and layer.tier != "cpu") or (quick and name not in _QUICK):
            continue
        dtypes = ["float32"]
        # cuDNN's search among float64 ways for the largest layer would take minutes
        if device == "cpu" or layer.fuse_flops() < _CUDA_FLOAT64_GFLOP * 1e9:
            dtypes.append("float64")
        if device == "cuda" or name in _HALF_ON_CPU:
            dtypes.append("bfloat16")
        for dtype in dtypes:
            yield Case(FUSE, layer, dtype, device, _patience(device, quick))


def matrix_cases(device: str, quick: bool = False) -> Iterator[Case]:
    """The small layers, then the matrices of the file that fit, smallest first."""
    layers = load_layers()
    wanted = [(name, "float32") for name in _SMALL_MATRICES]
    for name, dtype, tier in load_matrices():
        if device == "cuda" or tier == "cpu":
            wanted.append((name, dtype))
    found = [
        Case(MATRIX, layers[name], dtype, device, _patience(device, quick))
        for name, dtype in dict.fromkeys(wanted)
    ]
    found.sort(key=lambda case: case.layer.matrix_bytes(case.dtype))
    limit = _QUICK_MATRIX_BYTES[device] if quick else _memory(device)
    return (case for case in found if case.layer.matrix_bytes(case.dtype) <= limit)


def _patience(device: str, quick: bool) -> float:
    if device == "cuda":
        return _CUDA_PATIENCE
    return _QUICK_PATIENCE if quick else costs.MAX_SECONDS


def _memory(device: str) -> float:
    """Bytes a matrix may have: most of a card, else no bound but the tier."""
    return 0.8 * torch.cuda.mem_get_info()[1] if device == "cuda" else math.inf
