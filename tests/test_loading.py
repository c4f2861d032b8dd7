"""A package that cannot be loaded says what it found and what to type: met as a user would."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import linfuse_ext
from linfuse_ext import _C, _loader

PACKAGE = Path(linfuse_ext.__file__).parent


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of packages that holds the Python files of ours, and nothing compiled."""
    shutil.copytree(
        PACKAGE, tmp_path / "linfuse_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return tmp_path


def compiled(site: Path) -> Path:
    return site / "linfuse_ext" / Path(_C.__file__).name


# An installation in place finds what a folder of its own lacks.
_IMPORT = """
import sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
import linfuse_ext
"""


def import_from(site: Path) -> str:
    """The last line that a Python says which imports the package from `site`."""
    done = subprocess.run([sys.executable, "-c", _IMPORT], cwd=site, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    return done.stderr.strip().splitlines()[-1]


def load(site: Path) -> str:
    last = import_from(site)
    assert last.startswith("ImportError: linfuse_ext")
    return last


def write_torch(site: Path, text: str) -> None:
    (site / "torch").mkdir()
    (site / "torch" / "__init__.py").write_text(text)


def test_a_torch_that_is_too_old(site: Path) -> None:
    write_torch(site, "__version__ = '2.9.1+cu128'")
    text = load(site)
    assert "needs torch >= 2.11; running: torch 2.9.1+cu128, Python" in text
    assert text.endswith("Type: pip install --upgrade torch")


def test_no_torch(site: Path) -> None:
    write_torch(site, "raise ModuleNotFoundError('No module named torch', name='torch')")
    text = load(site)
    assert "needs torch >= 2.11, which is not installed for this Python (3." in text
    assert text.endswith("Type: pip install torch")


def test_a_torch_that_is_broken_speaks_for_itself(site: Path) -> None:
    write_torch(site, "import module_that_torch_misses")
    assert import_from(site).endswith("No module named 'module_that_torch_misses'")


def test_a_module_that_was_not_built(site: Path) -> None:
    text = load(site)
    assert "the compiled module was not built for this Python; running: torch 2." in text
    assert "python setup.py build_ext --inplace" in text


def test_a_module_of_another_python(site: Path) -> None:
    shutil.copy(_C.__file__, compiled(site).with_name("_C.cpython-38-x86_64-linux-gnu.so"))
    assert "was not built for this Python" in load(site)


def link(site: Path, code: str, *flags: str) -> None:
    source = site / "stub.c"
    source.write_text(code)
    command = ["cc", "-shared", "-fPIC", *flags, str(source), "-o", str(compiled(site))]
    subprocess.run(command, check=True, cwd=site)


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_a_library_that_is_missing(site: Path) -> None:
    subprocess.run(["cc", "-shared", "-o", "libgone.so", "-xc", os.devnull], check=True, cwd=site)
    link(site, "int nothing;", "-Wl,--no-as-needed", "-L.", "-lgone")
    (site / "libgone.so").unlink()
    text = load(site)
    assert "does not load (libgone.so: cannot open shared object file" in text
    assert text.endswith(
        "Type: `pip install --force-reinstall --no-deps --no-cache-dir linfuse_ext`"
    )


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_a_symbol_that_this_torch_does_not_have(site: Path) -> None:
    link(site, "void torch_of_tomorrow(void); void (*call)(void) = torch_of_tomorrow;")
    text = load(site)
    assert "undefined symbol: torch_of_tomorrow" in text
    assert f"running: torch {torch.__version__}" in text


def test_a_file_that_is_no_library(site: Path) -> None:
    compiled(site).write_bytes(b"cut off")
    assert "does not load (" in load(site)


def test_python_files_and_module_of_different_versions(site: Path) -> None:
    shutil.copy(_C.__file__, compiled(site))
    (site / "linfuse_ext" / "_version.py").write_text('__version__ = "99.0"')
    text = load(site)
    assert (
        f"Python files are version 99.0, the compiled module is {_C.build_info()['version']}"
        in text
    )


def test_the_minimum_is_the_one_that_packaging_names() -> None:
    from importlib.metadata import requires

    assert _loader.NEEDED.replace(" ", "") in {
        r.split(";")[0] for r in requires("linfuse_ext") or []
    }
