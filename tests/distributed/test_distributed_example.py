"""The example, started as its first lines say."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

import linfuse_ext

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "distributed.py"


def start(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs Python on the package that is being tested, wherever it was imported from."""
    package = str(Path(linfuse_ext.__file__).parents[1])
    environment = os.environ | {
        "PYTHONPATH": package, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, *command],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    )


def test_it_merges_on_two_processes(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert "torchrun " + " ".join(torchrun[2:]) in EXAMPLE.read_text()
    saved = tmp_path / "merged"
    finished = start(*torchrun, str(EXAMPLE), "--classes", "600", "--save", str(saved))
    assert finished.returncode == 0, finished.stderr
    printed = finished.stdout
    assert "2 processes, 600 classes" in printed
    # 600 x 3072 merged rows in float32, half of them on each.
    assert printed.count("3.7 MB of 7.4 MB here") == 2
    assert "collectives during the merge: 2" in printed  # the convolution's weight and bias
    assert "collectives during the merge: 0" in printed
    assert printed.count("largest difference from the two layers") == 2
    assert (saved / ".metadata").exists()


def test_without_torchrun_it_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    example = runpy.run_path(str(EXAMPLE))
    line = "torchrun --standalone --nproc-per-node 2 examples/distributed.py"
    with pytest.raises(SystemExit, match=line):
        example["main"]([])


@pytest.mark.parametrize("arguments", [["--classes", "0"], ["--classes", "many"], ["--no"]])
def test_wrong_usage_is_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(EXAMPLE))["main"](arguments)
    assert stop.value.code == 2 and "error: " in capsys.readouterr().err
