"""`info`: what is installed, what is running, and whether the two fit."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .. import info
from . import tables

__all__ = ["add"]


def add(commands: Any) -> None:
    """Adds the command to the parser."""
    command = commands.add_parser(
        "info",
        help="what is installed, what is running, and whether the two fit",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: %(prog)s --json",
    )
    command.add_argument("--json", action="store_true", help="print a JSON object")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    console = tables.terminal()
    if arguments.json:
        print(json.dumps(info.collect(), indent=2))
    elif console is None:
        print(info.text())
    else:
        facts = [(name, str(value)) for name, value in info.collect().items()]
        styles = ["bold" if name == "verdict" else "" for name, _ in facts]
        tables.draw(console, ("", ""), facts, styles)
