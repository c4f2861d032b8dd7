"""On every rank: layers under FSDP2 and under tensor parallelism, merged where they are."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from sharding import COLUMNS, ROWS, WHOLE, collectives
from tolerance import assert_close
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import linfuse_ext as lf
from linfuse_ext.distributed import fully_shard_again

Layers = Sequence[nn.Module]


def _each_layer(mesh: Any, layers: Layers) -> None:
    for layer in layers:
        fully_shard(layer, mesh=mesh)


def _as_one_network(mesh: Any, layers: Layers) -> None:
    fully_shard(nn.Sequential(*layers), mesh=mesh)


def _parallel(style: Any) -> Callable[[Any, Layers], None]:
    def parallelize(mesh: Any, layers: Layers) -> None:
        for layer in layers:
            if isinstance(layer, nn.Linear):
                parallelize_module(layer, mesh, style())

    return parallelize


def _norm(kind: type[nn.Module], features: int) -> nn.Module:
    norm: Any = kind(features).double().eval()
    for tensor in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
        tensor.uniform_(0.5, 2)
    return norm


def _merges() -> dict[str, tuple[Callable[..., Any], list[nn.Module]]]:
    conv = nn.Conv2d(3, 8, 3, padding=1)
    size = (4, 5)
    return {
        "conv_to_linear": (lambda c: lf.conv_to_linear(c, size), [conv]),
        "groups": (lambda c: lf.conv_to_linear(c, size), [nn.Conv2d(4, 8, 3, groups=2)]),
        "uneven": (lambda c: lf.conv_to_linear(c, size), [nn.Conv2d(3, 5, 3, bias=False)]),
        "transposed": (lambda c: lf.conv_to_linear(c, size), [nn.ConvTranspose2d(3, 8, 3)]),
        "fuse_conv_linear": (
            lambda c, x: lf.fuse_conv_linear(c, x, size),
            [conv, nn.Linear(160, 7)],
        ),
        "few_rows": (
            lambda c, x: lf.fuse_conv_linear(c, x, size),
            [conv, nn.Linear(160, 3, bias=False)],
        ),
        "fuse_linear_conv": (
            lambda x, c: lf.fuse_linear_conv(x, c, size),
            [nn.Linear(7, 60), conv],
        ),
        "fuse_linear_linear": (lf.fuse_linear_linear, [nn.Linear(9, 7), nn.Linear(7, 5)]),
        "fuse_conv_conv": (lf.fuse_conv_conv, [conv, nn.Conv2d(8, 6, 1)]),
        "fuse_bn": (lf.fuse_bn, [nn.Conv2d(4, 8, 3, groups=2), _norm(nn.BatchNorm2d, 8)]),
        "fuse_bn of a Linear": (lf.fuse_bn, [nn.Linear(9, 7), _norm(nn.BatchNorm1d, 7)]),
        "fuse_bn_into": (lf.fuse_bn_into, [_norm(nn.BatchNorm2d, 8), nn.Conv2d(8, 5, 3)]),
        "fuse_bn_into a Linear": (
            lf.fuse_bn_into,
            [_norm(nn.BatchNorm1d, 9), nn.Linear(9, 7)],
        ),
    }


def _largest(layers: Layers) -> Any:
    """The layer whose weight is sharded and has the most elements."""
    sharded = [layer for layer in layers if isinstance(layer.weight, DTensor)]
    return max(sharded, key=lambda layer: layer.weight.numel(), default=None)


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _check(mesh: Any, how: Callable[[Any, Layers], None], again: Any = None) -> None:
    for name, (merge, plain) in _merges().items():
        plain = [layer.double() for layer in plain]
        layers = copy.deepcopy(plain)
        how(mesh, layers)
        before = [tensor for layer in layers for tensor in layer.parameters()]
        merged, want = merge(*layers), merge(*plain)
        assert [id(t) for layer in layers for t in layer.parameters()] == list(map(id, before))
        assert type(merged) is type(want), name
        like = _largest(layers)
        for key, value in want.named_parameters():
            parameter = merged.get_parameter(key)
            assert parameter.is_leaf and parameter.requires_grad == value.requires_grad
            assert isinstance(parameter, DTensor) == (like is not None), name
            if like is not None:
                wanted = like.weight.placements
                if key == "bias":
                    wanted = tuple(ROWS if p == ROWS else WHOLE for p in wanted)
                assert parameter.placements == wanted, (name, key)
            assert_close(_full(parameter).detach(), value.detach(), value.detach().abs() + 9, 999)
        if again is not None:
            x = torch.randn(2, *_input(want), dtype=torch.float64)
            torch.testing.assert_close(again(mesh, merged)(x), want(x))


def _input(layer: Any) -> tuple[int, ...]:
    if isinstance(layer, nn.Linear):
        return (layer.in_features,)
    return (layer.in_channels, 6, 7)


def layers_that_are_fully_sharded_each(mesh: Any) -> None:
    _check(mesh, _each_layer, lambda mesh, merged: fully_shard_again(merged))


def layers_of_a_fully_sharded_network(mesh: Any) -> None:
    _check(mesh, _as_one_network)


def linears_that_are_sharded_by_rows(mesh: Any) -> None:
    def again(mesh: Any, merged: Any) -> Any:
        from torch.distributed.tensor import Replicate

        if not isinstance(merged.weight, DTensor):
            return merged
        return parallelize_module(merged, mesh, ColwiseParallel(output_layouts=Replicate()))

    _check(mesh, _parallel(ColwiseParallel), again)


def linears_that_are_sharded_by_columns(mesh: Any) -> None:
    def again(mesh: Any, merged: Any) -> Any:
        from torch.distributed.tensor import Replicate

        if not isinstance(merged.weight, DTensor):
            return merged
        return parallelize_module(merged, mesh, RowwiseParallel(input_layouts=Replicate()))

    _check(mesh, _parallel(RowwiseParallel), again)


def a_linear_sharded_by_rows_needs_nothing_moved(mesh: Any) -> None:
    conv, linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(160, 7)
    _parallel(ColwiseParallel)(mesh, [linear])
    with collectives(0):
        lf.fuse_conv_linear(conv, linear, (4, 5))
    before = nn.Linear(7, 60)
    _parallel(RowwiseParallel)(mesh, [before])
    with collectives(0):
        assert lf.fuse_linear_conv(before, conv, (4, 5)).weight.placements == (COLUMNS,)
    alone = nn.Conv2d(3, 8, 3)
    fully_shard(alone, mesh=mesh)
    with collectives(0):
        assert lf.conv_to_linear(alone, (4, 5)).weight.placements == (ROWS,)


def whole_parameters_that_a_forward_leaves_are_not_merged(mesh: Any) -> None:
    conv, linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(160, 7)
    want = lf.fuse_conv_linear(conv, linear, (4, 5))
    _each_layer(mesh, [conv, linear])
    linear(conv(torch.randn(2, 3, 4, 5)).flatten(1))
    assert not isinstance(linear.weight, DTensor), "else there is nothing to check"
    merged = lf.fuse_conv_linear(conv, linear, (4, 5))
    assert isinstance(merged.weight, DTensor) and merged.weight.placements == (ROWS,)
    torch.testing.assert_close(_full(merged.weight), want.weight)


def layers_under_fsdp_and_tensor_parallelism_both(mesh: Any) -> None:
    if mesh.size() < 4:
        return
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for style, axis in (
        (ColwiseParallel(output_layouts=WHOLE), 0),
        (RowwiseParallel(input_layouts=WHOLE), 1),
    ):
        conv, linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(160, 8)
        linear.bias.requires_grad_(False)
        want = lf.fuse_conv_linear(conv, linear, (4, 5))
        want.bias.requires_grad_(False)
        parallelize_module(linear, grid["tensor"], style)
        for layer in (conv, linear):
            fully_shard(layer, mesh=grid["data"])
        assert linear.weight.device_mesh.ndim == 2 and conv.weight.device_mesh.ndim == 1
        merged = lf.fuse_conv_linear(conv, linear, (4, 5))
        assert merged.weight.placements == linear.weight.placements
        assert merged.weight.placements[1].is_shard(axis)
        assert merged.weight.to_local().shape == ((2, 60), (4, 30))[axis]
        torch.testing.assert_close(_full(merged.weight), want.weight)
        torch.testing.assert_close(_full(merged.bias), want.bias)
        merged.bias.requires_grad_(False)
        placements = [parameter.placements for parameter in merged.parameters()]
        before = [id(parameter) for parameter in merged.parameters()]
        other = ColwiseParallel() if axis else RowwiseParallel()
        for plan, reason in ((None, "give the `plan` of tensor"), (other, "different placements")):
            with _raises(reason):
                fully_shard_again(merged, plan)
            assert [id(parameter) for parameter in merged.parameters()] == before
        try:
            fully_shard_again(merged, style, no_such_option=1)
        except TypeError as error:
            assert "no_such_option" in str(error)
        again = fully_shard_again(merged, style)
        x = torch.randn(3, 60)
        for layer in (want, again):
            optimizer = torch.optim.SGD([layer.weight], lr=0.1)
            _full(layer(x)).square().mean().backward()
            optimizer.step()
        assert [parameter.placements for parameter in again.parameters()] == placements
        assert [parameter.requires_grad for parameter in again.parameters()] == [True, False]
        torch.testing.assert_close(_full(again.weight), want.weight)


def plans_that_do_not_fit_are_refused(mesh: Any) -> None:
    if mesh.size() < 4:
        return
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    first, last = nn.Linear(6, 8), nn.Linear(8, 4)
    parallelize_module(first, grid["tensor"], ColwiseParallel(output_layouts=WHOLE))
    for layer in (first, last):
        fully_shard(layer, mesh=grid["data"])
    network = nn.Sequential(lf.fuse_linear_linear(nn.Linear(5, 6), first), nn.ReLU())
    network.append(lf.fuse_linear_linear(last, nn.Linear(4, 4)))
    hooks = [(len(part._forward_hooks), type(part)) for part in network.modules()]
    right = {"0": ColwiseParallel(output_layouts=WHOLE)}
    for plan, reason in (
        ({}, "`plan` must have 0.weight sharded as it is"),
        ({**right, "2": RowwiseParallel()}, "`plan` must have 2.weight sharded as it is, not at"),
        (None, "or give the `plan` of tensor parallelism"),
    ):
        with _raises(reason):
            fully_shard_again(network, plan)
        assert [(len(part._forward_hooks), type(part)) for part in network.modules()] == hooks
    fully_shard_again(network[2])  # which then stays as it is
    x, want = torch.randn(3, 5), nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))
    want.load_state_dict({name: _full(each) for name, each in network.state_dict().items()})
    torch.testing.assert_close(_full(fully_shard_again(network, right)(x)), want(x))
    with _raises("got none in FSDPSequential; fully_shard itself does the rest"):
        fully_shard_again(network)
    # Rows that are cut by one axis after the other are in another order than fully_shard's.
    linear = nn.Linear(6, 8, bias=False)
    rows = distribute_tensor(linear.weight.detach(), grid, [ROWS, ROWS])
    linear.weight = nn.Parameter(rows)
    with _raises("must be sharded as fully_shard does it"):
        fully_shard_again(linear, ColwiseParallel())


def layers_on_different_meshes(mesh: Any) -> None:
    if mesh.size() < 4:
        return
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for style in (ColwiseParallel(), RowwiseParallel()):
        conv, linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(160, 8)
        want = lf.fuse_conv_linear(conv, linear, (4, 5))
        fully_shard(conv, mesh=grid["data"])
        parallelize_module(linear, grid["tensor"], style)
        merged = lf.fuse_conv_linear(conv, linear, (4, 5))
        assert merged.weight.device_mesh == merged.bias.device_mesh == grid["tensor"]
        assert merged.weight.placements == linear.weight.placements
        torch.testing.assert_close(_full(merged.weight), want.weight)
        # The larger of two Linears stays where it is.
        first, second = nn.Linear(9, 7), nn.Linear(7, 5)
        want = lf.fuse_linear_linear(first, second)
        fully_shard(second, mesh=grid["data"])
        parallelize_module(first, grid["tensor"], style)
        merged = lf.fuse_linear_linear(first, second)
        assert merged.weight.device_mesh == merged.bias.device_mesh == grid["tensor"]
        torch.testing.assert_close(_full(merged.weight), want.weight)


def what_is_not_sharded_by_fsdp_is_not_given_to_it(mesh: Any) -> None:
    linear = parallelize_module(nn.Linear(160, 8), mesh, RowwiseParallel())
    with _raises("must be sharded as fully_shard does it, by rows, got weight with"):
        fully_shard_again(linear)
    with _raises("`plan` must be None for parameters on a mesh that has not two named axes"):
        fully_shard_again(linear, RowwiseParallel())


@contextmanager
def _raises(reason: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        assert reason in str(error), error
    else:
        raise AssertionError(f"there should be an error: {reason}")


def hooks_of_others_are_still_refused(mesh: Any) -> None:
    conv, linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(160, 7)
    conv.register_forward_hook(lambda *arguments: None)
    _each_layer(mesh, [conv, linear])
    with _raises("`conv` must have no forward hooks"):
        lf.fuse_conv_linear(conv, linear, (4, 5))
    # distribute_module hides a function of the caller's in one of its own.
    doubled = nn.Linear(160, 7)
    distribute_module(doubled, mesh, input_fn=lambda module, inputs, mesh: (inputs[0] * 2,))
    with _raises("`linear` must have no forward hooks"):
        lf.fuse_conv_linear(nn.Conv2d(3, 8, 3, padding=1), doubled, (4, 5))


def merged_layers_are_saved_and_loaded(mesh: Any) -> None:
    conv, linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(160, 7)
    want = lf.fuse_conv_linear(conv, linear, (4, 5))
    _each_layer(mesh, [conv, linear])
    merged = lf.fuse_conv_linear(conv, linear, (4, 5))
    folder = [tempfile.mkdtemp() if mesh.get_local_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    path = Path(folder[0])
    checkpoint.save({"layer": merged.state_dict()}, checkpoint_id=path)
    # Into a layer that is sharded in another way, and into one that is not sharded.
    other = parallelize_module(nn.Linear(60, 7), mesh, RowwiseParallel())
    for layer in (other, nn.Linear(60, 7), fully_shard_again(copy.deepcopy(merged))):
        state = layer.state_dict()
        for tensor in state.values():
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).zero_()
        checkpoint.load({"layer": state}, checkpoint_id=path)
        layer.load_state_dict(state)
        assert torch.equal(_full(layer.weight), want.weight)
        assert torch.equal(_full(layer.bias), want.bias)
    dist.barrier()


def a_merged_layer_is_trained_again(mesh: Any) -> None:
    conv, linear = nn.Conv2d(3, 8, 3, padding=1).double(), nn.Linear(160, 7).double()
    want = lf.fuse_conv_linear(conv, linear, (4, 5))
    _each_layer(mesh, [conv, linear])
    merged = fully_shard_again(lf.fuse_conv_linear(conv, linear, (4, 5)))
    x = torch.randn(3, 60, dtype=torch.float64)
    for layer in (want, merged):
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
        layer(x).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(_full(merged.weight), want.weight)
    torch.testing.assert_close(_full(merged.bias), want.bias)
