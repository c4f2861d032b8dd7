"""Drawings of the ways in which a convolution's matrix can be held."""

from __future__ import annotations

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from torch import nn

import linfuse_ext as lf

from .strip import FAINT, INK, MUTED, Strip, cells, strength

_SIZE = 8


def _layer() -> nn.Conv1d:
    conv = nn.Conv1d(1, 1, 3, padding=1, bias=False, dtype=torch.float64).requires_grad_(False)
    conv.weight.data = torch.tensor([[[-0.6, 1.0, 0.5]]], dtype=torch.float64)
    return conv


def one_matrix() -> Strip:
    """The matrix of a convolution on 8 positions: dense, sparse, by diagonals, by blocks."""
    conv = _layer()
    matrix = lf.conv_to_linear(conv, _SIZE).weight.detach()
    sparse, _ = lf.functional.conv_to_affine(
        conv.weight, None, _SIZE, padding=1, layout=torch.sparse_coo
    )
    stored = sparse.values().numel()
    _, vectors, _ = lf.functional.conv_to_diagonals(conv.weight, None, _SIZE, padding=1)
    limit = strength(matrix)
    strip = Strip(4, lines=3)

    axes = strip.panel("dense", f"{matrix.numel()} numbers, zeros included")
    cells(axes, matrix, limit)

    axes = strip.panel("CSR", f"{stored} numbers, their columns,\n{_SIZE + 1} row pointers")
    cells(axes, matrix, limit, lines="none")
    for row, column in torch.nonzero(matrix).tolist():
        axes.text(column + 0.5, row + 0.5, str(column), fontsize=7, color=_ink(matrix[row, column]),
                  ha="center", va="center")  # fmt: skip

    axes = strip.panel(
        "diagonals", f"{len(vectors)} vectors of {_SIZE}: shift x by d,\nmultiply, add"
    )
    stack = torch.zeros(_SIZE, _SIZE, dtype=torch.float64)
    for place, vector in enumerate(vectors.values()):
        stack[:, 1 + 2 * place] = vector
    cells(axes, stack, limit, lines="none")
    for place, shift in enumerate(vectors):
        axes.add_patch(Rectangle((1 + 2 * place, 0), 1, _SIZE, fill=False, edgecolor=MUTED,
                                 linewidth=0.7))  # fmt: skip
        axes.text(0.9 + 2 * place, _SIZE / 2, f"d = {shift}", fontsize=7, color=MUTED, rotation=90,
                  ha="right", va="center")  # fmt: skip

    axes = strip.panel("file", "blocks of rows, one at a time")
    cells(axes, matrix, limit, lines="none")
    for start in (0, 3, 6):
        stop = min(start + 3, _SIZE)
        axes.add_patch(Rectangle((0, start), _SIZE, stop - start, fill=False, edgecolor=INK))
        words = f"rows {start} to {stop - 1}"
        axes.text(_SIZE - 0.3 if start == 0 else 0.3, (start + stop) / 2, words,
                  fontsize=7, color=MUTED, ha="right" if start == 0 else "left",
                  va="center")  # fmt: skip
    return strip


def _ink(value: torch.Tensor) -> str:
    return "white" if value.abs() > 0.75 else INK


_WIDTH, _STEP, _HIGH = 640, 72, 50
_QUESTIONS = (
    (
        "Do you need the matrix itself?",
        "no",
        "fused",
        "fuse_..., collapse: it is never built",
    ),
    ("Is it for encrypted vectors,\nwith rotations?", "yes", "diagonals", "conv_to_diagonals"),
    (
        "Does your tool take sparse matrices?",
        "yes",
        "CSR or COO",
        "layout=torch.sparse_csr; save_matrix to .npz",
    ),
    ("Does it fit in memory?", "yes", "dense", "conv_to_linear, conv_to_affine"),
)


class _Page:
    """A page that has `save`, as a strip has; all places in points from the upper left corner."""

    def __init__(self, width: float, height: float) -> None:
        strip = Strip.__new__(Strip)
        strip.figure = Figure(figsize=(width / 72, height / 72), facecolor="white")
        self.strip = strip
        self.axes: Axes = strip.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.axis("off")

    def box(self, left: float, top: float, width: float, fill: str) -> None:
        self.axes.add_patch(
            FancyBboxPatch(
                (left, top), width, _HIGH, boxstyle="round,pad=0,rounding_size=6", facecolor=fill,
                edgecolor=MUTED, linewidth=0.8,
            )
        )  # fmt: skip

    def text(self, left: float, top: float, words: str, size: float = 9, **style: object) -> None:
        self.axes.text(
            left, top, words, fontsize=size, va="center", **({"color": INK, "ha": "center"} | style)
        )

    def arrow(self, start: tuple[float, float], end: tuple[float, float], words: str) -> None:
        self.axes.add_patch(
            FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color=MUTED,
                            linewidth=1, shrinkA=0, shrinkB=0)
        )  # fmt: skip
        across = start[1] == end[1]
        left, top = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        self.text(left - 3 if across else left + 8, top - 8 if across else top, words, 8,
                  color=MUTED, ha="center" if across else "left")  # fmt: skip


def choice() -> Strip:
    """Which representation: questions on the left, answers on the right."""
    page = _Page(_WIDTH, _STEP * (len(_QUESTIONS) + 1) - 10)
    for n, (question, answer, name, calls) in enumerate(_QUESTIONS):
        top = 8 + _STEP * n
        middle = top + _HIGH / 2
        page.box(8, top, 230, "white")
        page.text(123, middle, question)
        page.arrow((238, middle), (298, middle), answer)
        page.box(298, top, 334, FAINT)
        page.text(312, middle - 10, name, 10, weight="bold", ha="left")
        page.text(312, middle + 10, calls, 8, color=MUTED, ha="left")
        other = "yes" if answer == "no" else "no"
        page.arrow((123, top + _HIGH), (123, top + _STEP), other)
    top = 8 + _STEP * len(_QUESTIONS)
    page.box(8, top, 624, FAINT)
    page.text(22, top + _HIGH / 2 - 10, "file, or rows by blocks", 10, weight="bold", ha="left")
    page.text(22, top + _HIGH / 2 + 10, "save_matrix to .safetensors; rows=(start, stop)", 8,
              color=MUTED, ha="left")  # fmt: skip
    return page.strip
