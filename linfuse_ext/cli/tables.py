"""Tables: drawn by rich on a terminal where it is installed, aligned columns elsewhere."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["draw", "lines", "size_text", "terminal"]


def terminal(file: TextIO | None = None) -> Console | None:
    """Returns rich's console if `file`, by default stdout, is a terminal and rich is installed."""
    file = sys.stdout if file is None else file
    if not file.isatty() or importlib.util.find_spec("rich") is None:
        return None
    from rich.console import Console

    return Console(file=file)


def draw(
    console: Console,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    styles: Sequence[str] | None = None,
) -> None:
    """Draws a table.

    Args:
        console: Where.
        columns: The headers; those that begin with a space stand over columns of numbers. The
            last column is of text and takes what room there is. No header at all if all are empty.
        rows: The cells, as text without markup.
        styles: Of each row, as rich names them.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_header=any(columns))
    for column in columns[:-1]:
        side: Any = "right" if column.startswith(" ") else "left"
        table.add_column(column.strip(), justify=side, no_wrap=True)
    table.add_column(columns[-1], overflow="fold")
    for number, row in enumerate(rows):
        # Text, as a name may have brackets that rich would take for markup.
        table.add_row(*map(Text, row), style=styles[number] if styles else None)
    console.print(table)


def lines(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table as text; columns as in `draw`."""
    cells = [[column.strip() for column in columns], *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        aligned = (
            cell.rjust(width) if column.startswith(" ") else cell.ljust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        )
        return "  ".join(aligned).rstrip()

    return "\n".join(map(line, cells))


def size_text(size: float) -> str:
    """Returns a number of bytes with its unit.

    Examples:
        >>> size_text(999), size_text(1_250_000)
        ('999 B', '1.25 MB')
    """
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    power = 0
    while size >= 999.5 and power < len(units) - 1:
        size, power = size / 1000, power + 1
    return f"{size:.3g} {units[power]}"
