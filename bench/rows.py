"""From medians to rows: what a group's measured times say, and what they say together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from bench import machine
from bench.cases import ENGINES, FLOOR, OURS
from bench.collapse_cases import CAPTURE
from bench.ops import FUSE, MATRIX, OPS

Row = dict[str, Any]


def make_row(facts: Mapping[str, Any], medians: Mapping[str, float]) -> Row:
    """One row: ours, the best peer, and how many times faster ours is.

    Args:
        facts: `Case.facts`.
        medians: Seconds by entrant; ours among them.
    """
    row: Row = {key: value for key, value in facts.items() if key != "entrant"}
    ms = {name: seconds * 1e3 for name, seconds in medians.items()}
    ours, floor = ms.pop(OURS), ms.pop(FLOOR, None)
    row["ms"] = ours
    if "gflop" in row:
        row["gflops"] = row["gflop"] / ours * 1e3
        row["tflops"] = row["gflops"] / 1e3
    else:
        row["gbps"] = row["gb"] / ours * 1e3
    if floor is not None:
        row |= {"zero_ms": floor, "ms_over_zero_ms": ours / floor}
    if sides := {engine: ms.pop(name) for name, engine in ENGINES.items() if name in ms}:
        row["engines_ms"] = sides
    if rivals := [name for name in OPS[row["op"]].rivals or ms if name in ms]:
        peer = min(rivals, key=lambda name: ms[name])
        row |= {"peer": peer, "peer_ms": ms[peer], "ratio": ms[peer] / ours}
    row["all_peers_ms"] = ms
    return row


def network_rows(groups: Iterable[tuple[Mapping[str, Any], Mapping[str, float]]]) -> list[Row]:
    """One row for every network that is collapsed, from its groups.

    Args:
        groups: Facts of each, and seconds by entrant; ours among them.
    """
    rows: dict[str, Row] = {}
    for facts, medians in groups:
        known = {k: v for k, v in facts.items() if k not in ("op", "batch", "entrant")}
        row = rows.setdefault(facts["network"], {**known, "latency_ms": {}})
        ms = {name: seconds * 1e3 for name, seconds in medians.items()}
        ours = ms.pop(OURS)
        if "batch" in facts:
            row["latency_ms"][str(facts["batch"])] = {"after": ours, **ms}
        else:
            row |= {"merge_ms": ours, "capture_ms": ms.get(CAPTURE)}
    return list(rows.values())


def geometric_mean(values: Iterable[float]) -> float:
    """The mean that treats twice as fast and half as fast alike."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def summarise(rows: list[Row]) -> list[Row]:
    """Per op and dtype: the mean ratio, and by name every row slower than its best peer."""
    found = []
    for op, dtype in dict.fromkeys((row["op"], row["dtype"]) for row in rows):
        raced = [r for r in rows if (r["op"], r["dtype"]) == (op, dtype) and "ratio" in r]
        if not raced:
            continue
        part: Row = {
            "op": op,
            "dtype": dtype,
            "layers": len(raced),
            "geometric_mean_ratio": geometric_mean(r["ratio"] for r in raced),
            "slower_than_peer": {r["layer"]: round(r["ratio"], 3) for r in raced if r["ratio"] < 1},
        }
        measured = [r for r in raced if op == FUSE and "adjoint" in r["all_peers_ms"]]
        adjoint = [r["all_peers_ms"]["adjoint"] / r["ms"] for r in measured]
        if adjoint:
            part["geometric_mean_over_adjoint"] = geometric_mean(adjoint)
        found.append(part)
    return found


def document(
    device: str,
    rows: list[Row],
    matmul_gflops: Mapping[str, float],
    peak_gflops: Mapping[str, float] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Everything about one device, as it is written to the JSON file.

    Args:
        device: "cpu" or "cuda".
        rows: From `make_row`.
        matmul_gflops: The rate of a large `torch.matmul` in the same run, by dtype.
        peak_gflops: The peak rate of the cores in the same run, by dtype.
        more: Further entries at the top.
    """
    peaks = peak_gflops or {}
    for row in rows:
        if "gflops" not in row:
            continue
        if rate := matmul_gflops.get(row["dtype"]):
            row["of_matmul"] = row["gflops"] / rate
        if rate := peaks.get(row["dtype"]):
            row["of_peak"] = row["gflops"] / rate
            if "gflop_valid" in row:
                row["of_peak_valid"] = row["of_peak"] * row["gflop_valid"] / row["gflop"]
    tiny = [row for row in rows if row.get("tier") == "tiny"]
    rows = [row for row in rows if row.get("tier") != "tiny"]
    by_op = {op: [row for row in rows if row["op"] == op] for op in OPS}
    return {
        **machine.facts(device),
        **more,
        "matmul_gflops": dict(matmul_gflops),
        "peak_gflops": dict(peaks),
        **{op: found for op, found in by_op.items() if found or op in (FUSE, MATRIX)},
        "tiny": tiny,
        "summary": summarise(rows),
    }
