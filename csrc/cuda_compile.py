"""Sends every CUDA source through nvcc, and the ops as a CUDA build compiles them.

A kernel whose registers spill fails like one that does not compile.

No card and no CUDA build of torch are needed: the kernels know nothing of torch, and the stable
ABI's headers are the same in every build. Says so and succeeds where there is no nvcc.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

CSRC = Path(__file__).parent
ARCHITECTURES = ["80", "90a"]


def command(nvcc: str, source: Path, output: Path) -> list[str]:
    """The call of nvcc for one source."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    torch_headers = Path(torch.__file__).parent / "include"
    defines = ["LINFUSE_WITH_CUDA", "USE_CUDA", "TORCH_TARGET_VERSION=0x020b000000000000"]
    return [
        nvcc,
        "-std=c++20",
        "-O3",
        *targets,
        *(f"-D{name}" for name in defines),
        *(["-isystem", str(torch_headers)] if source.suffix == ".cpp" else ["-Xptxas", "-v"]),
        *["-x", "cu", "-c", str(source), "-o", str(output)],
    ]


def compile_one(nvcc: str, source: Path, folder: Path) -> tuple[Path, subprocess.CompletedProcess]:
    """Compiles one source; the result holds what nvcc said."""
    output = folder / (source.name + ".o")
    return source, subprocess.run(command(nvcc, source, output), capture_output=True, text=True)


def report(text: str) -> list[str]:
    """Ptxas's line on registers and spills, one per kernel and architecture."""
    lines = [
        line.split(":", 1)[-1].strip() for line in text.splitlines() if line.startswith("ptxas")
    ]
    spills = [line.strip() for line in text.splitlines() if "spill" in line]
    used = [line for line in lines if line.startswith("Used")]
    return sorted({f"{use}; {spill}" for use, spill in zip(used, spills, strict=False)})


def spills(text: str) -> bool:
    """Whether ptxas had to put registers into memory."""
    return any(int(count) for count in re.findall(r"(\d+) bytes spill", text))


def main() -> int:
    """Compiles all, prints a line per source, and returns the exit status."""
    nvcc = shutil.which("nvcc")
    if nvcc is None and "CUDA_HOME" in os.environ:
        nvcc = shutil.which("nvcc", path=os.path.join(os.environ["CUDA_HOME"], "bin"))
    if nvcc is None:
        print("cuda-compile: skipped, there is no nvcc on this machine")
        return 0
    sources = sorted(CSRC.glob("kernels/*.cu")) + sorted(CSRC.glob("ops/*.cpp"))
    failed = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(compile_one, nvcc, source, Path(folder)) for source in sources]
        for job in jobs:
            source, result = job.result()
            good = result.returncode == 0 and not spills(result.stderr)
            failed += not good
            print(f"{'ok  ' if good else 'FAIL'} {source.relative_to(CSRC)}")
            if result.returncode != 0:
                print(result.stdout + result.stderr)
            for line in report(result.stderr):
                print(f"       {line}")
    print(f"{len(sources) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
