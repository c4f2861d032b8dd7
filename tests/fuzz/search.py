"""How the search is done: so many examples, the same ones in every run, and those that failed."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.database import DirectoryBasedExampleDatabase, ExampleDatabase

SAVED = Path(__file__).parent / "examples"
COUNT = os.environ.get("LINFUSE_EXAMPLES")
PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)
# More than any call of these takes; what asks for more has a number beyond all reason in it.
MEMORY = 2**31


class Examples(ExampleDatabase):
    """The examples that failed once, each as small as it got, by the name of a search.

    Hypothesis goes by a digest of a test's source, and forgets an example as soon as it passes.
    Here an example outlives an edit of the test and the mending of its defect, whose return it
    guards against: what was there when a run began is never deleted by it. What Hypothesis passes
    through on the way to the smallest is not stored.
    """

    _DIGEST = hashlib.sha384().digest_size  # longer keys are those of what is on the way

    def __init__(self, name: str, path: Path = SAVED) -> None:
        super().__init__()
        self._name = name.encode()
        self._files = DirectoryBasedExampleDatabase(path)
        self._kept = frozenset(self._files.fetch(self._name))

    def fetch(self, key: bytes) -> Iterable[bytes]:
        return self._files.fetch(self._name) if len(key) == self._DIGEST else ()

    def save(self, key: bytes, value: bytes) -> None:
        if len(key) == self._DIGEST:
            self._files.save(self._name, value)

    def delete(self, key: bytes, value: bytes) -> None:
        if len(key) == self._DIGEST and value not in self._kept:
            self._files.delete(self._name, value)


def search(
    name: str,
    count: int,
    number: int = 0,
    path: Path = SAVED,
    phases: Collection[Phase] = PHASES,
) -> Callable[[Any], Any]:
    """Decorates a test: the saved examples of that name, then `count` that `number` determines.

    LINFUSE_EXAMPLES draws that many in place of `count`, other ones in every run.
    """

    def decorate(test: Any) -> Any:
        # Before the settings: behind them it would take the database away.
        test = test if COUNT else seed(number)(test)
        return settings(
            max_examples=int(COUNT or count),
            database=Examples(name, path),
            phases=phases,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )(test)

    return decorate


@contextmanager
def little_memory() -> Iterator[None]:
    """Allocations of many gigabytes fail, as they would somewhere, and do not drain the machine."""
    if sys.platform != "linux":
        yield
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + MEMORY
    if before != resource.RLIM_INFINITY:
        most = min(before, most)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))
