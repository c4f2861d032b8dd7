"""What is called held, and what is called a cliff."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import linfuse_ext
from bench import engines, growth
from bench.bounds import judge
from bench.cases import Case
from bench.layers import load_layers
from bench.ops import FUSE, LINEAR_CONV, MATRIX
from bench.rows import document, make_row
from bench.tables import markdown

LAYERS = load_layers()


def _row(op: str, layer: str, dtype: str = "float32", **ms: float) -> dict[str, Any]:
    facts = Case(op, LAYERS[layer], dtype).facts
    return make_row(facts, {name: value / 1e3 for name, value in ms.items()})


def _held(*rows: dict[str, Any], **more: Any) -> dict[str, bool]:
    doc = document("cpu", list(rows), {}, {"float32": 400.0}, **more)
    assert all(markdown(doc))
    return {line.bound: line.held for line in judge(doc) if line.held is not None}


def test_the_peer_is_the_better_of_two() -> None:
    row = _row(FUSE, "lenet5", ours=2.0, adjoint=6.0, conv_input=5.0, jacrev=1.0)
    assert row["peer"] == "conv_input" and row["ratio"] == 2.5
    assert _held(row)[f"{FUSE} float32, geometric mean"]
    assert _held(row)[f"{FUSE} float32, every layer"]


def test_one_slower_layer_breaks_a_bound() -> None:
    rows = [
        _row(FUSE, "lenet5", ours=1.0, adjoint=9.0), _row(FUSE, "forum", ours=1.0, adjoint=0.99),
    ]  # fmt: skip
    held = _held(*rows)
    assert held[f"{FUSE} float32, geometric mean"]
    assert not held[f"{FUSE} float32, every layer"]


def test_a_merge_may_lose_what_noise_takes() -> None:
    line = f"{LINEAR_CONV} float32, every layer"
    assert _held(_row(LINEAR_CONV, "lenet5", ours=1.0, forward=0.98))[line]
    assert not _held(_row(LINEAR_CONV, "lenet5", ours=1.0, forward=0.96))[line]


def test_small_and_large_matrices_have_their_own_bounds() -> None:
    held = _held(
        _row(MATRIX, "voxels", ours=50.0, zeros=90.0), _row(MATRIX, "gist", ours=0.011, zeros=0.002)
    )
    assert held == {f"{MATRIX} float32, >= 64 MB": False, f"{MATRIX}, < 64 MB": True}


def test_the_peak_counts_where_there_is_enough_to_do() -> None:
    line = f"{FUSE} float32, >= 5 GFLOP and 16 channels"
    assert line not in _held(_row(FUSE, "patch_embed", ours=1.0))  # 3 channels
    flops = LAYERS["same3x3"].fuse_flops() / 400e9  # seconds at the peak
    assert _held(_row(FUSE, "same3x3", ours=flops * 1e3 / 0.61))[line]
    assert not _held(_row(FUSE, "same3x3", ours=flops * 1e3 / 0.59))[line]


def test_bits_and_memory() -> None:
    memory = [{"layer": "same3x3", "dtype": "float32", "extra": 2e8, "limit": 1e8}]
    held = _held(memory=memory, same_bits={"one": True, "two": False})
    assert held[f"{FUSE}, memory beside operands and result"] is False
    assert held["bits for 1 and 2 threads"] is False


@pytest.mark.parametrize(
    ("ours", "peer", "factor"),
    [
        ((1.0, 2.0), (1.0, 2.0), 1.0),  # both in proportion
        ((1.0, 4.0), (1.0, 2.0), 2.0),  # a cliff
        ((1.0, 4.0), (1.0, 4.0), 1.0),  # the peer falls off the same one
        ((1.0, 2.0), (1.0, 1.0), 1.0),  # the peer gets better: no cliff of ours
    ],
)
def test_a_cliff_is_what_the_peer_does_not_have(ours, peer, factor: float) -> None:
    points = [
        {"work": work, "seconds": {"ours": ours[at], "adjoint": peer[at], "conv_input": 99.0}}
        for at, work in enumerate((1.0, 2.0))
    ]
    assert growth.worsening(*points) == pytest.approx(factor)


@pytest.mark.parametrize("sweep", growth.sweeps(), ids=lambda sweep: sweep.name)
def test_sweeps_grow(sweep: growth.Sweep) -> None:
    key = "gb" if sweep.op == MATRIX else "gflop"
    work = [case.facts[key] for _, case in sweep.points]
    assert work == sorted(work)


def test_an_engine_is_forced_for_one_call(monkeypatch) -> None:
    case = Case(FUSE, LAYERS["gist"], "float32", both_engines=True)
    used = ["auto"]

    def set_engine(name: str) -> str:
        used.append(name)
        return used[-2]

    monkeypatch.delattr(linfuse_ext._C, "set_engine", raising=False)
    assert case.skip_reason("ours[own]") == engines.missing() is not None
    monkeypatch.setattr(linfuse_ext._C, "set_engine", set_engine, raising=False)
    assert case.skip_reason("ours[own]") is None
    with torch.no_grad():
        case.check(case.call("ours[torch]", case.inputs())(), case.inputs())
    assert used == ["auto", "torch", "auto"]
    row = _row(FUSE, "gist", **{"ours": 1.0, "ours[own]": 1.0, "ours[torch]": 2.0, "adjoint": 3.0})
    assert row["engines_ms"] == {"own": 1.0, "torch": 2.0} and row["peer"] == "adjoint"
    assert "choice of engine" in markdown(document("cpu", [row], {}))[0]
