"""Fair timing of a few things against each other."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

MOST_ROUNDS = 1000


def medians(tasks: dict[str, Callable[[], object]], *, seconds: float) -> dict[str, float]:
    """Median time of each task, in seconds.

    The tasks take turns, so that a slow spell of the machine meets all of them alike. A task that
    has had its `seconds` sits out the later rounds. The first run, which warms up, does not count.

    Args:
        tasks: What to call, by name.
        seconds: Time to spend on each task; each runs once at least, whatever it takes.
    """
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for _ in range(MOST_ROUNDS):
        for name, task in tasks.items():
            if not times[name] or sum(times[name]) < seconds:
                start = perf_counter()
                task()
                times[name].append(perf_counter() - start)
    return {name: median(values) for name, values in times.items()}
