"""Many threads of Python at once: each gets what it would get alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from every_op import BY_NAME, OPS, make_operands, same_bits
from torch import Tensor, nn

import linfuse_ext as lf
from linfuse_ext import functional

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

IMAGES = [(5, 4), (16, 9), (7, 24), (30,), (4, 3, 5)]
CHANNELS = (3, 8)


def modules(operands: dict[str, Tensor], image: tuple[int, ...]) -> list[Tensor]:
    """The functions on layers."""
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(image) - 1]
    channels = operands["weight"].shape[0]
    conv = kind(channels, channels, 3, padding=1, device="meta")
    conv.weight, conv.bias = nn.Parameter(operands["weight"]), nn.Parameter(operands["bias"])
    behind = nn.Linear(1, 1, device="meta")
    behind.weight, behind.bias = (
        nn.Parameter(operands[name]) for name in ("behind", "behind_bias")
    )
    made = [lf.conv_to_linear(conv, image), lf.fuse_conv_linear(conv, behind, image)]
    return [parameter.detach() for layer in made for parameter in layer.parameters()]


Job = Callable[[], list[Tensor]]


def make_jobs() -> list[Job]:
    jobs: list[Job] = []
    for number, image in enumerate(IMAGES):
        for channels in CHANNELS:
            for dtype in (torch.float32, torch.bfloat16):
                operands = make_operands(channels, image, 40, dtype, seed=number)
                jobs += [lambda op=op, o=operands, i=image: op(o, i) for op in OPS]
                jobs.append(lambda o=operands, i=image: modules(o, i))
    return jobs


@pytest.fixture(scope="module")
def jobs() -> list[tuple[Job, list[Tensor]]]:
    """Calls, and what they give alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [(job, [part.clone() for part in job()]) for job in make_jobs()]
    finally:
        torch.set_num_threads(before)


@pytest.fixture(params=[1, 2])
def threads_of_torch(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def wrong_of(jobs: list[tuple[Job, list[Tensor]]], order: int) -> list[int]:
    """Runs all jobs, in an order of its own; returns the numbers of those that came out wrong."""
    step = (1, 3, 7, 9, 11, 13, 17, 19)[order]  # prime to the number of jobs
    wrong = []
    for n in range(len(jobs)):
        number = (order + n * step) % len(jobs)
        job, right = jobs[number]
        if not same_bits(job(), right):
            wrong.append(number)
    return wrong


@pytest.mark.parametrize("threads", [2, 8])
def test_the_same_bits_as_alone(jobs, threads: int, threads_of_torch: int) -> None:
    assert len(jobs) == 160
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(lambda order: wrong_of(jobs, order), range(threads)))
    assert found == [[]] * threads


def test_the_same_bits_while_the_number_of_threads_changes(jobs) -> None:
    before, stop = torch.get_num_threads(), threading.Event()

    def change() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            torch.set_num_threads(1 + number % 4)

    changer = threading.Thread(target=change)
    changer.start()
    try:
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda order: wrong_of(jobs, order), range(2)))
    finally:
        stop.set()
        changer.join()
        torch.set_num_threads(before)
    assert found == [[], []]


def test_each_thread_may_set_its_own_number_of_threads(jobs) -> None:
    before = torch.get_num_threads()

    def run(order: int) -> list[int]:
        torch.set_num_threads(1 + order)
        return wrong_of(jobs, order)

    try:
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(run, range(3))) == [[]] * 3
    finally:
        torch.set_num_threads(before)


def fail_in_python() -> None:
    functional.conv_to_affine(torch.ones(2, 2, 3, 3), torch.ones(3), (5, 5))


def fail_in_the_op() -> None:
    torch.ops.linfuse.conv_to_affine(torch.ones(2, 2, 3, 3), torch.ones(3), [5, 5])


def fail_for_memory() -> None:
    functional.conv_to_affine(torch.ones(1, 1, 1), None, 3 * 10**8)


@pytest.mark.parametrize("fail", [fail_in_python, fail_in_the_op, fail_for_memory])
def test_errors_of_one_thread_are_its_own(jobs, fail: Callable[[], None]) -> None:
    stop, errors = threading.Event(), []

    def keep_failing() -> None:
        while not stop.is_set():
            try:
                fail()
                errors.append("no error")
            except (ValueError, RuntimeError) as error:
                errors.append(str(error).split(":")[0])

    failing = threading.Thread(target=keep_failing)
    failing.start()
    try:
        assert wrong_of(jobs, 0) == []
    finally:
        stop.set()
        failing.join()
    assert set(errors) == {"conv_to_affine"}


LONG = {  # image, channels, features
    "dense": ((28, 28), 8, 1),
    "csr": ((180, 180), 8, 1),
    "fuse_conv_linear": ((32, 32), 32, 500),
    "fuse_linear_conv": ((32, 32), 32, 500),
    "fuse_conv_conv": ((5, 5), 192, 1),
}


@pytest.mark.parametrize("name", LONG)
def test_other_threads_of_python_go_on_during_a_kernel(name: str) -> None:
    """The kernels run without the interpreter's lock: a thread that counts is not held up."""
    image, channels, features = LONG[name]
    operands = make_operands(channels, image, features)
    beats: list[float] = []
    stop = threading.Event()

    def count() -> None:
        while not stop.wait(0.001):
            beats.append(time.perf_counter())

    op = BY_NAME[name]
    op(operands, image)
    counter = threading.Thread(target=count)
    counter.start()
    took, during = 0.0, 0
    try:
        for _ in range(60):
            begin = time.perf_counter()
            op(operands, image)
            end = time.perf_counter()
            # well within the call: not while it goes in or comes out
            within = [beat for beat in beats if begin + 0.002 < beat < end - 0.002]
            took, during = took + end - begin, during + len(within)
            if during > 20:
                break
    finally:
        stop.set()
        counter.join()
    assert during > 5, f"{during} beats in {took:.2f} s"
