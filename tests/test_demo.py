"""The demo, run as a newcomer runs it, with little training and hardly any timing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import linfuse_ext

for package in ("matplotlib", "rich", "sklearn"):
    pytest.importorskip(package)

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs Python on the package that is being tested, wherever it was imported from."""
    paths = [str(Path(linfuse_ext.__file__).parents[1]), str(EXAMPLES)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, *command],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A run of the demo: what it printed, and the folder it wrote to."""
    folder = tmp_path_factory.mktemp("demo") / "images"  # the demo makes the folder
    finished = run(str(EXAMPLES / "digits.py"), "--quick", "--images", str(folder))
    assert finished.returncode == 0, finished.stderr
    return finished.stdout, folder


@pytest.fixture(scope="module")
def numbers(demo):
    return json.loads((demo[1] / "numbers.json").read_text())


def test_prints_its_tables(demo):
    printed, _ = demo
    assert "What collapse did" in printed
    assert "│ pool1  │ fused" in printed
    assert "The network, before and after" in printed
    assert "Making one Linear of the forum's two layers" in printed
    assert "450 of 450" in printed


@pytest.mark.parametrize("name", ["matrix.png", "times.png"])
def test_pictures_show_something(demo, name):
    from matplotlib.image import imread

    pixels = torch.from_numpy(imread(demo[1] / name))[..., :3]  # [H, W, RGB] in [0, 1]
    height, width, _ = pixels.shape
    assert 1500 <= width <= 1700
    assert height >= 700
    sample = pixels[::5, ::5].reshape(-1, 3)
    white = (sample == 1).all(dim=1).float().mean()
    assert 0.2 < white < 0.95  # neither blank nor one stain
    assert len(sample.unique(dim=0)) > 20  # colours, and letters with smooth edges


def test_collapsing_keeps_every_prediction(numbers):
    for agreement in numbers["agreement"].values():
        assert agreement["same_predictions"] == agreement["digits"] == 450
    networks = numbers["networks"]
    assert networks["before"]["right"] == networks["after"]["right"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_logits_differ_by_rounding_only(numbers, dtype):
    agreement = numbers["agreement"][str(dtype).removeprefix("torch.")]
    # A logit is sums of 25, 9, 125, 9, 1250 and 100 terms, one in the other; each addition rounds.
    terms = 25 + 9 + 125 + 9 + 1250 + 100
    tolerance = terms * torch.finfo(dtype).eps * agreement["largest_logit"]
    assert 0 < agreement["largest_logit"] < 1000
    assert agreement["difference"] <= tolerance


def test_network_learns_to_read(numbers):
    assert numbers["networks"]["before"]["right"] >= 0.9 * 450


def test_all_between_the_squares_becomes_one_linear(numbers):
    networks = numbers["networks"]
    first, last = "Conv(1, 5) → x² → ", " → x² → Linear(100, 10)"
    middle = "pool → Conv(5, 50) → pool → Linear(1250, 100)"
    assert networks["before"]["layers"] == first + middle + last
    assert networks["after"]["layers"] == first + "Linear(845, 100)" + last
    assert (networks["before"]["depth"], networks["after"]["depth"]) == (8, 5)


def test_collapsed_network_costs_less(numbers):
    before, after = numbers["networks"]["before"], numbers["networks"]["after"]
    outer = 25 * 5 * 13**2 + 5 * 13**2 + 100 + 100 * 10  # first layer, two squares, last layer
    # The pools are sums: they multiply nothing.
    assert before["multiplications"] == outer + 5 * 50 * 25 * 5**2 + 1250 * 100
    assert after["multiplications"] == outer + 845 * 100
    assert (before["levels"], after["levels"]) == (6, 5)
    saved = (5 * 25 + 1) * 50 + (1250 + 1) * 100 - (845 + 1) * 100
    assert before["parameters"] - after["parameters"] == saved


def test_report_follows_from_the_sizes(numbers):
    collapse = numbers["collapse"]
    (row,) = collapse["rows"]
    assert (row["verdict"], row["layers"]) == ("fused", ["pool1", "conv2", "pool2", "hidden"])
    pools = 9 * 845 + 9 * 1250  # 3 x 3 at each position
    conv, hidden = (2 * 125 + 1) * 1250, (2 * 1250 + 1) * 100  # a product and a sum, and a bias
    assert row["flops_before"] == pools + conv + hidden
    assert row["flops_after"] == (2 * 845 + 1) * 100
    assert row["params_before"] == (5 * 25 + 1) * 50 + (1250 + 1) * 100
    assert row["params_after"] == (845 + 1) * 100
    assert collapse["totals"] == {
        "fused": 1,
        "declined": 0,
        "refused": 0,
        "flops_saved": row["flops_before"] - row["flops_after"],
        "params_saved": row["params_before"] - row["params_after"],
    }
    assert 0 < row["error"] <= 845 * torch.finfo(torch.float32).eps  # a sum of 845 products


def test_every_way_to_fuse_gives_the_same_layer(numbers):
    assert len(numbers["ways"]) == 4
    # Nine output positions at most read one pixel, in each of 50 channels: 450 products of weights
    # that are smaller than 1.
    tolerance = 9 * 50 * torch.finfo(torch.float32).eps
    for name, facts in numbers["ways"].items():
        assert facts["error"] <= tolerance, name


def test_missing_package_is_named_in_one_sentence():
    hide = "import runpy, sys; sys.modules['sklearn'] = None; "
    finished = run("-c", hide + f"runpy.run_path({str(EXAMPLES / 'digits.py')!r})")
    assert finished.returncode == 1
    assert finished.stderr == "The demo needs sklearn; type: pip install scikit-learn\n"
