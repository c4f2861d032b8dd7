"""The searches of this folder for as long as one likes: `make fuzz`.

    python tests/fuzz/run.py [--count 10000] [--seed 0] [--geometry 1000000]

Half of the calls must give right values, half have bad arguments. They run in processes of their
own, a few hundred in each, which note every call before they make it: a call that ends its process
or does not return is known.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from fuzz.calls import IMPORTS, Call
from fuzz.kinds import KINDS
from fuzz.sanitized_geometry import Missing, run_geometry
from fuzz.search import search
from hypothesis import given

CHUNK = 250
PATIENCE = 120  # seconds that no call takes, not even on a machine that does much else


class Chunk(NamedTuple):
    """So many calls of one kind, drawn by a seed, and the folder in which their process writes."""

    number: int
    size: int
    seed: int
    folder: Path

    @property
    def kind(self) -> Any:
        return KINDS[self.number % len(KINDS)]

    @property
    def current(self) -> Path:
        """The call that is being made."""
        return self.folder / "current"

    @property
    def said(self) -> Path:
        """What the process wrote to stderr: of a crash, where it was."""
        return self.folder / "said"

    @property
    def report(self) -> Path:
        return self.folder / "report.json"


def work(chunk: Chunk) -> None:
    """Makes the calls of a chunk, in a process of its own, and reports what came of them."""
    faulthandler.enable(chunk.said.open("w"))
    torch.set_num_threads(1)
    outcomes: Counter[str] = Counter()
    ops: Counter[str] = Counter()
    failed: list[tuple[Call, Exception]] = []

    @search(chunk.kind.name, chunk.size, chunk.seed)
    @given(call=chunk.kind.calls())
    def make(call: Call) -> None:
        chunk.current.write_text(repr(call))
        try:
            outcome = chunk.kind.answer(call)
        except Exception as error:
            failed[:] = [(call, error)]  # the last one is the smallest
            raise
        outcomes[outcome] += 1
        ops[f"{call.where}.{call.op}"] += 1

    failure = None
    try:
        make()
    except Exception as error:
        call, error = failed[0] if failed else ("no call failed, the search did", error)
        failure = (repr(call), f"{type(error).__name__}: {error}")
    chunk.report.write_text(json.dumps([outcomes, ops, failure]))


class Running(NamedTuple):
    chunk: Chunk
    process: Any

    def is_stuck(self) -> bool:
        try:
            return time.time() - self.chunk.current.stat().st_mtime > PATIENCE
        except FileNotFoundError:
            return False  # it has not made its first call

    def reproduction(self) -> str | None:
        """What is wrong, as text that can be pasted; None while all is well."""
        chunk, says = self.chunk, ""
        if self.process.is_alive():
            if not self.is_stuck():
                return None
            os.kill(self.process.pid, signal.SIGKILL)
            says = f"does not return within {PATIENCE} seconds"
        elif chunk.report.exists():
            failure = json.loads(chunk.report.read_text())[2]
            if failure is None:
                return None
            call, says = failure
            return self._text(call, says)
        else:
            code = self.process.exitcode
            says = f"ends its process, exit code {code}\n{chunk.said.read_text()}"
        return self._text(chunk.current.read_text() if chunk.current.exists() else "", says)

    def _text(self, call: str, says: str) -> str:
        chunk = self.chunk
        return (
            f"\nFAILED: {chunk.kind.name}\n{says}\n\n{IMPORTS}\n\n{call}\n\n"
            f"Again: python tests/fuzz/run.py --seed {chunk.seed} --chunk {chunk.number} "
            f"--count {chunk.size}"
        )


def search_calls(count: int, seed: int, only: int | None, folder: Path) -> int:
    """Makes `count` calls, on every core; returns the exit status."""
    started = time.time()
    context = multiprocessing.get_context("fork")  # torch is imported once, and nothing run yet
    waiting = []
    for number, first in enumerate(range(0, count, CHUNK)):
        own = folder / str(number)
        own.mkdir()
        size = min(CHUNK, count - first)
        if only is None:
            waiting.append(Chunk(number, size, seed + number, own))
        else:
            waiting.append(Chunk(only, size, seed, own))
    waiting.reverse()
    running: list[Running] = []
    outcomes: Counter[str] = Counter()
    ops: Counter[str] = Counter()
    said = 0
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            chunk = waiting.pop()
            process = context.Process(target=work, args=(chunk,))
            process.start()
            running.append(Running(chunk, process))
        time.sleep(0.1)
        for each in list(running):
            wrong = each.reproduction()
            if wrong is not None:
                print(wrong, flush=True)
                for other in running:
                    other.process.kill()
                return 1
            if not each.process.is_alive() and each.chunk.report.exists():
                running.remove(each)
                made, of_op, _ = json.loads(each.chunk.report.read_text())
                outcomes.update(made)
                ops.update(of_op)
        if outcomes.total() >= said + 1000 or not (waiting or running):
            said = outcomes.total() // 1000 * 1000
            told = ", ".join(f"{number} {name}" for name, number in outcomes.most_common())
            elapsed = time.time() - started
            print(
                f"{outcomes.total()} calls of {len(ops)} ops in {elapsed:.0f} s: {told}", flush=True
            )
    for op, number in sorted(ops.items()):
        print(f"  {number:6} {op}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="calls to make")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunk", type=int, help="the chunk that a failure names, with its seed")
    parser.add_argument(
        "--geometry", type=int, default=1_000_000, help="geometries for csrc/geometry; 0 for none"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        status = search_calls(options.count, options.seed, options.chunk, Path(folder))
    if status == 0 and options.geometry and options.chunk is None:
        started = time.time()
        try:
            result = run_geometry(options.geometry, options.seed, seconds=3600)
        except Missing as missing:
            print(f"csrc/geometry is passed over: {missing}")
        else:
            print(f"csrc/geometry in {time.time() - started:.0f} s: {result.said}")
            status = 0 if result.is_right else 1
    return status


if __name__ == "__main__":
    sys.exit(main())
