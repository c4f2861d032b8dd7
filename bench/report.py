"""From measured rounds to files: ``results/<machine>.json``, ``.md`` and ``.png``.

``python -m bench.report raw.json`` makes them from what ``pytest --benchmark-json`` wrote.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table

from bench import growth_plot, machine, plot
from bench.bounds import judge
from bench.cases import OURS
from bench.collapse_cases import COLLAPSE
from bench.rows import Row, document, make_row, network_rows
from bench.tables import bounds_table, markdown

__all__ = ["LAST", "RESULTS", "Row", "document", "make_row", "save", "write"]

RESULTS = Path(__file__).with_name("results")
LAST = Path(__file__).with_name(".last")  # of runs that are not whole; not under version control
_WIDTH = 140


def print_bounds(doc: Mapping[str, Any]) -> None:
    """Prints the bounds of a document that was measured on a CPU."""
    lines = judge(doc)
    measured = [line for line in lines if line.held is not None]
    about = (
        f"{len(lines) - len(measured)} more not measured; " if len(measured) < len(lines) else ""
    )
    shown = Table(title="Bounds", caption=f"{about}{doc['machine']}, commit {doc['commit']}")
    for head in ("bound", "limit", "", "figure", "worst"):
        shown.add_column(head, overflow="fold")
    words = {True: "[green]held[/]", False: "[bold red]NOT HELD[/]"}
    for line in measured:
        # a row's name may hold a slice, which would read as markup
        texts = [escape(text) for text in (line.bound, line.limit, line.figure, line.worst)]
        shown.add_row(*texts[:2], words[bool(line.held)], *texts[2:])
    Console(width=_WIDTH).print(shown)


def last() -> Path | None:
    """The results of a CPU that were written last."""
    found = [folder / f"{machine.stem('cpu')}.json" for folder in (LAST, RESULTS)]
    found = [path for path in found if path.exists()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def write(doc: Mapping[str, Any], name: str, *folders: Path) -> list[Path]:
    """Writes the files of one device into each folder and prints the report."""
    main, details = markdown(doc)
    growth = doc.get("growth", {})
    on_cpu = "threads" in doc
    if on_cpu:
        bounds = judge(doc)
        doc = {**doc, "bounds": [line._asdict() for line in bounds]}
        details = "\n".join(["## Bounds", "", *bounds_table(bounds), details])
    # the points of the sweeps would drown the rows; the steps that bounds are made from stay
    brief = {n: {k: v for k, v in s.items() if k != "points"} for n, s in growth.items()}
    doc = {**doc, **({"growth": brief} if growth else {})}
    written = []
    for folder in folders:
        base = folder / name
        save(doc, base.with_suffix(".json"))
        base.with_suffix(".md").write_text(f"{main}\n{details}")
        plot.speedups(doc, base.with_suffix(".png"))
        written += [base.with_suffix(suffix) for suffix in (".json", ".md", ".png")]
        if growth:
            written += write_growth(doc, growth, folder / f"{name}-growth")
    Console(width=_WIDTH).print(Markdown(main))
    if on_cpu:
        print_bounds(doc)
    return written


def save(doc: Mapping[str, Any], path: Path) -> None:
    """Writes a document, and nothing beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(doc, indent=1) + "\n")


def write_growth(doc: Mapping[str, Any], growth: Mapping[str, Any], base: Path) -> list[Path]:
    """Writes the points of the growth sweeps and their picture."""
    facts = {key: doc[key] for key in ("machine", "device", "torch", "commit")}
    paths = [base.with_name(base.name + suffix) for suffix in (".json", ".png")]
    save({**facts, "sweeps": growth}, paths[0])
    growth_plot.draw(growth, f"{doc['device']}, torch {doc['torch']}", paths[1])
    return paths


def from_pytest(raw: Mapping[str, Any], folder: Path, **on_cpu: Any) -> list[Path]:
    """Writes one set of files per device from what pytest-benchmark wrote.

    Args:
        raw: What pytest-benchmark wrote.
        folder: Where to.
        on_cpu: More for the document of the CPU.
    """
    groups: dict[str, tuple[dict[str, Any], dict[str, float]]] = {}
    rates: dict[str, dict[str, float]] = {}
    peaks: dict[str, float] = {}
    for entry in raw["benchmarks"]:
        facts, stats = entry["extra_info"], entry["stats"]
        if facts["op"] == "matmul":
            rate = facts["gflop"] / stats["median"]
            rates.setdefault(facts["device"], {})[facts["dtype"]] = rate
        elif facts["op"] == "peak":
            rate = facts["gflop"] / stats["min"]
            peaks[facts["dtype"]] = max(rate, peaks.get(facts["dtype"], 0.0))
        else:
            _, medians = groups.setdefault(entry["group"], (facts, {}))
            medians[facts["entrant"]] = stats["median"]
    measured = [group for group in groups.values() if OURS in group[1]]
    rows = [make_row(*group) for group in measured if group[0]["op"] != COLLAPSE]
    if networks := network_rows(group for group in measured if group[0]["op"] == COLLAPSE):
        on_cpu[COLLAPSE] = networks
    written = []
    for device in dict.fromkeys(row["device"] for row in [*rows, *networks]):
        of_device = [row for row in rows if row["device"] == device]
        more = {"peak_gflops": peaks, **on_cpu} if device == "cpu" else {}
        doc = document(device, of_device, rates.get(device, {}), **more)
        written += write(doc, machine.stem(device), folder)
    return written


if __name__ == "__main__":
    print(*from_pytest(json.loads(Path(sys.argv[1]).read_text()), RESULTS), sep="\n")
