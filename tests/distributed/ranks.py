"""Runs checks on several processes at once, each a rank with gloo on the CPU.

To start takes longer than to check. So all checks run in one start, whose processes are forks of
one that has imported everything; every worker of the test run reads what came of it.
"""

from __future__ import annotations

import ast
import datetime
import fcntl
import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

HERE = Path(__file__).parent
FILES = ("checks_ops", "checks_adjoints", "checks_layers", "checks_networks", "checks_memory")
WORLDS = (2, 4)
SECONDS = 300

Results = dict[str, dict[str, str]]


def names_of_checks() -> list[str]:
    """The functions of the files, whose argument is the mesh, in their order."""
    found = []
    for file in FILES:
        tree = ast.parse((HERE / f"{file}.py").read_text())
        names = [part.name for part in tree.body if isinstance(part, ast.FunctionDef)]
        found += [f"{file}.{name}" for name in names if not name.startswith("_")]
    return found


def run(folder: Path) -> Results:
    """What went wrong, by number of ranks and check; run once for all that share the folder."""
    results = folder / "ranks.json"
    with open(folder / "ranks.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not results.exists():
            results.write_text(json.dumps(_start()))
    found: Results = json.loads(results.read_text())
    return found


def _start() -> Results:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    paths = [str(HERE.parents[1]), str(HERE.parent), str(HERE), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "ranks.py"), folder],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
        )
        try:
            errors = process.communicate(timeout=SECONDS)[1]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)  # the forks as well
        return {str(world): _read(Path(folder) / str(world), world, errors) for world in WORLDS}


def _read(folder: Path, world: int, errors: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for rank in range(world):
        written = folder / f"{rank}.json"
        if not written.exists():
            return {"": f"rank {rank} of {world} has ended early:\n{errors[-3000:]}"}
        for name, error in json.loads(written.read_text()).items():
            found[name] = found.get(name, "") + (f"rank {rank}: {error}\n" if error else "")
    return found


def _be_all_ranks(folder: Path) -> None:
    for name in (*FILES, "torch.export", "torch._dynamo"):
        importlib.import_module(name)
    for world in WORLDS:
        meeting = folder / str(world)
        meeting.mkdir()
        ranks = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                _be_a_rank(world, meeting, rank)
                os._exit(0)
            ranks.append(child)
        for child in ranks:
            os.waitpid(child, 0)


def _be_a_rank(world: int, folder: Path, rank: int) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    mesh = init_device_mesh("cpu", (world,))
    found = {}
    for name in names_of_checks():
        torch.manual_seed(0)
        file, _, function = name.partition(".")
        try:
            getattr(importlib.import_module(file), function)(mesh)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc(limit=-4)
        # Ranks that do not agree would wait for each other: what follows is not run.
        failed = [torch.zeros(1) for _ in range(world)]
        dist.all_gather(failed, torch.tensor([float(bool(found[name]))]))
        if 0 < sum(failed) < world:
            found |= {other: "not run" for other in names_of_checks() if other not in found}
            break
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    _be_all_ranks(Path(sys.argv[1]))
