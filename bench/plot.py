"""The picture of the results: how many times faster than the best peer, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.ops import OPS

Row = dict[str, Any]

# told apart by lightness too, so that they stay distinct in grey and to colour-blind eyes
_COLOURS = {
    "float32": "#1b4f8f",
    "float64": "#e0912f",
    "bfloat16": "#5fae9b",
    "float16": "#9c7fc0",
}
INK, FAINT = "#222222", "#d9d9d9"
_BAR_INCHES = 0.155


def speedups(doc: Mapping[str, Any], path: Path) -> None:
    """Draws one panel per op, one bar per layer and dtype, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {op: [row for row in doc.get(op, []) if "ratio" in row] for op in OPS}
    panels = {op: rows for op, rows in panels.items() if rows}
    if not panels:
        return
    heights = [_slots(rows) * _BAR_INCHES + 0.9 for rows in panels.values()]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(8.5, sum(heights) + 0.6), squeeze=False,
        gridspec_kw={"height_ratios": heights}, layout="constrained",
    )  # fmt: skip
    for axis, (op, rows) in zip(axes[:, 0], panels.items(), strict=True):
        _panel(axis, op, rows)
    figure.suptitle(
        f"Speed-up over the best other way\n{doc['device']}, torch {doc['torch']}",
        fontsize=11, color=INK,
    )  # fmt: skip
    figure.savefig(path, dpi=160, facecolor="white")
    pyplot.close(figure)


def _layers(rows: list[Row]) -> dict[str, list[Row]]:
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row["layer"], []).append(row)
    return grouped


def _slots(rows: list[Row]) -> float:
    """Height of a panel in bars: every layer's bars and a gap."""
    return len(rows) + 0.7 * len(_layers(rows))


def _panel(axis: Any, op: str, rows: list[Row]) -> None:
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    at, ticks = 0.0, {}
    for layer, of_layer in _layers(rows).items():
        ticks[layer] = at + (len(of_layer) - 1) / 2
        for row in of_layer:
            ratio = row["ratio"]
            slower = ratio < 1
            axis.barh(
                at, ratio - 1, left=1, height=0.92, color=_COLOURS[row["dtype"]],
                hatch="////" if slower else None, edgecolor="white", linewidth=0,
            )  # fmt: skip
            axis.annotate(
                f"{ratio:.3g}x", (ratio, at), xytext=(-3 if slower else 3, 0),
                textcoords="offset points", ha="right" if slower else "left", va="center",
                fontsize=6.5, color="#b3261e" if slower else INK,
            )  # fmt: skip
            at += 1
        at += 0.7
    axis.set_xscale("log")
    low, high = min(row["ratio"] for row in rows), max(row["ratio"] for row in rows)
    # room for the numbers beside the bars
    axis.set_xlim(min(0.8, low * 0.75), max(high * 1.35, 2))
    axis.set_ylim(at - 0.2, -1.0)
    axis.axvline(1, color=INK, linewidth=0.9)
    axis.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_yticks(list(ticks.values()), list(ticks), fontsize=8)
    axis.tick_params(axis="x", labelsize=7.5, colors=INK)
    axis.tick_params(axis="y", length=0, colors=INK)
    axis.grid(axis="x", color=FAINT, linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.set_title(op, loc="left", fontsize=10, color=INK)
    dtypes = dict.fromkeys(row["dtype"] for row in rows)
    axis.legend(
        handles=[Patch(color=_COLOURS[dtype], label=dtype) for dtype in dtypes],
        loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(dtypes), fontsize=7.5,
        frameon=False, borderaxespad=0.2,
    )  # fmt: skip
