"""The operations on layers: torch.nn modules in, torch.nn modules out.

Arguments are never changed. Results keep dtype, device, `training` and `requires_grad`, have no
bias where none is left, and hold fresh parameters; for gradients through a merge use
linfuse_ext.functional.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .functional import Size

__all__ = ["conv_to_linear", "fuse_conv_linear"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _check_module(op: str, name: str, module: Any, kinds: tuple[type[nn.Module], ...]) -> None:
    """Accepts a layer that computes what its class says, and nothing else."""
    base = next((kind for kind in kinds if isinstance(module, kind)), None)
    if base is None:
        names = ", ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{op}: `{name}` must be one of {names}, got {type(module).__name__}")
    for method in ("forward", "_conv_forward"):
        own = getattr(type(module), method, None)
        if own is not getattr(base, method, None) or method in vars(module):
            raise TypeError(
                f"{op}: `{name}` must compute what {base.__name__} computes, but "
                f"{type(module).__name__} overrides {method}"
            )
    if any(nn.parameter.is_lazy(parameter) for parameter in module.parameters()):
        raise ValueError(f"{op}: `{name}` must be initialised; run one batch through it first")
    if module._forward_hooks or module._forward_pre_hooks:
        raise ValueError(
            f"{op}: `{name}` must have no forward hooks, as the merged layer would lose them; "
            "remove them first"
        )


def _conv_keywords(conv: Any) -> dict[str, Any]:
    """The settings of a convolution layer, as linfuse_ext.functional takes them."""
    keywords = {
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
        "groups": conv.groups,
        "padding_mode": conv.padding_mode,
    }
    if isinstance(conv, _TRANSPOSED):
        keywords |= {"transposed": True, "output_padding": conv.output_padding}
    return keywords


def _parameters(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, each read once: a parametrised layer computes them at every look."""
    return layer.weight, layer.bias


def _requires_grad(*parameters: Tensor | None) -> bool:
    return any(parameter is not None and parameter.requires_grad for parameter in parameters)


def _make_linear(
    weight: Tensor, bias: Tensor | None, weight_grad: bool, bias_grad: bool, training: bool
) -> nn.Linear:
    # On the meta device nothing is allocated and no random number is drawn.
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=weight_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=bias_grad)
    return linear.train(training)


def conv_to_linear(conv: nn.Module, input_size: Size) -> nn.Linear:
    """Writes a convolution layer as the Linear that computes the same on flattened tensors.

    `conv(x).flatten(1) == linear(x.flatten(1))` for every `x` of shape `[N, C_in, *input_size]`.

    Args:
        conv: A Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d or ConvTranspose3d with any
            settings. Subclasses are accepted where they compute the same.
        input_size: Spatial size of the convolution's input, in positions: an int or one per axis.

    Returns:
        A Linear from `C_in * prod(input_size)` to `C_out * prod(output_size)` features; its size is
        the product of the two.

    Raises:
        TypeError: `conv` is no such layer, overrides its forward, or has an unsupported dtype.
        ValueError: `input_size` does not fit, or `conv` has hooks or is not initialised.

    Example:
        >>> conv = torch.nn.Conv2d(2, 5, 3, stride=2, padding=1)
        >>> linear = conv_to_linear(conv, (6, 7))
        >>> x = torch.rand(4, 2, 6, 7)
        >>> torch.allclose(conv(x).flatten(1), linear(x.flatten(1)), atol=1e-6)
        True
    """
    op = "conv_to_linear"
    _check_module(op, "conv", conv, _CONVOLUTIONS + _TRANSPOSED)
    weight, bias = _parameters(conv)
    with torch.no_grad():
        matrix, offset = functional.conv_to_affine(weight, bias, input_size, **_conv_keywords(conv))
    return _make_linear(
        matrix,
        None if bias is None else offset,
        _requires_grad(weight),
        _requires_grad(bias),
        conv.training,
    )


def fuse_conv_linear(conv: nn.Module, linear: nn.Module, input_size: Size) -> nn.Linear:
    """Merges a convolution layer and the Linear behind it into one Linear.

    `linear(conv(x).flatten(1)) == fused(x.flatten(1))` for every `x` of shape
    `[N, C_in, *input_size]`. The convolution's matrix is never built.

    Args:
        conv: A Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d or ConvTranspose3d with any
            settings. Subclasses are accepted where they compute the same.
        linear: The Linear that takes the flattened output of `conv`; same dtype and device.
        input_size: Spatial size of the convolution's input, in positions: an int or one per axis.

    Returns:
        A Linear from `C_in * prod(input_size)` to `linear.out_features` features, without bias
        where neither layer has one.

    Raises:
        TypeError: An argument is no such layer, overrides its forward, or has an unsupported dtype.
        ValueError: `input_size` or the sizes of the layers do not fit, or a layer has hooks or is
            not initialised.

    Example:
        >>> conv, linear = torch.nn.Conv2d(5, 50, 5, stride=2), torch.nn.Linear(1250, 100)
        >>> fused = fuse_conv_linear(conv, linear, (13, 13))
        >>> fused
        Linear(in_features=845, out_features=100, bias=True)
        >>> x = torch.rand(4, 5, 13, 13)
        >>> torch.allclose(linear(conv(x).flatten(1)), fused(x.flatten(1)), atol=1e-5)
        True
    """
    op = "fuse_conv_linear"
    _check_module(op, "conv", conv, _CONVOLUTIONS + _TRANSPOSED)
    _check_module(op, "linear", linear, (nn.Linear,))
    conv_weight, conv_bias = _parameters(conv)
    linear_weight, linear_bias = _parameters(linear)
    with torch.no_grad():
        weight, bias = functional.fuse_conv_linear(
            conv_weight, conv_bias, linear_weight, linear_bias, input_size, **_conv_keywords(conv)
        )
    return _make_linear(
        weight,
        None if conv_bias is None and linear_bias is None else bias,
        _requires_grad(conv_weight, linear_weight),
        _requires_grad(conv_bias, linear_bias),
        conv.training or linear.training,
    )
