"""The picture of the times."""

from __future__ import annotations

from math import floor, log10
from pathlib import Path
from typing import NamedTuple

from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from cryptonets.canvas import ACCENT, FAINT, INK, MUTED, PLAIN, Canvas
from cryptonets.measure import NetworkFacts, WayFacts
from cryptonets.report import duration, ratio

PITCH = 56  # pixels from one bar to the next


class Bar(NamedTuple):
    """One line of a chart; `remark` stands at its right end."""

    name: str
    seconds: float
    remark: str = ""
    ours: bool = False


def draw_times(
    ways: dict[str, WayFacts], networks: dict[str, NetworkFacts], threads: int, path: Path
) -> None:
    """Draws how long it takes to fuse two layers, and to run the network before and after."""
    *others, ours = ways
    making = [
        Bar(name, ways[name].seconds, f"{ratio(ways[name].seconds, ways[ours].seconds)} as long")
        for name in others
    ]
    making.append(Bar(ours, ways[ours].seconds, ours=True))

    running = []
    for load, field in (("an image alone", "seconds_alone"), ("in a batch", "seconds_in_batch")):
        old, new = (getattr(networks[name], field) for name in ("before", "after"))
        running.append(Bar(f"{load}, as trained", old, f"{ratio(old, new)} as long"))
        running.append(Bar(f"{load}, collapsed", new, ours=True))

    page = Canvas(1600, 860)
    page.text(70, 72, "What fusing costs, and what it saves", 17, weight="bold")
    where = f"{threads} CPU thread{'s' * (threads > 1)}"
    page.text(70, 118, f"Median times on {where}, logarithmic scale", 10, color=MUTED)
    page.title(70, 1530, 200, "Making one Linear of the forum's two layers")
    draw_bars(page, 220, making)
    page.title(70, 1530, 544, "Running the network, time per image")
    draw_bars(page, 564, running)
    page.save(path)


def draw_bars(page: Canvas, top: float, bars: list[Bar]) -> None:
    """Draws horizontal bars from the height `top` down, with the time behind each."""
    axes = page.axes(430, top, 900, PITCH * len(bars))
    axes.spines[:].set_visible(False)
    axes.set(xscale="log", ylim=(len(bars) - 0.5, -0.5))
    # From a power of ten well below the shortest, so that every bar has a length to see.
    shortest, longest = min(bar.seconds for bar in bars), max(bar.seconds for bar in bars)
    axes.set_xlim(10 ** floor(log10(shortest / 2)), longest * 2)
    axes.xaxis.set_major_locator(LogLocator(10))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: power(value)))
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)

    for line, bar in enumerate(bars):
        baseline = top + PITCH * (line + 0.5) + 7
        color, weight = (ACCENT, "bold") if bar.ours else (INK, "normal")
        axes.barh(line, bar.seconds, height=0.6, color=ACCENT if bar.ours else PLAIN)
        page.text(70, baseline, bar.name, 9, color=color, weight=weight)
        page.text(1530, baseline, bar.remark, 9, color=MUTED, ha="right")
        axes.annotate(
            duration(bar.seconds),
            (bar.seconds, line),
            xytext=(6, 0),
            textcoords="offset points",
            va="center_baseline",
            fontsize=9,
            color=color,
            weight="bold",
        )


def power(seconds: float) -> str:
    """A power of ten, short: `100 µs`."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= 0.999 * scale:
            return f"{seconds / scale:.0f} {unit}"
    return f"{seconds * 1e9:.0f} ns"
