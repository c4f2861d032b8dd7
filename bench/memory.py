"""Memory that `fuse_conv_linear` takes beyond its operands and its result.

Each layer in a process of its own, whose high-water mark starts low: what the mark grows by during
the call, less the result, is what the call held in between. ``python -m bench.memory LAYER DTYPE``
is such a process.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench.cases import OURS, Case
from bench.layers import load_layers
from bench.ops import FUSE

# Large inputs, large outputs, packing of many channels, long axes, half types.
LAYERS = (
    ("same3x3", "float32"),
    ("vgg_tail_cpu", "float32"),
    ("vgg_tail_cpu", "bfloat16"),
    ("depthwise", "float64"),
    ("wav_frontend", "float32"),
    ("patch_embed", "float16"),
)
_STATUS = Path("/proc/self/status")


def limit(inputs: int, output: int) -> float:
    """Bytes that a call may hold besides."""
    return 64e6 + 0.1 * (inputs + output)


def measure() -> list[dict[str, Any]]:
    """One row per layer; none where the system does not tell a high-water mark."""
    if not _STATUS.exists():
        return []
    rows = []
    for layer, dtype in LAYERS:
        command = [sys.executable, "-m", "bench.memory", layer, dtype]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append({"layer": layer, "dtype": dtype, **json.loads(run.stdout)})
    return rows


def _mark() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
    assert found, "no high-water mark"
    return int(found[1]) * 1024


@torch.no_grad()
def _one(layer: str, dtype: str) -> dict[str, float]:
    layers = load_layers()
    tiny, case = Case(FUSE, layers["gist"], dtype), Case(FUSE, layers[layer], dtype)
    tiny.call(OURS, tiny.inputs())()  # starts the threads, loads what is loaded once
    operands = case.inputs()
    call = case.call(OURS, operands)
    before = _mark()
    result = call()
    grown = _mark() - before
    output, inputs = (sum(t.nbytes for t in tensors) for tensors in (result, operands))
    assert grown + 8e6 > output, "the mark did not see the result, so it shows nothing"
    return {"extra": grown - output, "limit": limit(inputs, output), "output": output}


if __name__ == "__main__":
    print(json.dumps(_one(*sys.argv[1:3])))
