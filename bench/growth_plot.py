"""The picture of the growth sweeps: time against work, one panel per sweep."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.cases import OURS
from bench.plot import FAINT, INK

# ours stands out; the others are told apart by line and marker too
_STYLES = {
    OURS: {"color": "#1b4f8f", "marker": "o", "linewidth": 1.8},
    "adjoint": {"color": "#e0912f", "marker": "s", "linestyle": "--"},
    "conv_input": {"color": "#5fae9b", "marker": "^", "linestyle": ":"},
    "zeros": {"color": "#9c7fc0", "marker": "D", "linestyle": "-."},
}


def draw(growth: Mapping[str, Any], heading: str, path: Path) -> None:
    """Draws every sweep on logarithmic axes; the worst step is named in each panel."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 2
    rows = -(-len(growth) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(10, 3.4 * rows + 0.5), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(growth) :]:
        axis.set_axis_off()
    for axis, (name, sweep) in zip(axes.flat, growth.items(), strict=False):
        _panel(axis, name, sweep)
    figure.suptitle(f"Growth, float32, fastest round\n{heading}", fontsize=11, color=INK)
    figure.savefig(path, dpi=130, facecolor="white")
    pyplot.close(figure)


def _panel(axis: Any, name: str, sweep: Mapping[str, Any]) -> None:
    points = sweep["points"]
    work = [point["work"] for point in points]
    for entrant in points[0]["seconds"]:
        ms = [point["seconds"][entrant] * 1e3 for point in points]
        style = {"linewidth": 1.1, **_STYLES[entrant]}
        axis.plot(work, ms, label=entrant, markersize=3.5, **style)
    axis.set_xscale("log")
    axis.set_yscale("log")
    step, factor = max(sweep["steps"].items(), key=lambda item: item[1])
    axis.set_title(f"{sweep['op']} over {name}", loc="left", fontsize=10, color=INK)
    axis.set_xlabel(
        f"{sweep['unit']}, from {points[0]['at']} to {points[-1]['at']}; "
        f"worst step {step}: {factor:.2f}x beyond the peer",
        fontsize=7.5,
    )
    axis.set_ylabel("ms", fontsize=8)
    axis.tick_params(which="both", labelsize=7.5, colors=INK)
    axis.grid(color=FAINT, linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.legend(fontsize=7.5, frameon=False)
