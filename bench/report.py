"""From measured rounds to files: ``results/<machine>.json``, ``.md`` and ``.png``.

``python -m bench.report raw.json`` makes them from what ``pytest --benchmark-json`` wrote.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from bench import machine, plot
from bench.cases import FLOOR, FUSE, MATRIX, OURS

Row = dict[str, Any]
RESULTS = Path(__file__).with_name("results")
LAST = Path(__file__).with_name(".last")  # of runs that are not whole; not under version control
_TINY_LAYERS = ("gist", "forum")


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
    if ms:
        peer = min(ms, key=lambda name: ms[name])
        row |= {"peer": peer, "peer_ms": ms[peer], "ratio": ms[peer] / ours}
    row["all_peers_ms"] = ms
    return row


def geometric_mean(values: Iterable[float]) -> float:
    """The mean that treats twice as fast and half as fast alike."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def summarise(rows: list[Row]) -> list[Row]:
    """Per op and dtype: the mean ratio, and by name every row slower than its best peer."""
    found = []
    for op, dtype in dict.fromkeys((row["op"], row["dtype"]) for row in rows):
        raced = [r for r in rows if (r["op"], r["dtype"]) == (op, dtype) and "ratio" in r]
        if raced:
            found.append(
                {
                    "op": op,
                    "dtype": dtype,
                    "layers": len(raced),
                    "geometric_mean_ratio": geometric_mean(r["ratio"] for r in raced),
                    "slower_than_peer": {
                        r["layer"]: round(r["ratio"], 3) for r in raced if r["ratio"] < 1
                    },
                }
            )
    return found


def document(
    device: str, rows: list[Row], matmul_gflops: Mapping[str, float], **more: Any
) -> dict[str, Any]:
    """Everything about one device, as it is written to the JSON file.

    Args:
        device: "cpu" or "cuda".
        rows: From `make_row`.
        matmul_gflops: The rate of a large `torch.matmul` in the same run, by dtype.
        more: Further entries at the top.
    """
    for row in rows:
        if "gflops" in row and (rate := matmul_gflops.get(row["dtype"])):
            row["of_matmul"] = row["gflops"] / rate
    return {
        **machine.facts(device),
        **more,
        "matmul_gflops": dict(matmul_gflops),
        FUSE: [row for row in rows if row["op"] == FUSE],
        MATRIX: [row for row in rows if row["op"] == MATRIX],
        "summary": summarise(rows),
    }


# --- text ------------------------------------------------------------------------------------


def _number(value: float | None) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return "-"
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(max(digits, 0), 4)}f}"


def _table(head: list[str], lines: Iterable[list[str]]) -> list[str]:
    """A markdown table; columns after the second are numbers and stand to the right."""
    rule = ["---" if at < 2 else "---:" for at in range(len(head))]
    return ["| " + " | ".join(line) + " |" for line in [head, rule, *lines]] + [""]


def _ratio(row: Row) -> str:
    if "ratio" not in row:
        return "-"
    return f"{row['ratio']:.2f}x" + (" (slower)" if row["ratio"] < 1 else "")


def _fuse_table(rows: list[Row]) -> list[str]:
    head = [
        "layer", "dtype", "GFLOP", "ms", "GFLOP/s", "of matmul", "best peer", "peer ms", "ratio",
    ]  # fmt: skip
    return _table(
        head,
        (
            [
                r["layer"], r["dtype"], _number(r["gflop"]), _number(r["ms"]),
                _number(r["gflops"]), f"{r['of_matmul']:.0%}" if "of_matmul" in r else "-",
                r.get("peer", "-"), _number(r.get("peer_ms")), _ratio(r),
            ]
            for r in rows
        ),
    )  # fmt: skip


def _matrix_table(rows: list[Row]) -> list[str]:
    head = [
        "layer", "dtype", "GB", "ms", "GB/s", "zeros ms", "of zeros", "best peer", "peer ms",
        "ratio",
    ]  # fmt: skip
    return _table(
        head,
        (
            [
                r["layer"], r["dtype"], _number(r["gb"]), _number(r["ms"]), _number(r["gbps"]),
                _number(r.get("zero_ms")), _number(r.get("ms_over_zero_ms")),
                r.get("peer", "-"), _number(r.get("peer_ms")), _ratio(r),
            ]
            for r in rows
        ),
    )  # fmt: skip


def _every_peer(rows: list[Row]) -> list[str]:
    """How many times longer than ours each way takes."""
    names = list(dict.fromkeys(name for row in rows for name in row["all_peers_ms"]))
    lines = []
    for row in rows:
        times = (row["all_peers_ms"].get(name) for name in names)
        cells = ["" if ms is None else _number(ms / row["ms"]) for ms in times]
        lines.append([row["layer"], row["dtype"], *cells])
    return _table(["layer", "dtype", *names], lines)


def _left_out(rows: list[Row]) -> list[str]:
    """Who was left out where, and why, gathered by entrant and reason."""
    gathered: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, reason in row.get("left_out", {}).items():
            gathered.setdefault((name, reason), []).append(f"{row['layer']} {row['dtype']}")
    return [f"- {name}, {reason}: {', '.join(where)}" for (name, reason), where in gathered.items()]


def _summary_lines(summary: list[Row]) -> list[str]:
    lines = []
    for part in summary:
        slower = ", ".join(f"{n} ({ratio}x)" for n, ratio in part["slower_than_peer"].items())
        lines.append(
            f"- {part['op']} {part['dtype']}: {part['geometric_mean_ratio']:.2f}x the best peer "
            f"over {part['layers']} layers (geometric mean); slower than it: {slower or 'none'}"
        )
    return [*lines, ""]


def _overhead_lines(rows: list[Row]) -> list[str]:
    return [
        f"- {r['op']} {r['layer']} {r['dtype']}: {r['ms'] * 1e3:.1f} us, best peer "
        f"({r['peer']}) {r['peer_ms'] * 1e3:.1f} us: {(r['ms'] - r['peer_ms']) * 1e3:+.1f} us"
        for r in rows
        if r["layer"] in _TINY_LAYERS and "peer" in r
    ]


def markdown(doc: Mapping[str, Any]) -> tuple[str, str]:
    """The readable report: its main part, and the details that only the file carries."""
    fuse, matrix = doc[FUSE], doc[MATRIX]
    skipped = (FUSE, MATRIX, "summary", "checks", "matmul_gflops", "device")
    told = [f"{key} {value}" for key, value in doc.items() if key not in skipped]
    rates = ", ".join(f"{d} {_number(r)}" for d, r in doc["matmul_gflops"].items())
    lines = [f"# {doc['device']}", "", ", ".join(told) + ".", ""]
    lines += [f"torch.matmul, GFLOP/s in the same run: {rates or 'not measured'}.", ""]
    if doc.get("checks"):
        lines += ["## Checks on this machine", ""]
        lines += [*(f"- {name}: {said}" for name, said in doc["checks"].items()), ""]
    if fuse:
        lines += ["## fuse_conv_linear", "", *_fuse_table(fuse)]
    if matrix:
        lines += ["## conv_to_affine", "", *_matrix_table(matrix)]
    if tiny := _overhead_lines(fuse + matrix):
        lines += ["## Call overhead on tiny layers", "", *tiny, ""]
    if doc["summary"]:
        lines += ["## Geometric means", "", *_summary_lines(doc["summary"])]
    details = ["## How many times longer than ours each way takes", ""]
    for rows in filter(None, (fuse, matrix)):
        details += [f"### {rows[0]['op']}", "", *_every_peer(rows)]
    details += ["## Left out", "", *_left_out(fuse + matrix), ""]
    return "\n".join(lines), "\n".join(details)


# --- files -----------------------------------------------------------------------------------


def write(doc: Mapping[str, Any], name: str, *folders: Path) -> list[Path]:
    """Writes the three files of one device into each folder and prints the report."""
    main, details = markdown(doc)
    written = []
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        base = folder / name
        base.with_suffix(".json").write_text(json.dumps(doc, indent=1) + "\n")
        base.with_suffix(".md").write_text(f"{main}\n{details}")
        plot.speedups(doc, base.with_suffix(".png"))
        written += [base.with_suffix(suffix) for suffix in (".json", ".md", ".png")]
    Console(width=120).print(Markdown(main))
    return written


def from_pytest(raw: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes one set of files per device from what pytest-benchmark wrote."""
    groups: dict[str, tuple[dict[str, Any], dict[str, float]]] = {}
    rates: dict[str, dict[str, float]] = {}
    for entry in raw["benchmarks"]:
        facts, median = entry["extra_info"], entry["stats"]["median"]
        if facts["op"] == "matmul":
            rate = facts["gflop"] / median
            rates.setdefault(facts["device"], {})[facts["dtype"]] = rate
        else:
            _, medians = groups.setdefault(entry["group"], (facts, {}))
            medians[facts["entrant"]] = median
    rows = [make_row(facts, medians) for facts, medians in groups.values() if OURS in medians]
    written = []
    for device in dict.fromkeys(row["device"] for row in rows):
        of_device = [row for row in rows if row["device"] == device]
        doc = document(device, of_device, rates.get(device, {}))
        written += write(doc, machine.stem(device), folder)
    return written


if __name__ == "__main__":
    print(*from_pytest(json.loads(Path(sys.argv[1]).read_text()), RESULTS), sep="\n")
