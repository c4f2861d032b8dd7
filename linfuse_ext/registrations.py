"""What torch must know of each op besides its kernels: fake kernels, autograd, vmap.

Importing this module registers them. The formulas:

    conv_to_affine is linear in the weight and in the bias. Its adjoint in the weight is the op
    conv_to_affine_backward, whose own adjoint is conv_to_affine again.

    fuse_conv_linear, convolve_rows and fuse_conv_linear_backward_conv are the
    three partial derivatives of one trilinear form (torch_engine.py), so that the derivatives of
    each are the other two: derivatives of every order close on these three ops. fuse_linear_conv
    is the second of them with a bias, and its derivatives are the other two as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .composition import common_divisor, merged_size
from .operands import (
    check_bias,
    check_fuse_conv_conv,
    check_fuse_conv_linear,
    check_fuse_linear_conv,
    check_tensor,
    op_geometry,
    op_rows,
)
from .torch_ops import fuse_conv_conv_by_torch

_OPS = torch.ops.linfuse


# Fake kernels -------------------------------------------------------------------------------------


@torch.library.register_fake("linfuse::conv_to_affine")
def _(weight: Tensor, bias: Tensor | None, *arguments: Any, **keywords: Any) -> Any:
    op = "conv_to_affine"
    check_tensor(op, "weight", weight)
    geometry = op_geometry(op, weight.shape, arguments, keywords)
    check_bias(op, "bias", bias, weight, geometry.out_channels)
    start, stop = op_rows(op, geometry, keywords)
    return weight.new_empty(stop - start, geometry.cols), weight.new_empty(stop - start)


@torch.library.register_fake("linfuse::conv_to_affine_backward")
def _(grad_matrix: Tensor, weight_size: Any, *arguments: Any, **keywords: Any) -> Any:
    op = "conv_to_affine_backward"
    geometry = op_geometry(op, weight_size, arguments, keywords)
    start, stop = op_rows(op, geometry, keywords)
    check_tensor(op, "grad_matrix", grad_matrix, None, (stop - start, geometry.cols))
    return grad_matrix.new_empty(weight_size)


@torch.library.register_fake("linfuse::fuse_conv_linear")
def _(
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    *arguments: Any,
    **keywords: Any,
) -> Any:
    op = "fuse_conv_linear"
    geometry = check_fuse_conv_linear(
        op, conv_weight, conv_bias, linear_weight, linear_bias, arguments, keywords
    )
    features = linear_weight.shape[0]
    return conv_weight.new_empty(features, geometry.cols), conv_weight.new_empty(features)


@torch.library.register_fake("linfuse::fuse_linear_conv")
def _(
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    *arguments: Any,
    **keywords: Any,
) -> Any:
    op = "fuse_linear_conv"
    geometry = check_fuse_linear_conv(
        op, linear_weight, linear_bias, conv_weight, conv_bias, arguments, keywords
    )
    features = linear_weight.shape[1]
    return conv_weight.new_empty(geometry.rows, features), conv_weight.new_empty(geometry.rows)


@torch.library.register_fake("linfuse::convolve_rows")
def _(rows: Tensor, conv_weight: Tensor, *arguments: Any, **keywords: Any) -> Any:
    op = "convolve_rows"
    check_tensor(op, "conv_weight", conv_weight)
    geometry = op_geometry(op, conv_weight.shape, arguments, keywords)
    check_tensor(op, "rows", rows, conv_weight, (None, geometry.cols))
    return rows.new_empty(rows.shape[0], geometry.rows)


@torch.library.register_fake("linfuse::fuse_conv_linear_backward_conv")
def _(
    grad_weight: Tensor, linear_weight: Tensor, weight_size: Any, *arguments: Any, **keywords: Any
) -> Any:
    op = "fuse_conv_linear_backward_conv"
    geometry = op_geometry(op, weight_size, arguments, keywords)
    check_tensor(op, "grad_weight", grad_weight, None, (None, geometry.cols))
    features = grad_weight.shape[0]
    check_tensor(op, "linear_weight", linear_weight, grad_weight, (features, geometry.rows))
    return grad_weight.new_empty(weight_size)


# fuse_conv_conv, which is differentiated as torch differentiates the convolution that it is -------


@torch.library.register_fake("linfuse::fuse_conv_conv")
def _(
    first_weight: Tensor,
    first_bias: Tensor | None,
    second_weight: Tensor,
    second_bias: Tensor | None,
    *settings: Any,
) -> Any:
    operands = (first_weight, first_bias, second_weight, second_bias)
    steps, groups = check_fuse_conv_conv(*operands, *settings)
    sizes = first_weight.shape[2:], second_weight.shape[2:]
    common = common_divisor(*groups)
    weight = first_weight.new_empty(
        second_weight.shape[0],
        first_weight.shape[1] * (groups[0] // common),
        *merged_size(sizes, steps),
    )
    return weight, first_weight.new_empty(second_weight.shape[0])


@torch.library.impl("linfuse::fuse_conv_conv", "Autograd")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and any(
        isinstance(each, Tensor) and each.requires_grad for each in arguments
    ):
        return fuse_conv_conv_by_torch(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        outputs: tuple[Tensor, Tensor] = _OPS.fuse_conv_conv(*arguments)
    return outputs


# Autograd -----------------------------------------------------------------------------------------


def _none_for(arguments: Any) -> tuple[None, ...]:
    return (None,) * len(arguments)


def _save_conv_to_affine(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    weight, bias, *ctx.arguments = inputs
    ctx.keywords = keyword_only_inputs
    ctx.weight_size = weight.shape
    ctx.has_bias = bias is not None
    ctx.set_materialize_grads(False)


def _conv_to_affine_gradient(
    ctx: Any, grad_matrix: Tensor | None, grad_offset: Tensor | None
) -> Any:
    grad_weight = grad_bias = None
    if grad_matrix is not None and ctx.needs_input_grad[0]:
        grad_weight = _OPS.conv_to_affine_backward(
            grad_matrix, ctx.weight_size, *ctx.arguments, **ctx.keywords
        )
    if grad_offset is not None and ctx.has_bias and ctx.needs_input_grad[1]:
        geometry = op_geometry("conv_to_affine", ctx.weight_size, ctx.arguments, ctx.keywords)
        start, stop = op_rows("conv_to_affine", geometry, ctx.keywords)
        all_rows = torch.nn.functional.pad(grad_offset, (start, geometry.rows - stop))
        grad_bias = all_rows.view(geometry.out_channels, -1).sum(1)
    return grad_weight, grad_bias, *_none_for(ctx.arguments)


def _save_conv_to_affine_backward(
    ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any
) -> None:
    _, _, *ctx.arguments = inputs
    ctx.keywords = keyword_only_inputs


def _conv_to_affine_backward_gradient(ctx: Any, grad: Tensor) -> Any:
    matrix, _ = _OPS.conv_to_affine(grad, None, *ctx.arguments, **ctx.keywords)
    return matrix, None, *_none_for(ctx.arguments)


def _save_fuse_conv_linear(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    conv_weight, conv_bias, linear_weight, linear_bias, *ctx.arguments = inputs
    ctx.keywords = keyword_only_inputs
    ctx.has_linear_bias = linear_bias is not None
    ctx.save_for_backward(conv_weight, conv_bias, linear_weight)
    ctx.set_materialize_grads(False)


def _fuse_conv_linear_gradient(ctx: Any, grad: Tensor | None, grad_bias: Tensor | None) -> Any:
    conv_weight, conv_bias, linear_weight = ctx.saved_tensors
    by_conv_weight = by_conv_bias = by_linear_weight = by_linear_bias = None
    if grad is not None and ctx.needs_input_grad[0]:
        by_conv_weight = _OPS.fuse_conv_linear_backward_conv(
            grad, linear_weight, conv_weight.shape, *ctx.arguments, **ctx.keywords
        )
    if grad is not None and ctx.needs_input_grad[2]:
        by_linear_weight = _OPS.convolve_rows(grad, conv_weight, *ctx.arguments, **ctx.keywords)
    if grad_bias is not None and ctx.has_linear_bias:
        by_linear_bias = grad_bias
    if grad_bias is not None and conv_bias is not None:
        channels = conv_bias.shape[0]
        positions = linear_weight.shape[1] // channels
        wide = torch.promote_types(conv_bias.dtype, torch.float32)
        if ctx.needs_input_grad[1]:
            # Spelled out: without rows nothing can be inferred.
            images = linear_weight.view(linear_weight.shape[0], channels, positions)
            sums = images.sum(2, dtype=wide)
            by_conv_bias = (grad_bias.to(wide)[:, None] * sums).sum(0).to(conv_bias.dtype)
        if ctx.needs_input_grad[2]:
            by_bias = grad_bias[:, None] * conv_bias.repeat_interleave(
                positions, output_size=channels * positions
            )
            by_linear_weight = by_bias if by_linear_weight is None else by_linear_weight + by_bias
    return (
        by_conv_weight,
        by_conv_bias,
        by_linear_weight,
        by_linear_bias,
        *_none_for(ctx.arguments),
    )


def _save_fuse_linear_conv(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    linear_weight, linear_bias, conv_weight, conv_bias, *ctx.arguments = inputs
    ctx.keywords = keyword_only_inputs
    ctx.save_for_backward(linear_weight, linear_bias, conv_weight, conv_bias)
    ctx.set_materialize_grads(False)


def _fuse_linear_conv_gradient(ctx: Any, grad: Tensor | None, grad_bias: Tensor | None) -> Any:
    linear_weight, linear_bias, conv_weight, conv_bias = ctx.saved_tensors
    gradients: list[Tensor | None] = [None] * 4
    # The Linear's weight and its bias go through the convolution alike, as rows of images.
    passes = ((0, grad, linear_weight), (1, grad_bias, linear_bias))
    for number, by_output, operand in passes:
        if by_output is None or operand is None:
            continue
        by_rows, rows = (each.T if number == 0 else each[None] for each in (by_output, operand))
        if ctx.needs_input_grad[number]:
            back, _ = _OPS.fuse_conv_linear(
                conv_weight, None, by_rows, None, *ctx.arguments, **ctx.keywords
            )
            gradients[number] = back.T if number == 0 else back[0]
        if ctx.needs_input_grad[2]:
            by_conv_weight = _OPS.fuse_conv_linear_backward_conv(
                rows, by_rows, conv_weight.shape, *ctx.arguments, **ctx.keywords
            )
            before = gradients[2]
            gradients[2] = by_conv_weight if before is None else before + by_conv_weight
    if grad_bias is not None and conv_bias is not None and ctx.needs_input_grad[3]:
        wide = torch.promote_types(conv_bias.dtype, torch.float32)
        sums = grad_bias.view(conv_bias.shape[0], -1).sum(1, dtype=wide)
        gradients[3] = sums.to(conv_bias.dtype)
    return *gradients, *_none_for(ctx.arguments)


def _save_convolve_rows(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    rows, conv_weight, *ctx.arguments = inputs
    ctx.keywords = keyword_only_inputs
    ctx.save_for_backward(rows, conv_weight)


def _convolve_rows_gradient(ctx: Any, grad: Tensor) -> Any:
    rows, conv_weight = ctx.saved_tensors
    by_rows = by_conv_weight = None
    if ctx.needs_input_grad[0]:
        by_rows, _ = _OPS.fuse_conv_linear(
            conv_weight, None, grad, None, *ctx.arguments, **ctx.keywords
        )
    if ctx.needs_input_grad[1]:
        by_conv_weight = _OPS.fuse_conv_linear_backward_conv(
            rows, grad, conv_weight.shape, *ctx.arguments, **ctx.keywords
        )
    return by_rows, by_conv_weight, *_none_for(ctx.arguments)


def _save_backward_conv(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    grad_weight, linear_weight, _, *ctx.arguments = inputs
    ctx.keywords = keyword_only_inputs
    ctx.save_for_backward(grad_weight, linear_weight)


def _backward_conv_gradient(ctx: Any, grad: Tensor) -> Any:
    grad_weight, linear_weight = ctx.saved_tensors
    by_grad_weight = by_linear_weight = None
    if ctx.needs_input_grad[0]:
        by_grad_weight, _ = _OPS.fuse_conv_linear(
            grad, None, linear_weight, None, *ctx.arguments, **ctx.keywords
        )
    if ctx.needs_input_grad[1]:
        by_linear_weight = _OPS.convolve_rows(grad_weight, grad, *ctx.arguments, **ctx.keywords)
    return by_grad_weight, by_linear_weight, None, *_none_for(ctx.arguments)


# vmap ---------------------------------------------------------------------------------------------


def _element(argument: Any, dim: int | None, n: int) -> Any:
    if dim is None or not isinstance(argument, Tensor):
        return argument
    if argument.shape[dim] == 0:
        return argument.new_zeros(argument.shape[:dim] + argument.shape[dim + 1 :])
    return argument.select(dim, n)


def _one_by_one(op: Any) -> Callable[..., Any]:
    """Runs the op once for each element of the batch and stacks: geometry is never batched."""

    def batched(info: Any, in_dims: Any, *arguments: Any, **keywords: Any) -> Any:
        # An empty batch still has a shape: that of what one element of zeros gives.
        outputs = [
            op(*(_element(a, d, n) for a, d in zip(arguments, in_dims, strict=True)), **keywords)
            for n in range(max(1, info.batch_size))
        ]
        if isinstance(outputs[0], Tensor):
            return torch.stack(outputs)[: info.batch_size], 0
        stacked = (torch.stack(each)[: info.batch_size] for each in zip(*outputs, strict=True))
        return tuple(stacked), (0,) * len(outputs[0])

    return batched


_AUTOGRAD: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "conv_to_affine": (_conv_to_affine_gradient, _save_conv_to_affine),
    "conv_to_affine_backward": (
        _conv_to_affine_backward_gradient,
        _save_conv_to_affine_backward,
    ),
    "fuse_conv_linear": (_fuse_conv_linear_gradient, _save_fuse_conv_linear),
    "fuse_linear_conv": (_fuse_linear_conv_gradient, _save_fuse_linear_conv),
    "convolve_rows": (_convolve_rows_gradient, _save_convolve_rows),
    "fuse_conv_linear_backward_conv": (_backward_conv_gradient, _save_backward_conv),
}

for _name, (_gradient, _save) in _AUTOGRAD.items():
    torch.library.register_autograd(f"linfuse::{_name}", _gradient, setup_context=_save)
    torch.library.register_vmap(f"linfuse::{_name}", _one_by_one(getattr(_OPS, _name)))

torch.library.register_vmap("linfuse::fuse_conv_conv", _one_by_one(_OPS.fuse_conv_conv))
