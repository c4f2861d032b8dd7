"""Builds geometry.cpp under the sanitizers and runs it."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from cuda_on_cpu.build import COMPILER, CSRC

SOURCE = Path(__file__).parent / "geometry.cpp"
HEADERS = ("geometry.h", "make_geometry.h", "axis_taps.h", "stored_taps.h")
BUILT = CSRC.parent / "build" / "fuzz"
_FLAGS = [
    "-std=c++20", "-O0", "-g1", "-Wall", "-Wextra",
    "-fsanitize=undefined,address", "-fno-sanitize-recover=all",
]  # fmt: skip


class Missing(Exception):
    """What the compiler would need."""


class Result(NamedTuple):
    """What a run said, and whether no rule was broken and no sanitizer stopped it."""

    is_right: bool
    said: str

    @property
    def counts(self) -> dict[str, int]:
        """How many geometries were accepted, walked, rejected; and how often by which argument."""
        pairs = re.findall(r"(accepted|walked|rejected) (\d+)", self.said)
        by_argument = re.findall(r"^ +(\d+) (\S+)$", self.said, re.MULTILINE)
        return {name: int(n) for name, n in [*pairs, *((name, n) for n, name in by_argument)]}


def build(changes: Mapping[str, tuple[str, str]] | None = None) -> Path:
    """Returns the program, from build/fuzz unless something that goes into it has changed.

    Args:
        changes: By the name of a header, a piece of its text and what to put in its place: a
            planted fault.
    """
    if shutil.which(COMPILER) is None:
        raise Missing(f"there is no {COMPILER}")
    texts = {name: (CSRC / "geometry" / name).read_text() for name in HEADERS}
    for name, (before, after) in (changes or {}).items():
        assert texts[name].count(before) == 1, f"{before!r} must be in {name}, once"
        texts[name] = texts[name].replace(before, after)
    digest = hashlib.sha256(subprocess.check_output([COMPILER, "--version"]))
    for text in (SOURCE.read_text(), *_FLAGS, *texts.values()):
        digest.update(text.encode())
    program = BUILT / f"geometry-{digest.hexdigest()[:16]}"
    if program.exists():
        return program
    BUILT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILT) as folder:
        for name, text in texts.items():
            Path(folder, name).write_text(text)
        _check_sanitizers(Path(folder))
        made = Path(folder, program.name)
        _compile([f"-I{folder}", str(SOURCE), "-o", str(made)])
        os.replace(made, program)  # at once: another process may build the same
    return program


def _compile(arguments: list[str]) -> None:
    done = subprocess.run([COMPILER, *_FLAGS, *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)


def _check_sanitizers(folder: Path) -> None:
    empty = folder / "empty.cpp"
    empty.write_text("int main() {}\n")
    try:
        _compile([str(empty), "-o", str(folder / "empty")])
    except RuntimeError as error:
        raise Missing(f"{COMPILER} comes without the runtime of the sanitizers: {error}") from None


def run_geometry(
    count: int,
    seed: int,
    seconds: float,
    changes: Mapping[str, tuple[str, str]] | None = None,
) -> Result:
    """Draws `count` geometries; a run that does not end is stopped, and says where it was."""
    command = [str(build(changes)), str(count), str(seed)]
    # What a sanitizer stops by a signal can still say what it was at.
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "abort_on_error=1:detect_leaks=0",
        "UBSAN_OPTIONS": "abort_on_error=1:print_stacktrace=1",
    }
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # which it answers with what it was at
        said, _ = process.communicate()
        return Result(False, f"{said}\nnot done within {seconds} seconds")
    return Result(process.returncode == 0, said)
