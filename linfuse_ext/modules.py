"""The operations on layers: torch.nn modules in, torch.nn modules out.

Arguments are never changed. Results keep dtype, device, `training` and `requires_grad`, have no
bias where none is left, and hold fresh parameters; for gradients through a merge use
linfuse_ext.functional. Layers may be sharded, see linfuse_ext.distributed: what comes of them is
sharded as the Linear was, or else the larger layer.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .composition import Conv, compose
from .functional import Size
from .geometry import make_geometry, make_settings
from .meshes import check_rules, is_of_a_mesh, let_go, on_one_mesh, placed_as_layers
from .operands import check_tensor

__all__ = [
    "conv_to_linear",
    "fuse_conv_conv",
    "fuse_conv_linear",
    "fuse_linear_conv",
    "fuse_linear_linear",
]

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
    if any(isinstance(p, nn.UninitializedParameter) for p in module.parameters()):
        raise ValueError(f"{op}: `{name}` must be initialised; run one batch through it first")
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    if not all(is_of_a_mesh(hook) for hook in hooks):
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
    let_go(layer)
    return layer.weight, layer.bias


def _requires_grad(*parameters: Tensor | None) -> bool:
    return any(parameter is not None and parameter.requires_grad for parameter in parameters)


def _placed(
    weight: Tensor, bias: Tensor, *layers: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """A merged weight and bias where the layers' were; no bias where none of these has one."""
    kept = None if all(each is None for _, each in layers) else bias
    return placed_as_layers(weight, kept, layers)


@functools.cache
def _linear_template() -> nn.Linear:
    # On the meta device nothing is allocated and no random number is drawn.
    return nn.Linear(1, 1, bias=False, device="meta")


def _new_linear() -> nn.Linear:
    """A Linear as its constructor leaves it, which takes longer than to merge two small layers."""
    linear = nn.Linear.__new__(nn.Linear)
    attributes = vars(linear)
    for name, value in vars(_linear_template()).items():
        attributes[name] = value.copy() if isinstance(value, (dict, list, set)) else value
    return linear


def _make_linear(
    weight: Tensor, bias: Tensor | None, weight_grad: bool, bias_grad: bool, training: bool
) -> nn.Linear:
    linear = _new_linear()
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight, requires_grad=weight_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=bias_grad)
    return linear.train(training)


def _make_conv(
    settings: Conv, weight: Tensor, bias: Tensor | None, weight_grad: bool, bias_grad: bool
) -> nn.Module:
    kinds = _TRANSPOSED if settings.transposed else _CONVOLUTIONS
    options: dict[str, Any] = {"output_padding": settings.output_padding}
    if not settings.transposed:
        options = {"padding_mode": settings.padding_mode}
    conv: nn.Module = kinds[len(settings.kernel_size) - 1](
        settings.in_channels,
        settings.out_channels,
        settings.kernel_size,  # type: ignore[arg-type]  # a tuple of as many as there are axes
        stride=settings.stride,  # type: ignore[arg-type]
        padding=tuple(low for low, _ in settings.padding),  # type: ignore[arg-type]
        dilation=settings.dilation,  # type: ignore[arg-type]
        groups=settings.groups,
        bias=bias is not None,
        device="meta",
        **options,
    )
    conv.weight = nn.Parameter(weight, requires_grad=weight_grad)
    if bias is not None:
        conv.bias = nn.Parameter(bias, requires_grad=bias_grad)
    return conv


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

    Examples:
        >>> conv = torch.nn.Conv2d(2, 5, 3, stride=2, padding=1)
        >>> linear = conv_to_linear(conv, (6, 7))
        >>> x = torch.rand(4, 2, 6, 7)
        >>> torch.allclose(conv(x).flatten(1), linear(x.flatten(1)), atol=1e-6)
        True
    """
    op = "conv_to_linear"
    _check_module(op, "conv", conv, _CONVOLUTIONS + _TRANSPOSED)
    weight, bias = _parameters(conv)
    check_tensor(op, "weight", weight)
    check_rules(op, "conv.weight", weight)
    make_geometry(op, weight.shape, input_size, **_conv_keywords(conv))  # errors name this op
    with torch.no_grad():
        kernel, each = on_one_mesh(weight, bias)
        matrix, offset = functional.conv_to_affine(kernel, each, input_size, **_conv_keywords(conv))
        made = _placed(matrix, offset, (weight, bias))
    return _make_linear(
        *made,
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

    Examples:
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
        kernel, offset, rows, bias = on_one_mesh(conv_weight, conv_bias, linear_weight, linear_bias)
        merged = functional.fuse_conv_linear(
            kernel, offset, rows, bias, input_size, **_conv_keywords(conv)
        )
        made = _placed(*merged, (linear_weight, linear_bias), (conv_weight, conv_bias))
    return _make_linear(
        *made,
        _requires_grad(conv_weight, linear_weight),
        _requires_grad(conv_bias, linear_bias),
        conv.training or linear.training,
    )


def fuse_linear_conv(linear: nn.Module, conv: nn.Module, input_size: Size) -> nn.Linear:
    """Merges a Linear and the convolution layer behind it into one Linear.

    `conv(linear(x).unflatten(1, (C_in, *input_size))).flatten(1) == fused(x)` for every `x` of
    shape `[N, linear.in_features]`: the first layers of a decoder. The convolution's matrix is
    never built.

    Args:
        linear: The Linear whose output is unflattened, of the dtype and on the device of `conv`.
        conv: A Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d or ConvTranspose3d with any
            settings. Subclasses are accepted where they compute the same.
        input_size: Spatial size of the convolution's input, in positions: an int or one per axis.

    Returns:
        A Linear from `linear.in_features` to `C_out * prod(output_size)` features, without bias
        where neither layer has one.

    Raises:
        TypeError: An argument is no such layer, overrides its forward, or has an unsupported dtype.
        ValueError: `input_size` or the sizes of the layers do not fit, or a layer has hooks or is
            not initialised.

    Examples:
        >>> linear, conv = torch.nn.Linear(16, 8 * 4 * 4), torch.nn.ConvTranspose2d(8, 3, 4, 2, 1)
        >>> fused = fuse_linear_conv(linear, conv, (4, 4))
        >>> fused
        Linear(in_features=16, out_features=192, bias=True)
        >>> x = torch.rand(2, 16)
        >>> y = conv(linear(x).unflatten(1, (8, 4, 4)))
        >>> torch.allclose(y.flatten(1), fused(x), atol=1e-5)
        True
    """
    op = "fuse_linear_conv"
    _check_module(op, "linear", linear, (nn.Linear,))
    _check_module(op, "conv", conv, _CONVOLUTIONS + _TRANSPOSED)
    linear_weight, linear_bias = _parameters(linear)
    conv_weight, conv_bias = _parameters(conv)
    with torch.no_grad():
        rows, bias, kernel, offset = on_one_mesh(linear_weight, linear_bias, conv_weight, conv_bias)
        merged = functional.fuse_linear_conv(
            rows, bias, kernel, offset, input_size, **_conv_keywords(conv)
        )
        made = _placed(*merged, (linear_weight, linear_bias), (conv_weight, conv_bias))
    return _make_linear(
        *made,
        _requires_grad(linear_weight, conv_weight),
        _requires_grad(linear_bias, conv_bias),
        linear.training or conv.training,
    )


def fuse_linear_linear(first: nn.Module, second: nn.Module) -> nn.Linear:
    """Merges two Linears in a row into one: `second(first(x)) == fused(x)`.

    Args:
        first: A Linear.
        second: The Linear behind it, of its dtype and on its device.

    Returns:
        A Linear from `first.in_features` to `second.out_features` features, without bias where
        neither layer has one.

    Raises:
        TypeError: An argument is no Linear, overrides its forward, or has an unsupported dtype.
        ValueError: The sizes do not fit, or a layer has hooks or is not initialised.

    Examples:
        >>> first, second = torch.nn.Linear(3, 50), torch.nn.Linear(50, 2, bias=False)
        >>> fuse_linear_linear(first, second)
        Linear(in_features=3, out_features=2, bias=True)
    """
    op = "fuse_linear_linear"
    _check_module(op, "first", first, (nn.Linear,))
    _check_module(op, "second", second, (nn.Linear,))
    first_weight, first_bias = _parameters(first)
    second_weight, second_bias = _parameters(second)
    with torch.no_grad():
        operands = on_one_mesh(first_weight, first_bias, second_weight, second_bias)
        merged = functional.fuse_linear_linear(*operands)
        made = _placed(*merged, (first_weight, first_bias), (second_weight, second_bias))
    return _make_linear(
        *made,
        _requires_grad(first_weight, second_weight),
        _requires_grad(first_bias, second_bias),
        first.training or second.training,
    )


def _conv_settings(op: str, conv: Any, weight: Tensor, bias: Tensor | None) -> Conv:
    keywords = _conv_keywords(conv)
    return Conv.of(make_settings(op, weight.shape, **keywords), bias is not None)


def fuse_conv_conv(first: nn.Module, second: nn.Module) -> nn.Module:
    """Merges two convolution layers in a row into one, for inputs of every size.

    `second(first(x)) == fused(x)`, exactly; where no single convolution does that, a FusionError
    names the rule that the pair breaks (linfuse_ext/composition.py) and what would work instead.
    Without padding in the second layer every pair of convolutions merges, whatever the stride,
    dilation, kernel and groups. The result is as compact as can be: it keeps the dilation and
    groups that the two have in common. A merge is computed in float64 and rounded once; to round
    a whole chain once, merge its layers as `.double()` and convert the last.

    Args:
        first: A Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d or ConvTranspose3d.
        second: The layer behind it, with as many axes, of its dtype and on its device. Where the
            two are of different kinds, one of them must have stride 1.

    Returns:
        A convolution layer of the same number of axes, without bias where neither layer has one.

    Raises:
        FusionError: There is no exact merge.
        TypeError: An argument is no such layer, overrides its forward, or has an unsupported dtype.
        ValueError: The layers do not fit, or a layer has hooks or is not initialised.

    Examples:
        >>> first, second = torch.nn.Conv2d(3, 64, 3, padding=1), torch.nn.Conv2d(64, 8, 1)
        >>> fuse_conv_conv(first, second)
        Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """
    op = "fuse_conv_conv"
    _check_module(op, "first", first, _CONVOLUTIONS + _TRANSPOSED)
    _check_module(op, "second", second, _CONVOLUTIONS + _TRANSPOSED)
    first_weight, first_bias = _parameters(first)
    second_weight, second_bias = _parameters(second)
    functional.check_pair(op, first_weight, second_weight)
    merge = compose(
        op,
        _conv_settings(op, first, first_weight, first_bias),
        _conv_settings(op, second, second_weight, second_bias),
    )
    with torch.no_grad():
        operands = on_one_mesh(first_weight, first_bias, second_weight, second_bias)
        merged = functional.merge_weights(merge, *operands)
        made = _placed(*merged, (first_weight, first_bias), (second_weight, second_bias))
    fused = _make_conv(
        merge.result,
        *made,
        _requires_grad(first_weight, second_weight),
        _requires_grad(first_bias, second_bias),
    )
    return fused.train(first.training or second.training)
