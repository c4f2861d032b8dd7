"""The layer functions: any layer of torch.nn, its flags kept, its refusals clear."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import linfuse_ext as lf

LAYERS = {
    "Conv1d": (nn.Conv1d(4, 6, 3, 2, 2, 2, 2), 11),
    "Conv2d": (nn.Conv2d(3, 4, (3, 2), (2, 1), (2, 0)), (8, 9)),
    "Conv3d": (nn.Conv3d(2, 3, (2, 3, 1), padding=(1, 0, 2)), (3, 4, 2)),
    "same": (nn.Conv2d(2, 3, (2, 4), padding="same"), (5, 6)),
    "same reflect": (nn.Conv2d(2, 3, (2, 4), padding="same", padding_mode="reflect"), (5, 6)),
    "valid": (nn.Conv2d(2, 3, 3, padding="valid"), (5, 6)),
    "reflect": (nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="reflect"), (5, 6)),
    "replicate": (nn.Conv2d(2, 3, 3, padding=(4, 2), padding_mode="replicate"), (3, 4)),
    "circular": (nn.Conv2d(2, 4, 3, padding=2, groups=2, padding_mode="circular"), (3, 4)),
    "no bias": (nn.Conv2d(2, 3, 3, bias=False), (5, 6)),
    "ConvTranspose1d": (nn.ConvTranspose1d(2, 4, 3, 3, 1, 2, 2), (5,)),
    "ConvTranspose2d": (nn.ConvTranspose2d(6, 9, 3, 2, 1, (1, 0), 3), (4, 3)),
    "ConvTranspose3d": (nn.ConvTranspose3d(2, 3, 2, 2, 1), (3, 4, 2)),
    "ConvTranspose2d dilated": (nn.ConvTranspose2d(2, 3, 2, dilation=3, output_padding=2), (4, 3)),
}


def tiny() -> tuple[nn.Conv2d, nn.Linear]:
    return nn.Conv2d(2, 3, 3), nn.Linear(3 * 4 * 3, 5)


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> tuple[nn.Module, object, torch.Tensor]:
    conv, input_size = LAYERS[request.param]
    axes = conv.weight.dim() - 2
    size = (input_size,) * axes if isinstance(input_size, int) else input_size
    return conv.double(), input_size, torch.randn(3, conv.in_channels, *size, dtype=torch.float64)


def test_conv_to_linear(layer) -> None:
    conv, input_size, x = layer
    linear = lf.conv_to_linear(conv, input_size)
    torch.testing.assert_close(linear(x.flatten(1)), conv(x).flatten(1))
    assert (linear.bias is None) == (conv.bias is None)
    assert (linear.out_features, linear.in_features) == tuple(linear.weight.shape)


def test_fuse_conv_linear(layer) -> None:
    conv, input_size, x = layer
    y = conv(x).flatten(1)
    linear = nn.Linear(y.shape[1], 7).double()
    fused = lf.fuse_conv_linear(conv, linear, input_size)
    torch.testing.assert_close(fused(x.flatten(1)), linear(y))
    assert (fused.out_features, fused.in_features) == tuple(fused.weight.shape)


@pytest.mark.parametrize("conv_bias", [True, False])
@pytest.mark.parametrize("linear_bias", [True, False])
def test_no_bias_where_none_is_left(conv_bias: bool, linear_bias: bool) -> None:
    conv, linear = nn.Conv2d(2, 3, 3, bias=conv_bias), nn.Linear(36, 5, bias=linear_bias)
    fused = lf.fuse_conv_linear(conv, linear, (6, 5))
    assert (fused.bias is not None) == (conv_bias or linear_bias)
    x = torch.randn(2, 2, 6, 5)
    torch.testing.assert_close(fused(x.flatten(1)), linear(conv(x).flatten(1)))


def test_arguments_are_not_changed() -> None:
    conv, linear = tiny()
    before = copy.deepcopy((conv.state_dict(), linear.state_dict()))
    fused = lf.fuse_conv_linear(conv, linear, (6, 5))
    matrix = lf.conv_to_linear(conv, (6, 5))
    with torch.no_grad():
        for made in (fused, matrix):
            made.weight.fill_(9)
            made.bias.fill_(9)
    for layer, state in zip((conv, linear), before, strict=True):
        assert all(torch.equal(value, layer.state_dict()[name]) for name, value in state.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_flags_are_kept(dtype: torch.dtype, training: bool) -> None:
    conv, linear = (layer.to(dtype).train(training) for layer in tiny())
    for made in (lf.conv_to_linear(conv, (6, 5)), lf.fuse_conv_linear(conv, linear, (6, 5))):
        assert made.training == training
        assert made.weight.dtype == made.bias.dtype == dtype
        assert made.weight.is_leaf and made.weight.requires_grad and made.bias.requires_grad
    conv.weight.requires_grad_(False)
    made = lf.conv_to_linear(conv, (6, 5))
    assert not made.weight.requires_grad and made.bias.requires_grad
    assert lf.fuse_conv_linear(conv, linear, (6, 5)).weight.requires_grad
    linear.requires_grad_(False)
    assert not lf.fuse_conv_linear(conv, linear, (6, 5)).weight.requires_grad


def test_no_random_number_is_drawn() -> None:
    conv, linear = tiny()
    before = torch.get_rng_state()
    lf.conv_to_linear(conv, (6, 5))
    lf.fuse_conv_linear(conv, linear, (6, 5))
    assert torch.equal(torch.get_rng_state(), before)


def test_works_without_gradients_and_in_inference_mode() -> None:
    conv, linear = tiny()
    x = torch.randn(2, 2, 6, 5)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            fused = lf.fuse_conv_linear(conv, linear, (6, 5))
            torch.testing.assert_close(fused(x.flatten(1)), linear(conv(x).flatten(1)))


def test_subclasses_that_compute_the_same_are_welcome() -> None:
    class Named(nn.Conv2d):
        note = "nothing new"

    conv = Named(2, 3, 3)
    x = torch.randn(2, 2, 6, 5)
    torch.testing.assert_close(lf.conv_to_linear(conv, (6, 5))(x.flatten(1)), conv(x).flatten(1))


def test_parametrized_layers_are_merged_as_they_are() -> None:
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 3))
    x = torch.randn(2, 2, 6, 5)
    torch.testing.assert_close(lf.conv_to_linear(conv, (6, 5))(x.flatten(1)), conv(x).flatten(1))


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight, bias) * 2


class OwnLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def patched() -> nn.Conv2d:
    conv = nn.Conv2d(2, 3, 3)
    conv.forward = lambda x: x
    return conv


def hooked() -> nn.Conv2d:
    conv = nn.Conv2d(2, 3, 3)
    conv.register_forward_hook(lambda module, inputs, output: output * 2)
    return conv


LINEAR = nn.Linear(36, 5)
REFUSED = [
    (lambda: lf.conv_to_linear(nn.Linear(2, 3), 3), TypeError,
     "conv_to_linear: `conv` must be one of Conv1d, Conv2d, Conv3d, ConvTranspose1d, "
     "ConvTranspose2d, ConvTranspose3d, got Linear"),
    (lambda: lf.conv_to_linear(torch.ones(1, 1, 1), 3), TypeError, "got Tensor"),
    (lambda: lf.conv_to_linear(OwnForward(2, 3, 3), 6), TypeError,
     "conv_to_linear: `conv` must compute what Conv2d computes, but OwnForward overrides forward"),
    (lambda: lf.conv_to_linear(OwnConvForward(2, 3, 3), 6), TypeError,
     "but OwnConvForward overrides _conv_forward"),
    (lambda: lf.conv_to_linear(patched(), 6), TypeError, "but Conv2d overrides forward"),
    (lambda: lf.conv_to_linear(hooked(), 6), ValueError,
     "conv_to_linear: `conv` must have no forward hooks"),
    (lambda: lf.conv_to_linear(nn.LazyConv2d(3, 3), 6), ValueError,
     "conv_to_linear: `conv` must be initialised; run one batch through it first"),
    (lambda: lf.conv_to_linear(nn.Conv2d(2, 3, 3), (6, 5, 4)), ValueError,
     "conv_to_linear: `input_size` must have one value or 2, got (6, 5, 4)"),
    (lambda: lf.fuse_conv_linear(nn.Conv2d(2, 3, 3), nn.Conv2d(2, 3, 3), 6), TypeError,
     "fuse_conv_linear: `linear` must be one of Linear, got Conv2d"),
    (lambda: lf.fuse_conv_linear(nn.Conv2d(2, 3, 3), OwnLinear(36, 5), 6), TypeError,
     "`linear` must compute what Linear computes, but OwnLinear overrides forward"),
    (lambda: lf.fuse_conv_linear(nn.Conv2d(2, 3, 3), LINEAR, (6, 6)), ValueError,
     "fuse_conv_linear: `linear_weight` must have shape (F, 48), as the convolution's output "
     "flattens to 48, got (5, 36)"),
    (lambda: lf.fuse_conv_linear(nn.Conv2d(2, 3, 3).double(), LINEAR, (6, 5)), TypeError,
     "fuse_conv_linear: `linear_weight` must have the dtype of the weight (torch.float64), "
     "got torch.float32"),
    (lambda: lf.conv_to_linear(nn.Conv2d(2, 3, 3).to(torch.complex64), 6), TypeError,
     "conv_to_linear: `weight` must be float32, float64, float16 or bfloat16, got torch.complex64"),
    (lambda: lf.fuse_conv_linear(nn.Conv2d(2, 3, 3, device="meta"), LINEAR, (6, 5)), ValueError,
     "fuse_conv_linear: `linear_weight` must be on the device of the weight (meta), got cpu"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_refusals_say_why(number: int) -> None:
    call, kind, message = REFUSED[number]
    with pytest.raises(kind) as caught:
        call()
    assert message in str(caught.value)


def test_meta_layers_give_meta_layers() -> None:
    conv, linear = nn.Conv2d(2, 3, 3, device="meta"), nn.Linear(36, 5, device="meta")
    fused = lf.fuse_conv_linear(conv, linear, (6, 5))
    assert fused.weight.is_meta and fused.weight.shape == (5, 60)


def test_what_is_returned_is_a_linear_as_its_constructor_makes_it() -> None:
    conv, linear = tiny()
    first, second = (lf.fuse_conv_linear(conv, linear, (6, 5)) for _ in range(2))
    fresh = nn.Linear(first.in_features, first.out_features)
    assert {k: type(v) for k, v in vars(first).items()} == {
        k: type(v) for k, v in vars(fresh).items()
    }
    assert list(first.state_dict()) == list(fresh.state_dict())
    # Two results share nothing, not even where hooks are kept.
    first.register_forward_hook(lambda *_: None)
    first.register_buffer("extra", torch.zeros(1), persistent=False)
    assert not second._forward_hooks
    assert not second._buffers
    assert not second._non_persistent_buffers_set
    assert not lf.fuse_conv_linear(conv, linear, (6, 5))._forward_hooks
