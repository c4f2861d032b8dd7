"""``python -m bench [--quick]``: runs the benchmarks and writes ``bench/results``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from bench.report import LAST, RESULTS, from_pytest


def main() -> int:
    """Runs pytest on this folder, then makes the report; pytest's exit status is the result."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a minute or two instead of ten")
    parser.add_argument("-k", metavar="EXPR", help="only these, as pytest's -k")
    options = parser.parse_args()

    LAST.mkdir(exist_ok=True)
    raw = LAST / "raw.json"
    raw.unlink(missing_ok=True)
    arguments = [
        str(Path(__file__).parent), "-q", "-rfE", "--benchmark-only", "--benchmark-quiet",
        f"--benchmark-json={raw}",
    ]  # fmt: skip
    arguments += ["--bench-quick"] if options.quick else []
    arguments += ["-k", options.k] if options.k else []
    status = pytest.main(arguments)
    if raw.exists() and raw.stat().st_size:
        # what is not the whole run does not replace the whole run's files
        folder = LAST if options.quick or options.k else RESULTS
        print(*from_pytest(json.loads(raw.read_text()), folder), sep="\n")
    return int(status)


if __name__ == "__main__":
    raise SystemExit(main())
