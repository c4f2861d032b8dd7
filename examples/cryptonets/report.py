"""The tables that the demo prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.table import Table

from cryptonets.measure import Agreement, NetworkFacts, WayFacts


def duration(seconds: float) -> str:
    """Three significant digits in the unit that suits: `1.23 ms`."""
    unit, scale = next(
        ((unit, scale) for unit, scale in (("s", 1.0), ("ms", 1e-3)) if seconds >= scale),
        ("µs", 1e-6),
    )
    value = seconds / scale
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def thousands(number: float) -> str:
    """Digits in groups of three: `281 250`."""
    return f"{number:,.0f}".replace(",", " ")


def ratio(before: float, after: float) -> str:
    """How many times as much the first is: `3.3 x`, `21 043 x`."""
    value = before / after
    return f"{value:.1f} x" if value < 10 else f"{thousands(value)} x"


def layers_table(networks: dict[str, NetworkFacts]) -> Table:
    """The layers of each network, in a row."""
    table = Table.grid(padding=(0, 2))
    for name, facts in networks.items():
        table.add_row(f"{name}:", facts.layers)
    return table


def collapse_table(report: Sequence[Any]) -> Table:
    """What `linfuse_ext.collapse` found, and what became of it: the rows of its report."""
    table = Table(title="What collapse did", box=box.ROUNDED, show_lines=True)
    table.add_column("layers")
    table.add_column("verdict")
    table.add_column("reason", ratio=1)
    for head in ("FLOPs", "parameters", "error"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in report:
        table.add_row(
            "\n".join(row.layers),
            row.verdict,
            row.reason,
            f"{thousands(row.flops_before)}\n→ {thousands(row.flops_after)}",
            f"{thousands(row.params_before)}\n→ {thousands(row.params_after)}",
            "" if row.error is None else f"{row.error:.0e}",
            style="bold green" if row.verdict == "fused" else "",
        )
    return table


def networks_table(
    before: NetworkFacts, after: NetworkFacts, float32: Agreement, float64: Agreement
) -> Table:
    """The network as it was trained against the collapsed one."""
    table = Table(title="The network, before and after", box=box.ROUNDED)
    table.add_column("", min_width=34)
    table.add_column("as trained", justify="right", min_width=10)
    table.add_column("collapsed", justify="right", min_width=10, style="bold green")
    table.add_column("ratio", justify="right", min_width=10)

    def row(label: str, field: str, words: Callable[[float], str] = thousands) -> None:
        old, new = getattr(before, field), getattr(after, field)
        table.add_row(label, words(old), words(new), ratio(old, new))

    row("layers", "depth")
    row("multiplications per image", "multiplications")
    row("multiplications in a row (levels)", "levels")
    row("parameters", "parameters")
    table.add_section()
    row("time for an image alone", "seconds_alone", duration)
    row("time per image, all in a batch", "seconds_in_batch", duration)
    table.add_section()
    digits = float32.digits
    table.add_row("test accuracy", f"{before.right / digits:.1%}", f"{after.right / digits:.1%}")
    table.add_row("same predictions", "", f"{float32.same_predictions} of {digits}")
    table.add_section()
    table.add_row("largest logit", "", f"{float32.largest_logit:.1f}")
    table.add_row("largest difference in float32", "", f"{float32.difference:.0e}")
    table.add_row("largest difference in float64", "", f"{float64.difference:.0e}")
    return table


def ways_table(ways: dict[str, WayFacts]) -> Table:
    """Each way to make the fused layer against the last one, ours."""
    *_, ours = ways
    table = Table(title="Making one Linear of the forum's two layers", box=box.ROUNDED)
    table.add_column("", min_width=34)
    table.add_column("time", justify="right", min_width=10)
    table.add_column("over ours", justify="right", min_width=10)
    table.add_column("error", justify="right", min_width=10)
    for name, facts in ways.items():
        table.add_row(
            name,
            duration(facts.seconds),
            "" if name == ours else ratio(facts.seconds, ways[ours].seconds),
            f"{facts.error:.0e}",
            style="bold green" if name == ours else "",
        )
    return table
