"""Builds linfuse_ext._C. Everything that does not need torch stands in pyproject.toml.

LINFUSE_CUDA            auto (default), 0 or 1: whether the CUDA kernels are built
TORCH_CUDA_ARCH_LIST    the cards to build for, as torch reads it
LINFUSE_INSTRUMENT      sanitize, threads or coverage: a build that watches itself, for tests
MAX_JOBS                compilers at a time
"""

import os
import re
import subprocess
from pathlib import Path

from setuptools import setup

try:
    import pybind11
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError as error:
    raise SystemExit(
        f"linfuse_ext: building needs {error.name}, which is not installed here. Type "
        "`pip install 'torch>=2.11' ninja pybind11` first, or `pip install .` without "
        "--no-build-isolation, which fetches them for the build."
    ) from None

ROOT = Path(__file__).parent
# One binary serves every torch from this one on: the stable ABI of libtorch 2.11.
TARGET_TORCH = ("2.11", "0x020b000000000000")
# Said to the compilers: torch's own default is C++17 until 2.12.
STANDARD = "-std=c++20"
ARCHITECTURES = ["7.5", "8.0", "8.6", "8.9", "9.0a", "10.0", "12.0"]
GIB_PER_COMPILER = 1.5
# What an instrumented build adds, for the compiler and the linker. AddressSanitizer is to name
# lines; gcov counts them, so that nothing may be moved far.
SANITIZED = ["-O1", "-g1", "-fno-omit-frame-pointer"]
INSTRUMENTS = {
    "": [],
    "sanitize": [*SANITIZED, "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "threads": [*SANITIZED, "-fsanitize=thread", "-DLINFUSE_PLAIN_THREADS"],
    "coverage": ["-Og", "--coverage", "-DLINFUSE_COVERAGE"],
}


def say(message: str) -> None:
    print(f"linfuse_ext: {message}", flush=True)


def version() -> str:
    text = (ROOT / "linfuse_ext" / "_version.py").read_text()
    return re.search(r'__version__ = "(.+)"', text)[1]


def nvcc() -> Path | None:
    path = Path(CUDA_HOME or "", "bin", "nvcc")
    return path if CUDA_HOME and path.exists() else None


def with_cuda() -> bool:
    """Decides for or against the CUDA kernels, and says why."""
    wish = os.environ.get("LINFUSE_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"linfuse_ext: LINFUSE_CUDA must be auto, 0 or 1, got '{wish}'.")
    if wish == "0":
        say("CPU only, as LINFUSE_CUDA=0 says.")
        return False
    missing = None
    if nvcc() is None:
        missing = "there is no nvcc (set CUDA_HOME to a CUDA toolkit)"
    elif torch.version.cuda is None:
        missing = f"the installed torch {torch.__version__} is a CPU build"
    if missing and wish == "1":
        raise SystemExit(f"linfuse_ext: LINFUSE_CUDA=1, but {missing}.")
    if missing:
        say(f"CPU only: {missing}.")
        return False
    toolkit = re.search(
        r"release (\d+)\.", subprocess.check_output([nvcc(), "--version"], text=True)
    )
    if toolkit and toolkit[1] != torch.version.cuda.split(".")[0]:
        say(f"note: nvcc is CUDA {toolkit[1]}, torch was built with CUDA {torch.version.cuda}.")
    say(f"with CUDA {torch.version.cuda}, by {nvcc()}.")
    return True


def choose_architectures() -> str:
    """Keeps what the user or the card says; otherwise all that this nvcc knows, plus PTX."""
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        if torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability()
            os.environ["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}{'a' if major == 9 else ''}"
        else:
            listed = subprocess.check_output([nvcc(), "--list-gpu-code"], text=True).split()
            known = [a for a in ARCHITECTURES if "sm_" + a.rstrip("a").replace(".", "") in listed]
            os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join([*known, known[-1] + "+PTX"])
    say(f"for the cards {os.environ['TORCH_CUDA_ARCH_LIST']}.")
    return os.environ["TORCH_CUDA_ARCH_LIST"]


def limit_jobs() -> None:
    """Compilers that run out of memory take the machine with them: so many as fit, no more."""
    if "MAX_JOBS" in os.environ:
        return
    cores = os.cpu_count() or 1
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError):
        free = GIB_PER_COMPILER * cores
    os.environ["MAX_JOBS"] = str(max(1, min(cores, int(free / GIB_PER_COMPILER))))
    say(f"{os.environ['MAX_JOBS']} compilers at a time.")


def instrument() -> tuple[str, list[str]]:
    name = os.environ.get("LINFUSE_INSTRUMENT", "")
    if name not in INSTRUMENTS:
        known = ", ".join(filter(None, INSTRUMENTS))
        raise SystemExit(f"linfuse_ext: LINFUSE_INSTRUMENT must be one of {known}, got '{name}'.")
    if name:
        say(f"instrumented: {name}. Slow, and not for use.")
    return name, INSTRUMENTS[name]


def extension():
    cuda = with_cuda()
    instrumented, added = instrument()
    limit_jobs()
    sources = sorted(
        str(path.relative_to(ROOT))
        for pattern in ("module.cpp", "ops/*.cpp", "kernels/*_cpu.cpp")
        for path in (ROOT / "csrc").glob(pattern)
    )
    macros = [
        ("TORCH_TARGET_VERSION", TARGET_TORCH[1]),
        ("LINFUSE_VERSION", f'"{version()}"'),
        ("LINFUSE_TORCH_VERSION", f'"{torch.__version__}"'),
        ("LINFUSE_INSTRUMENT", f'"{instrumented}"'),
    ]
    warnings = ["-Wall", "-Wextra", "-Wno-unused-parameter"]
    flags = {"cxx": [STANDARD, "-O3", "-g0", "-fvisibility=hidden", *warnings, *added]}
    if cuda:
        sources += sorted(
            str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("kernels/*_cuda.cu")
        )
        macros += [
            ("LINFUSE_WITH_CUDA", None),
            ("USE_CUDA", None),  # shows the stable ABI's CUDA functions
            ("LINFUSE_CUDA_VERSION", f'"{torch.version.cuda}"'),
            ("LINFUSE_CUDA_ARCHITECTURES", f'"{choose_architectures()}"'),
        ]
        flags["nvcc"] = [STANDARD, "-O3", "-lineinfo"]
    make = CUDAExtension if cuda else CppExtension
    return make(
        "linfuse_ext._C",
        sources,
        # No flag: torch drops its -gencode flags when any flag of nvcc contains the letters "arch".
        include_dirs=[pybind11.get_include()],
        define_macros=macros,
        extra_compile_args=flags,
        extra_link_args=added,
    )


setup(version=version(), ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
