"""The command line: `python -m linfuse_ext info`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from . import __version__, info


def _info(arguments: argparse.Namespace) -> int:
    print(json.dumps(info.collect(), indent=2) if arguments.json else info.text())
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser; each command sets `run`, from the arguments to an exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m linfuse_ext",
        description="Turns neighbouring linear layers of a network into one, exactly and fast.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "info",
        help="what is installed, what is running, and whether the two fit",
        epilog="example: python -m linfuse_ext info --json",
    )
    command.add_argument("--json", action="store_true", help="print a JSON object")
    command.set_defaults(run=_info)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    arguments = make_parser().parse_args(argv)
    status: int = arguments.run(arguments)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
