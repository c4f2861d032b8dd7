"""Compiles the CUDA kernels, the shim and the runner with g++ into a shared library a variant."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .prepare import prepare

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
COMPILER = "g++"

# Kernels use one block of memory as different types, which is fine between barriers.
_FLAGS = ["-std=c++20", "-O1", "-g", "-fPIC", "-fno-strict-aliasing", "-DLINFUSE_WITH_CUDA"]
_INCLUDES = [f"-I{path}" for path in (HERE / "shim", HERE, HERE / "planted", CSRC / "kernels")]
_SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# Counts the lines of the kernels that are reached; gcov's notes lie beside the objects.
_COUNTED = os.environ.get("LINFUSE_INSTRUMENT") == "coverage"
_COVERAGE = ["--coverage"] if _COUNTED else []

# What is added for the kernels, for the runner, for the shim, and to link.
_VARIANTS = {
    # Calls a hook of ours (shim/races.cpp) for every access of a kernel to memory.
    "races": (["-fsanitize=thread"], [], [], []),
    "sanitized": (
        [*_SANITIZERS, "-fno-omit-frame-pointer", *_COVERAGE],
        _SANITIZERS,
        ["-DCUDA_ON_CPU_ASAN"],
        [*_SANITIZERS, *_COVERAGE],
    ),
}


def kernel_sources() -> list[Path]:
    return sorted((CSRC / "kernels").glob("*_cuda.cu"))


def build(variant: str, cache: Path) -> Path:
    """Returns the library, from `cache` unless something that goes into it has changed."""
    library = cache / f"{variant}-{_fingerprint()}.so"
    if library.exists():
        return library
    for outdated in cache.glob(f"{variant}-*.so"):
        outdated.unlink(missing_ok=True)
    folder = Path(tempfile.mkdtemp(dir=cache))
    try:
        _build(variant, folder / library.name)
        os.replace(folder / library.name, library)  # at once: another process may build the same
    finally:
        if not _COUNTED:
            shutil.rmtree(folder)
    return library


def _build(variant: str, library: Path) -> None:
    for_kernels, for_runner, for_shim, for_link = _VARIANTS[variant]
    jobs: list[tuple[Path, list[str]]] = [(HERE / "runner.cpp", for_runner)]
    jobs += [(path, for_kernels) for path in _prepared(library.parent)]
    jobs += [(path, for_shim) for path in sorted((HERE / "shim").glob("*.cpp"))]

    def compile_one(job: tuple[Path, list[str]]) -> str:
        source, flags = job
        target = str(library.parent / f"{source.stem}.o")
        _run([COMPILER, *_FLAGS, *_INCLUDES, *flags, "-c", str(source), "-o", target])
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, jobs))
    _run([COMPILER, "-shared", *for_link, *objects, "-o", str(library)])


def _prepared(folder: Path) -> Iterator[Path]:
    for source in [*kernel_sources(), *sorted((HERE / "planted").glob("*.cu"))]:
        path = folder / f"{source.stem}.cpp"
        path.write_text(prepare(source.read_text(), str(source)))
        yield path


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def _fingerprint() -> str:
    digest = hashlib.sha256(subprocess.check_output([COMPILER, "--version"]))
    folders = (HERE, HERE / "shim", HERE / "planted", CSRC / "geometry", CSRC / "kernels")
    for folder in folders:
        for path in sorted(folder.iterdir()):
            if path.suffix in (".h", ".cpp", ".cu", ".py"):
                digest.update(f"{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
