"""The readable report: a document of rows as markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from bench.bounds import Bound, call_rows
from bench.collapse_cases import BEFORE, COLLAPSE, FX_FUSE
from bench.ops import OPS
from bench.rows import Row

_NAMED = 6  # rows listed by name; more are counted
_MACHINE = ("machine", "torch", "python", "commit", "driver", "cuda", "threads")


def number(value: float | None) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return "-"
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(max(digits, 0), 4)}f}"


def table(head: list[str], lines: Iterable[list[str]], words: int = 2) -> list[str]:
    """A markdown table; columns after the first `words` are numbers and stand to the right."""
    rule = ["---" if at < words else "---:" for at in range(len(head))]
    return ["| " + " | ".join(line) + " |" for line in [head, rule, *lines]] + [""]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _ratio(row: Row) -> str:
    if "ratio" not in row:
        return "-"
    return f"{row['ratio']:.2f}x" + (" (slower)" if row["ratio"] < 1 else "")


def _rate_table(rows: list[Row]) -> list[str]:
    """Ops that compute. The peak stands for matmul where it was measured."""
    of_peak = any("of_peak" in row for row in rows)
    key, head = ("of_peak", "of peak") if of_peak else ("of_matmul", "of matmul")
    heads = ["layer", "dtype", "GFLOP", "ms", "GFLOP/s", head]
    heads += ["valid"] if of_peak else []
    lines = []
    for row in rows:
        line = [row["layer"], row["dtype"], number(row["gflop"]), number(row["ms"])]
        line += [number(row["gflops"]), _percent(row.get(key))]
        line += [_percent(row.get("of_peak_valid"))] if of_peak else []
        lines.append([*line, row.get("peer", "-"), number(row.get("peer_ms")), _ratio(row)])
    return table([*heads, "best peer", "peer ms", "ratio"], lines)


def _fill_table(rows: list[Row]) -> list[str]:
    """Ops that write memory."""
    head = ["layer", "dtype", "rows", "GB", "ms", "GB/s", "zeros ms", "of zeros", "best peer",
            "peer ms", "ratio"]  # fmt: skip
    lines = (
        [
            row["layer"], row["dtype"], f"{row['rows']:,}" if "rows" in row else "all",
            number(row["gb"]), number(row["ms"]), number(row["gbps"]), number(row.get("zero_ms")),
            number(row.get("ms_over_zero_ms")), row.get("peer", "-"), number(row.get("peer_ms")),
            _ratio(row),
        ]
        for row in rows
    )  # fmt: skip
    return table(head, lines)


def _engine_table(rows: list[Row]) -> list[str]:
    """Ours as it chooses, and with either engine forced."""
    lines = []
    for row in rows:
        sides = row["engines_ms"]
        best = min(sides, key=lambda name: sides[name])
        lines.append(
            [
                row["layer"], row["dtype"], number(row["ms"]), number(sides.get("own")),
                number(sides.get("torch")), best, f"{row['ms'] / sides[best]:.2f}",
            ]
        )  # fmt: skip
    head = ["layer", "dtype", "ours ms", "own ms", "torch ms", "faster", "ours over it"]
    return table(head, lines)


def _call_table(rows: list[Row]) -> list[str]:
    lines = []
    for row in rows:
        us, peer = row["ms"] * 1e3, row["peer_ms"] * 1e3
        over = f"{(row['ms'] - row['zero_ms']) * 1e3:+.1f}" if "zero_ms" in row else "-"
        lines.append(
            [row["op"], row["layer"], row["dtype"], f"{us:.1f}", row["peer"], f"{peer:.1f}",
             f"{us - peer:+.1f}", over]
        )  # fmt: skip
    head = ["op", "layer", "dtype", "us", "peer", "peer us", "over peer", "over zeros"]
    return table(head, lines, words=3)


def _change(of: Mapping[str, float], write: Callable[[float], str]) -> str:
    return f"{write(of['before'])} -> {write(of['after'])}"


def _network_table(rows: list[Row]) -> list[str]:
    """What collapsing a network takes, and what is left of it."""
    lines = [
        [
            row["network"], " x ".join(map(str, row["input"])),
            number(row.get("capture_ms")), number(row.get("merge_ms")),
            " / ".join(str(row[verdict]) for verdict in ("fused", "declined", "refused")),
            _change(row["operations"], str), _change(row["parameters"], "{:,}".format),
            _change(row["mflop"], number), _change(row["error"], "{:.0e}".format),
        ]
        for row in rows
    ]  # fmt: skip
    head = ["network", "input", "capture ms", "merge ms", "fused / declined / refused",
            "operations", "parameters", "MFLOP a sample", "error"]  # fmt: skip
    return table(head, lines)


def _latency_table(rows: list[Row]) -> list[str]:
    """How long a network takes before and after."""
    lines = []
    for row in rows:
        for batch, ms in row["latency_ms"].items():
            after, others = ms["after"], (ms.get(BEFORE), ms.get(FX_FUSE))
            line = [row["network"], batch, *map(number, (others[0], after, others[1]))]
            line += ["-" if other is None else f"{other / after:.2f}x" for other in others]
            lines.append(line)
    head = ["network", "batch", "before ms", "collapsed ms", "fx fuse ms", "before over it",
            "fx fuse over it"]  # fmt: skip
    return table(head, lines, words=1)


def bounds_table(bounds: Iterable[Bound]) -> list[str]:
    """One line for every bound."""
    held = {True: "held", False: "NOT HELD", None: "-"}
    lines = [[b.bound, b.limit, held[b.held], b.figure, b.worst] for b in bounds]
    return table(["bound", "limit", "", "figure", "worst"], lines, words=5)


def _every_peer(rows: list[Row]) -> list[str]:
    """How many times longer than ours each way takes."""
    names = list(dict.fromkeys(name for row in rows for name in row["all_peers_ms"]))
    lines = []
    for row in rows:
        times = (row["all_peers_ms"].get(name) for name in names)
        cells = ["" if ms is None else number(ms / row["ms"]) for ms in times]
        lines.append([row["layer"], row["dtype"], *cells])
    return table(["layer", "dtype", *names], lines)


def _left_out(rows: list[Row]) -> list[str]:
    """Who was left out where, and why, gathered by op, entrant and reason."""
    gathered: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        for name, reason in row.get("left_out", {}).items():
            where = gathered.setdefault((row["op"], name, reason), [])
            where.append(f"{row['layer']} {row['dtype']}")
    return [
        f"- {op}, {name}, {reason}: "
        + (", ".join(where) if len(where) <= _NAMED else f"{len(where)} rows")
        for (op, name, reason), where in gathered.items()
    ]


def _summary_lines(summary: list[Row]) -> list[str]:
    lines = []
    for part in summary:
        slower = ", ".join(f"{n} ({ratio}x)" for n, ratio in part["slower_than_peer"].items())
        alone = part.get("geometric_mean_over_adjoint")
        lines.append(
            f"- {part['op']} {part['dtype']}: {part['geometric_mean_ratio']:.2f}x the best peer "
            f"over {part['layers']} layers (geometric mean)"
            + (f", {alone:.2f}x adjoint alone" if alone else "")
            + f"; slower than it: {slower or 'none'}"
        )
    return [*lines, ""]


def _heading(doc: Mapping[str, Any]) -> list[str]:
    told = ", ".join(f"{key} {doc[key]}" for key in _MACHINE if key in doc)
    lines = [f"# {doc['device']}", "", f"{told}.", ""]
    for name, key in (("torch.matmul", "matmul_gflops"), ("peak", "peak_gflops")):
        rates = ", ".join(f"{d} {number(r)}" for d, r in doc[key].items())
        if rates or name == "torch.matmul":
            lines += [f"{name}, GFLOP/s in the same run: {rates or 'not measured'}.", ""]
    if doc.get("checks"):
        lines += ["## Checks on this machine", ""]
        lines += [*(f"- {name}: {said}" for name, said in doc["checks"].items()), ""]
    return lines


def markdown(doc: Mapping[str, Any]) -> tuple[str, str]:
    """The readable report: its main part, and the details that only the file carries."""
    lines = _heading(doc)
    ops = {op: doc[op] for op in OPS if doc.get(op)}
    for op, rows in ops.items():
        make = _rate_table if "gflop" in rows[0] else _fill_table
        lines += [f"## {op}", "", *make(rows)]
    everything = [row for rows in ops.values() for row in rows] + doc["tiny"]
    if both := [row for row in everything if "engines_ms" in row]:
        lines += ["## Each side of the choice of engine", "", *_engine_table(both)]
    if calls := call_rows(doc):
        lines += ["## What one call costs", "", *_call_table(calls)]
    if networks := doc.get(COLLAPSE):
        lines += [f"## {COLLAPSE}", "", *_network_table(networks), *_latency_table(networks)]
    if doc["summary"]:
        lines += ["## Geometric means", "", *_summary_lines(doc["summary"])]
    details = ["## How many times longer than ours each way takes", ""]
    for op, rows in ops.items():
        details += [f"### {op}", "", *_every_peer([row for row in rows if row["all_peers_ms"]])]
    details += ["## Left out", "", *_left_out(everything), ""]
    return "\n".join(lines), "\n".join(details)
