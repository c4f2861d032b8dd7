"""The picture of a convolution's matrix and of the fused weight."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.patches import ConnectionPatch, Rectangle
from torch import Tensor, nn

from cryptonets.canvas import FAINT, INK, MUTED, SIGNED, Canvas
from cryptonets.ways import Size, output_size
from linfuse_ext.functional import conv_to_affine


@torch.no_grad()
def draw_matrix(
    conv: nn.Conv2d, linear: nn.Linear, fused: nn.Linear, input_size: Size, path: Path
) -> None:
    """Draws the matrix of `conv`, one of its blocks close up, and the fused weight.

    Args:
        conv: The convolution.
        linear: The Linear behind it.
        fused: What `linfuse_ext.fuse_conv_linear` made of the two.
        input_size: Spatial size of the convolution's input.
        path: The PNG to write.
    """
    matrix, _ = conv_to_affine(conv.weight, conv.bias, input_size, conv.stride, conv.padding)
    page = Canvas(1620, 1390)
    page.text(70, 72, "Two layers, one matrix", 17, weight="bold")
    page.text(
        70,
        118,
        f"Conv2d({conv.in_channels}, {conv.out_channels}), then "
        f"Linear({linear.in_features}, {linear.out_features}):"
        "   $W(A\\,x + a) + b\\;=\\;(WA)\\,x + (W a + b)$",
        10,
        color=MUTED,
    )
    whole = draw_whole(page, conv, matrix)
    draw_close_up(page, conv, matrix, input_size, whole)
    draw_fused(page, fused, (conv.in_channels, *input_size))
    page.save(path)


def draw_whole(page: Canvas, conv: nn.Conv2d, matrix: Tensor) -> Axes:
    """Left: all of the matrix `[C_out * o, C_in * i]`."""
    taps = (matrix != 0).float().mean().item()
    page.title(130, 738, 192, "A, the convolution", f"{size(matrix)}, {taps:.0%} taps")
    axes = page.axes(130, 238, 608, 900)
    show(axes, matrix, 0.6 * strength(conv.weight))  # shrinking mixes the taps with white
    label(
        axes,
        columns=[f"$c_{{in}}$ = {c_in}" for c_in in range(conv.in_channels)],
        rows=[str(c_out) if c_out % 10 == 0 else "" for c_out in range(conv.out_channels)],
        row_name="$c_{out}$",
    )
    return axes


def draw_close_up(
    page: Canvas, conv: nn.Conv2d, matrix: Tensor, input_size: Size, whole: Axes
) -> None:
    """Right: one block of the matrix, the kernel in it, and the block's rows as images."""
    i_y, i_x = input_size
    o_y, o_x = output_size(conv, input_size)
    # The strongest kernel near the matrix's upper right corner: a short way from there to here.
    c_in = conv.in_channels - 1
    c_out = int(conv.weight[:10, c_in].square().sum((1, 2)).argmax())
    kernel = conv.weight[c_out, c_in]  # [k_y, k_x]
    block = matrix.view(conv.out_channels, o_y * o_x, -1, i_y * i_x)[c_out, :, c_in]  # [o, i]
    rows, columns = block.shape
    marked = rows // 2  # the row that has a frame in the block and among the images
    limit = strength(conv.weight)

    name = f"One block: $c_{{out}}$ = {c_out}, $c_{{in}}$ = {c_in}"
    page.title(830, 1550, 192, name, size(block))
    axes = page.axes(830, 238, 720, 332)
    show(axes, block, limit)
    label(
        axes,
        columns=["$i_y$ = 0", *map(str, range(1, i_y))],
        rows=[str(y) for y in range(o_y)],
        row_name="$o_y$",
        lines=True,
    )
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    frame(axes, -0.5, marked - 0.5, columns, 1)

    left, top = c_in * columns - 0.5, c_out * rows - 0.5
    frame(whole, left, top, columns, rows)
    for height, corner in ((0, (0, 1)), (rows, (0, 0))):
        page.figure.add_artist(
            ConnectionPatch(
                (left + columns, top + height),
                corner,
                whole.transData,
                axes.transAxes,
                color=INK,
                linewidth=0.6,
            )
        )

    page.title(830, 1030, 658, "Its kernel")
    show(page.axes(830, 678, 200, 200), kernel, limit)
    page.text(
        830,
        902,
        f"The same {kernel.numel()} numbers fill\nall {int((block != 0).sum())} taps of the\n"
        "block. From one row to\nthe next, the kernel\nmoves on by the stride.",
        va="top",
    )
    show(page.axes(830, 1096, 200, 14), torch.linspace(-1, 1, 200)[None], 1)
    page.text(830, 1132, "negative", 7.5, color=MUTED)
    page.text(930, 1132, "0", 7.5, color=MUTED, ha="center")
    page.text(1030, 1132, "positive", 7.5, color=MUTED, ha="right")

    page.title(1090, 1550, 658, "Each row of the block, as an image")
    for row, (y, x) in enumerate(product(range(o_y), range(o_x))):
        image = page.axes(1090 + 93 * x, 678 + 93 * y, 88, 88)
        show(image, block[row].view(input_size), limit)
        if row == marked:
            image.spines[:].set(color=INK, linewidth=1.2)


def draw_fused(page: Canvas, fused: nn.Linear, image: tuple[int, int, int]) -> None:
    """Below: the fused weight, column under column, and one row of it as an image `[C_in, i]`."""
    page.title(130, 738, 1200, "W A, the fused weight", f"{size(fused.weight)}, dense")
    axes = page.axes(130, 1220, 608, 128)
    show(axes, fused.weight, strength(fused.weight))
    label(axes, columns=[""] * image[0], rows=[], row_name="$f$")

    page.title(830, 1550, 1200, "One row of it, as an image", f"{image[0]} channels")
    row = fused.weight[int(fused.weight.square().sum(1).argmax())].view(image)
    for channel, values in enumerate(row):
        show(page.axes(830 + 148 * channel, 1220, 128, 128), values, strength(row))


def size(matrix: Tensor) -> str:
    """Rows and columns, in words."""
    rows, columns = matrix.shape
    return f"{rows} $\\times$ {columns}"


def strength(values: Tensor) -> float:
    """The size that is drawn darkest: not the largest, so that a few do not pale all others."""
    return values.abs().quantile(0.98).item()


def show(axes: Axes, values: Tensor, limit: float) -> None:
    """Draws a matrix as colours, from `-limit` to `limit`."""
    axes.imshow(values.numpy(), cmap=SIGNED, vmin=-limit, vmax=limit, aspect="auto")
    axes.set(xticks=[], yticks=[])


def frame(axes: Axes, left: float, top: float, width: float, height: float) -> None:
    """Draws a dark frame around some entries."""
    axes.add_patch(Rectangle((left, top), width, height, fill=False, color=INK, linewidth=0.9))


def label(
    axes: Axes,
    columns: Sequence[str],
    rows: Sequence[str],
    row_name: str = "",
    lines: bool = False,
) -> None:
    """Labels equal groups of columns, above, and of rows; parts the column groups by thin lines.

    Args:
        axes: Axes with a matrix in them.
        columns: A word for each group of columns.
        rows: A word for each group of rows.
        row_name: What the rows' words mean, written beside them.
        lines: Whether thin lines part the groups of rows, too.
    """
    height, width = axes.get_images()[0].get_size()
    column, row = width / len(columns), height / max(len(rows), 1)
    axes.xaxis.tick_top()
    axes.set_xticks([column * (n + 0.5) - 0.5 for n in range(len(columns))], columns)
    axes.set_yticks([row * (n + 0.5) - 0.5 for n in range(len(rows))], rows)
    axes.set_ylabel(row_name, fontsize=9, color=MUTED)
    for n in range(1, len(columns)):
        axes.axvline(column * n - 0.5, color=FAINT, linewidth=0.5)
    for n in range(1, len(rows) if lines else 0):
        axes.axhline(row * n - 0.5, color=FAINT, linewidth=0.5)
