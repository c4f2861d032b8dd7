"""The ops that torch's convolution computes. Importing this module registers them.

They are the adjoints, what CUDA has no kernel for, and the other side of every choice between our
kernels and torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _C, torch_engine
from .operands import (
    check_fuse_conv_conv,
    check_fuse_conv_linear,
    check_fuse_linear_conv,
    check_tensor,
    op_geometry,
)


@torch.library.impl("linfuse::convolve_rows", ("cpu", "cuda"))
def _(rows: Tensor, conv_weight: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
    op = "convolve_rows"
    check_tensor(op, "conv_weight", conv_weight)
    geometry = op_geometry(op, conv_weight.shape, arguments, keywords)
    check_tensor(op, "rows", rows, conv_weight, (None, geometry.cols))
    return torch_engine.convolve_rows(conv_weight, rows, geometry).contiguous()


@torch.library.impl("linfuse::fuse_conv_linear_backward_conv", ("cpu", "cuda"))
def _(
    grad_weight: Tensor, linear_weight: Tensor, weight_size: Any, *arguments: Any, **keywords: Any
) -> Tensor:
    op = "fuse_conv_linear_backward_conv"
    geometry = op_geometry(op, weight_size, arguments, keywords)
    check_tensor(op, "grad_weight", grad_weight, None, (None, geometry.cols))
    features = grad_weight.shape[0]
    check_tensor(op, "linear_weight", linear_weight, grad_weight, (features, geometry.rows))
    return torch_engine.conv_gradient(
        linear_weight, grad_weight, weight_size, geometry
    ).contiguous()


def fuse_conv_linear_by_torch(
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    *arguments: Any,
    **keywords: Any,
) -> tuple[Tensor, Tensor]:
    """fuse_conv_linear with the product by torch's convolution: on CUDA, or where it is told to."""
    op = "fuse_conv_linear"
    geometry = check_fuse_conv_linear(
        op, conv_weight, conv_bias, linear_weight, linear_bias, arguments, keywords
    )
    weight = torch_engine.product(conv_weight, linear_weight, geometry).contiguous()
    wide = torch.promote_types(conv_weight.dtype, torch.float32)
    features = linear_weight.shape[0]
    bias = (
        torch.zeros(features, dtype=wide, device=conv_weight.device)
        if linear_bias is None
        else linear_bias.to(wide)
    )
    if conv_bias is not None:
        positions = geometry.rows // geometry.out_channels
        images = linear_weight.reshape(features, geometry.out_channels, positions)
        sums = images.sum(2, dtype=wide)
        bias = bias + (sums * conv_bias.to(wide)).sum(1)
    return weight, bias.to(conv_weight.dtype, copy=True)


torch.library.impl("linfuse::fuse_conv_linear_by_torch", ("cpu", "cuda"), fuse_conv_linear_by_torch)


def fuse_linear_conv_by_torch(
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    *arguments: Any,
    **keywords: Any,
) -> tuple[Tensor, Tensor]:
    """fuse_linear_conv by torch's convolution: on CUDA, or where it is told to.

    Each column of the Linear, and its bias, is an image that goes forward.
    """
    op = "fuse_linear_conv"
    geometry = check_fuse_linear_conv(
        op, linear_weight, linear_bias, conv_weight, conv_bias, arguments, keywords
    )
    weight = torch_engine.convolve_rows(conv_weight, linear_weight.T, geometry).T
    wide = torch.promote_types(conv_weight.dtype, torch.float32)
    bias = torch.zeros(geometry.rows, dtype=wide, device=conv_weight.device)
    if linear_bias is not None:
        image = linear_bias[None].to(wide)
        bias = torch_engine.convolve_rows(conv_weight.to(wide), image, geometry)[0]
    if conv_bias is not None:
        positions = geometry.rows // geometry.out_channels
        bias = bias + conv_bias.to(wide)[:, None].expand(-1, positions).reshape(-1)
    return weight.contiguous(), bias.to(conv_weight.dtype, copy=True)


torch.library.impl("linfuse::fuse_linear_conv_by_torch", ("cpu", "cuda"), fuse_linear_conv_by_torch)
torch.library.impl("linfuse::fuse_linear_conv", "cuda", fuse_linear_conv_by_torch)


def fuse_conv_conv_by_torch(
    first_weight: Tensor,
    first_bias: Tensor | None,
    second_weight: Tensor,
    second_bias: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    """The merged kernel and bias by torch's convolution: on CUDA, and where gradients are wanted.

    In float64 and rounded once, as our kernel; exactness is the caller's matter.
    """
    operands = (first_weight, first_bias, second_weight, second_bias)
    steps, groups = check_fuse_conv_conv(*operands, *settings)
    weight = torch_engine.composed_kernel(
        first_weight.double(), second_weight.double(), steps, groups
    )
    bias = torch_engine.merged_bias(first_bias, second_weight, second_bias, groups[1])
    return weight.to(first_weight.dtype).contiguous(), bias.to(first_weight.dtype)


def _has_cuda_kernels() -> bool:
    return _C.build_info()["cuda"] is not None


if not _has_cuda_kernels():
    torch.library.impl("linfuse::fuse_conv_linear", "cuda", fuse_conv_linear_by_torch)
torch.library.impl("linfuse::fuse_conv_conv", "cuda", fuse_conv_conv_by_torch)
