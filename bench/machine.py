"""What the rows were measured on."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch


def _output(*command: str) -> str:
    """What a command prints, or nothing where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    here = Path(__file__).parent
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=here)
    return run.stdout.strip() if run.returncode == 0 else ""


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def name(device: str) -> str:
    """The device in words."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    simd = torch.backends.cpu.get_cpu_capability()
    return f"{_cpu_model()}, {torch.get_num_threads()} threads, {simd}"


def stem(device: str) -> str:
    """A file name for the device, such as ``nvidia-h100-80gb-hbm3`` or ``cpu-2core-avx512``."""
    if device == "cuda":
        return _plain(torch.cuda.get_device_name())
    model = re.sub(r"\(.*?\)|\bCPU\b|\bProcessor\b|@.*", " ", _cpu_model())
    simd = torch.backends.cpu.get_cpu_capability().lower()
    # a virtual machine often hides the model and leaves only the maker's name and line
    known = _plain(model) if re.search(r"\d", model) else "cpu"
    return f"{known}-{os.cpu_count()}core-{_plain(simd)}"


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def commit() -> str:
    """The commit measured, with ``-dirty`` where files differ from it."""
    described = _output("git", "describe", "--always", "--dirty", "--exclude=*")
    return described or os.environ.get("LINFUSE_COMMIT", "unknown")


def facts(device: str) -> dict[str, Any]:
    """Device, versions and commit, as they head a file of results."""
    found = {
        "machine": stem(device),
        "device": name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }
    if device == "cuda":
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["driver"] = driver.splitlines()[0] if driver else "unknown"
        found["cuda"] = torch.version.cuda
    else:
        found["threads"] = torch.get_num_threads()
    return found
