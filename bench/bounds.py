"""What the package must reach on a CPU, line by line: held or not, with the figure.

Every line is made from the rows of a results file, so that it can be made again from the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from bench.cases import LARGE_BYTES
from bench.layers import DTYPES
from bench.ops import CONV_CONV, CSR, FUSE, LINEAR_CONV, MATRIX
from bench.rows import Row

_WORST_SHOWN = 5
_NOISE = 0.03

# The least geometric mean over the peer, by dtype.
_MEANS = {"float32": 2.5, "float64": 4.0}
_OF_ZEROS, _OVER_ZEROS_US, _OVER_PEER_US = 0.5, 10.0, 30.0
_OF_PEAK, _PEAK_GFLOP, _PEAK_CHANNELS = 0.6, 5.0, 16


class Bound(NamedTuple):
    """One line; `held` is None where nothing was measured. `worst` names rows, worst first."""

    bound: str
    limit: str
    figure: str
    held: bool | None
    worst: str


class Limit(NamedTuple):
    """What every value must be at least, or at most, and how a value is written."""

    value: float
    text: str
    write: Callable[[float], str]
    at_most: bool = False

    def broken(self, value: float) -> bool:
        """Whether a value is beyond the limit; NaN is."""
        return not (value <= self.value if self.at_most else value >= self.value)


def _every(bound: str, limit: Limit, values: Mapping[str, float], note: str = "") -> Bound:
    """A line that holds if all values keep the limit."""
    if not values:
        return Bound(bound, limit.text, "not measured", None, "")
    ranked = sorted(values.items(), key=lambda item: item[1], reverse=limit.at_most)
    broken = [name for name, value in ranked if limit.broken(value)]
    shown = max(1, min(len(broken), _WORST_SHOWN))
    worst = ", ".join(f"{name} {limit.write(value)}" for name, value in ranked[:shown])
    more = f", {len(broken) - shown} more" if len(broken) > shown else ""
    figure = f"worst {limit.write(ranked[0][1])}; {len(values) - len(broken)} of {len(values)} hold"
    return Bound(bound, limit.text, figure + note, not broken, worst + more)


def _times(value: float) -> str:
    return f"{value:.2f}x"


def _microseconds(value: float) -> str:
    return f"{value:+.1f} us"


def _label(row: Row) -> str:
    return f"{row['layer']}" + (f"[:{row['rows']:,}]" if "rows" in row else "")


def _of(doc: Mapping[str, Any], op: str, dtype: str) -> list[Row]:
    return [row for row in doc.get(op, []) if row["dtype"] == dtype]


def _fills(doc: Mapping[str, Any]) -> Iterable[Bound]:
    """The ops that write memory, against torch.zeros."""
    limit = Limit(_OF_ZEROS, "<= 0.5 x zeros", _times, at_most=True)
    for op in (MATRIX, CSR):
        for dtype in DTYPES:
            large = [row for row in _of(doc, op, dtype) if row["gb"] * 1e9 >= LARGE_BYTES]
            values = {_label(row): row["ms_over_zero_ms"] for row in large if "zero_ms" in row}
            yield _every(f"{op} {dtype}, >= 64 MB", limit, values)
    small = [row for row in doc.get(MATRIX, []) + doc["tiny"] if row["op"] == MATRIX]
    over = {
        f"{_label(row)} {row['dtype']}": (row["ms"] - row["zero_ms"]) * 1e3
        for row in small
        if row["gb"] * 1e9 < LARGE_BYTES and "zero_ms" in row
    }
    limit = Limit(_OVER_ZEROS_US, "<= zeros + 10 us", _microseconds, at_most=True)
    yield _every(f"{MATRIX}, < 64 MB", limit, over)


def _speedups(doc: Mapping[str, Any]) -> Iterable[Bound]:
    """fuse_conv_linear against the better of adjoint and conv_input."""
    means = {part["dtype"]: part for part in doc["summary"] if part["op"] == FUSE}
    for dtype in DTYPES:
        if dtype in _MEANS:
            least, part = _MEANS[dtype], means.get(dtype)
            line = f"{FUSE} {dtype}, geometric mean", f">= {least} x the peer"
            if part is None:
                yield Bound(*line, "not measured", None, "")
            else:
                mean, alone = part["geometric_mean_ratio"], part["geometric_mean_over_adjoint"]
                figure = f"{mean:.2f}x; {alone:.2f}x over adjoint alone"
                yield Bound(*line, figure, mean >= least, "")
        values = {_label(row): row["ratio"] for row in _of(doc, FUSE, dtype) if "ratio" in row}
        close = sum(1 - _NOISE <= value < 1 for value in values.values())
        note = f", {close} within 3 % of it" if close else ""
        limit = Limit(1.0, ">= 1.0 x the peer", _times)
        yield _every(f"{FUSE} {dtype}, every layer", limit, values, note)


def _peak(doc: Mapping[str, Any]) -> Iterable[Bound]:
    for dtype in _MEANS:
        rows = [
            row
            for row in _of(doc, FUSE, dtype)
            if row["gflop"] >= _PEAK_GFLOP
            and row["group_channels"] >= _PEAK_CHANNELS
            and "of_peak" in row
        ]
        values = {
            f"{_label(row)} (valid {row['of_peak_valid']:.0%})": row["of_peak"] for row in rows
        }
        limit = Limit(_OF_PEAK, ">= 60 % of the FMA peak", lambda value: f"{value:.0%}")
        yield _every(f"{FUSE} {dtype}, >= 5 GFLOP and 16 channels", limit, values)


def _merges(doc: Mapping[str, Any]) -> Iterable[Bound]:
    limit = Limit(1 - _NOISE, ">= 1.0 x the peer, less 3 % for noise", _times)
    for op in (LINEAR_CONV, CONV_CONV):
        for dtype in DTYPES:
            values = {_label(row): row["ratio"] for row in _of(doc, op, dtype) if "ratio" in row}
            yield _every(f"{op} {dtype}, every layer", limit, values)


def _calls(doc: Mapping[str, Any]) -> Iterable[Bound]:
    limit = Limit(_OVER_PEER_US, "<= the peer + 30 us", _microseconds, at_most=True)
    for op in (FUSE, MATRIX, LINEAR_CONV, CONV_CONV):
        values = {
            f"{_label(row)} {row['dtype']}": (row["ms"] - row["peer_ms"]) * 1e3
            for row in call_rows(doc)
            if row["op"] == op
        }
        yield _every(f"{op}, one call on tiny layers", limit, values)


def call_rows(doc: Mapping[str, Any]) -> list[Row]:
    """The rows that show what a call costs: the tiny layers and the gist's."""
    gist = [row for op in (FUSE, MATRIX, LINEAR_CONV) for row in doc.get(op, [])]
    gist = [row for row in gist if row["layer"] == "gist" and row["dtype"] in _MEANS]
    return [row for row in doc["tiny"] + gist if "peer" in row]


def _rest(doc: Mapping[str, Any]) -> Iterable[Bound]:
    """Memory, bits and growth."""
    held = {
        f"{row['layer']} {row['dtype']} ({row['extra'] / 1e6:.0f} MB)": row["extra"] / row["limit"]
        for row in doc.get("memory", [])
    }
    limit = Limit(1.0, "<= 64 MB + 10 %", lambda value: f"{value:.2f} of it", at_most=True)
    yield _every(f"{FUSE}, memory beside operands and result", limit, held)
    same = {name: float(equal) for name, equal in doc.get("same_bits", {}).items()}
    limit = Limit(1.0, "the same", lambda value: "same" if value else "different")
    yield _every("bits for 1 and 2 threads", limit, same)
    for sweep, found in doc.get("growth", {}).items():
        limit = Limit(found["allowed"], f"<= {found['allowed']} x", _times, at_most=True)
        name = f"growth over {sweep}, no cliff beyond the peer's"
        yield _every(name, limit, found["steps"])


def judge(doc: Mapping[str, Any]) -> list[Bound]:
    """All lines for what was measured on a CPU."""
    parts = (_fills, _speedups, _peak, _merges, _calls, _rest)
    return [line for part in parts for line in part(doc)]
