"""Runs calls of `Kernels` in a process of their own that AddressSanitizer watches.

    python -m cuda_on_cpu.sanitized <library> <file of pickled calls> <file for pickled results>

AddressSanitizer has to be in the process from its start, which LD_PRELOAD sees to. torch is not
imported, so that nothing but the kernels is slowed down.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from .build import COMPILER
from .kernels import Kernels

Call = tuple[str, tuple[Any, ...]]  # a method of Kernels and its arguments


def find_sanitizer() -> str | None:
    """Returns the path of AddressSanitizer's runtime, None where the compiler comes without."""
    path = subprocess.check_output([COMPILER, "-print-file-name=libasan.so"], text=True).strip()
    return path if Path(path).is_absolute() else None


def run_sanitized(
    library: Path, calls: list[Call], folder: Path
) -> tuple[list[tuple[np.ndarray, ...]], str]:
    """Returns the calls' outputs, and what the process said; no outputs where it was stopped."""
    given, made = folder / "calls", folder / "results"
    given.write_bytes(pickle.dumps(calls))
    environment = {
        **os.environ,
        "LD_PRELOAD": str(find_sanitizer()),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "cuda_on_cpu.sanitized", str(library), str(given), str(made)],
        cwd=Path(__file__).parent.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    results = pickle.loads(made.read_bytes()) if done.returncode == 0 else []
    return results, done.stdout + done.stderr


def main(library: str, given: str, made: str) -> None:
    kernels = Kernels(Path(library))
    calls: list[Call] = pickle.loads(Path(given).read_bytes())
    results = [getattr(kernels, name)(*arguments) for name, arguments in calls]
    Path(made).write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
