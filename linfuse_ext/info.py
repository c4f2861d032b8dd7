"""What is installed, what is running, and whether the two fit: `python -m linfuse_ext info`."""

from __future__ import annotations

import platform
import re
from typing import Any

import torch

from . import _C


def _openmp() -> str:
    found = re.search(r"OpenMP \S+", torch.__config__.parallel_info())
    return f"{found[0]}, {torch.get_num_threads()} threads" if found else "no OpenMP in torch"


def covers(architectures: str, capability: tuple[int, int]) -> bool:
    """Says whether a binary built for `architectures` runs on a card.

    Args:
        architectures: As TORCH_CUDA_ARCH_LIST has them: "8.0;9.0a;12.0+PTX".
        capability: Compute capability (major, minor) of the card.

    Returns:
        True for machine code of the same major and no later minor version, machine code of exactly
        this card (a suffix `a`), or PTX of no later version.

    Examples:
        >>> covers("8.0;9.0a", (8, 6)), covers("8.0;9.0a", (10, 0)), covers("8.0+PTX", (10, 0))
        (True, False, True)
    """
    for entry in re.split(r"[; ]+", architectures.strip()):
        found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", entry)
        if found is None:
            continue
        built = (int(found[1]), int(found[2]))
        if built == capability:
            return True
        if found[3]:  # made for one card, its PTX as well
            continue
        if built[0] == capability[0] and built[1] <= capability[1]:
            return True
        if found[4] and built <= capability:
            return True
    return False


def _cuda() -> tuple[dict[str, str], str]:
    """Rows about CUDA, and the verdict."""
    build = _C.build_info()
    rows = {
        "CUDA built with": build["cuda"] or "none, CPU only",
        "CUDA of torch": torch.version.cuda or "none, CPU only",
    }
    if build["cuda"]:
        rows["cards in the binary"] = build["cuda_architectures"]
    if not torch.cuda.is_available():
        rows["card"] = "none"
        return rows, "ready on the CPU"
    capability = torch.cuda.get_device_capability()
    rows["card"] = f"{torch.cuda.get_device_name()} ({capability[0]}.{capability[1]})"
    if not build["cuda"]:
        return rows, (
            "ready on the CPU only: there is a card, but the binary was built without CUDA; "
            "reinstall with LINFUSE_CUDA=1"
        )
    if not covers(build["cuda_architectures"], capability):
        wanted = f"{capability[0]}.{capability[1]}"
        return rows, (
            f"ready on the CPU only: the binary has no code for this card; reinstall with "
            f"TORCH_CUDA_ARCH_LIST={wanted}"
        )
    return rows, "ready on the CPU and on this card"


def collect() -> dict[str, Any]:
    """Returns the facts by name, in the order in which they are printed; the verdict is last."""
    build = _C.build_info()
    cuda, verdict = _cuda()
    return {
        "linfuse_ext": build["version"],
        "torch running": torch.__version__,
        "torch built with": f"{build['built_with_torch']} (stable ABI of 2.11)",
        "Python": platform.python_version(),
        "platform": platform.platform(),
        "compiler": build["compiler"],
        "SIMD": f"{build['simd']} (of {', '.join(build['simd_available'])})",
        "threads": _openmp(),
        **cuda,
        "verdict": verdict,
    }


def text() -> str:
    """Returns the facts as lines of text."""
    facts = collect()
    width = max(len(name) for name in facts)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())
