"""The parser, and what becomes of an error: one line and an exit status."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import __version__
from . import collapse, info, matrix

__all__ = ["main", "make_parser"]

_INTERRUPTED = 130  # 128 and the number of the signal, as shells have it


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser; each command sets `run`, which takes the arguments."""
    module = Path(sys.argv[0]).parts[-2:] == ("linfuse_ext", "__main__.py")
    parser = argparse.ArgumentParser(
        prog="python -m linfuse_ext" if module else "linfuse",
        description="Turns neighbouring linear layers of a network into one, exactly and fast.",
        epilog="exit status: 0 done, 1 it could not be done and the last line says why, 2 wrong\n"
        "usage, 130 interrupted. Files appear when they are complete, or not at all.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (info, collapse, matrix):
        command.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted: no file is left half-written", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read has gone. Python would say so once more when it closes what it cannot flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if arguments.traceback:
            raise
        print(f"{parser.prog}: {_line(error)}", file=sys.stderr)
        return 1
    return 0


def _line(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, (ValueError, TypeError, OSError)):
        return lines[0]
    return f"unexpected {type(error).__name__}: {lines[0]} (--traceback shows where)"
