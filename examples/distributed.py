"""Merges a convolution into a Linear that is sharded over several processes, where it lies.

    torchrun --standalone --nproc-per-node 2 examples/distributed.py
    torchrun --standalone --nproc-per-node 2 examples/distributed.py --classes 100000

A stem with many classes is made twice, by FSDP2 and by tensor parallelism, without any process ever
holding all of it. Each process merges its own rows; what that moved between processes is counted,
the merged layer runs and is compared with the two, and torch.distributed.checkpoint saves it.
On CUDA cards NCCL takes the place of gloo. `python examples/sharded_sizes.py` has the numbers for
layers that no single card could hold.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as checkpoint
    from torch import Tensor, nn
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor.debug import CommDebugMode
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    import linfuse_ext as lf
    import linfuse_ext.distributed  # registers how the ops are sharded
except ModuleNotFoundError as missing:
    install = {"linfuse_ext": ".", "torch": "torch"}
    name = (missing.name or "").partition(".")[0]
    if name not in install:
        raise
    raise SystemExit(f"The example needs {name}; type: pip install {install[name]}") from None

SIZE = (32, 32)  # of the images


def main(arguments: Sequence[str] | None = None) -> None:
    """Shards, merges, compares, prints and saves."""
    options = parse(arguments)
    if "RANK" not in os.environ:
        raise SystemExit(f"Start it by torchrun: {(__doc__ or '').splitlines()[2].strip()}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    say(f"{mesh.size()} processes, {options.classes} classes")

    images = whole_images(mesh)
    for how in (by_fsdp, by_tensor_parallelism):
        say(f"\n{(how.__doc__ or '').splitlines()[0]}")
        how(mesh, images, options)
    dist.barrier()  # nobody hangs up while another process still has an answer to wait for
    dist.destroy_process_group()


def by_fsdp(mesh: DeviceMesh, images: Tensor, options: argparse.Namespace) -> None:
    """FSDP2: every parameter is sharded over its first axis."""
    conv, linear = layers(options.classes)
    for layer in (conv, linear):
        fully_shard(layer, mesh=mesh)
    fill(mesh, conv, linear)
    with torch.no_grad():
        want = linear(conv(images).flatten(1))

    with CommDebugMode() as moved:
        merged = lf.fuse_conv_linear(conv, linear, SIZE)  # gathers the small convolution
    tell(linear, merged, moved)

    if options.save is not None:
        checkpoint.save({"merged": merged.state_dict()}, checkpoint_id=options.save)
        say(f"  saved to {options.save}")
    lf.distributed.fully_shard_again(merged)  # FSDP2's own once more
    with torch.no_grad():
        compare(merged(images.flatten(1)), want)


def by_tensor_parallelism(mesh: DeviceMesh, images: Tensor, options: argparse.Namespace) -> None:
    """Tensor parallelism: each process has rows of the Linear, and all have the convolution."""
    conv, linear = layers(options.classes)
    style = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(linear, mesh, style)
    fill(mesh, conv, linear)
    with torch.no_grad():
        want = linear(conv(images).flatten(1))

    with CommDebugMode() as moved:
        merged = lf.fuse_conv_linear(conv, linear, SIZE)  # moves nothing
    tell(linear, merged, moved)

    parallelize_module(merged, mesh, style)  # what the style does before and after the layer
    with torch.no_grad():
        compare(merged(images.flatten(1)), want)


def layers(classes: int) -> tuple[nn.Conv2d, nn.Linear]:
    """The two layers, with shapes but no values yet."""
    conv = nn.Conv2d(3, 16, 5, stride=2, padding=2, device="meta")
    return conv, nn.Linear(16 * 16 * 16, classes, device="meta")


def fill(mesh: DeviceMesh, *made: nn.Module) -> None:
    """Gives layers values where they are: parts their own, replicated tensors the same."""
    for layer in made:
        layer.to_empty(device=mesh.device_type)
        for parameter in layer.parameters():
            sharded = isinstance(parameter, DTensor)
            torch.manual_seed(1 + (mesh.get_local_rank() if sharded else 0))
            local: Any = parameter.to_local() if sharded else parameter
            nn.init.normal_(local.detach(), std=0.02)


def whole_images(mesh: DeviceMesh) -> Tensor:
    """The same images on every process."""
    torch.manual_seed(0)
    return torch.rand(4, 3, *SIZE).to(mesh.device_type)


def tell(linear: nn.Linear, merged: nn.Linear, moved: CommDebugMode) -> None:
    """What a process has, and what went between them."""
    rows = [
        ("the Linear", linear.weight, linear.out_features * linear.in_features),
        ("merged", merged.weight, merged.out_features * merged.in_features),
    ]
    for name, weight, whole in rows:
        assert isinstance(weight, DTensor)
        own = weight.to_local().numel() * weight.element_size()
        all_of_it = whole * weight.element_size()
        placement = ", ".join(map(str, weight.placements))
        say(f"  {name:<11}{own / 1e6:9.1f} MB of {all_of_it / 1e6:.1f} MB here, {placement}")
    say(f"  collectives during the merge: {moved.get_total_counts()}")


def compare(merged: Tensor, want: Tensor) -> None:
    """The largest difference, over the largest value."""
    error = float((merged - want).abs().max() / want.abs().max())
    say(f"  largest difference from the two layers: {error:.1e}")
    assert error < 1e-4


def say(text: str) -> None:
    """Prints once."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Merges layers that are sharded.")
    parser.add_argument("--classes", type=int, default=20_000, help="default: %(default)s")
    parser.add_argument("--save", type=Path, metavar="DIR", help="for a checkpoint")
    options = parser.parse_args(arguments)
    if options.classes < 1:
        parser.error(f"--classes must be positive, got {options.classes}")
    return options


if __name__ == "__main__":
    main()
