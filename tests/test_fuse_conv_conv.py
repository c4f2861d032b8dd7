"""fuse_conv_conv: every rule of exactness, from both sides, and the composed kernels."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import DTYPES
from torch import nn

import linfuse_ext as lf
from linfuse_ext import functional
from linfuse_ext.torch_ops import fuse_conv_conv_by_torch

KINDS = {
    (False, 1): nn.Conv1d,
    (False, 2): nn.Conv2d,
    (False, 3): nn.Conv3d,
    (True, 1): nn.ConvTranspose1d,
    (True, 2): nn.ConvTranspose2d,
    (True, 3): nn.ConvTranspose3d,
}


def conv(i, o, k, s=1, p=0, d=1, g=1, bias=True, mode="zeros", axes=2, t=False, extra=0):
    options = {"output_padding": extra} if t else {"padding_mode": mode}
    torch.manual_seed(i + 10 * o)
    return KINDS[t, axes](
        i, o, k, s, padding=p, dilation=d, groups=g, bias=bias, dtype=torch.float64, **options
    )


def assert_exact(first: nn.Module, second: nn.Module, fused: nn.Module, sizes) -> None:
    for size in sizes:
        x = torch.randn(2, first.in_channels, *size, dtype=torch.float64)
        torch.testing.assert_close(fused(x), second(first(x)), rtol=1e-10, atol=1e-10)


SIZES = [(11, 12), (14, 9), (17, 16)]

EXACT = {
    "no padding between": (conv(2, 3, 3), conv(3, 4, 3)),
    "first pads": (conv(2, 3, 3, p=1), conv(3, 4, 3)),
    "strides": (conv(2, 3, 3, (2, 1), p=(1, 2)), conv(3, 4, (2, 3), (1, 3))),
    "stride 3 then 2": (conv(2, 3, (3, 2), 3, p=2), conv(3, 4, 2, 2)),
    "dilations": (conv(2, 3, 3, d=(2, 1), p=2), conv(3, 4, 2, d=(3, 2))),
    "stride and dilations": (conv(2, 3, 2, (2, 3), d=2), conv(3, 4, (2, 1), d=(1, 2))),
    "groups": (conv(4, 6, 3, g=2), conv(6, 8, 3, g=2)),
    "groups 6 and 4": (conv(12, 12, 2, g=6), conv(12, 8, 2, g=4)),
    "depthwise then pointwise": (conv(4, 4, 3, g=4, p=1), conv(4, 5, 1)),
    "pointwise then depthwise": (conv(3, 4, 1), conv(4, 4, 3, g=4)),
    "no biases": (conv(2, 3, 3, bias=False), conv(3, 4, 3, bias=False)),
    "only the first has a bias": (conv(2, 3, 3), conv(3, 4, 3, bias=False)),
    "pointwise, no bias, then padding": (conv(2, 3, 1, bias=False), conv(3, 4, 3, p=1)),
    "strided pointwise, no bias, then padding": (
        conv(2, 3, 1, 2, bias=False),
        conv(3, 4, 3, 2, p=(1, 2)),
    ),
    "full then padding": (conv(2, 3, 3, p=2, bias=False), conv(3, 4, 5, p=4)),
    "more than full, strided, then padding": (
        conv(2, 3, 3, 2, p=3, bias=False),
        conv(3, 4, 3, p=1),
    ),
    "full on one axis, no padding on the other": (
        conv(2, 3, 3, p=(2, 0), bias=False),
        conv(3, 4, 3, p=(1, 0)),
    ),
    "circular twice": (
        conv(2, 3, 3, p=1, mode="circular"),
        conv(3, 4, 5, p=2, mode="circular"),
    ),
    "circular, then a strided one": (
        conv(2, 3, 3, p=1, mode="circular"),
        conv(3, 4, 3, 2, p=1, mode="circular"),
    ),
    "reflect outside": (conv(2, 3, 3, p=2, mode="reflect"), conv(3, 4, 3)),
    "replicate outside": (conv(2, 3, 3, 2, p=3, mode="replicate"), conv(3, 4, 2)),
    "pointwise with bias, then reflect": (conv(2, 3, 1), conv(3, 4, 3, p=1, mode="reflect")),
    "pointwise with bias, then replicate": (conv(2, 3, 1), conv(3, 4, 3, p=2, mode="replicate")),
    "transposed twice": (
        conv(2, 3, 3, 2, t=True, bias=False),
        conv(3, 4, 4, 2, p=1, t=True),
    ),
    "transposed twice, grouped, output padding": (
        conv(4, 6, 3, 3, g=2, t=True, bias=False, extra=2),
        conv(6, 4, 2, 2, g=2, p=1, t=True, extra=1),
    ),
    "transposed, then transposed pointwise": (
        conv(2, 3, 4, 2, p=1, t=True),
        conv(3, 4, 1, t=True),
    ),
    "transposed, then pointwise": (conv(2, 3, 4, 2, p=1, t=True), conv(3, 4, 1)),
    "transposed, then a convolution": (conv(2, 3, 4, 2, p=1, t=True), conv(3, 4, 3)),
    "transposed, then a padded convolution": (
        conv(2, 3, 4, 2, t=True, bias=False),
        conv(3, 4, 3, p=1),
    ),
    "transposed with groups, then a grouped convolution": (
        conv(4, 6, 3, 2, g=2, t=True),
        conv(6, 4, (3, 2), g=2),
    ),
    "pointwise, then transposed": (conv(2, 3, 1, bias=False), conv(3, 4, 4, 2, p=1, t=True)),
    "full, then transposed": (conv(4, 4, 3, p=2, g=2, bias=False), conv(4, 6, 4, 2, g=2, t=True)),
    "convolution, then transposed of stride 1": (conv(2, 3, 3, 2), conv(3, 4, 3, p=2, t=True)),
    "1-d": (conv(2, 3, 3, 2, p=1, axes=1), conv(3, 4, 3, d=2, axes=1)),
    "3-d": (conv(2, 3, (2, 3, 1), (1, 2, 1), axes=3), conv(3, 2, (2, 1, 2), axes=3)),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact(name: str) -> None:
    first, second = EXACT[name]
    fused = lf.fuse_conv_conv(first, second)
    axes = first.weight.dim() - 2
    sizes = {1: [(11,), (14,)], 2: SIZES, 3: [(6, 7, 5), (5, 8, 6)]}[axes]
    assert_exact(first, second, fused, sizes)
    assert (fused.bias is None) == (first.bias is None and second.bias is None)


REFUSED = {
    "padding between": (conv(2, 3, 3, p=1), conv(3, 4, 3, p=1), "hides values"),
    "padding on one axis": (conv(2, 3, 3, p=(2, 0)), conv(3, 4, 3, p=(0, 1)), "hides values"),
    "bias under padding": (conv(2, 3, 1), conv(3, 4, 3, p=1), "put out its bias"),
    "full with bias": (conv(2, 3, 3, p=2), conv(3, 4, 3, p=1), "put out its bias"),
    "reflect between": (
        conv(2, 3, 3, p=1, mode="reflect"),
        conv(3, 4, 3, p=1, mode="reflect"),
        "reflect padding between",
    ),
    "replicate between": (
        conv(2, 3, 3, p=1, mode="replicate"),
        conv(3, 4, 3, p=1, mode="replicate"),
        "replicate padding between",
    ),
    "circular that shrinks": (
        conv(2, 3, 3, p=0, mode="circular"),
        conv(3, 4, 3, p=1, mode="circular"),
        "circular padding between",
    ),
    "circular with stride": (
        conv(2, 3, 3, 2, p=1, mode="circular"),
        conv(3, 4, 3, p=1, mode="circular"),
        "circular padding between",
    ),
    "zeros, then circular": (
        conv(2, 3, 3, p=1),
        conv(3, 4, 3, p=1, mode="circular"),
        "circular padding between",
    ),
    "two modes": (
        conv(2, 3, (1, 3), p=(0, 1), mode="reflect"),
        conv(3, 4, (3, 1), p=(1, 0), mode="replicate"),
        "one padding mode",
    ),
    "cropped, then transposed": (
        conv(2, 3, 3, 2, p=1, t=True, bias=False),
        conv(3, 4, 3, 2, t=True),
        "cuts values off",
    ),
    "transposed with bias, then transposed": (
        conv(2, 3, 3, 2, t=True),
        conv(3, 4, 3, 2, t=True),
        "does not reach all output positions",
    ),
    "strided, then transposed": (
        conv(2, 3, 3, 2),
        conv(3, 4, 3, 2, t=True),
        "no convolution of either kind",
    ),
    "transposed, then strided": (
        conv(2, 3, 3, 2, t=True),
        conv(3, 4, 3, 2),
        "no convolution of either kind",
    ),
    "asymmetric 'same'": (conv(2, 3, 2, p="same"), conv(3, 4, 3), "different padding at the two"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_rule_both_layers_and_what_to_do(name: str) -> None:
    first, second, rule = REFUSED[name]
    with pytest.raises(lf.FusionError) as caught:
        lf.fuse_conv_conv(first, second)
    message = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert message.startswith("fuse_conv_conv: not exact as one convolution, because ")
    assert rule in message
    assert "First: " in message and "Second: " in message and "Instead: " in message


def test_padding_between_really_is_wrong_at_the_rim_and_nowhere_else() -> None:
    """What others do: add up the paddings. The interior agrees, the rim does not."""
    first, second = conv(2, 3, 3, p=1, bias=False), conv(3, 4, 3, p=1)
    weight, bias = functional.fuse_conv_conv(
        first.weight, None, second.weight, second.bias, first_padding=1
    )
    x = torch.randn(1, 2, 12, 12, dtype=torch.float64)
    naive = torch.nn.functional.conv2d(x, weight, bias, padding=2)
    error = (naive - second(first(x))).abs().amax((0, 1))
    assert error[1:-1, 1:-1].max() < 1e-12
    assert error[0].min() > 1e-3 and error[:, -1].min() > 1e-3


def test_the_sign_trap() -> None:
    """Torch's convolutions correlate; composing without turning a kernel is the classic mistake."""
    first, second = conv(2, 3, 3, bias=False), conv(3, 4, 3, bias=False)
    merged = lf.fuse_conv_conv(first, second).weight
    compose = torch.nn.functional.conv2d
    swapped = first.weight.transpose(0, 1)
    right = compose(swapped, second.weight.flip(2, 3), padding=2).transpose(0, 1)
    wrong = compose(swapped, second.weight, padding=2).transpose(0, 1)
    torch.testing.assert_close(merged, right)
    assert (merged - wrong).abs().max() > 0.1 * merged.abs().max()


def test_the_answer_that_merges_full_convolutions() -> None:
    """100 channels between, kernels 3 and 5, both full: one 7 x 7 kernel, 1 -> 2 channels."""
    first, second = conv(1, 100, 3, p=2, bias=False), conv(100, 2, 5, p=4, bias=False)
    fused = lf.fuse_conv_conv(first, second)
    assert fused.weight.shape == (2, 1, 7, 7) and fused.padding == (6, 6)
    assert_exact(first, second, fused, [(6, 6), (6, 9)])


COMPACT = [
    (conv(4, 6, 3, d=2), conv(6, 4, 3, d=4), (7, 7), (2, 2), 1),
    (conv(4, 6, 1, 3), conv(6, 4, 3, d=1), (3, 3), (3, 3), 1),
    (conv(4, 6, 3, d=5), conv(6, 4, 1, d=7), (3, 3), (5, 5), 1),
    (conv(4, 6, (3, 1), 2, d=(4, 1)), conv(6, 4, (2, 2), d=2), (4, 2), (4, 4), 1),
    (conv(4, 6, 2, g=2), conv(6, 4, 2, g=2), (3, 3), (1, 1), 2),
    (conv(12, 12, 2, g=6), conv(12, 8, 2, g=4), (3, 3), (1, 1), 2),
    (conv(4, 6, 1), conv(6, 4, 1), (1, 1), (1, 1), 1),
]


@pytest.mark.parametrize("number", range(len(COMPACT)))
def test_as_compact_as_can_be(number: int) -> None:
    first, second, kernel_size, dilation, groups = COMPACT[number]
    fused = lf.fuse_conv_conv(first, second)
    assert (fused.kernel_size, fused.dilation, fused.groups) == (kernel_size, dilation, groups)
    assert_exact(first, second, fused, [(40, 41)])


def fold(*layers: nn.Module) -> nn.Module:
    merged = layers[0]
    for layer in layers[1:]:
        merged = lf.fuse_conv_conv(merged, layer)
    return merged


CHAINS = {
    "three": [conv(2, 3, 3, p=1), conv(3, 3, 3, d=2), conv(3, 2, 2)],
    "strided": [conv(2, 3, 3, 2, p=1), conv(3, 4, 2, 2), conv(4, 3, 2), conv(3, 2, 1)],
    "six": [conv(2, 3, 2), *(conv(3, 3, 2, bias=n % 2 == 0) for n in range(4)), conv(3, 2, 3)],
    "expanded": [conv(2, 8, 1), conv(8, 8, 3), conv(8, 2, 1)],
    "expanded, padding inside": [conv(2, 8, 1, bias=False), conv(8, 8, 3, p=1), conv(8, 2, 1)],
    "low-rank, grouped": [conv(8, 4, 3, p=1, g=2, bias=False), conv(4, 8, 1, g=2, bias=False)],
    "sparse groups": [conv(6, 6, 3, g=6), conv(6, 12, 1, g=3), conv(12, 6, 2, g=2)],
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains_fold_left_to_right(name: str) -> None:
    layers = CHAINS[name]
    merged = fold(*layers)
    for size in ((23, 24), (30, 22)):
        x = torch.randn(2, layers[0].in_channels, *size, dtype=torch.float64)
        torch.testing.assert_close(merged(x), nn.Sequential(*layers)(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accumulates_in_float64_and_rounds_once(dtype: torch.dtype) -> None:
    first, second = conv(4, 100, 3, bias=True).to(dtype), conv(100, 5, 3).to(dtype)
    fused = lf.fuse_conv_conv(first, second)
    exact = lf.fuse_conv_conv(first.double(), second.double())
    for name in ("weight", "bias"):
        value, wide = getattr(fused, name).detach(), getattr(exact, name).detach()
        assert value.dtype == dtype
        assert torch.equal(value, wide.to(dtype))


def test_flags_are_kept_and_arguments_left_alone() -> None:
    first, second = conv(2, 3, 3).float().eval(), conv(3, 4, 3).float().eval()
    first.requires_grad_(False)
    before = [value.clone() for value in (*first.parameters(), *second.parameters())]
    rng = torch.get_rng_state()
    fused = lf.fuse_conv_conv(first, second)
    assert not fused.training and fused.weight.requires_grad and fused.weight.is_leaf
    assert type(fused) is nn.Conv2d and fused.weight.dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), rng)
    after = (*first.parameters(), *second.parameters())
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    second.requires_grad_(False)
    assert not lf.fuse_conv_conv(first, second).weight.requires_grad


def test_layers_that_do_not_fit_say_so() -> None:
    with pytest.raises(ValueError, match=r"must have the 3 input channels that `first` puts out"):
        lf.fuse_conv_conv(conv(2, 3, 3), conv(4, 5, 3))
    with pytest.raises(ValueError, match=r"must have the 2 spatial axes of `first`, got 1"):
        lf.fuse_conv_conv(conv(2, 3, 3), conv(3, 5, 3, axes=1))
    with pytest.raises(TypeError, match=r"`second_weight` must have the dtype of the weight"):
        lf.fuse_conv_conv(conv(2, 3, 3), conv(3, 5, 3).float())
    with pytest.raises(TypeError, match=r"`second` must be one of Conv1d.*got Linear"):
        lf.fuse_conv_conv(conv(2, 3, 3), nn.Linear(3, 4))
    with pytest.raises(ValueError, match=r"first layer: `stride` must be positive, got \(0,\)"):
        functional.fuse_conv_conv(torch.ones(1, 1, 1), None, torch.ones(1, 1, 1), None, 0)
    with pytest.raises(ValueError, match=r"second_weight` must take the 1 channels"):
        torch.ops.linfuse.fuse_conv_conv(torch.ones(1, 1, 1), None, torch.ones(1, 2, 1), None)


OPERANDS = {
    "plain": ((3, 2, 2, 3), (2, 3, 3, 2), {}),
    "strided, dilated": (
        (3, 2, 2, 3),
        (2, 3, 3, 2),
        {"first_stride": 2, "second_dilation": (1, 3)},
    ),
    "grouped": ((4, 1, 2), (6, 2, 3), {"first_groups": 4, "second_groups": 2}),
    "3-d": ((2, 2, 1, 2, 2), (3, 2, 2, 1, 2), {"first_dilation": (1, 2, 3)}),
    "transposed": (
        (2, 3, 2, 2),
        (3, 2, 3, 3),
        {"first_stride": 2, "first_transposed": True, "second_transposed": True},
    ),
    "mixed": ((2, 3, 4, 4), (2, 3, 3, 3), {"first_stride": 2, "first_transposed": True}),
}


def make_operands(name: str, dtype: torch.dtype = torch.float64):
    first, second, keywords = OPERANDS[name]
    generator = torch.Generator().manual_seed(8)
    both_transposed = "second_transposed" in keywords
    mid = first[1] * keywords.get("first_groups", 1) if both_transposed else first[0]
    mid = first[1] if keywords.get("first_transposed") else mid
    out = second[1] if both_transposed else second[0]
    sizes = (first, (mid,), second, (out,))
    values = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    if both_transposed:
        values[1] = None
    return [None if value is None else value.to(dtype) for value in values], keywords


@pytest.mark.parametrize("name", OPERANDS)
def test_derivatives_compile_export_and_vmap(name: str) -> None:
    values, keywords = make_operands(name)

    def run(*values):
        return functional.fuse_conv_conv(*values, **keywords)

    used = [value.requires_grad_() for value in values if value is not None]

    def run_used(*given):
        given = list(given)
        return run(*(None if value is None else given.pop(0) for value in values))

    assert torch.autograd.gradcheck(run_used, used, fast_mode=True)
    assert torch.autograd.gradgradcheck(run_used, used, fast_mode=True)
    values = [None if value is None else value.detach() for value in values]
    expected = run(*values)
    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(*values), expected)

    class Fuse(nn.Module):
        def forward(self, *values):
            return run(*values)

    exported = torch.export.export(Fuse(), tuple(values)).module()
    torch.testing.assert_close(exported(*values), expected)
    weights, _ = torch.func.vmap(lambda first: run(first, *values[1:]))(
        torch.stack([values[0], -values[0]])
    )
    torch.testing.assert_close(weights, torch.stack([expected[0], -expected[0]]))


# (groups of the first, of the second): each way to share the work, and mixtures.
GROUPS = [(1, 1), (4, 1), (1, 4), (4, 4), (6, 2), (2, 6), (6, 4), (4, 6), (12, 12), (1, 12)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_own_kernel_equals_torchs_convolution(groups: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    one, two = groups
    sizes = [(24, 3, 3, 2), (24,), (36, 24 // two, 2, 3), (36,)]
    values = [torch.randn(size, generator=generator, dtype=dtype) for size in sizes]
    values[0] = values[0].transpose(0, 1).contiguous().transpose(0, 1)
    for options in (((1,), (1,), one, (1,), two), ((2, 3), (1, 2), one, (3, 1), two)):
        weight, bias = torch.ops.linfuse.fuse_conv_conv(*values, *options)
        exact = fuse_conv_conv_by_torch(*(value.double() for value in values), *options)
        assert weight.is_contiguous() and weight.dtype == dtype
        # Both sum in float64; the last digit of that may turn a rounding.
        eps, normal = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
        near = {"rtol": eps, "atol": max(1e-13, eps * normal)}
        torch.testing.assert_close(weight.double(), exact[0], **near)
        torch.testing.assert_close(bias.double(), exact[1], **near)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            again = torch.ops.linfuse.fuse_conv_conv(*values, *options)
        finally:
            torch.set_num_threads(before)
        assert torch.equal(weight, again[0]) and torch.equal(bias, again[1])


@pytest.mark.parametrize("groups", [(1, 1), (3, 1), (1, 2), (3, 2), (6, 4)])
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_not_finite_stays_where_it_belongs(which: int, groups: tuple[int, int]) -> None:
    """Channels of other groups are no zeros that it could be multiplied with."""
    shapes = ((12, 12 // groups[0], 2), (8, 12 // groups[1], 3))
    for place in range(0, shapes[which][0] * shapes[which][1] * shapes[which][2], 7):
        weights = [torch.ones(shape, dtype=torch.float64) for shape in shapes]
        weights[which].view(-1)[place] = torch.inf
        marked = [torch.ones_like(weight) for weight in weights]
        marked[which].zero_().view(-1)[place] = 1
        settings = {"first_groups": groups[0], "second_groups": groups[1]}
        fused = functional.fuse_conv_conv(weights[0], None, weights[1], None, **settings)[0]
        reached = functional.fuse_conv_conv(marked[0], None, marked[1], None, **settings)[0]
        assert torch.equal(fused.isinf(), reached != 0) and not fused.isnan().any()


def test_direct_calls_of_the_op_are_checked() -> None:
    first, second = torch.ones(4, 2, 3), torch.ones(6, 4, 3)
    op = torch.ops.linfuse.fuse_conv_conv
    with pytest.raises(ValueError, match="same 3, 4 or 5 dimensions"):
        op(first, None, torch.ones(6, 4, 3, 3), None)
    with pytest.raises(ValueError, match=r"`first_groups` must be .* got 3"):
        op(first, None, second, None, first_groups=3)
    with pytest.raises(ValueError, match=r"`second_groups` must be .* got 0"):
        op(first, None, second, None, second_groups=0)
    with pytest.raises(ValueError, match=r"`second_weight` must take the 4 channels .* got 8"):
        op(first, None, second, None, second_groups=2)
    with pytest.raises(ValueError, match=r"`first_stride` must be positive, got \(0,\)"):
        op(first, None, second, None, first_stride=[0])
    with pytest.raises(ValueError, match=r"`first_bias` must have shape \(4,\), got \(3,\)"):
        op(first, torch.ones(3), second, None)
    with pytest.raises(ValueError, match="no empty dimension"):
        op(first, None, torch.ones(6, 4, 0), None)
    with pytest.raises(ValueError, match="fit in 63 bits"):
        op(first, None, second, None, second_dilation=[2**62])


@pytest.mark.parametrize("name", ["plain", "strided, dilated", "grouped", "3-d"])
def test_opcheck(name: str) -> None:
    values, keywords = make_operands(name, torch.float32)
    axes = values[0].dim() - 2

    def each(key: str) -> list[int]:
        value = keywords.get(key, 1)
        return [value] * axes if isinstance(value, int) else list(value)

    torch.library.opcheck(
        torch.ops.linfuse.fuse_conv_conv.default,
        (
            *(value.requires_grad_() for value in values),
            each("first_stride"),
            each("first_dilation"),
            keywords.get("first_groups", 1),
            each("second_dilation"),
            keywords.get("second_groups", 1),
        ),
    )


def test_aot_inductor(tmp_path) -> None:
    values = [make_operands(name) for name in OPERANDS]

    class Fuse(nn.Module):
        def forward(self, operands):
            return [
                functional.fuse_conv_conv(*given, **keywords)
                for given, (_, keywords) in zip(operands, values, strict=True)
            ]

    given = [operands for operands, _ in values]
    program = torch.export.export(Fuse(), (given,))
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "f.pt2")
    )
    run = torch._inductor.aoti_load_package(package)
    flat = torch.utils._pytree.tree_leaves
    torch.testing.assert_close(flat(run(given)), flat(Fuse()(given)))


@st.composite
def layers(draw: st.DrawFn, channels: int, axes: int) -> nn.Module:
    transposed = draw(st.booleans())
    mode = (
        "zeros" if transposed else draw(st.sampled_from(["zeros", "zeros", "circular", "reflect"]))
    )
    groups = draw(st.sampled_from([1, 1, 2]))
    stride = tuple(draw(st.integers(1, 2)) for _ in range(axes))
    return conv(
        channels,
        4,
        tuple(draw(st.integers(1, 3)) for _ in range(axes)),
        stride,
        tuple(draw(st.integers(0, 4)) for _ in range(axes)),
        draw(st.integers(1, 2)),
        groups,
        draw(st.booleans()),
        mode,
        axes,
        transposed,
        tuple(draw(st.integers(0, s - 1)) for s in stride) if transposed else 0,
    )


@settings(max_examples=500, deadline=None)
@given(data=st.data(), axes=st.integers(1, 2))
def test_whatever_is_merged_is_exact(data: st.DataObject, axes: int) -> None:
    first = data.draw(layers(2, axes))
    second = data.draw(layers(4, axes))
    try:
        fused = lf.fuse_conv_conv(first, second)
    except lf.FusionError:
        return
    merged = 0
    for size in itertools.islice(itertools.product((9, 10, 12), repeat=axes), 4):
        x = torch.randn(1, 2, *size, dtype=torch.float64)
        try:
            y = second(first(x))
        except RuntimeError:  # too small for the two
            continue
        torch.testing.assert_close(fused(x), y, rtol=1e-9, atol=1e-9)
        merged += 1
