"""The ops, layers and networks on 2 and 4 processes; what each of them checks is in checks_*.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import WORLDS, names_of_checks, run

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all workers of a test run."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if own.name.startswith("popen") else own


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("check", names_of_checks())
def test_on_every_rank(check: str, world: int, folder: Path) -> None:
    results = run(folder)[str(world)]
    assert set(results) == set(names_of_checks()), results
    assert not results[check], results[check]
