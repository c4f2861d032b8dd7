"""Every op once, on operands of one's choice: the table that the tests here go through."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from linfuse_ext import functional as F

HERE = Path(__file__).parent

Operands = dict[str, Tensor]


class Op(NamedTuple):
    """A function of linfuse_ext.functional with its settings.

    Attributes:
        name: Of the test.
        says: The name that its errors begin with.
        operands: The names of its operands, in order.
        call: The function, of the operands and the image's size.
    """

    name: str
    says: str
    operands: tuple[str, ...]
    call: Callable[..., Any]

    def __call__(self, operands: Operands, image: Sequence[int]) -> list[Tensor]:
        return parts(self.call(*(operands[name] for name in self.operands), image))


def _affine(layout: torch.layout, **settings: Any) -> Callable[..., Any]:
    return lambda w, b, image: F.conv_to_affine(w, b, image, layout=layout, **settings)


_CONV = ("weight", "bias")
OPS = [
    Op("dense", "conv_to_affine", _CONV, _affine(torch.strided, padding=1)),
    Op("csr", "conv_to_affine", _CONV, _affine(torch.sparse_csr, padding=1)),
    Op("coo", "conv_to_affine", _CONV, _affine(torch.sparse_coo, padding=1)),
    Op("diagonals", "conv_to_diagonals", _CONV,
       lambda w, b, image: F.conv_to_diagonals(w, b, image, padding=1)),
    Op("fuse_conv_linear", "fuse_conv_linear", ("weight", "bias", "behind", "behind_bias"),
       lambda w, b, m, mb, image: F.fuse_conv_linear(w, b, m, mb, image, padding=1)),
    Op("fuse_linear_conv", "fuse_linear_conv", ("before", "before_bias", "weight", "bias"),
       lambda m, mb, w, b, image: F.fuse_linear_conv(m, mb, w, b, image, padding=1)),
    Op("fuse_conv_conv", "fuse_conv_conv", ("weight", "bias", "second", "second_bias"),
       lambda w, b, w2, b2, image: F.fuse_conv_conv(w, b, w2, b2)),
]  # fmt: skip
BY_NAME = {op.name: op for op in OPS}


def parts(result: Any) -> list[Tensor]:
    """All dense tensors that a result is made of."""
    found: list[Tensor] = []
    for part in result:
        if isinstance(part, dict):
            found += part.values()
        elif not isinstance(part, Tensor):
            found.append(torch.tensor(part))
        elif part.layout == torch.sparse_csr:
            found += [part.crow_indices(), part.col_indices(), part.values()]
        elif part.layout == torch.sparse_coo:
            found += [part._indices(), part._values()]
        else:
            found.append(part)
    return found


def make_operands(
    channels: int = 2,
    image: Sequence[int] = (5, 4),
    features: int = 3,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Operands:
    """Random operands of all ops, for a kernel of 3 with padding 1, which keeps the image."""
    axes = len(image)
    flat = channels * torch.Size(image).numel()
    sizes: dict[str, tuple[int, ...]] = {
        "weight": (channels, channels, *[3] * axes),
        "bias": (channels,),
        "behind": (features, flat),
        "behind_bias": (features,),
        "before": (flat, features),
        "before_bias": (flat,),
        "second": (2 * channels, channels, *[3] * axes),
        "second_bias": (2 * channels,),
    }
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size, generator=generator).to(dtype) for name, size in sizes.items()}


def same_bits(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Whether two results are the same to the bit, NaN and the sign of zeros included."""
    if len(left) != len(right):
        return False
    return all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))
        for a, b in zip(left, right, strict=True)
    )


def bits(tensor: Tensor) -> Tensor:
    """The bytes of its elements, in order."""
    return tensor.detach().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def run_python(
    script: str, *arguments: str, timeout: float = 60, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a script that finds the modules of the tests, and not forever."""
    folders = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders)), **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
