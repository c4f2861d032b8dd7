"""The other ways of merging a Linear or a convolution into the convolution behind it.

A peer of `fuse_linear_conv` is ``f(layer, linear_weight, linear_bias, conv_weight, conv_bias) ->
(weight, bias)``, a peer of `fuse_conv_conv` ``f(pair, first_weight, first_bias, second_weight,
second_bias) -> (weight, bias)``. Each returns contiguous tensors.
"""

from __future__ import annotations

from torch import Tensor

from bench.layers import Layer, Pair
from bench.peers import CONV, Affine, conv


def linear_conv_forward(layer: Layer, lw: Tensor, lb: Tensor, cw: Tensor, cb: Tensor) -> Affine:
    """Each column of the Linear, and its bias, is an image that goes through the convolution."""
    shape = (-1, layer.in_channels, *layer.input_size)
    weight = conv(layer, lw.T.reshape(shape), cw).flatten(1).T
    return weight.contiguous(), conv(layer, lb.view(shape), cw, cb).flatten()


def conv_conv_kernels(pair: Pair, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Affine:
    """Convolves the first kernel, its input channels as a batch, with the second one turned round.

    Groups are those of the second, or those of the first where the second has none: no zeros of
    a dense weight are multiplied.
    """
    first, second = pair.first, pair.second
    images = w1.transpose(0, 1)  # [C_in/g1, C_mid, *k1]
    turned = w2.flip(tuple(range(2, w2.dim())))  # [C_out, C_mid/g2, *k2]
    step = pair.second_step
    full = [s * (k - 1) for s, k in zip(step, second.kernel, strict=True)]
    groups = second.groups
    if second.groups == 1 and first.groups > 1:
        groups = first.groups
        # [C_out, g1 x C_mid/g1, *k2] -> [g1 x C_out, C_mid/g1, *k2]
        turned = turned.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)
    # [C_in/g1, (g1 x) C_out, *k]
    weight = CONV[first.axes](images, turned, None, 1, full, step, groups)
    if groups != second.groups:
        weight = weight.unflatten(1, (groups, -1)).permute(2, 1, 0, *range(3, w2.dim() + 1))
        weight = weight.flatten(1, 2)  # [C_out, g1 x C_in/g1, *k]
    else:
        weight = weight.transpose(0, 1)
    sums = w2.flatten(2).sum(2).unflatten(0, (second.groups, -1))
    bias = b2 + (sums @ b1.view(second.groups, -1, 1)).flatten()
    return weight.contiguous(), bias


def conv_conv_float64(pair: Pair, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Affine:
    """The same in float64, rounded once: the work that the package does, whatever the dtype."""
    weight, bias = conv_conv_kernels(pair, w1.double(), b1.double(), w2.double(), b2.double())
    return weight.to(w1.dtype), bias.to(w1.dtype)
