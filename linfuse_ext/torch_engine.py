"""The product of a Linear and a convolution's matrix, and its adjoints, by torch's convolution.

With A(w) the matrix of the convolution with weight w, all three are partial derivatives of one
trilinear form `phi(w, L, G) = sum_f sum_row sum_col G[f, col] L[f, row] A(w)[row, col]`:

    product        d phi / d G = L @ A(w)       the rows of L taken back through the convolution
    convolve_rows  d phi / d L = G @ A(w)^T     the rows of G taken forward through it
    conv_gradient  d phi / d w                  the weight gradient of the convolution

This is the engine of the last two everywhere, and by default of the product on CUDA. L is
`[F, rows]`, G `[F, cols]`. float32 is true float32 on CUDA unless
torch.set_float32_matmul_precision or torch.backends.cuda.matmul.fp32_precision allow TF32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .composition import common_divisor, tap_spacing
from .geometry import HALF_TYPES, Geometry


def _tf32_is_on() -> bool:
    """Whether the caller lets matrix products round float32 to TF32, by torch's own switch."""
    backends: Any = torch.backends
    precision = backends.cuda.matmul.fp32_precision
    if precision == "none":  # not set: the switch of all backends decides
        precision = backends.fp32_precision
    return bool(precision == "tf32")


@contextmanager
def _own_precision(tensor: Tensor) -> Iterator[None]:
    """Lets nothing but the dtype and the switch for matrix products decide the precision.

    Autocast would lower it inside an op that returns what its operands are; cuDNN has TF32 on by
    default.
    """
    with torch.autocast(tensor.device.type, enabled=False):
        if not tensor.is_cuda:
            yield
            return
        backends: Any = torch.backends
        switch = backends.cudnn.conv
        before = switch.fp32_precision
        switch.fp32_precision = "tf32" if _tf32_is_on() else "ieee"
        try:
            yield
        finally:
            switch.fp32_precision = before


def _pad(images: Tensor, geometry: Geometry) -> Tensor:
    """The padded input images of a convolution, `[F, C_in, *(in + low + high)]`."""
    if not any(value for pair in geometry.padding for value in pair):
        return images
    flat = [value for pair in reversed(geometry.padding) for value in pair]
    mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
    return F.pad(images, flat, mode=mode)


def _fold_padding(padded: Tensor, geometry: Geometry) -> Tensor:
    """The adjoint of _pad: what was read as padding is added where it was read from."""
    mode = geometry.padding_mode
    axes = enumerate(zip(geometry.input_size, geometry.padding, strict=True), start=2)
    for axis, (size, (low, high)) in axes:
        inside = padded.narrow(axis, low, size)
        if mode == "zeros" or not (low or high):
            padded = inside
            continue
        before, after = padded.narrow(axis, 0, low), padded.narrow(axis, low + size, high)
        folded = inside.clone()
        if mode == "circular":
            folded.narrow(axis, size - low, low).add_(before)
            folded.narrow(axis, 0, high).add_(after)
        elif mode == "reflect":
            folded.narrow(axis, 1, low).add_(before.flip(axis))
            folded.narrow(axis, size - 1 - high, high).add_(after.flip(axis))
        else:
            folded.narrow(axis, 0, 1).add_(before.sum(axis, keepdim=True))
            folded.narrow(axis, size - 1, 1).add_(after.sum(axis, keepdim=True))
        padded = folded
    return padded


class _Padding(NamedTuple):
    """Who pads, and cuts what was padded: on each axis torch's convolution or this file.

    The convolution does it for nothing, this file by a copy of all images.
    """

    padding: list[int]  # what the convolution is told
    output_padding: list[int]  # what that of a transposed convolution is told
    rest: Geometry  # with what is left to do here


def _divide_padding(geometry: Geometry) -> _Padding:
    """Leaves to torch's convolution what it can do: zeros, as many on both sides of an axis.

    Not more of them than the kernel spans, and not on an axis with one step, whose stride is to go
    (_convolve).
    """
    padding, output_padding = [], []
    steps = geometry.input_size if geometry.transposed else geometry.output_size
    for (low, high), extra, stride, dilation, kernel, count in zip(
        geometry.padding,
        geometry.output_padding,
        geometry.stride,
        geometry.dilation,
        geometry.kernel_size,
        steps,
        strict=True,
    ):
        is_plain = geometry.padding_mode == "zeros" and low == high and extra < stride
        fits = is_plain and low <= (kernel - 1) * dilation and count > 1
        padding.append(low if fits else 0)
        output_padding.append(extra if fits else 0)
    rest = geometry._replace(
        padding=tuple(
            (low - own, high - own)
            for (low, high), own in zip(geometry.padding, padding, strict=True)
        ),
        output_padding=tuple(
            extra - own for extra, own in zip(geometry.output_padding, output_padding, strict=True)
        ),
    )
    return _Padding(padding, output_padding, rest)


def _cut(geometry: Geometry) -> list[int]:
    """What a transposed convolution cuts off its full output, in the order of F.pad."""
    return [
        value
        for (low, high), extra in zip(
            reversed(geometry.padding), reversed(geometry.output_padding), strict=True
        )
        for value in (low, high - extra)
    ]


def _resize(images: Tensor, amounts: list[int]) -> Tensor:
    """F.pad in two steps: what remains may lie in the extension alone, which torch refuses."""
    if any(amount > 0 for amount in amounts):
        images = F.pad(images, [max(0, amount) for amount in amounts])
    if any(amount < 0 for amount in amounts):
        images = F.pad(images, [min(0, amount) for amount in amounts])
    return images


def _uncrop(images: Tensor, geometry: Geometry) -> Tensor:
    """The output images of a transposed convolution before its padding cut them."""
    return _resize(images, _cut(geometry))


def _crop(images: Tensor, geometry: Geometry) -> Tensor:
    """The adjoint of _uncrop."""
    return _resize(images, [-amount for amount in _cut(geometry)])


def _convolve(
    images: Tensor,
    weight: Tensor,
    geometry: Geometry,
    transposed: bool,
    padding: Sequence[int],
    output_padding: Sequence[int],
) -> Tensor:
    stride = list(geometry.stride)
    if not transposed:
        # An axis with one step needs no stride; torch up to 2.13 computes wrong bfloat16 with it
        # (https://github.com/pytorch/pytorch/issues/169688).
        spans = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], geometry.dilation, strict=True)]
        for axis, span in enumerate(spans):
            if images.shape[axis + 2] + 2 * padding[axis] - span < stride[axis]:
                images = images.narrow(axis + 2, 0, span)
                stride[axis] = 1
    with _own_precision(images):
        images = torch.ops.aten.convolution(
            images,
            weight,
            None,
            stride,
            padding,
            geometry.dilation,
            transposed,
            output_padding,
            geometry.groups,
        )
    return images


def _widened(*operands: Tensor, added_later: bool = False) -> tuple[Tensor, ...]:
    """Half types as float32 where rounding once at the end needs it.

    On the CPU some of torch's routines add up in the half type itself; which, depends on the
    machine. Elsewhere it is needed where results are still to be added to one another.
    """
    half = operands[0].dtype in HALF_TYPES
    if half and (added_later or not operands[0].is_cuda):
        return tuple(operand.float() for operand in operands)
    return operands


def product(weight: Tensor, linear: Tensor, geometry: Geometry) -> Tensor:
    """Returns `linear @ A(weight)`, `[F, cols]`, in the dtype of `linear`."""
    features = linear.shape[0]
    images = linear.reshape(features, geometry.out_channels, *geometry.output_size)
    if features == 0:
        return linear.new_empty(0, geometry.cols)
    repeats = geometry.padding_mode != "zeros"
    images, weight = _widened(images, weight, added_later=repeats)
    padding, _, rest = _divide_padding(geometry)
    if geometry.transposed:
        images = _uncrop(images, rest)
        images = _convolve(images, weight, geometry, False, padding, [0] * len(padding))
        return images.reshape(features, -1).to(linear.dtype)
    # What the last step of the stride left over at the high end of the padded input.
    left_over = [
        (size + low + high - (k - 1) * dilation - 1) % stride
        for size, (low, high), k, dilation, stride in zip(
            geometry.input_size,
            geometry.padding,
            geometry.kernel_size,
            geometry.dilation,
            geometry.stride,
            strict=True,
        )
    ]
    padded = _convolve(images, weight, geometry, True, padding, left_over)
    return _fold_padding(padded, rest).reshape(features, -1).to(linear.dtype)


def convolve_rows(weight: Tensor, rows: Tensor, geometry: Geometry) -> Tensor:
    """Returns `rows @ A(weight)^T`, `[F, rows]`: each row as an image, through the convolution."""
    features = rows.shape[0]
    if features == 0:
        return rows.new_empty(0, geometry.rows)
    images = rows.reshape(features, geometry.in_channels, *geometry.input_size)
    images, weight = _widened(images, weight)
    padding, output_padding, rest = _divide_padding(geometry)
    if geometry.transposed:
        images = _convolve(images, weight, geometry, True, padding, output_padding)
        images = _crop(images, rest)
    else:
        images = _pad(images, rest)
        images = _convolve(images, weight, geometry, False, padding, output_padding)
    return images.reshape(features, -1).to(rows.dtype)


def conv_gradient(
    linear: Tensor, grad: Tensor, weight_size: Sequence[int], geometry: Geometry
) -> Tensor:
    """Returns the gradient of `sum(grad * (linear @ A(weight)))` in the weight, `weight_size`."""
    features, dtype = grad.shape[0], grad.dtype
    if features == 0:
        return grad.new_zeros(weight_size)
    grad, linear = _widened(grad, linear)
    fine = grad.reshape(features, geometry.in_channels, *geometry.input_size)
    coarse = linear.reshape(features, geometry.out_channels, *geometry.output_size)
    # A transposed convolution takes grad as its input and the Linear's rows as output gradient.
    padding, output_padding, rest = _divide_padding(geometry)
    images, outputs = (
        (fine, _uncrop(coarse, rest)) if geometry.transposed else (_pad(fine, rest), coarse)
    )
    with _own_precision(grad):
        gradients = torch.ops.aten.convolution_backward(
            outputs,
            images,
            grad.new_empty(1).expand(weight_size),  # only its shape is read
            None,
            geometry.stride,
            padding,
            geometry.dilation,
            geometry.transposed,
            output_padding,
            geometry.groups,
            [False, True, False],
        )
    by_weight: Tensor = gradients[1].to(dtype)
    return by_weight


def composed_kernel(
    first: Tensor,
    second: Tensor,
    steps: tuple[Sequence[int], Sequence[int]],
    groups: tuple[int, int],
) -> Tensor:
    """The kernel of two convolutions in a row, `[C_out, C_in / gcd(groups), *kernel]`.

    Its taps lie at `k1 step1 + k2 step2`, and their sums over the channels between the layers are
    what a transposed convolution of the second kernel with the first computes: no kernel need be
    turned around.

    Args:
        first: `[C_mid, C_in / groups[0], *k1]`.
        second: `[C_out, C_mid / groups[1], *k2]`.
        steps: What an element of each kernel moves by, per axis, in positions of the input.
        groups: Groups of the two.
    """
    axes = first.dim() - 2
    common = common_divisor(*groups)
    # Within a common group the layers' own groups are blocks on a diagonal.
    first = as_one_group(first, groups[0], common)
    second = as_one_group(second, groups[1], common)
    out_channels, between = second.shape[0] // common, second.shape[1]
    second = second.reshape(common, out_channels, between, *second.shape[2:]).transpose(0, 1)
    apart = tap_spacing((first.shape[2:], second.shape[3:]), steps)
    # In units of the spacing; the step of a kernel of one element plays no part, however large.
    dilation, stride = (
        [step // unit if k > 1 else 1 for k, step, unit in zip(size, each, apart, strict=True)]
        for size, each in zip((first.shape[2:], second.shape[3:]), steps, strict=True)
    )
    kernel: Tensor = torch.ops.aten.convolution(
        second.reshape(out_channels, common * between, *second.shape[3:]),
        first,
        None,
        stride,
        [0] * axes,
        dilation,
        True,
        [0] * axes,
        common,
    )
    in_channels = kernel.shape[1] // common
    kernel = kernel.reshape(out_channels, common, in_channels, *kernel.shape[2:]).transpose(0, 1)
    return kernel.reshape(common * out_channels, in_channels, *kernel.shape[3:])


def as_one_group(weight: Tensor, groups: int, common: int) -> Tensor:
    """A weight of `groups` groups as one of `common`, a divisor; what the groups lack is zero."""
    blocks = groups // common
    if blocks == 1:
        return weight
    out_channels, in_channels = weight.shape[0] // groups, weight.shape[1]
    grouped = weight.reshape(common, blocks, out_channels, 1, in_channels, *weight.shape[2:])
    chosen = torch.eye(blocks, dtype=torch.bool, device=weight.device)
    chosen = chosen.reshape(1, blocks, 1, blocks, *[1] * (weight.dim() - 1))
    dense = torch.where(chosen, grouped, 0)
    return dense.reshape(weight.shape[0], blocks * in_channels, *weight.shape[2:])


def merged_bias(
    first_bias: Tensor | None, second: Tensor, second_bias: Tensor | None, groups: int
) -> Tensor:
    """The bias of two convolutions in a row, `[C_out]` in float64, where nothing is padding.

    `second` is the weight of the second as a convolution, `[C_out, C_mid / groups, *k2]`.
    """
    bias = second.new_zeros(second.shape[0], dtype=torch.float64)
    if first_bias is not None:
        sums = second.double().flatten(2).sum(2).reshape(groups, -1, second.shape[1])
        bias = (sums @ first_bias.double().reshape(groups, -1, 1)).reshape(-1)
    return bias if second_bias is None else bias + second_bias.double()


def turn(weight: Tensor, groups: int) -> Tensor:
    """The weight of a stride-1 convolution as that of a transposed one, or back.

    `[C_out, C_in / groups, *kernel]` becomes `[C_in, C_out / groups, *kernel]` and vice versa, with
    the kernel turned around.
    """
    grouped = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2)
    turned = grouped.reshape(-1, grouped.shape[2], *weight.shape[2:])
    return turned.flip(list(range(2, weight.dim())))
