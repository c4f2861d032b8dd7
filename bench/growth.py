"""How time grows with the size of a layer: sweeps over one size each, ours and the peer.

A kernel that is fast on the suite's layers can fall off a cliff beside them, at a size that no
tile divides. Between neighbouring points of a sweep the time per FLOP (per byte for the matrix)
must not worsen by more than `ALLOWED` beyond what the peer's does there. Two things keep noise out:
times are the fastest of all rounds, and a step that looks like a cliff is measured again, up to
`_AGAIN` times, with the fastest round of all kept; what noise made goes away, a cliff stays.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

from bench.cases import FLOOR, OURS, Case
from bench.layers import Layer
from bench.ops import FUSE, MATRIX, OPS
from bench.race import race

ALLOWED = 1.5
_AGAIN = 2
_SECONDS = 0.6
_FEATURES = (1, 2, 3, 4, 7, 8, 10, 16, 31, 32, 64, 100, 127, 128, 129, 256, 500, 512, 1000, 1024,
             2048)  # fmt: skip
_IMAGES = ((5, 5), (6, 6), (7, 7), (8, 8), (7, 12), (11, 11), (13, 13), (14, 14), (16, 16),
           (17, 17), (20, 31), (28, 28), (31, 31), (32, 32), (33, 33), (47, 47), (48, 64), (63, 65),
           (64, 64), (80, 80), (96, 96))  # fmt: skip
_CHANNELS = (1, 2, 3, 5, 7, 8, 11, 16, 17, 24, 31, 32, 33, 48, 61, 64, 67, 96, 127, 128, 129, 192,
             256, 257)  # fmt: skip
_KERNELS = tuple(range(1, 12))
_MATRIX_IMAGE = 64 * 64  # the matrix grows as the square of it


class Sweep(NamedTuple):
    """One axis of growth: an op, and the case of every point."""

    name: str
    op: str
    points: tuple[tuple[str, Case], ...]

    @property
    def unit(self) -> str:
        """What the work is counted in."""
        return "GB" if self.op == MATRIX else "GFLOP"

    def entrants(self) -> list[str]:
        """Ours and those it is compared with."""
        return [OURS, *(OPS[self.op].rivals or [FLOOR])]


def _layer(
    channels: int = 32, size: Sequence[int] = (14, 14), kernel: int = 3, dense: int = 128
) -> Layer:
    return Layer(
        name="growth", in_channels=channels, out_channels=channels, kernel=(kernel, kernel),
        stride=(1, 1), padding=(kernel // 2,) * 2, dilation=(1, 1), groups=1, transposed=False,
        input_size=tuple(size), dense=dense,
    )  # fmt: skip


def _sweep(name: str, op: str, layers: Iterator[tuple[str, Layer]]) -> Sweep:
    return Sweep(name, op, tuple((at, Case(op, layer, "float32")) for at, layer in layers))


def sweeps(quick: bool = False) -> list[Sweep]:
    """All of them; a third of the points if quick."""
    thin = slice(None, None, 3 if quick else 1)
    images = [("x".join(map(str, size)), size) for size in _IMAGES]
    return [
        _sweep("F", FUSE, ((str(f), _layer(dense=f)) for f in _FEATURES[thin])),
        _sweep("image", FUSE, ((at, _layer(16, size, dense=64)) for at, size in images[thin])),
        _sweep("channels", FUSE, ((str(c), _layer(c, (8, 8), dense=64)) for c in _CHANNELS[thin])),
        _sweep("kernel", FUSE, ((str(k), _layer(16, kernel=k, dense=64)) for k in _KERNELS[thin])),
        _sweep(
            "matrix image",
            MATRIX,
            ((at, _layer(2, size)) for at, size in images[thin] if prod(size) <= _MATRIX_IMAGE),
        ),
    ]


def _fastest(sweep: Sweep, case: Case, seconds: float) -> dict[str, float]:
    """Seconds of the fastest round, by entrant."""
    outcomes = race(case, sweep.entrants(), seconds)
    for outcome in outcomes.values():
        if isinstance(outcome, Exception):
            raise outcome
    return {name: min(rounds) for name, rounds in outcomes.items()}


def _peer(point: dict[str, Any]) -> float:
    return min(seconds for name, seconds in point["seconds"].items() if name != OURS)


def worsening(before: dict[str, Any], after: dict[str, Any]) -> float:
    """How much more ours worsens per unit of work than the peer does, from a point to the next.

    A peer that gets better per unit does not count against us: what counts beside it is 1.
    """
    work = before["work"] / after["work"]
    ours = after["seconds"][OURS] / before["seconds"][OURS] * work
    peer = _peer(after) / _peer(before) * work
    return ours / max(1.0, peer)


def measure(quick: bool = False) -> dict[str, Any]:
    """All points of all sweeps, and every step between neighbours."""
    seconds = _SECONDS * (0.4 if quick else 1.0)
    found = {}
    for sweep in sweeps(quick):
        points = [_point(sweep, at, case, seconds) for at, case in sweep.points]
        for _ in range(_AGAIN):
            for at in _suspects(points):
                again = _fastest(sweep, sweep.points[at][1], seconds)
                old = points[at]["seconds"]
                points[at]["seconds"] = {name: min(old[name], again[name]) for name in old}
        steps = {
            f"{one['at']} to {two['at']}": worsening(one, two)
            for one, two in itertools.pairwise(points)
        }
        about = {"op": sweep.op, "unit": sweep.unit, "allowed": ALLOWED}
        found[sweep.name] = {**about, "points": points, "steps": steps}
    return found


def _point(sweep: Sweep, at: str, case: Case, seconds: float) -> dict[str, Any]:
    work = case.facts["gb" if sweep.op == MATRIX else "gflop"]
    return {"at": at, "work": work, "seconds": _fastest(sweep, case, seconds)}


def _suspects(points: list[dict[str, Any]]) -> list[int]:
    """Both ends of every step that looks like a cliff; points stand in the order of their work."""
    steps = itertools.pairwise(range(len(points)))
    cliffs = [pair for pair in steps if worsening(*(points[at] for at in pair)) > ALLOWED]
    return sorted({at for pair in cliffs for at in pair})
