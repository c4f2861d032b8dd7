"""Fixtures and tolerances shared by all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from linfuse_ext import _C

sys.path.insert(0, str(Path(__file__).parent))

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA card"),
        ],
    ),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    # Gradients that go through torch are asked to be the same twice, as ours are.
    if request.param == "cuda":
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    return request.param


@pytest.fixture(params=["own", "torch"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.set_engine(request.param)
    yield request.param
    _C.set_engine(before)


def pytest_configure(config: pytest.Config) -> None:
    # Inductor's worker processes would fight the tests for the cores.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if _C.build_info()["instrument"] in ("sanitize", "threads"):
        for item in items:
            if item.get_closest_marker("lean"):
                item.add_marker(pytest.mark.skip(reason="a build with sanitizers is not lean"))


def pytest_sessionfinish() -> None:
    if hasattr(_C, "write_coverage"):  # a worker of these tests ends without its exit handlers
        _C.write_coverage()
