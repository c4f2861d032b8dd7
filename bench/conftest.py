"""Fixtures of the benchmarks: every group is measured once, in alternation, then reported."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from bench.cases import OURS, Case
from bench.measure import CLOCK
from bench.race import Outcome, race


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the one option of the benchmarks."""
    parser.addoption(
        "--bench-quick", action="store_true", help="a few layers, small matrices, short rounds"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Turns a module's `cases` into one test per case and entrant."""
    if "entrant" not in metafunc.fixturenames:
        return
    quick = metafunc.config.getoption("--bench-quick")
    cases: Iterable[Case] = metafunc.module.cases(quick)
    pairs = [(case, entrant) for case in cases for entrant in case.entrants]
    metafunc.parametrize(
        ("case", "entrant"), pairs, ids=[f"{case.group}/{entrant}" for case, entrant in pairs]
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the peak's tests where their names say: first, in the middle, last."""
    moments: dict[str, list[pytest.Item]] = {"start": [], "middle": [], "end": []}
    others = []
    for item in items:
        params = getattr(item, "callspec", None)
        moments.get(params.params.get("moment", "") if params else "", others).append(item)
    half = len(others) // 2
    while 0 < half < len(others) and _case(others[half]) is _case(others[half - 1]):
        half += 1  # not between the entrants of one case
    items[:] = [
        *moments["start"], *others[:half], *moments["middle"], *others[half:], *moments["end"],
    ]  # fmt: skip


def _case(item: pytest.Item) -> Case | None:
    params = getattr(item, "callspec", None)
    return params.params.get("case") if params else None


@pytest.fixture(scope="session")
def share(request: pytest.FixtureRequest) -> float:
    """How much of its time a group is given."""
    return 0.3 if request.config.getoption("--bench-quick") else 1.0


@pytest.fixture
def replay(benchmark) -> Callable[[list[float], dict[str, Any]], None]:
    """Returns ``replay(samples, facts)``, which makes measured rounds this test's benchmark."""

    def report(samples: list[float], facts: dict[str, Any]) -> None:
        benchmark.extra_info.update(facts)
        rounds = iter(samples)
        benchmark.pedantic(lambda: CLOCK.play(next(rounds)), rounds=len(samples))

    return report


@pytest.fixture(scope="session")
def _measured() -> dict[Case, dict[str, Outcome]]:
    return {}


@pytest.fixture(scope="session")
def _entrants(request: pytest.FixtureRequest) -> dict[Case, list[str]]:
    """Who was selected, by case."""
    selected: dict[Case, list[str]] = {}
    for item in request.session.items:
        if case := _case(item):
            selected.setdefault(case, []).append(item.callspec.params["entrant"])
    return selected


@pytest.fixture
def run(benchmark, replay, share, _entrants, _measured) -> Callable:
    """Returns ``run(case, entrant)``, which reports an entrant's rounds as a benchmark.

    The first test of a group measures everyone of that group who was selected.
    """

    def report(case: Case, entrant: str) -> None:
        benchmark.group = case.group
        if reason := case.skip_reason(entrant):
            pytest.skip(f"{entrant}: {reason}")
        if case not in _measured:
            running = [name for name in _entrants[case] if case.skip_reason(name) is None]
            _measured[case] = race(case, running, case.seconds * share)
        outcome = _measured[case][entrant]
        if isinstance(outcome, RuntimeError) and entrant != OURS:
            pytest.skip(f"{entrant} does not run here: {outcome}")
        if isinstance(outcome, Exception):
            raise outcome
        replay(outcome, {**case.facts, "entrant": entrant})

    return report
