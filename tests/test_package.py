"""The package around the ops: what it says of itself, its examples, and how it is built."""

from __future__ import annotations

import doctest
import importlib
import json
import pkgutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import linfuse_ext
from linfuse_ext import _C, functional, info
from linfuse_ext.__main__ import main

ROOT = Path(__file__).parent.parent


MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(linfuse_ext.__path__, "linfuse_ext.")
    if not name.endswith(("_C", "__main__"))
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.failed == 0


@pytest.mark.parametrize("name", linfuse_ext.__all__)
def test_every_public_function_has_an_example(name: str) -> None:
    thing = getattr(linfuse_ext, name)
    if callable(thing) and not isinstance(thing, type):
        assert ">>>" in thing.__doc__


def readme_blocks() -> list[str]:
    text = (ROOT / "README.md").read_text()
    return [block.split("```")[0] for block in text.split("```python\n")[1:]]


def test_examples_in_the_readme() -> None:
    blocks = readme_blocks()
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


def test_public_names() -> None:
    assert set(linfuse_ext.__all__) <= set(dir(linfuse_ext))
    for name in ("conv_to_affine", "fuse_conv_linear"):
        assert hasattr(torch.ops.linfuse, name) and hasattr(functional, name)


def test_info_says_what_is_installed(capsys) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for word in (linfuse_ext.__version__, torch.__version__, "SIMD", "OpenMP", "verdict"):
        assert word in text
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts)[-1] == "verdict" and facts["verdict"].startswith("ready on the CPU")


def test_build_info() -> None:
    build = _C.build_info()
    assert build["version"] == linfuse_ext.__version__
    assert build["simd"] in build["simd_available"]


@pytest.mark.parametrize(
    ("architectures", "card", "covered"),
    [
        ("8.0;9.0a", (8, 0), True),
        ("8.0;9.0a", (8, 9), True),
        ("8.0;9.0a", (7, 5), False),
        ("8.0;9.0a", (9, 0), True),
        ("8.0;9.0a", (10, 0), False),
        ("8.0 9.0+PTX", (12, 0), True),
        ("9.0a+PTX", (10, 0), False),
    ],
)
def test_info_knows_which_cards_the_binary_covers(architectures, card, covered) -> None:
    assert info.covers(architectures, card) == covered


def setup_py(**environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_setup_says_what_it_decided() -> None:
    assert "linfuse_ext: CPU only, as LINFUSE_CUDA=0 says." in setup_py(LINFUSE_CUDA="0").stdout
    wrong = setup_py(LINFUSE_CUDA="maybe")
    assert wrong.returncode != 0
    assert "LINFUSE_CUDA must be auto, 0 or 1, got 'maybe'." in wrong.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build")
def test_setup_fails_with_one_sentence_where_cuda_is_wished_but_missing() -> None:
    result = setup_py(LINFUSE_CUDA="1", CUDA_HOME="/nowhere")
    assert result.returncode != 0
    assert "linfuse_ext: LINFUSE_CUDA=1, but there is no nvcc" in result.stderr
    assert "Traceback" not in result.stderr


def test_setup_without_torch_says_what_to_type() -> None:
    """An interpreter with setuptools but without torch: -S hides what is installed."""
    script = (
        "import sys, runpy\n"
        "sys.modules['torch'] = None\n"
        "sys.argv = ['setup.py', '--version']\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "building needs torch" in result.stderr and "pip install" in result.stderr
    assert "Traceback" not in result.stderr


def test_nothing_but_the_stable_interface_is_included() -> None:
    """torch/extension.h would tie the binary to one torch; kernels and geometry know no torch."""
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix not in (".h", ".cpp", ".cu", ".inl"):
            continue
        includes = [line for line in path.read_text().splitlines() if line.startswith("#include")]
        for line in includes:
            if "torch/" in line:
                assert path.parent.name == "ops", f"{path}: {line}"
                assert "torch/csrc/stable/" in line or "torch/headeronly/" in line, (
                    f"{path}: {line}"
                )
            if path.parent.name == "geometry":
                assert "kernels" not in line and "ops" not in line and "cuda" not in line
            if path.parent.name == "kernels":
                assert "ops/" not in line


def test_sdist_holds_all_that_a_build_needs(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path),
         "sdist", "--dist-dir", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )  # fmt: skip
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.split("/", 1)[1] for name in files.getnames() if "/" in name}
    suffixes = {".h", ".cpp", ".cu", ".inl"}
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in suffixes
    }
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "linfuse_ext").glob("*.py")}
    assert sources | package | {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names
