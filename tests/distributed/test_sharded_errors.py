"""What is said where DTensors are not taken, and that every op has its rule."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

if not dist.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import linfuse_ext as lf
import linfuse_ext.distributed
from linfuse_ext import functional
from linfuse_ext.distributed.rules import MAKES_A_WEIGHT, RULES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def meshes() -> Iterator[tuple[Any, Any]]:
    """Two meshes of ranks that are not there; nothing is sent."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    dist.destroy_process_group()


def sharded(mesh: Any, *size: int) -> Any:
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    whole = torch.empty(size)
    return DTensor.from_local(
        whole[: size[0] // mesh.size(mesh.ndim - 1)],
        mesh,
        placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def test_every_op_has_a_rule() -> None:
    schemas = (ROOT / "csrc" / "ops" / "library.cpp").read_text()
    ops = set(re.findall(r'm\.def\(\s*"(\w+)\(', schemas))
    # There to compare engines by, without a fake kernel.
    assert ops - set(RULES) == {"fuse_conv_linear_by_torch", "fuse_linear_conv_by_torch"}
    assert set(RULES) <= ops
    told = linfuse_ext.distributed.__doc__ or ""
    for name in ("conv_to_affine", "fuse_conv_linear", "fuse_linear_conv", "fuse_conv_conv"):
        assert f"| {name} |" in told


def test_sizes_of_weights_are_where_the_rules_say() -> None:
    for name, rule in RULES.items():
        schema = getattr(torch.ops.linfuse, name).default._schema
        sizes = [n for n, each in enumerate(schema.arguments) if each.name == "weight_size"]
        assert sizes == ([MAKES_A_WEIGHT[name]] if name in MAKES_A_WEIGHT else [])
        tensors = [each.name for each in schema.arguments if "Tensor" in str(each.type)]
        assert list(inspect.signature(rule).parameters)[: len(tensors)] == tensors


@pytest.mark.parametrize("plain", range(4))
def test_a_plain_tensor_among_sharded_ones_is_named(plain: int, meshes: Any) -> None:
    names = ("conv_weight", "conv_bias", "linear_weight", "linear_bias")
    sizes = [(8, 3, 3), (8,), (12, 40), (12,)]
    operands = [sharded(meshes[0], *size) for size in sizes]
    operands[plain] = torch.empty(sizes[plain])
    first = names[1 if plain == 0 else 0]
    with pytest.raises(
        ValueError,
        match=f"^fuse_conv_linear: `{names[plain]}` must be a DTensor, as `{first}` is one, got a "
        "plain tensor; distribute_tensor",
    ):
        functional.fuse_conv_linear(*operands, 7)


@pytest.mark.parametrize("op", ["fuse_linear_conv", "fuse_linear_linear", "fuse_conv_conv"])
def test_every_function_names_it(op: str, meshes: Any) -> None:
    sizes = {
        "fuse_linear_conv": [(21, 4), (21,), (8, 3, 3), (8,)],
        "fuse_linear_linear": [(8, 4), (8,), (12, 8), (12,)],
        "fuse_conv_conv": [(8, 4, 3), (8,), (12, 8, 3), (12,)],
    }[op]
    operands: list[Any] = [sharded(meshes[0], *size) for size in sizes]
    operands[3] = torch.empty(sizes[3])
    rest = (7,) if op == "fuse_linear_conv" else ()
    with pytest.raises(ValueError, match=f"^{op}: `\\w+_bias` must be a DTensor"):
        getattr(functional, op)(*operands, *rest)


def test_two_meshes_are_refused(meshes: Any) -> None:
    weight, bias = sharded(meshes[0], 8, 3, 3), sharded(meshes[1], 8)
    with pytest.raises(
        ValueError, match=r"^conv_to_affine: `bias` must be on the mesh of `weight`"
    ):
        functional.conv_to_affine(weight, bias, 7)


@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_coo])
def test_sparse_matrices_are_made_of_plain_tensors(layout: torch.layout, meshes: Any) -> None:
    weight = sharded(meshes[0], 8, 3, 3)
    with pytest.raises(
        ValueError, match=r"`weight` must be a plain tensor, got a DTensor; weight\.full"
    ):
        functional.conv_to_affine(weight, None, 7, layout=layout)
    with pytest.raises(ValueError, match=r"^conv_to_diagonals: `weight` must be a plain tensor"):
        functional.conv_to_diagonals(weight, None, 7)


def test_wrong_sizes_are_named_as_ever(meshes: Any) -> None:
    conv, linear = sharded(meshes[0], 8, 3, 3), sharded(meshes[0], 12, 41)
    with pytest.raises(ValueError, match=r"`linear_weight` must have shape \(F, 40\)"):
        functional.fuse_conv_linear(conv, None, linear, None, 7)


def test_only_sharded_layers_are_sharded_again() -> None:
    with pytest.raises(ValueError, match=r"^fully_shard_again: `module` must have parameters that"):
        linfuse_ext.distributed.fully_shard_again(nn.Linear(3, 4))


WITHOUT = """
import sys
import torch
before = set(sys.modules)
import linfuse_ext as lf

print([name for name in set(sys.modules) - before if name.startswith("torch.distributed")])

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
mesh = init_device_mesh("cpu", (2,))
weight = DTensor.from_local(torch.randn(4, 3, 3), mesh, [Shard(0)], run_check=False)
conv = torch.nn.Conv1d(3, 8, 3, bias=False)
conv.weight = torch.nn.Parameter(weight)
for call in (
    lambda: lf.functional.conv_to_affine(weight, None, 7),
    lambda: lf.functional.fuse_linear_linear(weight[:, :, 0], None, torch.randn(2, 8), None),
    lambda: lf.conv_to_linear(conv, 7),
    lambda: lf.fuse_bn(conv, torch.nn.BatchNorm1d(8).eval()),
    lambda: lf.collapse(torch.nn.Sequential(conv).eval(), torch.randn(2, 3, 7)),
):
    try:
        call()
    except ValueError as error:
        print(error)
"""


def test_without_the_rules_it_says_what_to_type(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT],
        capture_output=True,
        encoding="utf-8",
        cwd=tmp_path,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(Path(lf.__file__).parents[1])},
    )
    assert finished.returncode == 0, finished.stderr
    imported, *lines = finished.stdout.splitlines()
    assert imported == "[]", "importing the package must not import torch.distributed"
    ops = ("conv_to_affine", "fuse_linear_linear", "conv_to_linear", "fuse_bn", "collapse")
    for line, op in zip(lines, ops, strict=True):
        assert line.startswith(f"{op}: `")
        assert line.endswith("got a DTensor; type: import linfuse_ext.distributed")


def test_a_sharded_convolution_is_not_written_by_every_rank(meshes: Any, tmp_path: Path) -> None:
    conv = nn.Conv1d(3, 8, 3, bias=False)
    conv.weight = nn.Parameter(sharded(meshes[0], 8, 3, 3))
    with pytest.raises(ValueError, match=r"^save_matrix: `conv.weight` must be a plain tensor"):
        lf.save_matrix(tmp_path / "matrix.safetensors", conv, 7)
    assert not list(tmp_path.iterdir())


def test_plain_tensors_are_not_asked_for_a_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(value: Tensor) -> bool:
        raise AssertionError("a plain call has nothing to do with meshes")

    monkeypatch.setattr(lf.meshes, "is_sharded", refuse)
    functional.conv_to_affine(torch.randn(2, 2, 3), None, 7)
    functional.fuse_conv_linear(torch.randn(2, 2, 3), None, torch.randn(3, 10), None, 7)
