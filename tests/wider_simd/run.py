"""Runs tests at levels of SIMD that this machine lacks, on a build that does them in plain C++.

    python tests/wider_simd/run.py avx512|amx [what pytest is to run]

Without more, all tests run; those fail that start Python in the project's folder, where the
ordinary build comes first. Only the files that know these instructions are compiled anew
(emulated.h gives each a meaning); the rest is linked from the objects of the ordinary build. It
takes AVX2 and the GNU compiler, and is some hundred times slower than the real thing where tiles
multiply.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from linfuse_ext import _C

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KERNELS = ROOT / "csrc" / "kernels"
OBJECTS = ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
COMPILER = "g++"
LEVELS = ("avx512", "amx")

_WIDER = ("tile_avx512_cpu", "amx_cpu", "simd_cpu")
_FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-mavx2", "-mfma", "-mf16c"]
_FLAGS += ["-Wno-psabi", f"-I{KERNELS}", "-include", str(HERE / "emulated.h")]
# What a file asks the compiler for, and what this machine has instead.
_TARGET = re.compile(r'target\("avx512[^"]*"\)')
_OWN_TARGET = 'target("avx2,fma,f16c")'


def why_not() -> str | None:
    """Returns what keeps this machine or build from it."""
    info = _C.build_info()
    if "avx2" not in info["simd_available"]:
        return "the machine has no AVX2"
    if not info["compiler"].startswith("gcc"):
        return "the objects are not of the GNU compiler"
    if info["instrument"] or info["cuda"] or not (OBJECTS / "csrc").exists():
        return "there are no objects of an ordinary build for CPUs"
    return None


def build(cache: Path) -> Path:
    """Returns the folder that holds the package, made anew where something in it has changed."""
    objects = [path for path in sorted(OBJECTS.rglob("*.o")) if path.stem not in _WIDER]
    package = cache / "linfuse_ext"
    library = package / Path(_C.__file__).name
    made_of = cache / "made_of"
    package.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be about the same
        fingerprint = _fingerprint(objects)
        if made_of.exists() and made_of.read_text() == fingerprint:
            return cache
        made_of.unlink(missing_ok=True)
        for path in package.iterdir():
            path.unlink()
        for path in (ROOT / "linfuse_ext").iterdir():
            if path.suffix != ".so":
                (package / path.name).symlink_to(path)
        with tempfile.TemporaryDirectory() as scratch:
            _link([*objects, *_compile(Path(scratch))], library)
        made_of.write_text(fingerprint)
    return cache


def _compile(folder: Path) -> list[Path]:
    def compile_one(name: str) -> Path:
        source, target = folder / f"{name}.cpp", folder / f"{name}.o"
        source.write_text(_TARGET.sub(_OWN_TARGET, (KERNELS / source.name).read_text()))
        command = [COMPILER, *_FLAGS, "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True)  # the compiler itself says what is wrong
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, _WIDER))


def _link(objects: list[Path], library: Path) -> None:
    torch_libraries = f"-L{Path(torch.__file__).parent / 'lib'}"
    needed = [torch_libraries, "-lc10", "-ltorch", "-ltorch_cpu"]
    command = [COMPILER, "-shared", *map(str, objects), *needed, "-o", str(library)]
    subprocess.run(command, check=True)


def _fingerprint(objects: list[Path]) -> str:
    names = sorted(path.name for path in (ROOT / "linfuse_ext").iterdir())
    digest = hashlib.sha256(f"{names} {_FLAGS} {torch.__version__}".encode())
    headers = [path for path in sorted(KERNELS.iterdir()) if path.suffix in (".h", ".inl")]
    sources = [KERNELS / f"{name}.cpp" for name in _WIDER]
    for path in [HERE / "emulated.h", *headers, *sources, *objects]:
        digest.update(f"{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def run_tests(
    level: str, folder: Path, arguments: list[str], **how: Any
) -> subprocess.CompletedProcess[str]:
    """Runs pytest on the package in `folder`; that lies ahead of the ordinary one."""
    environment = {**os.environ, "LINFUSE_SIMD": level, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not cuda"]
    command += ["-o", f"cache_dir={folder}/.pytest_cache"]
    # From a folder without a package of that name: it would come first.
    return subprocess.run([*command, *arguments], cwd=HERE.parent, env=environment, **how)


def main(level: str, *arguments: str) -> int:
    if reason := why_not():
        raise SystemExit(f"no build with wider SIMD: {reason}.")
    folder = build(ROOT / "build" / "wider_simd")
    chosen = [str(Path(name).resolve()) if Path(name).exists() else name for name in arguments]
    return run_tests(level, folder, chosen or ["-n", "auto", "."]).returncode


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in LEVELS:
        raise SystemExit(__doc__)
    raise SystemExit(main(*sys.argv[1:]))
