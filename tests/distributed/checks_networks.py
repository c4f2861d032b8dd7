"""On every rank: whole networks under FSDP2 and tensor parallelism, collapsed."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import linfuse_ext as lf
from linfuse_ext.distributed import fully_shard_again


class Network(nn.Module):
    """Two merges, a layer that stays, one that is used twice, and a weight that is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 16, 3, padding=1)
        self.pool = nn.AvgPool2d(2)
        self.hidden = nn.Linear(256, 10)
        self.head = nn.Linear(10, 10)
        self.tied = nn.Linear(10, 10)
        self.tied.weight = self.head.weight
        self.norm.running_mean.uniform_()
        self.norm.running_var.uniform_(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(self.wide(torch.relu(self.norm(self.conv(x)))))
        y = torch.relu(self.hidden(y.flatten(1)))
        return self.tied(torch.relu(self.head(torch.relu(self.head(y)))))


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _check(model: nn.Module, network: nn.Module, x: Tensor) -> Any:
    """Collapses a sharded network; what comes of it is what comes of the plain one."""
    want = lf.collapse(network, x)
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    before = {name: id(tensor) for name, tensor in model.named_parameters()}
    got = lf.collapse(model, x)
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == before
    assert str(got.report) == str(want.report)
    assert any(row.verdict == "fused" for row in got.report)
    whole = dict(want.model.named_parameters())
    mine = dict(got.model.named_parameters())
    assert list(mine) == list(whole)
    for name, parameter in mine.items():
        assert torch.equal(_full(parameter), whole[name]), name
        assert parameter.requires_grad == whole[name].requires_grad
    return got


def a_fully_sharded_network(mesh: Any) -> None:
    network, x = Network().eval(), torch.randn(2, 3, 16, 16)
    model = copy.deepcopy(network)
    for part in (model.hidden, model):
        fully_shard(part, mesh=mesh)
    got = _check(model, network, x)
    assert all(isinstance(each, DTensor) for each in got.model.parameters())
    folder = [tempfile.mkdtemp() if mesh.get_local_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    checkpoint.save({"model": got.model.state_dict()}, checkpoint_id=Path(folder[0]))
    y = network(x)
    torch.testing.assert_close(fully_shard_again(got.model)(x), y)
    torch.testing.assert_close(model(x), y)  # leaves gathered parameters behind
    again = lf.collapse(model, x)
    assert all(isinstance(each, DTensor) for each in again.model.parameters())
    loaded = lf.collapse(network, x).model
    state = loaded.state_dict()
    for tensor in state.values():
        tensor.zero_()
    checkpoint.load({"model": state}, checkpoint_id=Path(folder[0]))
    torch.testing.assert_close(loaded(x), y)
    dist.barrier()


def a_network_under_tensor_parallelism(mesh: Any) -> None:
    network, x = Network().eval(), torch.randn(2, 3, 16, 16)
    network.tied.weight = nn.Parameter(torch.randn(10, 10))
    model = copy.deepcopy(network)
    parallelize_module(model, mesh, {"hidden": ColwiseParallel(), "tied": RowwiseParallel()})
    got = _check(model, network, x)
    layers = dict(got.model.named_children())
    (merged,) = (name for name in layers if "hidden" in name)
    assert layers[merged].weight.placements[0].is_shard(0)
    assert layers["tied"].weight.placements[0].is_shard(1)
    assert not isinstance(layers["head"].weight, DTensor)


def a_collapsed_network_runs_under_its_plan_again(mesh: Any) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(128, 12),
        nn.ReLU(), nn.Linear(12, 7),
    ).eval()  # fmt: skip
    x = torch.randn(3, 3, 8, 8)
    model = copy.deepcopy(network)
    parallelize_module(model, mesh, {"3": ColwiseParallel(), "5": RowwiseParallel()})
    torch.testing.assert_close(model(x), network(x))
    got = _check(model, network, x).model
    first, last = (name for name, part in got.named_children() if isinstance(part, nn.Linear))
    parallelize_module(got, mesh, {first: ColwiseParallel(), last: RowwiseParallel()})
    torch.testing.assert_close(got(x), network(x))


class Entangled(nn.Module):
    """Layers in containers, in a slot and behind functions, besides being parts."""

    __slots__ = ("start",)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.hidden = nn.Linear(128, 12)
        self.last = nn.Linear(12, 8)
        self.start = OrderedDict(conv=self.conv)
        self.named = [{"norm": self.norm}]
        self.rest = (self.hidden, self.last)
        self.end = functools.partial(self._end, power=1)
        self.norm.register_forward_hook(self._hook)
        self.register_buffer("scale", torch.rand(8) + 1)

    def _hook(self, norm: nn.Module, inputs: object, y: Tensor) -> Tensor:
        return y * self.scale[:, None, None]

    def _end(self, y: Tensor, power: int) -> Tensor:
        return self.rest[1](torch.relu(self.rest[0](y))) * self.scale**power

    def forward(self, x: Tensor) -> Tensor:
        return self.end(torch.relu(self.named[0]["norm"](self.start["conv"](x))).flatten(1))


def layers_that_are_held_twice(mesh: Any) -> None:
    network, x = Entangled().eval(), torch.randn(2, 3, 4, 4)
    model = Entangled().eval()  # a copy would hold the layers of the first
    model.load_state_dict(network.state_dict())
    fully_shard(model, mesh=mesh)
    _check(model, network, x)


class Guest(nn.Module):
    """Reads a layer that is a part of another network."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.own = nn.Linear(6, 6)
        self.held = [layer]

    def forward(self, x: Tensor) -> Tensor:
        return self.held[0](self.own(x))


def layers_that_are_held_but_no_part(mesh: Any) -> None:
    network, x = Guest(nn.Linear(6, 6)).eval(), torch.randn(2, 6)
    model = copy.deepcopy(network)
    for layer in (model.own, model.held[0]):
        fully_shard(layer, mesh=mesh)
    _check(model, network, x)


class Counting(nn.Module):
    """Merges layers behind a buffer that it writes to, which is no constant."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        self.register_buffer("state", torch.rand(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(self.state)
        self.state.mul_(0.5)
        return y.sum() + self.layers(x)


def buffers_that_are_written(mesh: Any) -> None:
    network, x = Counting().eval(), torch.randn(2, 6)
    model = copy.deepcopy(network)
    distribute_module(model, mesh)
    _check(model, network, x)
    assert torch.equal(_full(model.state), network.state)


def buffers_that_are_sharded(mesh: Any) -> None:
    network, x = Entangled().eval(), torch.randn(2, 3, 4, 4)
    model = Entangled().eval()
    model.load_state_dict(network.state_dict())
    distribute_module(model, mesh)
    assert isinstance(model.norm.running_mean, DTensor)
    _check(model, network, x)
    # One that stays keeps its buffers as they are.
    stays = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1)).eval()
    plain = copy.deepcopy(stays)
    distribute_module(stays, mesh)
    state = lf.collapse(stays, x).model.state_dict()
    want = lf.collapse(plain, x).model.state_dict()
    assert list(state) == list(want)
    for name, tensor in state.items():
        assert isinstance(tensor, DTensor) and torch.equal(tensor.full_tensor(), want[name])


def networks_under_fsdp_and_tensor_parallelism_both(mesh: Any) -> None:
    if mesh.size() < 4:
        return
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1),
        nn.Flatten(), nn.Linear(80, 8), nn.ReLU(), nn.Linear(8, 6),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 4, 5)
    model = copy.deepcopy(network)
    parallelize_module(model, grid["tensor"], {"5": ColwiseParallel(), "7": RowwiseParallel()})
    fully_shard(model, mesh=grid["data"])
    got = _check(model, network, x).model
    placements = {name: each.placements for name, each in got.named_parameters()}
    assert placements["7.weight"] == model[7].weight.placements
    fully_shard_again(got, {"3_5": ColwiseParallel(), "7": RowwiseParallel()})
    assert {name: each.placements for name, each in got.named_parameters()} == placements
    torch.testing.assert_close(_full(got(x)), network(x))


def a_sharded_result_is_not_exported(mesh: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)).eval()
    fully_shard(model, mesh=mesh)
    got = lf.collapse(model, torch.randn(2, 6))
    try:
        got.export()
    except ValueError as error:
        assert "must be a plain tensor, got a DTensor" in str(error)
    else:
        raise AssertionError("torch.export takes no DTensor")
    # Nor a buffer that is one.
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(6, affine=False), nn.ReLU()).eval()
    distribute_module(model, mesh)
    try:
        lf.collapse(model, torch.randn(2, 6)).export()
    except ValueError as error:
        assert "`1.running_mean` must be a plain tensor, got a DTensor" in str(error)
    else:
        raise AssertionError("torch.export takes no DTensor")
