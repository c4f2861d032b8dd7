"""Processes forked after use: right, and no worse off than with torch's own operators.

GNU OpenMP, which torch brings along, does not outlive a fork: once a process has used threads, a
call of a forked child that wants several waits forever, torch's own additions as well. What torch
recommends, and its DataLoader does, is one thread in the child.
"""

from __future__ import annotations

import sys

import pytest
from every_op import OPS, run_python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks as Linux does")

PATIENT = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}

COMMON = """
import os, signal, sys, time
import torch
from every_op import OPS, make_operands, same_bits

SMALL = make_operands(), (5, 4)
LARGE = make_operands(16, (16, 16), 200), (16, 16)

def in_child(work, seconds):
    "Whether `work` says True in a forked child; None if it does not end."
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if work() else 1
        finally:
            os._exit(status)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None

def use(threads):
    "All ops, and torch's, on that many threads; what they give."
    torch.set_num_threads(threads)
    torch.ones(1000, 1000) + 1
    return {(op.name, n): op(*sizes) for op in OPS for n, sizes in enumerate((SMALL, LARGE))}

def all_right(right, sizes=(0, 1), besides=()):
    each = [(op, n) for op in OPS for n in sizes if op.name not in besides]
    return all(same_bits(op(*(SMALL, LARGE)[n]), right[op.name, n]) for op, n in each)
"""

CASES = """
def alone():
    torch.set_num_threads(1)
    return all_right(right)

def check(name, found):
    print(f"{name}: {found}", flush=True)

check("not used, and the child with two", in_child(lambda: all_right(use(2)), 30))
right = use(1)
check("used with one", in_child(lambda: all_right(right), 30))
right = use(2)
check("used with two, the child with one", in_child(alone, 30))
check("a child of a child", in_child(lambda: in_child(alone, 30), 40))
# torch's repeat_interleave, which these two are made with, takes all threads at any size.
besides = ("coo", "diagonals")
check("too small for two", in_child(lambda: all_right(right, (0,), besides), 30))
check("the parent goes on", all_right(right))
"""


def test_a_forked_child_is_right() -> None:
    result = run_python(COMMON + CASES, timeout=240, **PATIENT)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 6 and all(line.endswith(": True") for line in lines), result.stdout


NO_WORSE = """
use(2)
torchs = in_child(lambda: bool((torch.ones(1000, 1000) + 1).sum() > 0), 4)
for op in OPS:
    print(op.name, torchs, in_child(lambda: bool(op(*LARGE)), 4 if torchs else 0.5), flush=True)
"""


def test_where_torchs_own_operators_work_ours_do() -> None:
    """With a torch on another OpenMP both do; with GNU OpenMP both wait."""
    result = run_python(COMMON + NO_WORSE, **PATIENT)
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [name for name, _, _ in lines] == [op.name for op in OPS]
    for name, torchs, ours in lines:
        assert ours != "False", f"{name} is wrong in a child"
        assert torchs != "True" or ours == "True", f"{name} hangs where torch does not"


WORKERS = """
import multiprocessing
from torch.utils.data import DataLoader, Dataset

class Products(Dataset):
    def __len__(self):
        return 2 * len(OPS)

    def __getitem__(self, index):
        op, sizes = OPS[index // 2], (SMALL, LARGE)[index % 2]
        return index, [part.clone() for part in op(*sizes)]

def one(index):
    torch.set_num_threads(1)
    return Products()[index][0] if same_bits(Products()[index][1], right[key(index)]) else -1

def key(index):
    return OPS[index // 2].name, index % 2

right = use(2)
seen = set()
# the data sets of both kinds of workers are those of this process, as it was when they began
for index, made in DataLoader(
    Products(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=30
):
    assert same_bits(made, right[key(index)]), key(index)
    seen.add(index)
assert seen == set(range(2 * len(OPS)))
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map_async(one, sorted(seen)).get(30) == sorted(seen)
"""


def test_workers_of_a_data_loader_and_of_a_pool() -> None:
    result = run_python(COMMON + WORKERS, **PATIENT)
    assert result.returncode == 0, result.stderr
