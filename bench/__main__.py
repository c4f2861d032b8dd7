"""``python -m bench [--quick]``: runs the benchmarks and writes ``bench/results``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import growth, memory, threads
from bench.report import LAST, RESULTS, from_pytest, last, print_bounds


def main() -> int:
    """Runs pytest on this folder, then makes the report; pytest's exit status is the result."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a few layers: four minutes instead of fourteen"
    )
    parser.add_argument("-k", metavar="EXPR", help="only these, as pytest's -k")
    parser.add_argument("--growth", action="store_true", help="the growth sweeps too, with -k")
    parser.add_argument("--bounds", action="store_true", help="print those of the last results")
    options = parser.parse_args()
    if options.bounds:
        return _reprint()

    LAST.mkdir(exist_ok=True)
    raw = LAST / "raw.json"
    raw.unlink(missing_ok=True)
    arguments = [
        str(Path(__file__).parent), "-q", "-rfE", "--benchmark-only", "--benchmark-quiet",
        f"--benchmark-json={raw}",
    ]  # fmt: skip
    arguments += ["--bench-quick"] if options.quick else []
    arguments += ["-k", f"({options.k}) or test_peak"] if options.k else []
    status = pytest.main(arguments)
    more: dict[str, Any] = {}
    if not options.k:
        more |= {"memory": memory.measure(), "same_bits": threads.compare()}
    if not options.k or options.growth:
        more["growth"] = growth.measure(options.quick)
    if raw.exists() and raw.stat().st_size:
        # what is not the whole run does not replace the whole run's files
        folder = LAST if options.quick or options.k else RESULTS
        print(*from_pytest(json.loads(raw.read_text()), folder, **more), sep="\n")
    return int(status)


def _reprint() -> int:
    """Prints the bounds of the results that were written last."""
    path = last()
    if path is None:
        print("bench: no results of this machine yet", file=sys.stderr)
        return 1
    print_bounds(json.loads(path.read_text()))
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
