"""What a card holds, computes and receives when a convolution is merged into a sharded Linear.

    python examples/sharded_sizes.py

The numbers are worked out twice: on paper, by formulas of the sizes, and by running the merge on
shapes alone, as one card of as many as are asked for. A process group that sends nothing stands for
the others; every call that reaches this card's shards is seen, and so is every collective.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch
from weakref import ref

import torch
import torch.distributed as dist
from torch._subclasses import FakeTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import linfuse_ext.distributed
from linfuse_ext import functional
from linfuse_ext.geometry import make_geometry
from linfuse_ext.meshes import placed_like

CARDS = (1, 8, 64, 512)
BYTES = 4  # float32


@dataclass(frozen=True)
class Pair:
    """A convolution and the Linear behind it."""

    name: str
    channels: tuple[int, int]  # in, out
    kernel: int
    size: int
    stride: int
    padding: int
    features: int

    def geometry(self) -> Any:
        """What the merge reads of it."""
        weight = (self.channels[1], self.channels[0], self.kernel, self.kernel)
        size = (self.size, self.size)
        return make_geometry(self.name, weight, size, self.stride, self.padding)


VGG = Pair("VGG-16's tail", (512, 512), 3, 7, 1, 1, 4096)
STEM = Pair("ImageNet stem, 100 000 classes", (3, 64), 7, 224, 2, 3, 100_000)

LAYOUTS = {
    "FSDP2": "all parameters `Shard(0)`",
    "rows": "tensor parallelism by rows (ColwiseParallel), the convolution on every card",
    "columns": "tensor parallelism by columns (RowwiseParallel), the convolution on every card",
}


@dataclass(frozen=True)
class Numbers:
    """Of the card that has most.

    Attributes:
        linear: Bytes of its part of the Linear, weight and bias.
        merged: Bytes of its part of the merged layer.
        peak: Bytes of all that it holds at most: its parts of both layers, what it is sent of
            those of others, and what the merge puts out.
        flops: Floating-point operations of the merge.
        received: Bytes that it receives from others.
    """

    linear: int
    merged: int
    peak: int
    flops: int
    received: int


def on_paper(pair: Pair, layout: str, cards: int) -> Numbers:
    """By formulas."""
    geometry = pair.geometry()
    rows, cols, features = geometry.rows, geometry.cols, pair.features
    kernel = pair.channels[0] * pair.channels[1] * pair.kernel**2 + pair.channels[1]
    work = 2 * math.prod(geometry.output_size) * (kernel - pair.channels[1])
    share, others = -(-features // cards), cards - 1
    linear, merged = share * rows + share, share * cols + share
    if layout != "columns":
        own = -(-pair.channels[1] // cards) * (kernel // pair.channels[1])
        apart = layout == "FSDP2" and cards > 1  # each card has a part; what it gathers is padded
        received = others * own if apart else 0
        held = linear + merged + (own + cards * own if apart else kernel)
        flops = work * share
    elif pair.channels[1] % cards == 0:
        linear = features * (rows // cards) + features
        held = linear + kernel + features * cols + features
        merged = features * (cols // cards) + features
        # The sums are scattered: of each card's own part, from every other card. First they are
        # copied, part behind part.
        held += features * cols + merged - features if cards > 1 else 0
        received = others * features * (cols // cards) + 2 * features * others // cards
        flops = work // cards * features
    else:  # cut within a channel: the Linear is moved to rows, and the merged one back
        by_rows, merged_by_rows = linear, merged
        linear = features * -(-rows // cards) + features
        sent = share * cards * -(-rows // cards)
        held = linear + kernel + max(sent + share * rows, by_rows + merged_by_rows)
        merged = features * -(-cols // cards) + features
        received = others * share * (-(-rows // cards) + -(-cols // cards) + 1)
        flops = work * share
    return Numbers(BYTES * linear, BYTES * merged, BYTES * held, flops, BYTES * received)


NOT_SENT = ("wait_tensor", "_wrap_tensor_autograd")


class Watch(TorchDispatchMode):
    """Sees what is done to this card's shards, what it holds for it, and what it receives."""

    def __init__(self, pair: Pair, parts: list[torch.Tensor]) -> None:
        """For one merge, of layers of which the card has these parts."""
        super().__init__()
        self.flops = self.received = self.peak = 0
        self._geometry = pair.geometry()
        self._parts = parts
        self._seen = [ref(part) for part in parts]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Passes every call on."""
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # what it does to its shards comes by again
        namespace, _, name = func._schema.name.partition("::")
        if name in NOT_SENT:
            return args[0]  # what has come; without values a copy would be made of it
        result = func(*args, **(kwargs or {}))
        if name == "shard_dim_alltoall":
            result = result.new_empty(result.shape)  # without values, it is a part of the whole
        leaves = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor)]
        if any(isinstance(leaf, FakeTensor) for leaf in leaves):
            return result  # torch asks for the shape of the whole result
        self._seen += [ref(leaf) for leaf in leaves]
        self.peak = max(self.peak, self._held())
        if func._schema.name == "linfuse::fuse_conv_linear":
            conv, linear = args[0], args[2]
            positions = math.prod(self._geometry.output_size)
            self.flops += 2 * linear.shape[0] * conv.numel() * positions
        elif namespace in ("_c10d_functional", "_dtensor"):
            self.received += _received(name, args, dist.get_world_size())
        return result

    def _held(self) -> int:
        """Bytes of what all tensors that are still there are in, each counted once."""
        tensors = [tensor for tensor in (each() for each in self._seen) if tensor is not None]
        self._seen = [ref(tensor) for tensor in tensors]
        storages = {storage._cdata: storage for storage in (t.untyped_storage() for t in tensors)}
        return sum(storage.nbytes() for storage in storages.values())


def _bytes(values: Any) -> int:
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _received(collective: str, args: Any, cards: int) -> int:
    """Bytes that come to a card in a ring."""
    size = args[0].numel() * args[0].element_size()
    if collective == "all_gather_into_tensor":
        return int(size * (cards - 1))
    if collective == "reduce_scatter_tensor":
        return int(size // cards * (cards - 1))
    if collective == "all_reduce":
        return int(2 * size * (cards - 1) // cards)
    if collective == "shard_dim_alltoall":
        return int(size // cards * (cards - 1))
    raise ValueError(f"a collective that the merge has no use for: {collective}")


def _all_to_all(part: Any, gathered: int, split: int, mesh: Any, axis: int) -> Any:
    group = mesh.get_group(axis).group_name
    return torch.ops._dtensor.shard_dim_alltoall(part, gathered, split, group)


@contextmanager
def _one_of(cards: int) -> Iterator[Any]:
    """A mesh of cards that are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=cards, store=FakeStore())
    try:
        # For meshes of CPUs torch gathers where cards send each other what they need.
        with patch("torch.distributed.tensor.placement_types.shard_dim_alltoall", _all_to_all):
            yield init_device_mesh("cpu", (cards,))
    finally:
        dist.destroy_process_group()


def simulated(pair: Pair, layout: str, cards: int) -> Numbers:
    """By running the merge on the first card's shapes; the first one has most."""
    geometry = pair.geometry()
    conv_size = (pair.channels[1], pair.channels[0], pair.kernel, pair.kernel)
    sizes = [conv_size, conv_size[:1], (pair.features, geometry.rows), (pair.features,)]
    whole, first, second = Replicate(), Shard(0), Shard(1)
    placements = {
        "FSDP2": (first, first, first, first),
        "rows": (whole, whole, first, first),
        "columns": (whole, whole, second, whole),
    }[layout]
    with _one_of(cards) as mesh:
        operands = [
            _part_of(mesh, size, placement)
            for size, placement in zip(sizes, placements, strict=True)
        ]
        with Watch(pair, [each.to_local() for each in operands]) as watch:
            merged = functional.fuse_conv_linear(
                *operands, (pair.size, pair.size), pair.stride, pair.padding
            )
            placed = [
                placed_like(value, operand)
                for value, operand in zip(merged, operands[2:], strict=True)
            ]
        local = [_bytes([each.to_local() for each in pair]) for pair in (operands[2:], placed)]
    return Numbers(*local, watch.peak, watch.flops, watch.received)


def _part_of(mesh: Any, size: tuple[int, ...], placement: Any) -> Any:
    part = list(size)
    if placement.is_shard():
        part[placement.dim] = -(-part[placement.dim] // mesh.size())
    stride = tuple(math.prod(size[axis + 1 :]) for axis in range(len(size)))
    return DTensor.from_local(
        torch.empty(part, device="meta"), mesh, [placement], run_check=False,
        shape=torch.Size(size), stride=stride,
    )  # fmt: skip


def spelled(number: int, unit: str) -> str:
    """Three digits and a prefix."""
    value, prefix = float(number), 0
    while value >= 999.5:
        value, prefix = value / 1000, prefix + 1
    return f"{value:.3g} {' kMGTP'[prefix].strip()}{unit}"


def table() -> str:
    """As it stands in the README."""
    lines = [
        "| | cards | Linear a card | merged a card | held at most | operations | received |",
        "|---|---|---|---|---|---|---|",
    ]
    for pair in (VGG, STEM):
        for layout in LAYOUTS:
            for cards in CARDS:
                numbers = on_paper(pair, layout, cards)
                sizes = [spelled(n, "B") for n in (numbers.linear, numbers.merged, numbers.peak)]
                cells = [f"{pair.name}, {layout}", str(cards), *sizes]
                cells += [spelled(numbers.flops, "FLOP"), spelled(numbers.received, "B")]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    assert linfuse_ext.distributed
    print(table())
    for pair in (VGG, STEM):
        for layout in LAYOUTS:
            for cards in CARDS:
                assert simulated(pair, layout, cards) == on_paper(pair, layout, cards)
    print(
        "\nThe merge, run on these shapes as one card of as many, holds, computes and receives it."
    )
