"""`collapse`: a torch.export archive in, one with fewer layers out."""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..network.planning import POLICIES
from . import tables
from .files import byte_count, keep, naming, replacing, target

if TYPE_CHECKING:
    from .archives import Program

__all__ = ["add"]

_DESCRIPTION = """
Merges neighbouring linear layers of a model that torch.export.save wrote, wherever that is
exact, and says of every stretch of them what was done and why. Nothing that the archive may
bring along is run: pickles, compiled code and the like are refused.
"""
_COLUMNS = ("verdict", " FLOPs", " parameters", " error", "layers, and why")
_COLOURS = {"fused": "green", "declined": "yellow", "refused": "red"}


def add(commands: Any) -> None:
    """Adds the command to the parser."""
    command = commands.add_parser(
        "collapse",
        help="merge the linear layers of a model and write the smaller model",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: %(prog)s model.pt2 -o smaller.pt2 --policy always",
    )
    command.add_argument("model", help="the archive (.pt2), of one exported program")
    command.add_argument(
        "-o",
        "--output",
        metavar="FILE.pt2",
        help="the smaller model; it may be the first itself, which is replaced once the new one is "
        "complete. Only --policy never needs none",
    )
    command.add_argument(
        "--policy",
        choices=POLICIES,
        default="cheaper",
        help="merge where that saves multiplications or else parameters, wherever it is exact, or "
        "nowhere and only report (default: %(default)s)",
    )
    command.add_argument(
        "--max-bytes",
        metavar="SIZE",
        type=byte_count,
        default="1GiB",
        help="the largest layer that a merge may make, such as 256MiB or 2GB, unless it is "
        "smaller than what it replaces (default: 1GiB)",
    )
    command.add_argument("--report", metavar="FILE.json", help="write the report as JSON as well")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.set_defaults(run=_run, parser=command)


def _run(arguments: argparse.Namespace) -> None:
    fail = arguments.parser.error
    output, report = arguments.output, arguments.report
    if output is None and arguments.policy != "never":
        fail("-o/--output is needed, except with --policy never")
    if output is not None and Path(output).suffix != ".pt2":
        fail(f"-o/--output must end in .pt2, got {output!r}")
    if report is not None and os.path.realpath(report) in {
        os.path.realpath(path) for path in (arguments.model, output) if path is not None
    }:
        fail(f"--report must be another file than the model and the output, got {report!r}")
    targets = [None if path is None else target(path) for path in (output, report)]

    import linfuse_ext

    from .archives import load_program  # what reads them takes a second to import

    program = load_program(arguments.model)
    size = os.path.getsize(arguments.model)  # before it may be replaced
    collapsed = linfuse_ext.collapse(
        program.exported, policy=arguments.policy, max_bytes=arguments.max_bytes
    )
    _write(collapsed, program, *targets)
    if arguments.json:
        print(collapsed.report.to_json())
        return
    _show(collapsed.report)
    if output is not None:
        written = tables.size_text(os.path.getsize(output))
        print(f"{output}: {written}, {arguments.model} was {tables.size_text(size)}")


def _write(collapsed: Any, program: Program, output: Path | None, report: Path | None) -> None:
    """Both files or none: they take their places when both are complete and on the disk."""
    from .archives import save_program

    with ExitStack() as stack:
        model = None if output is None else stack.enter_context(replacing(output))
        text = None if report is None else stack.enter_context(replacing(report))
        if model is not None:
            with naming(output):
                save_program(model, program._replace(exported=collapsed.export()))
                keep(model)  # here, as no place is taken yet: the disk may be full
        if text is not None:
            with naming(report):
                text.write((collapsed.report.to_json() + "\n").encode())
                keep(text)


def _show(report: Any) -> None:
    console = tables.terminal()
    if console is None:
        print(report)
        return
    from ..network.report import cells

    rows = []
    for row in report:
        verdict, layers, *changes, error, reason = cells(row)
        narrow = (change.replace(" -> ", " ->\n") for change in changes)
        rows.append((verdict, *narrow, error, f"{layers}\n{reason}"))
    tables.draw(console, _COLUMNS, rows, [_COLOURS[row.verdict] for row in report])
    # The totals are the report's own.
    console.print(str(report).rstrip().splitlines()[-1], markup=False, highlight=False)
