"""Builds the package so that it watches itself, in a copy of the tree, and runs tests on it.

    python tests/instrumented.py sanitize          AddressSanitizer and UndefinedBehaviorSanitizer
    python tests/instrumented.py threads           ThreadSanitizer
    python tests/instrumented.py coverage          lines reached, of Python and of csrc/

What stands behind the name goes to pytest; without any, all tests run that such a build can run.
The copy lies in build/<name>, so that the ordinary build stays as it is, and is kept: the next
call compiles what has changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMPILER = "g++"
LEAST_COVERAGE = 95  # per cent of the lines

_ADDRESSES = [
    "detect_leaks=0",  # the interpreter keeps its objects to the end
    "allocator_may_return_null=1",  # torch raises the error where memory cannot be had
    "detect_odr_violation=0",  # torch's own libraries define some names twice
]
_ENVIRONMENT = {
    "sanitize": {
        "ASAN_OPTIONS": ":".join(_ADDRESSES),
        "UBSAN_OPTIONS": "print_stacktrace=1",
    },
    "threads": {},
    "coverage": {},
}
# The C++ library comes second: a sanitizer that finds none at the start cannot follow exceptions.
_PRELOADED = {
    "sanitize": ["libasan.so", "libstdc++.so"],
    "threads": ["libtsan.so", "libstdc++.so"],
    "coverage": [],
}


def copy_tree(target: Path) -> None:
    """Brings the copy up to date, with the times of the files: what is older is not compiled."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        raise SystemExit("an instrumented build is made of a checkout, by git")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(listed, cwd=ROOT, text=True).split("\0")
    wanted = {Path(name) for name in names if name and (ROOT / name).is_file()}
    for name in wanted:
        source, copied = ROOT / name, target / name
        if not copied.exists() or copied.stat().st_mtime_ns != source.stat().st_mtime_ns:
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copied)
    for folder in ("csrc", "linfuse_ext", "tests"):
        for path in (target / folder).rglob("*.[ipch]*"):
            if path.suffix in (".py", ".h", ".cpp", ".cu", ".inl") and (
                path.relative_to(target) not in wanted
            ):
                path.unlink()


def runtime(name: str) -> str:
    """The path of a library of the compiler."""
    path = subprocess.check_output([COMPILER, f"-print-file-name={name}"], text=True).strip()
    if not Path(path).is_absolute():
        raise SystemExit(f"{COMPILER} comes without {name}; install its sanitizers.")
    return path


def build(name: str, target: Path) -> None:
    environment = {**os.environ, "LINFUSE_INSTRUMENT": name, "LINFUSE_CUDA": "0"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # ninja
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=target, env=environment, check=True)


def run(name: str, target: Path, arguments: list[str]) -> int:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LINFUSE_INSTRUMENT": name}
    environment["PYTHONPATH"] = str(target)  # for the processes that tests start elsewhere
    environment |= _ENVIRONMENT[name]
    if preloaded := _PRELOADED[name]:
        environment["LD_PRELOAD"] = ":".join(runtime(library) for library in preloaded)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not cuda", *arguments]
    if name == "threads":  # it wants its memory at fixed addresses
        command = ["setarch", "--addr-no-randomize", *command]
    return subprocess.run(command, cwd=target, env=environment).returncode


def measure_coverage(target: Path, arguments: list[str]) -> int:
    """Runs the tests, then prints what they have reached, and what they have not."""
    for old in [*target.rglob("*.gcda"), *target.glob(".coverage*")]:
        old.unlink()
    # Builds that tests have made of other sources; gcov knows functions by name.
    shutil.rmtree(target / ".pytest_cache", ignore_errors=True)
    tests = run("coverage", target, ["--cov=linfuse_ext", "--cov-report=", *arguments])
    tools = Path(sys.executable).parent
    bound = str(LEAST_COVERAGE)
    python = [tools / "coverage", "report", "--show-missing", "--skip-covered"]
    python += ["--fail-under", bound]
    native = [tools / "gcovr", "--root", ".", "--filter", "csrc/", "--sort=uncovered-percent"]
    native += ["--merge-lines", "--exclude-throw-branches", "--fail-under-line", bound]
    # Threads count without waiting for each other, and inner loops count in thousands of millions.
    native += ["--gcov-ignore-parse-errors=negative_hits.warn_once_per_file"]
    native += ["--gcov-suspicious-hits-threshold=0"]
    results = [tests]
    for command in (python, native):
        results.append(subprocess.run(command, cwd=target).returncode)
    return max(results)


def main(name: str, *arguments: str) -> int:
    target = ROOT / "build" / name
    chosen = list(arguments) or ["-n", "auto", "--dist", "worksteal", "tests"]
    for library in _PRELOADED[name]:
        runtime(library)  # before the build, which takes minutes
    copy_tree(target)
    build(name, target)
    return measure_coverage(target, chosen) if name == "coverage" else run(name, target, chosen)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in _ENVIRONMENT:
        raise SystemExit(__doc__)
    raise SystemExit(main(*sys.argv[1:]))
