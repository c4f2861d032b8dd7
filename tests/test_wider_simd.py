"""AVX-512 and AMX where the machine lacks them: wider_simd/ does their instructions in plain C++.

A machine that has them runs all tests with them. Here a part does: values of every way and type,
and what is done by element.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from wider_simd.run import LEVELS, build, run_tests, why_not

from linfuse_ext import _C

REASON = why_not()
MISSING = [level for level in LEVELS if level not in _C.build_info()["simd_available"]]

pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no wider SIMD: {REASON}")


@pytest.fixture(scope="session")
def package(pytestconfig: pytest.Config) -> Path:
    return build(pytestconfig.cache.mkdir("wider_simd"))


# AMX is AVX-512 where it is not tiles.
TESTS = {
    "avx512": [
        "test_fuse_conv_linear.py::test_every_simd_level_equals_the_reference[avx512]",
        "test_conv_to_affine.py::test_rows_that_are_moved_are_those_that_are_written",
        "test_conv_to_csr.py::test_equals_the_dense_matrix_and_scipy",
    ],
    "amx": [
        "test_fuse_conv_linear.py::test_every_simd_level_equals_the_reference[amx]",
        "test_fuse_linear_conv.py::test_every_simd_level_equals_the_reference[amx]",
        "test_fuse_conv_linear.py::test_every_cut_of_the_work[position_tiles-plain-torch.bfloat16]",
        "test_fuse_conv_linear.py::test_every_cut_of_the_work[position_tiles-groups-torch.float16]",
        "faults/test_not_finite.py::test_subnormals",
    ],
}


# In a process of their own, since the level is chosen once.
@pytest.mark.parametrize("level", MISSING)
def test_what_the_machine_lacks(level: str, package: Path) -> None:
    result = run_tests(level, package, TESTS[level], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
