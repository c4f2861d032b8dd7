"""What the pictures share: palette, type, and axes placed by the pixel."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

DPI = 160
INK, MUTED, FAINT = "#1c2733", "#66727f", "#dde2e7"
ACCENT, PLAIN = "#c8404f", "#a9b8c7"

# Negative is blue, positive red, zero white like the page.
SIGNED = LinearSegmentedColormap.from_list(
    "signed", ["#0b3c6f", "#2f7fb8", "#b3d3e8", "#ffffff", "#f4c1b5", "#c8404f", "#6d0f24"]
)


class Canvas:
    """A white page; all places on it are pixels from its upper left corner."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes in a thin frame, without ticks."""
        axes = self.figure.add_axes(
            (
                left / self.width,
                1 - (top + height) / self.height,
                width / self.width,
                height / self.height,
            )
        )
        axes.set(xticks=[], yticks=[])
        axes.tick_params(length=0, labelsize=7.5, labelcolor=MUTED)
        axes.spines[:].set(color=MUTED, linewidth=0.6)
        return axes

    def text(self, left: float, baseline: float, words: str, size: float = 8, **style) -> None:
        """Words at a place, the baseline of the first line; `size` is in points."""
        style = {"color": INK, "va": "baseline", "linespacing": 1.5} | style
        self.figure.text(
            left / self.width, 1 - baseline / self.height, words, fontsize=size, **style
        )

    def title(self, left: float, right: float, baseline: float, words: str, note: str = "") -> None:
        """A heading over a part of the page, with a quiet note at its right end."""
        self.text(left, baseline, words, 10, weight="bold")
        self.text(right, baseline, note, 8, color=MUTED, ha="right")

    def save(self, path: Path) -> None:
        """Writes the page as a PNG."""
        self.figure.savefig(path, dpi=DPI)
