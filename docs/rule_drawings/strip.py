"""What all drawings share: a strip of panels, each with a title, a picture and a line below it.

Everything on the page is placed in points from its upper left corner. Files are the same bytes in
every run of one matplotlib: without a date, and with names that depend on the content alone.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

INK, MUTED, FAINT = "#1c2733", "#5c6873", "#dde2e7"
HIDDEN = "#c9d0d7"  # positions that padding fills, or hides

# Safe for the colour-blind, and with zero white like the page. Values: blue below zero, red above.
VALUES = LinearSegmentedColormap.from_list(
    "values", ["#0b3c6f", "#2f7fb8", "#b3d3e8", "#ffffff", "#f4c1b5", "#c8404f", "#6d0f24"]
)
# Errors: orange, which no value has.
ERRORS = LinearSegmentedColormap.from_list("errors", ["#ffffff", "#f7c873", "#d55e00", "#6b2f00"])
# Counts and other numbers that are not negative.
COUNTS = LinearSegmentedColormap.from_list("counts", ["#ffffff", "#b3d3e8", "#2f7fb8"])

_SETTINGS = {
    "font.family": "DejaVu Sans",
    "mathtext.fontset": "dejavusans",
    "svg.fonttype": "path",  # the same letters wherever it is shown
    "svg.hashsalt": "linfuse",
}
_MARGIN, _TOP, _GAP = 14, 34, 38


class Strip:
    """A row of panels of one height, with a sign between neighbours."""

    def __init__(self, panels: int, size: float = 130, gap: float = _GAP, lines: int = 2) -> None:
        """For so many square panels of `size` points, with so many lines of text below."""
        self._size, self._gap, self._left = size, gap, float(_MARGIN)
        self._width = 2 * _MARGIN + panels * size + (panels - 1) * gap
        self._height = _TOP + size + 12 + 12 * lines
        self.figure = Figure(figsize=(self._width / 72, self._height / 72), facecolor="white")

    def _axes(self, left: float, top: float, width: float, height: float) -> Axes:
        axes = self.figure.add_axes(
            (
                left / self._width,
                1 - (top + height) / self._height,
                width / self._width,
                height / self._height,
            )
        )
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(color=MUTED, linewidth=0.7)
        return axes

    def _text(self, left: float, top: float, words: str, size: float, **style: object) -> None:
        self.figure.text(
            left / self._width, 1 - top / self._height, words, fontsize=size, va="top", **style
        )

    def panel(self, title: str, note: str = "", sign: str = "") -> Axes:
        """The next panel; `sign` stands between it and the one before."""
        left = self._left
        if sign:
            middle = _TOP + self._size / 2
            self.figure.text(
                (left - self._gap / 2) / self._width,
                1 - middle / self._height,
                sign,
                fontsize=15,
                weight="bold",
                color=MUTED,
                ha="center",
                va="center",
            )
        self._text(left + self._size / 2, 14, title, 9, weight="bold", color=INK, ha="center")
        self._text(
            left + self._size / 2,
            _TOP + self._size + 7,
            note,
            8,
            color=MUTED,
            ha="center",
            linespacing=1.35,
        )
        self._left += self._size + self._gap
        return self._axes(left, _TOP, self._size, self._size)

    def save(self, path: Path) -> None:
        """Writes the drawing as an SVG."""
        with matplotlib.rc_context(_SETTINGS):
            self.figure.savefig(path, format="svg", metadata={"Date": None})
        # matplotlib ends lines of paths with a space.
        text = "\n".join(line.rstrip() for line in path.read_text().splitlines())
        path.write_text(text + "\n")


def strength(*values: Tensor) -> float:
    """The largest absolute value, for a scale that is even around zero."""
    return max(value.abs().max().item() for value in values) or 1.0


def cells(
    axes: Axes,
    values: Tensor,
    limit: float,
    colours: Colormap = VALUES,
    *,
    numbers: str | None = None,
    lines: str = "#eef1f3",
) -> None:
    """Draws a matrix `[rows, columns]` by its cells, the first row on top.

    Args:
        axes: Where.
        values: The numbers.
        limit: What the strongest colour stands for.
        colours: VALUES is even around zero, the others begin at zero.
        numbers: A format to write the numbers with, or None for none.
        lines: The colour between the cells.
    """
    array = values.detach().double().numpy()
    rows, columns = array.shape
    least = -limit if colours is VALUES else 0
    axes.set(xlim=(0, columns), ylim=(rows, 0))
    # Where nothing stands nothing is drawn: a matrix is mostly empty.
    for row, column in np.argwhere(np.abs(array) > 1e-12 * limit):
        colour = colours((array[row, column] - least) / (limit - least))
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor=colour, edgecolor="none"))
    if max(rows, columns) <= 40:
        axes.hlines(range(1, rows), 0, columns, colors=lines, linewidth=0.4)
        axes.vlines(range(1, columns), 0, rows, colors=lines, linewidth=0.4)
    if numbers is not None:
        cell = axes.get_window_extent().width * 72 / axes.figure.dpi / max(rows, columns)
        longest = max(len(format(value, numbers)) for value in array.flat)
        size = min(9, 0.6 * cell, 1.3 * cell / longest)  # a digit is 0.64 as wide as its size
        for row, column in np.ndindex(rows, columns):
            value = array[row, column]
            dark = abs(value) > 0.75 * limit
            axes.text(
                column + 0.5,
                row + 0.5,
                format(value, numbers).replace("-", "\N{MINUS SIGN}"),
                fontsize=size,
                color="white" if dark else INK,
                ha="center",
                va="center",
            )


def ring(axes: Axes, size: int, width: int, words: str = "") -> None:
    """Hatches the outermost cells of a square picture: what padding puts in place of values."""
    inner = size - 2 * width
    for left, top, wide, high in (
        (0, 0, size, width),
        (0, size - width, size, width),
        (0, width, width, inner),
        (size - width, width, width, inner),
    ):
        axes.add_patch(
            Rectangle(
                (left, top), wide, high, facecolor="white", edgecolor=HIDDEN, hatch="/////",
                linewidth=0,
            )
        )  # fmt: skip
    axes.add_patch(Rectangle((width, width), inner, inner, fill=False, edgecolor=INK, linewidth=1))
    if words:
        axes.text(size / 2, width / 2, words, fontsize=8, color=INK, ha="center", va="center",
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8})  # fmt: skip


def frame(axes: Axes, left: float, top: float, width: float, height: float) -> None:
    """A frame around some cells."""
    axes.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor=INK, linewidth=1))
