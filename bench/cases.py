"""What is benchmarked: an op on a layer in a dtype on a device, and who takes part."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench import engines
from bench.layers import DTYPES, Layer, Pair, load_layers, load_matrices, load_pairs
from bench.ops import CONV_CONV, CSR, FUSE, LINEAR_CONV, MATRIX, OPS, Op
from bench.peers import Affine

OURS = "ours"
FLOOR = "zeros"
ENGINES = {f"{OURS}[{name}]": name for name in engines.ENGINES}

# Largest relative error of A x + b on random x. Far above rounding (terms summed x epsilon), far
# below what one wrong tap gives; a half type's result is itself rounded to 8 (11) bits.
TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


@dataclass(frozen=True)
class Case:
    """One group of rows: the same work by everyone who takes part.

    A peer that would take more than `patience` seconds a call does not. `both_engines` adds ours
    with either engine forced.
    """

    op: str
    layer: Layer | Pair
    dtype_name: str
    device: str = "cpu"
    patience: float = math.inf
    both_engines: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype."""
        return DTYPES[self.dtype_name]

    @property
    def group(self) -> str:
        """Name of the group."""
        return f"{self.op}/{self.layer.name}/{self.dtype_name}/{self.device}"

    @property
    def seconds(self) -> float:
        """About how long the group is measured on a CPU."""
        return _TINY_SECONDS if self.layer.tier == "tiny" else self._op.seconds

    @property
    def _op(self) -> Op:
        return OPS[self.op]

    @property
    def entrants(self) -> list[str]:
        """Everyone who could take part: ours, the floor where there is one, the peers."""
        floor = [FLOOR] if self._op.floor else []
        return [OURS, *(ENGINES if self.both_engines else []), *floor, *self._op.peers]

    @property
    def brief(self) -> frozenset[str]:
        """Entrants of whom a few rounds are enough: the slow ways."""
        return frozenset(name for name, peer in self._op.peers.items() if peer.cost)

    @property
    def facts(self) -> dict[str, Any]:
        """What a row says besides times. GB is 1e9 bytes of result."""
        block = getattr(self.layer, "block", None)
        return {
            "op": self.op,
            "layer": self.layer.name,
            "dtype": self.dtype_name,
            "device": self.device,
            **({"tier": "tiny"} if self.layer.tier == "tiny" else {}),
            **({"rows": block} if block else {}),
            **self._op.work(self.layer, self.dtype),
            "left_out": {n: why for n in self.entrants if (why := self.skip_reason(n))},
        }

    def skip_reason(self, entrant: str) -> str | None:
        """Why an entrant does not take part, or None."""
        if entrant in (OURS, FLOOR):
            return None
        if entrant in ENGINES:
            return engines.missing()
        peer = self._op.peers[entrant]
        if peer.cost is None:
            unfit = getattr(self.layer, "transposed", False) and not peer.transposed
            return "not made for a transposed convolution" if unfit else None
        return self._why_slow(entrant)

    def _why_slow(self, entrant: str) -> str | None:
        """Why one of the slow ways does not take part, or None."""
        peer, layer = self._op.peers[entrant], self.layer
        assert isinstance(layer, Layer) and peer.cost is not None
        if self.dtype_name != "float32" and layer.tier != "tiny":
            return "slow ways are measured in float32"
        if layer.block is not None:
            return "blocks of a matrix are measured against zeros alone"
        if layer.transposed and not peer.transposed:
            return "not made for a transposed convolution"
        if peer.package and importlib.util.find_spec(peer.package) is None:
            return f"{peer.package} is not installed"
        patience = min(self.patience, peer.patience)
        return peer.cost(layer, self.dtype).too_much(self.device, self.dtype, patience)

    def inputs(self, seed: int = 0) -> tuple[Tensor, ...]:
        """The op's tensors."""
        return self._op.tensors(self.layer, self.dtype, self.device, seed)

    def call(self, entrant: str, *copies: tuple[Tensor, ...]) -> Callable[[], Any]:
        """The entrant as a function of nothing, going round the copies of the inputs."""
        layer, run = self.layer, self._function(entrant)
        if len(copies) == 1:
            return lambda: run(layer, *copies[0])
        turn = itertools.cycle(copies)
        return lambda: run(layer, *next(turn))

    def _function(self, entrant: str) -> Callable[..., Any]:
        if entrant == OURS:
            return self._op.ours
        if entrant in ENGINES:
            return _by_engine(ENGINES[entrant], self._op.ours)
        if entrant == FLOOR:
            assert self._op.floor is not None
            return self._op.floor
        return self._op.peers[entrant].run

    @torch.no_grad()
    def check(self, result: Affine, inputs: tuple[Tensor, ...]) -> None:
        """Raises AssertionError unless the result maps random inputs as the layers do."""
        wide = torch.float32 if self.dtype.itemsize < 4 else self.dtype
        generator = torch.Generator(self.device).manual_seed(7)
        shape = (3, *self._op.features(self.layer))
        x = torch.randn(shape, dtype=wide, device=self.device, generator=generator)
        expected = self._op.layers(self.layer, x, *inputs)
        got = self._op.merged(self.layer, x, *result)
        assert got.shape == expected.shape, f"{self.group}: {got.shape}, not {expected.shape}"
        error = float((got - expected).norm() / expected.norm())
        # written so that NaN fails
        assert error <= TOLERANCE[self.dtype], f"{self.group}: relative error {error:.1e}"


def _by_engine(engine: str, run: Callable[..., Any]) -> Callable[..., Any]:
    def forced(*arguments: Any) -> Any:
        with engines.forced(engine):
            return run(*arguments)

    return forced


# --- which cases -----------------------------------------------------------------------------

_QUICK = ("gist", "forum", "cifar_verify", "same3x3", "grouped", "patch_embed", "dcgan_up",
          "vgg16_tail", "3x3_3x3", "mobilenet", "tiny_1d", "tiny_pair")  # fmt: skip
_QUICK_MATRIX_BYTES = {"cpu": 1.2e9, "cuda": 6e9}
_TINY_SECONDS = 0.5

_HALF = ("bfloat16", "float16")
_TWO_ENGINES = ("gist", "lenet5", "same3x3", "pointwise", "dcgan_up")
# On a card nothing that takes longer comes near.
_CUDA_PATIENCE = 0.5
_CUDA_FLOAT64_GFLOP = 1000

_SMALL_MATRICES = ("gist", "forum", "lenet5", "cifar_verify")
_EVERY_DTYPE = "same3x3"
# Bound by memory from here on.
LARGE_BYTES = 64e6
_WHOLE_BYTES, _BLOCK_BYTES = 1.5e9, 256e6

# More columns of a Linear in front take longer and show nothing else.
_FRONT_COLUMNS = 256
_FRONT_FLOAT64 = ("gist", "lenet5", "same3x3", "resnet_down", "depthwise", "pointwise", "voxels",
                  "dcgan_up")  # fmt: skip
_FRONT_HALF = ("lenet5", "same3x3", "pointwise", "dcgan_up")
_PAIR_HALF = ("3x3_3x3", "mobilenet", "sesr_head")


def devices() -> list[str]:
    """Where the benchmarks run here."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _of_tier(table: dict[str, Any], tier: str, quick: bool) -> list[Any]:
    rows = [row for row in table.values() if row.tier == tier]
    return [row for row in rows if not quick or row.name in _QUICK]


def fuse_cases(device: str, quick: bool = False) -> Iterator[Case]:
    """The layers of `fuse_conv_linear` in the order of the file, every dtype of one together."""
    if device == "cuda":
        yield from _cuda_fuse_cases(quick)
        return
    for layer in _of_tier(load_layers(), "cpu", quick):
        for dtype in ("float32", "float64", *_HALF):
            both = dtype in _HALF or layer.name in _TWO_ENGINES
            yield Case(FUSE, layer, dtype, both_engines=both)


def _cuda_fuse_cases(quick: bool) -> Iterator[Case]:
    layers = load_layers()
    for layer in _of_tier(layers, "cpu", quick) + _of_tier(layers, "gpu", quick):
        dtypes = ["float32"]
        # cuDNN's search among float64 ways for the largest layer would take minutes
        if layer.fuse_flops() < _CUDA_FLOAT64_GFLOP * 1e9:
            dtypes.append("float64")
        for dtype in [*dtypes, "bfloat16"]:
            yield Case(FUSE, layer, dtype, "cuda", _CUDA_PATIENCE, both_engines=True)


def matrix_cases(device: str, quick: bool = False) -> Iterator[Case]:
    """The small layers, then the matrices of the file that fit, smallest first.

    On a CPU then all layers in all dtypes whose matrix is large, in blocks where it is very large.
    """
    layers = load_layers()
    wanted = [(name, "float32") for name in _SMALL_MATRICES]
    if device == "cuda":
        wanted += [(_EVERY_DTYPE, dtype) for dtype in DTYPES]
    for name, dtype, tier in load_matrices():
        if device == "cuda" or tier == "cpu":
            wanted.append((name, dtype))
    patience = _CUDA_PATIENCE if device == "cuda" else math.inf
    whole = [
        Case(MATRIX, layers[name], dtype, device, patience) for name, dtype in dict.fromkeys(wanted)
    ]
    whole.sort(key=lambda case: case.layer.matrix_bytes(case.dtype))
    limit = _QUICK_MATRIX_BYTES[device] if quick else _memory(device)
    yield from (case for case in whole if case.layer.matrix_bytes(case.dtype) <= limit)
    if device == "cpu":
        made = {(case.layer.name, case.dtype_name) for case in whole}
        large = _large_matrix_cases(_of_tier(layers, "cpu", quick))
        yield from (case for case in large if (case.layer.name, case.dtype_name) not in made)


def _large_matrix_cases(layers: list[Layer]) -> Iterator[Case]:
    for layer in layers:
        for name, dtype in DTYPES.items():
            size = layer.matrix_bytes(dtype)
            if size >= LARGE_BYTES:
                part = layer if size <= _WHOLE_BYTES else layer.in_blocks(dtype, _BLOCK_BYTES)
                yield Case(MATRIX, part, name)


def csr_cases(device: str = "cpu", quick: bool = False) -> Iterator[Case]:
    """Every layer in float32, and those of a large result in the other dtypes.

    On a card only those of a large result.
    """
    on_card = device == "cuda"
    layers = load_layers()
    for layer in _of_tier(layers, "cpu", quick) + (_of_tier(layers, "gpu", quick) * on_card):
        for name, dtype in DTYPES.items():
            is_large = layer.csr_bytes(dtype) >= LARGE_BYTES
            if is_large or (name == "float32" and not on_card):
                yield Case(CSR, layer, name, device, _CUDA_PATIENCE if on_card else math.inf)


def linear_conv_cases(quick: bool = False) -> Iterator[Case]:
    """A Linear in front of every layer in float32, of some in the other dtypes."""
    for layer in _of_tier(load_layers(), "cpu", quick):
        front = replace(layer, dense=min(layer.dense, _FRONT_COLUMNS))
        for dtype in DTYPES:
            some = _FRONT_HALF if dtype in _HALF else _FRONT_FLOAT64
            if dtype == "float32" or layer.name in some:
                yield Case(LINEAR_CONV, front, dtype)


def conv_conv_cases(quick: bool = False) -> Iterator[Case]:
    """Every pair in float32 and float64, some in half types."""
    for pair in _of_tier(load_pairs(), "cpu", quick):
        for dtype in DTYPES:
            if dtype not in _HALF or pair.name in _PAIR_HALF:
                yield Case(CONV_CONV, pair, dtype)


def tiny_cases(quick: bool = False) -> Iterator[Case]:
    """Layers so small that the call itself is what takes time; float32 and float64."""
    tiny = _of_tier(load_layers(), "tiny", quick)
    pairs = _of_tier(load_pairs(), "tiny", quick)
    for op in (FUSE, MATRIX, LINEAR_CONV, CONV_CONV):
        for layer in pairs if op == CONV_CONV else tiny:
            for dtype in ("float32", "float64"):
                yield Case(op, layer, dtype)


def _memory(device: str) -> float:
    """Bytes a matrix may have: most of a card, else no bound but the tier."""
    return 0.8 * torch.cuda.mem_get_info()[1] if device == "cuda" else math.inf
