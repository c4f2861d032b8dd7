"""``python -m bench.ways``: how good the choice among the CPU's ways of `fuse_conv_linear` is.

Layers at random are made by every way that takes them, in alternation. Their costs say which one
goes (``csrc/kernels/fuse_conv_linear_cost.h``); here is what that choice loses to the best of them.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from bench import ops, peers
from bench.layers import DTYPES, Layer
from linfuse_ext import _C

WAYS = ("input", "tiles", "output", "columns", "position", "position_tiles")
CHOICE = "cheapest"
_ROUNDS = 5
_SAMPLE = 1e-3  # seconds
_HOPELESS = 6  # times the best: not measured again
_GFLOP = (1e-3, 0.4)
_MOST_BYTES = 1e8
_ROWS = (1, 2, 5, 10, 16, 20, 32, 64, 100, 128, 200, 500)
_CHANNELS = (1, 2, 3, 4, 8, 10, 16, 20, 24, 32, 48, 64, 96, 100, 128, 256)
_POSITIONS = {1: (8, 2000), 2: (4, 48), 3: (3, 14)}


@dataclass(frozen=True)
class Row:
    """What each way took, in seconds, and the best peer."""

    layer: Layer
    dtype: str
    seconds: dict[str, float]
    peer: float

    @property
    def best(self) -> str:
        return min((way for way in WAYS if way in self.seconds), key=self.seconds.__getitem__)

    @property
    def lost(self) -> float:
        return self.seconds[CHOICE] / self.seconds[self.best]


@contextmanager
def going_by(way: str) -> Iterator[None]:
    """Makes `fuse_conv_linear` go that way for a while; it raises ValueError where it cannot."""
    before = _C.set_way(way)
    try:
        yield
    finally:
        _C.set_way(before)


def layers(rng: random.Random) -> Iterator[Layer]:
    """Layers of all kinds, of a size that is measured in milliseconds."""
    while True:
        axes = rng.choice((1, 2, 2, 2, 3))
        kernel = (rng.choice((1, 1, 2, 3, 3, 3, 4, 5, 7)),) * axes
        dilation = rng.choice((1, 1, 1, 2, 3))
        channels = [rng.choice(_CHANNELS), rng.choice(_CHANNELS)]
        groups = rng.choice((1, 1, 1, 1, 2, 4, 8, channels[0]))
        channels = [groups * math.ceil(count / groups) for count in channels]
        layer = Layer(
            name="random",
            in_channels=channels[0],
            out_channels=channels[1],
            kernel=kernel,
            stride=(rng.choice((1, 1, 1, 2, 2, 3, 4)),) * axes,
            padding=tuple(rng.choice((0, (k - 1) * dilation // 2, k - 1)) for k in kernel),
            dilation=(dilation,) * axes,
            groups=groups,
            transposed=rng.random() < 0.2,
            input_size=tuple(rng.randint(*_POSITIONS[axes]) for _ in range(axes)),
            dense=rng.choice(_ROWS),
            tier="cpu",
            block=None,
        )
        if min(layer.output_size) < 1:
            continue
        gflop = layer.fuse_flops() / 1e9
        size = 8 * layer.dense * max(layer.rows, layer.cols)
        if _GFLOP[0] < gflop < _GFLOP[1] and size < _MOST_BYTES:
            yield layer


def _sample(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    once = time.perf_counter() - start
    repeats = max(1, int(_SAMPLE / once))
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def measure(layer: Layer, dtype: str) -> Row:
    """All ways of one layer, and its peers."""
    tensors: tuple[Tensor, ...] = (
        *layer.conv_tensors(DTYPES[dtype]),
        *layer.linear_tensors(DTYPES[dtype]),
    )
    ours = ops.ours_on_layer("fuse_conv_linear")

    def by(way: str) -> Callable[[], object]:
        def call() -> None:
            with going_by(way):
                ours(layer, *tensors)

        return call

    calls = {way: by(way) for way in (CHOICE, *WAYS)}
    calls["adjoint"] = lambda: peers.fuse_adjoint(layer, *tensors)
    if not layer.transposed:
        calls["conv_input"] = lambda: peers.fuse_conv_input(layer, *tensors)
    samples: dict[str, list[float]] = {}
    for name, call in calls.items():
        try:
            samples[name] = [_sample(call)]
        except ValueError:  # this way does not take it
            continue
    best = min(times[0] for times in samples.values())
    hopeful = [name for name, times in samples.items() if times[0] < _HOPELESS * best]
    for _ in range(_ROUNDS):
        for name in {CHOICE, *hopeful}:
            samples[name].append(_sample(calls[name]))
    medians = {name: statistics.median(times) for name, times in samples.items()}
    peer = min(medians.pop(name) for name in ("adjoint", "conv_input") if name in medians)
    return Row(layer, dtype, medians, peer)


def _mean(values: list[float]) -> float:
    return statistics.geometric_mean(values) if values else math.nan


def report(rows: list[Row]) -> Iterator[str]:
    """A line for each dtype, then what the choice lost most at."""
    for dtype in DTYPES:
        of_dtype = [row for row in rows if row.dtype == dtype]
        if not of_dtype:
            continue
        over_peer = [row.peer / row.seconds[CHOICE] for row in of_dtype]
        best = Counter(row.best for row in of_dtype)
        yield (
            f"{dtype}: {len(of_dtype)} layers, {_mean([row.lost for row in of_dtype]):.3f} x the "
            f"best way, {_mean(over_peer):.2f} x as fast as the better peer, "
            f"{sum(ratio < 1 for ratio in over_peer)} behind it; best "
            + ", ".join(f"by {way} {best[way]}" for way in WAYS)
        )
    for row in sorted(rows, key=lambda row: -row.lost)[:10]:
        times = ", ".join(f"{way} {1e3 * s:.3g}" for way, s in row.seconds.items())
        yield f"{row.lost:.2f} x: {row.dtype}, {row.layer}, ms: {times}, peer {1e3 * row.peer:.3g}"


def main() -> int:
    """Measures layers until the time is up."""
    parser = argparse.ArgumentParser(prog="python -m bench.ways", description=__doc__)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    end = time.monotonic() + options.seconds
    rows = []
    for layer in layers(rng):
        if time.monotonic() > end:
            break
        rows.append(measure(layer, rng.choice(tuple(DTYPES))))
    print(*report(rows), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
