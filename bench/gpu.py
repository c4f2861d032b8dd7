"""The benchmarks on a CUDA card, within a given time and without pytest; see ``gpu.sh``."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import torch

from bench import machine, report
from bench.cases import ENGINES, OURS, Case, csr_cases, fuse_cases, matrix_cases
from bench.layers import DTYPES
from bench.race import matmul, race

DEVICE = "cuda"
# what is cut off when time runs out is float64, then bfloat16, never a part of a dtype's layers
_DTYPE_ORDER = ["float32", "bfloat16", "float64"]
_SAVED_EVERY = 10  # rows; what ends this process then does not take them along


def _row(case: Case, seconds: float) -> report.Row | str:
    """The case's row, or why it has none. A peer that fails is named among those left out."""
    facts = case.facts
    entrants = [name for name in case.entrants if name not in facts["left_out"]]
    try:
        outcomes = race(case, entrants, seconds)
    except Exception as error:  # of the measurement itself: no row is worth all others
        return _in_a_line(error)
    medians = {}
    for name, outcome in outcomes.items():
        if isinstance(outcome, Exception):
            facts["left_out"][name] = _in_a_line(outcome)
        else:
            medians[name] = statistics.median(outcome)
    if OURS not in medians:
        return facts["left_out"][OURS]
    return report.make_row(facts, medians)


def _in_a_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _card_lives() -> bool:
    """Whether the card still takes work; after an illegal access it does not, in this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def main() -> int:
    """Measures, prints and writes; the exit status is 1 where ours failed on any case."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few layers, short rounds")
    parser.add_argument("--seconds", type=float, default=200.0, help="start no case after this")
    parser.add_argument("--checks", type=Path, help="lines 'name<tab>result' to put on record")
    options = parser.parse_args()

    stop = time.monotonic() + options.seconds
    each = 0.3 if options.quick else 0.8
    rates = {}
    for dtype in _DTYPE_ORDER:
        gflop, samples = matmul(DEVICE, DTYPES[dtype], 0.5)
        rates[dtype] = gflop / statistics.median(samples)

    folders = [report.LAST if options.quick else report.RESULTS]
    if out := os.environ.get("OUT"):
        folders.append(Path(out))
    checks = {}
    if options.checks:
        lines = options.checks.read_text().splitlines()
        checks = dict(line.split("\t", 1) for line in lines if "\t" in line)
    name = machine.stem(DEVICE)

    cases = [*matrix_cases(DEVICE, options.quick), *csr_cases(DEVICE, options.quick)]
    fuse = fuse_cases(DEVICE, options.quick)
    cases += sorted(fuse, key=lambda case: _DTYPE_ORDER.index(case.dtype_name))
    rows, failed, unmeasured = [], {}, []
    for case in cases:
        if time.monotonic() > stop or not _card_lives():
            unmeasured.append(case.group)
            continue
        try:
            row = _row(case, each)
        except KeyboardInterrupt:  # out of time: what is measured is still written
            stop = 0.0
            unmeasured.append(case.group)
            continue
        if isinstance(row, str):
            failed[case.group] = row
            print(f"{case.group}: FAILED: {row}", flush=True)
        else:
            rows.append(row)
            for side in ENGINES.keys() & row["left_out"].keys():
                failed[f"{case.group} {side}"] = row["left_out"][side]
            peer = f"{row['peer']} {row['peer_ms']:.3f} ms" if "peer" in row else "no peer"
            sides = "".join(f", {n} {ms:.3f} ms" for n, ms in row.get("engines_ms", {}).items())
            print(f"{case.group}: {row['ms']:.3f} ms{sides}, {peer}", flush=True)
            if len(rows) % _SAVED_EVERY == 0:
                doc = report.document(DEVICE, rows, rates, checks={**checks, "rows": "not all"})
                for folder in folders:
                    report.save(doc, folder / f"{name}.json")

    told = [f"{group} ({why})" for group, why in failed.items()]
    checks["benchmark cases that failed"] = "; ".join(told) or "none"
    checks["benchmark cases not reached in time"] = ", ".join(unmeasured) or "none"
    if not rows:
        print(f"no rows, nothing written: {checks}")
        return 1
    doc = report.document(DEVICE, rows, rates, checks=checks)
    print(*report.write(doc, name, *folders), sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
