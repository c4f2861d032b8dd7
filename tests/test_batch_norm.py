"""BatchNorm into its neighbours: the same numbers, or a refusal that says why."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import DTYPES
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from linfuse_ext.batch_norm import fuse_bn, fuse_bn_into
from linfuse_ext.errors import FusionError

BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
SIZES = {0: (), 1: (11,), 2: (9, 8), 3: (6, 5, 7)}

# Every kind of layer, with the settings that decide where its channels lie in the weight.
LAYERS = {
    "Linear": nn.Linear(4, 6),
    "Linear no bias": nn.Linear(4, 6, bias=False),
    "Conv1d": nn.Conv1d(4, 6, 3, 2, 2, 2, 2),
    "Conv2d": nn.Conv2d(4, 6, (3, 2), (2, 1), (2, 0)),
    "Conv2d no bias": nn.Conv2d(4, 6, 3, bias=False),
    "Conv2d grouped": nn.Conv2d(4, 6, 3, groups=2),
    "Conv2d depthwise": nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False),
    "Conv2d same": nn.Conv2d(4, 6, (2, 3), padding="same"),
    "Conv2d valid": nn.Conv2d(4, 6, 3, padding="valid"),
    "Conv2d reflect": nn.Conv2d(4, 6, 3, 2, (1, 2), groups=2, padding_mode="reflect"),
    "Conv2d replicate": nn.Conv2d(4, 6, 3, padding=(5, 2), padding_mode="replicate"),
    "Conv2d circular": nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"),
    "Conv3d": nn.Conv3d(4, 6, (2, 3, 1), groups=2),
    "ConvTranspose1d": nn.ConvTranspose1d(4, 6, 3, 3, 1, 2, 2),
    "ConvTranspose2d": nn.ConvTranspose2d(4, 6, 3, 2, 1, (1, 0)),
    "ConvTranspose2d grouped": nn.ConvTranspose2d(4, 6, 3, 2, 1, 0, 2, bias=False),
    "ConvTranspose2d square groups": nn.ConvTranspose2d(4, 4, 3, groups=2),
    "ConvTranspose2d cropped": nn.ConvTranspose2d(4, 6, (3, 2), padding=(2, 3), groups=2),
    "ConvTranspose3d": nn.ConvTranspose3d(4, 6, 2, 2, 1),
}  # fmt: skip


def axes_of(layer: nn.Module) -> int:
    return layer.weight.dim() - 2


def sides(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def make_bn(channels: int, axes: int, seed: int = 0, **options) -> nn.Module:
    """A BatchNorm that has seen data: no statistic or parameter at its initial value."""
    generator = torch.Generator().manual_seed(seed)
    bn = BATCH_NORMS[max(axes, 1)](channels, **options)
    with torch.no_grad():
        for tensor in bn.state_dict().values():
            if tensor.dim():
                tensor.copy_(torch.rand(channels, generator=generator) + 0.3)
    return bn.eval()


def fresh(name: str) -> nn.Module:
    return copy.deepcopy(LAYERS[name])


def image(layer: nn.Module, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    size = (3, sides(layer)[0], *SIZES[axes_of(layer)])
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)


def settings_of(layer: nn.Module) -> str:
    return layer.extra_repr().replace(", bias=True", "").replace(", bias=False", "")


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("name", LAYERS)
def test_behind_any_layer(name: str, affine: bool) -> None:
    layer = fresh(name).double()
    bn = make_bn(sides(layer)[1], axes_of(layer), affine=affine).double()
    x = image(layer)
    fused = fuse_bn(layer, bn)
    assert type(fused) is type(layer) and fused.bias is not None
    assert settings_of(fused) == settings_of(layer)
    torch.testing.assert_close(fused(x), bn(layer(x)))


def shift_is_exact(layer: nn.Module) -> bool:
    """By what the layer makes of a constant image: the same in every position."""
    if isinstance(layer, nn.Linear):
        return True
    constant = torch.rand(1, sides(layer)[0], *[1] * axes_of(layer), dtype=torch.float64)
    answer = layer(constant.expand(1, -1, *SIZES[axes_of(layer)])).flatten(2)
    return bool((answer.amax(2) - answer.amin(2)).max() < 1e-9)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("name", LAYERS)
def test_before_any_layer(name: str, affine: bool) -> None:
    layer = fresh(name).double()
    bn = make_bn(sides(layer)[0], axes_of(layer), affine=affine).double()
    x = image(layer)
    if not shift_is_exact(layer):
        with pytest.raises(FusionError, match="fuse_bn_into: `layer` must "):
            fuse_bn_into(bn, layer)
        return
    fused = fuse_bn_into(bn, layer)
    assert type(fused) is type(layer)
    torch.testing.assert_close(fused(x), layer(bn(x)))


@pytest.mark.parametrize("name", LAYERS)
def test_before_any_layer_without_shift(name: str) -> None:
    layer = fresh(name).double()
    bn = make_bn(sides(layer)[0], axes_of(layer)).double()
    bn.running_mean.zero_()
    nn.init.zeros_(bn.bias)
    x = image(layer)
    torch.testing.assert_close(fuse_bn_into(bn, layer)(x), layer(bn(x)))


def test_both_are_exact_and_refused_somewhere() -> None:
    exact = {name: shift_is_exact(fresh(name).double()) for name in LAYERS}
    for kind in ("Conv2d", "ConvTranspose"):
        assert {value for name, value in exact.items() if name.startswith(kind)} == {True, False}


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_the_rule_for_the_shift_is_the_right_one(data: st.DataObject) -> None:
    """No merge where a constant image is not constant behind the layer, and all merges elsewhere.

    The input is larger than the kernel, so that padding, if any, is read, and what is left of a
    rim is seen.
    """
    transposed = data.draw(st.booleans())
    kernel, stride, dilation = (data.draw(st.integers(1, 3)) for _ in range(3))
    padding = data.draw(st.integers(0, 5))
    options = {}
    if transposed:
        options = {"output_padding": data.draw(st.integers(0, max(stride, dilation) - 1))}
    elif data.draw(st.booleans()):
        options = {"padding_mode": data.draw(st.sampled_from(["reflect", "circular", "replicate"]))}
    kind = nn.ConvTranspose1d if transposed else nn.Conv1d
    layer = kind(2, 2, kernel, stride, padding, dilation=dilation, **options).double()
    bn = make_bn(2, 1).double()
    try:
        fused = fuse_bn_into(bn, layer)
    except FusionError:
        fused = None
    assert (fused is not None) == shift_is_exact(layer)
    if fused is not None:
        x = image(layer)
        torch.testing.assert_close(fused(x), layer(bn(x)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["Linear", "Conv2d grouped", "ConvTranspose2d grouped"])
def test_parameters_are_rounded_once(name: str, dtype: torch.dtype) -> None:
    """They are the float64 ones of the rounded operands, rounded: no more than that is lost."""
    layer = fresh(name).to(dtype)
    bn = make_bn(sides(layer)[1], axes_of(layer)).to(dtype)
    wide = fuse_bn(copy.deepcopy(layer).double(), copy.deepcopy(bn).double())
    fused = fuse_bn(layer, bn)
    assert fused.weight.dtype == fused.bias.dtype == dtype
    assert torch.equal(fused.weight, wide.weight.to(dtype))
    assert torch.equal(fused.bias, wide.bias.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_layers_with_a_float32_batch_norm(dtype: torch.dtype) -> None:
    """The usual pair under mixed precision."""
    layer, bn = fresh("Conv2d").to(dtype), make_bn(6, 2)
    wide = fuse_bn(copy.deepcopy(layer).double(), copy.deepcopy(bn).double())
    fused = fuse_bn(layer, bn)
    assert torch.equal(fused.weight, wide.weight.to(dtype))
    assert torch.equal(fused.bias, wide.bias.to(dtype))
    torch.testing.assert_close(
        fused(image(layer, dtype)), bn(layer(image(layer, dtype))), rtol=0.05, atol=0.05
    )


def test_float32_against_the_layers() -> None:
    for name, layer in LAYERS.items():
        bn = make_bn(sides(layer)[1], axes_of(layer))
        x = image(layer, torch.float32)
        torch.testing.assert_close(fuse_bn(layer, bn)(x), bn(layer(x)), rtol=1e-5, atol=1e-5)
        assert layer is LAYERS[name]


def test_stays_on_its_device(device: str) -> None:
    layer, bn = fresh("ConvTranspose2d grouped").to(device), make_bn(6, 2).to(device)
    x = image(layer, torch.float32).to(device)
    fused = fuse_bn(layer, bn)
    assert fused.weight.device == fused.bias.device == x.device
    torch.testing.assert_close(fused(x), bn(layer(x)), rtol=1e-4, atol=1e-4)
    before, linear = make_bn(4, 1).to(device), fresh("Linear").to(device)
    x = image(linear, torch.float32).to(device)
    torch.testing.assert_close(
        fuse_bn_into(before, linear)(x), linear(before(x)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["ConvTranspose2d grouped", "ConvTranspose2d square groups"])
def test_grouped_transposed_where_torch_goes_wrong(name: str) -> None:
    """The scale belongs to (group, channel), which torch lays along the weight's second axis."""
    layer = fresh(name).double().eval()
    bn = make_bn(layer.out_channels, 2).double()
    x = image(layer)
    exact = bn(layer(x))
    torch.testing.assert_close(fuse_bn(layer, bn)(x), exact)
    try:
        right = torch.allclose(fuse_conv_bn_eval(layer, bn, transpose=True)(x), exact)
    except RuntimeError:
        right = False
    if right:
        pytest.skip("this torch merges grouped transposed convolutions")


def test_linear_with_a_plain_batch_norm_where_torch_crashes() -> None:
    layer, bn = fresh("Linear").double().eval(), make_bn(6, 1, affine=False).double()
    x = image(layer)
    torch.testing.assert_close(fuse_bn(layer, bn)(x), bn(layer(x)))
    try:
        fuse_linear_bn_eval(layer, bn)
    except (AttributeError, TypeError):
        return
    pytest.skip("this torch merges a BatchNorm without weight and bias")


STATES = {
    "momentum None": {"momentum": None},
    "eps": {"eps": 0.7},
    "no momentum": {"momentum": 0.0},
}


@pytest.mark.parametrize("options", STATES.values(), ids=STATES)
def test_settings_of_the_batch_norm(options: dict[str, object]) -> None:
    layer, bn = fresh("Conv2d grouped").double(), make_bn(6, 2, **options).double()
    x = image(layer)
    torch.testing.assert_close(fuse_bn(layer, bn)(x), bn(layer(x)))


def test_statistics_switched_off_later_are_used_in_eval_mode() -> None:
    """As torch does: eval mode looks at the buffers, not at the flag."""
    layer, bn = fresh("Conv2d").double(), make_bn(6, 2).double()
    bn.track_running_stats = False
    x = image(layer)
    torch.testing.assert_close(fuse_bn(layer, bn)(x), bn(layer(x)))


def test_a_batch_norm_without_bias() -> None:
    layer, bn = fresh("Conv2d no bias").double(), make_bn(6, 2).double()
    bn.register_parameter("bias", None)
    x = image(layer)
    torch.testing.assert_close(fuse_bn(layer, bn)(x), bn(layer(x)))


def test_sync_batch_norm_in_eval_mode_is_a_batch_norm() -> None:
    for name in ("Linear", "Conv1d", "Conv2d", "Conv3d"):
        layer = fresh(name).double()
        bn = nn.SyncBatchNorm.convert_sync_batchnorm(make_bn(6, axes_of(layer))).double()
        x = image(layer)
        torch.testing.assert_close(fuse_bn(layer, bn)(x), bn(layer(x)))


class NamedBatchNorm(nn.BatchNorm2d):
    note = "nothing new"


class NamedConv(nn.Conv2d):
    note = "nothing new"


def test_subclasses_that_compute_the_same_are_welcome() -> None:
    layer, bn = NamedConv(4, 6, 3), NamedBatchNorm(6).eval()
    bn.running_mean.fill_(0.3)
    x = image(layer, torch.float32)
    fused = fuse_bn(layer, bn)
    assert type(fused) is nn.Conv2d
    torch.testing.assert_close(fused(x), bn(layer(x)))


def test_parametrized_layers_are_read_once() -> None:
    layer = nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 6, 3)).eval()
    bn = make_bn(6, 2)
    x = image(layer, torch.float32)
    torch.testing.assert_close(fuse_bn(layer, bn)(x), bn(layer(x)), rtol=1e-5, atol=1e-5)
    looks = []
    layer.parametrizations.weight[0].register_forward_hook(lambda *_: looks.append(1))
    fuse_bn(layer, bn)
    assert len(looks) == 1


CALLS = [lambda layer, bn: fuse_bn(layer, bn), lambda layer, bn: fuse_bn_into(bn, layer)]


@pytest.mark.parametrize("call", CALLS, ids=["after", "before"])
def test_arguments_are_not_changed_or_shared(call) -> None:
    layer, bn = nn.Conv2d(6, 6, 3), make_bn(6, 2)
    before = copy.deepcopy((layer.state_dict(), bn.state_dict()))
    fused = call(layer, bn)
    with torch.no_grad():
        fused.weight.fill_(9)
        fused.bias.fill_(9)
    for module, state in zip((layer, bn), before, strict=True):
        assert all(torch.equal(value, module.state_dict()[name]) for name, value in state.items())


@pytest.mark.parametrize("call", CALLS, ids=["after", "before"])
def test_flags_are_kept(call) -> None:
    for training, weight, bias in itertools.product([True, False], repeat=3):
        layer, bn = nn.Conv2d(6, 6, 3).train(training), make_bn(6, 2).requires_grad_(False)
        layer.weight.requires_grad_(weight)
        layer.bias.requires_grad_(bias)
        fused = call(layer, bn)
        assert fused.training == training and fused.weight.is_leaf
        assert (fused.weight.requires_grad, fused.bias.requires_grad) == (weight, bias)
        bn.requires_grad_()
        fused = call(layer, bn)
        assert fused.weight.requires_grad and fused.bias.requires_grad


@pytest.mark.parametrize("call", CALLS, ids=["after", "before"])
def test_no_random_number_is_drawn(call) -> None:
    layer, bn = nn.ConvTranspose2d(6, 6, 1), make_bn(6, 2)
    before = torch.get_rng_state()
    call(layer, bn)
    assert torch.equal(torch.get_rng_state(), before)


def test_works_in_inference_mode_and_with_channels_last() -> None:
    layer, bn = nn.Conv2d(4, 6, 3, groups=2).to(memory_format=torch.channels_last), make_bn(6, 2)
    x = image(layer, torch.float32).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        torch.testing.assert_close(fuse_bn(layer, bn)(x), bn(layer(x)), rtol=1e-5, atol=1e-5)


def test_meta_layers_give_meta_layers() -> None:
    layer, bn = nn.Conv2d(4, 6, 3, device="meta"), nn.BatchNorm2d(6, device="meta").eval()
    fused = fuse_bn(layer, bn)
    assert fused.weight.is_meta and fused.bias.is_meta
    layer = nn.Conv2d(6, 6, 3, padding=1, device="meta")
    with pytest.raises(FusionError, match="shifts of unknown size"):
        fuse_bn_into(bn, layer)


class OwnBatchNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, inputs, output: output * 2)
    return module


CONV = nn.Conv2d(4, 6, 3, padding=1)
BN = make_bn(6, 2)
REFUSED = [
    (lambda: fuse_bn(nn.ReLU(), BN), TypeError,
     "fuse_bn: `layer` must be one of Linear, Conv1d, Conv2d, Conv3d, ConvTranspose1d, "
     "ConvTranspose2d, ConvTranspose3d, got ReLU"),
    (lambda: fuse_bn(BN, CONV), TypeError, "`layer` must be one of Linear"),
    (lambda: fuse_bn(CONV, make_bn(6, 1)), TypeError,
     "fuse_bn: `bn` must be one of BatchNorm2d, SyncBatchNorm, got BatchNorm1d"),
    (lambda: fuse_bn(nn.Linear(4, 6), BN), TypeError,
     "fuse_bn: `bn` must be one of BatchNorm1d, SyncBatchNorm, got BatchNorm2d"),
    (lambda: fuse_bn(CONV, nn.GroupNorm(2, 6)), TypeError, "got GroupNorm"),
    (lambda: fuse_bn(CONV, OwnBatchNorm(6).eval()), TypeError,
     "`bn` must compute what BatchNorm2d computes, but OwnBatchNorm overrides forward"),
    (lambda: fuse_bn(CONV, hooked(make_bn(6, 2))), ValueError,
     "fuse_bn: `bn` must have no forward hooks"),
    (lambda: fuse_bn(hooked(nn.Conv2d(4, 6, 3)), BN), ValueError,
     "fuse_bn: `layer` must have no forward hooks"),
    (lambda: fuse_bn(nn.LazyConv2d(6, 3), BN), ValueError, "`layer` must be initialised"),
    (lambda: fuse_bn(CONV, make_bn(6, 2).train()), ValueError,
     "fuse_bn: `bn` must be in eval mode, call bn.eval() first; in training mode it depends on "
     "the whole batch"),
    (lambda: fuse_bn(CONV, nn.BatchNorm2d(6, track_running_stats=False).eval()), ValueError,
     "fuse_bn: `bn` must have running statistics, got track_running_stats=False"),
    (lambda: fuse_bn_into(nn.BatchNorm2d(4, track_running_stats=False), CONV), ValueError,
     "fuse_bn_into: `bn` must have running statistics"),
    (lambda: fuse_bn(CONV, make_bn(4, 2)), ValueError,
     "fuse_bn: `bn` must have the 6 output channels of `layer`, got 4"),
    (lambda: fuse_bn_into(BN, CONV), ValueError,
     "fuse_bn_into: `bn` must have the 4 input channels of `layer`, got 6"),
    (lambda: fuse_bn(nn.Linear(4, 6), make_bn(4, 1)), ValueError,
     "fuse_bn: `bn` must have the 6 output features of `layer`, got 4"),
    (lambda: fuse_bn(CONV, make_bn(6, 2).double()), TypeError,
     "fuse_bn: `bn.running_mean` must be torch.float32 for this layer, got torch.float64"),
    (lambda: fuse_bn(nn.Conv2d(4, 6, 3).half(), make_bn(6, 2).bfloat16()), TypeError,
     "fuse_bn: `bn.running_mean` must be torch.float16 or torch.float32 for this layer, "
     "got torch.bfloat16"),
    (lambda: fuse_bn(nn.Conv2d(4, 6, 3).to(torch.complex64), BN), TypeError,
     "fuse_bn: `layer.weight` must be float32, float64, float16 or bfloat16, got torch.complex64"),
    (lambda: fuse_bn(CONV, make_bn(6, 2).to("meta")), ValueError,
     "fuse_bn: `bn.running_mean` must be on the device of the layer (cpu), got meta"),
    (lambda: fuse_bn_into(make_bn(4, 2), CONV), FusionError,
     "fuse_bn_into: `layer` must read no zero padding where `bn` shifts, as the zeros are not "
     "shifted; got Conv2d(4, 6, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1)) behind "
     "BatchNorm2d(4, "),
    (lambda: fuse_bn_into(make_bn(4, 2), CONV), FusionError,
     "Exact instead: pad the input by -shift / scale of its channel, with padding=0 in the layer; "
     "or merge the scale only and add the layer's answer to the shift as a bias per output "
     "position, which the Linear of conv_to_linear(layer, input_size) can hold"),
    (lambda: fuse_bn_into(make_bn(4, 2), nn.ConvTranspose2d(4, 6, 2, 2)), FusionError,
     "fuse_bn_into: `layer` must have stride 1 and padding of at least dilation * (kernel_size - "
     "1) + output_padding where `bn` shifts, as the shift otherwise reaches its output positions "
     "unevenly; got ConvTranspose2d(4, 6, kernel_size=(2, 2), stride=(2, 2)) behind"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_refusals_say_why(number: int) -> None:
    call, kind, message = REFUSED[number]
    with pytest.raises(kind) as caught:
        call()
    assert message in str(caught.value)


def test_what_the_refusal_offers_instead_is_exact() -> None:
    """Its two repairs for zero padding, carried out."""
    conv, bn = nn.Conv2d(4, 6, 3, padding=1).double(), make_bn(4, 2).double()
    x = image(conv)
    exact = conv(bn(x))
    scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    shift = bn.bias - bn.running_mean * scale
    # padding by -shift / scale
    bare = nn.Conv2d(4, 6, 3).double()
    bare.load_state_dict(conv.state_dict())
    outside = nn.functional.pad(torch.ones_like(x[:1, :1]), [1] * 4) == 0
    padded = torch.where(outside, (-shift / scale).view(1, -1, 1, 1), nn.functional.pad(x, [1] * 4))
    torch.testing.assert_close(fuse_bn_into(bn, bare)(padded), exact)
    # the scale, and a map
    scaled = make_bn(4, 2).double()
    scaled.running_mean.zero_()
    nn.init.zeros_(scaled.bias)
    constant = shift.view(1, -1, 1, 1).expand(1, -1, *x.shape[2:])
    answer = nn.functional.conv2d(constant, conv.weight, padding=1)
    torch.testing.assert_close(fuse_bn_into(scaled, conv)(x) + answer, exact)


def test_chains_collapse_from_both_sides() -> None:
    first, conv, last = (
        make_bn(4, 2).double(),
        nn.Conv2d(4, 6, 3).double(),
        make_bn(6, 2, 1).double(),
    )
    x = image(conv)
    fused = fuse_bn(fuse_bn_into(first, conv), last)
    torch.testing.assert_close(fused(x), last(conv(first(x))))
