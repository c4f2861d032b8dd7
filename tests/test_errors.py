"""Every bad argument: the right kind of error, naming op, argument, requirement and value."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad

from linfuse_ext import functional

WEIGHT = torch.ones(4, 2, 3, 3)
BIAS = torch.ones(4)
LINEAR = torch.ones(5, 4 * 4 * 3)  # behind WEIGHT on (6, 5)


def affine(*arguments, weight=WEIGHT, bias=BIAS, **keywords):
    arguments = arguments or ((6, 5),)
    return lambda: functional.conv_to_affine(weight, bias, *arguments, **keywords)


def fused(*arguments, conv=WEIGHT, bias=BIAS, linear=LINEAR, linear_bias=None, **keywords):
    arguments = arguments or ((6, 5),)
    return lambda: functional.fuse_conv_linear(
        conv, bias, linear, linear_bias, *arguments, **keywords
    )


VALUES = [
    (affine(weight=torch.ones(2, 3)), "the convolution's weight must have 3, 4 or 5 dimensions, got shape (2, 3)"),
    (affine(weight=torch.ones(1, 1, 1, 1, 1, 1)), "must have 3, 4 or 5 dimensions"),
    (affine(weight=torch.ones(4, 0, 3, 3)), "must have no empty dimension, got shape (4, 0, 3, 3)"),
    (affine((6, 5, 4)), "`input_size` must have one value or 2, got (6, 5, 4)"),
    (affine((6, 0)), "`input_size` must be positive, got (6, 0)"),
    (affine((6, -5)), "`input_size` must be positive, got (6, -5)"),
    (affine(()), "`input_size` must have one value or 2, got ()"),
    (affine((6, 5), (0, 1)), "`stride` must be positive, got (0, 1)"),
    (affine((6, 5), (1, 1, 1)), "`stride` must have one value or 2, got (1, 1, 1)"),
    (affine((6, 5), 1, -1), "`padding` must be non-negative, got (-1,)"),
    (affine((6, 5), 1, (1, 2, 3)), "`padding` must have one value or 2, got (1, 2, 3)"),
    (affine((6, 5), 1, (1, 2, 3, -4)), "`padding` must be non-negative, got (1, 2, 3, -4)"),
    (affine((6, 5), 1, "full"), "`padding` must be 'same', 'valid' or numbers, got 'full'"),
    (affine((6, 5), 2, "same"), "`padding` must not be 'same' for a strided convolution, got stride (2, 2)"),
    (affine((6, 5), 1, "same", transposed=True), "`padding` must not be 'same' for a transposed convolution"),
    (affine((6, 5), 1, 0, 0), "`dilation` must be positive, got (0,)"),
    (affine((6, 5), 1, 0, 1, 0), "`groups` must be positive, got 0"),
    (affine((6, 5), 1, 0, 1, 3), "`groups` must divide the output channels (4), got 3"),
    (affine((6, 5), 1, 0, 1, 3, transposed=True), "`groups` must divide the input channels (4), got 3"),
    (affine((2, 5)), "the output must have at least one position per axis, but `input_size` (2, 5) leaves none"),
    (affine((6, 5), 1, 9, transposed=True), "the output must have at least one position per axis"),
    (affine(output_padding=1), "`output_padding` must be 0 unless the convolution is transposed, got (1, 1)"),
    (affine((6, 5), 2, transposed=True, output_padding=2, bias=None), "`output_padding` must be smaller than the stride or the dilation, got (2, 2)"),
    (affine((6, 5), transposed=True, output_padding=-1), "`output_padding` must be non-negative, got (-1,)"),
    (affine(padding_mode="mirror"), "`padding_mode` must be 'zeros', 'reflect', 'replicate' or 'circular', got 'mirror'"),
    (affine(padding_mode="reflect", transposed=True), "`padding_mode` must be 'zeros' for a transposed convolution, got 'reflect'"),
    (affine((6, 5), 1, 5, padding_mode="reflect"), "`padding` must be smaller than `input_size` in this padding mode"),
    (affine((6, 5), 1, 6, padding_mode="circular"), "`padding` must be at most `input_size` in this padding mode"),
    (affine(bias=torch.ones(3)), "`bias` must have shape (4,), got (3,)"),
    (affine(bias=torch.ones(4, 1)), "`bias` must have shape (4,), got (4, 1)"),
    (affine(bias=torch.ones(4, device="meta")), "`bias` must be on the device of the weight (cpu), got meta"),
    (affine(rows=(0, 49)), "`rows` must be (start, stop) with 0 <= start <= stop <= 48, got (0, 49)"),
    (affine(rows=(3, 2)), "`rows` must be (start, stop) with 0 <= start <= stop <= 48, got (3, 2)"),
    (affine(rows=(-1, 2)), "got (-1, 2)"),
    (affine(layout=torch.sparse_bsr), "`layout` must be torch.strided, torch.sparse_csr or torch.sparse_coo, got torch.sparse_bsr"),
    (affine((2**62, 2**62), 2**62), "the sizes must fit in 63 bits"),
    (affine((2**70, 5)), "the sizes must fit in 63 bits"),
    (affine((2**31, 2**31)), "the sizes must fit in 63 bits"),
    (fused(linear=torch.ones(5, 47)), "`linear_weight` must have shape (F, 48), as the convolution's output flattens to 48, got (5, 47)"),
    (fused(linear=torch.ones(48)), "`linear_weight` must have shape (F, 48), as the convolution's output flattens to 48, got (48,)"),
    (fused(linear_bias=torch.ones(4)), "`linear_bias` must have shape (5,), got (4,)"),
    (fused(bias=torch.ones(5)), "`conv_bias` must have shape (4,), got (5,)"),
    (fused((6, 5), (1, -1)), "`stride` must be positive, got (1, -1)"),
]  # fmt: skip

TYPES = [
    (affine(weight=[1.0]), "`weight` must be a tensor, got list"),
    (affine(weight=torch.ones(4, 2, 3, 3, dtype=torch.int32)), "`weight` must be float32, float64, float16 or bfloat16, got torch.int32"),
    (affine(weight=torch.ones(4, 2, 3, 3).to_sparse()), "`weight` must be a dense tensor, got torch.sparse_coo"),
    (affine(bias=torch.ones(4).double()), "`bias` must have the dtype of the weight (torch.float32), got torch.float64"),
    (affine(bias=1.0), "`bias` must be a tensor, got float"),
    (affine((6, 5.5)), "`input_size` must be an int, got 5.5 (float)"),
    (affine("65"), "`input_size` must be an int or a sequence of ints, got '65'"),
    (affine((6, 5), True), "`stride` must be an int, got True"),
    (affine((6, 5), None), "`stride` must be an int, got None (NoneType)"),
    (affine((6, 5), 1, 0, 1, 1.0), "`groups` must be an int, got 1.0 (float)"),
    (affine(rows=3), "`rows` must be a pair (start, stop) or None, got 3"),
    (affine(rows=(0, 1.5)), "`rows` must be an int, got 1.5 (float)"),
    (affine(transposed="no"), "`transposed` must be a bool, got 'no'"),
    (affine(padding_mode=None), "`padding_mode` must be a str, got None"),
    (affine(layout="dense"), "`layout` must be a torch.layout, got 'dense'"),
    (fused(linear=LINEAR.double()), "`linear_weight` must have the dtype of the weight (torch.float32), got torch.float64"),
    (fused(linear=None), "`linear_weight` must be a tensor, got NoneType"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(VALUES)))
def test_wrong_values(number: int) -> None:
    call, message = VALUES[number]
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value)
    assert str(caught.value).split(": ")[0] in ("conv_to_affine", "fuse_conv_linear")


@pytest.mark.parametrize("number", range(len(TYPES)))
def test_wrong_types(number: int) -> None:
    call, message = TYPES[number]
    with pytest.raises(TypeError) as caught:
        call()
    assert message in str(caught.value)
    assert str(caught.value).split(": ")[0] in ("conv_to_affine", "fuse_conv_linear")


def direct_affine(size=(6, 5), bias=BIAS, weight=WEIGHT, **keywords):
    return lambda: torch.ops.linfuse.conv_to_affine(weight, bias, list(size), **keywords)


def direct_fused(linear=LINEAR, linear_bias=None, conv_bias=BIAS, size=(6, 5)):
    return lambda: torch.ops.linfuse.fuse_conv_linear(
        WEIGHT, conv_bias, linear, linear_bias, list(size)
    )


DIRECT = [
    (direct_affine(weight=torch.ones(2, 3)), "must have 3, 4 or 5 dimensions, got shape (2, 3)"),
    (direct_affine(weight=WEIGHT.int()), "`weight` must be float32, float64, float16 or bfloat16"),
    (direct_affine((6, 5, 4)), "`input_size` must have one value or 2, got (6, 5, 4)"),
    (direct_affine((6,)), None),  # one value stands for all axes
    (direct_affine(bias=BIAS.to("meta")), "`bias` must be on the device"),
    (direct_fused(LINEAR.to("meta")), "`linear_weight` must be on the device"),
    (direct_affine(stride=[0]), "`stride` must be positive, got (0,)"),
    (direct_affine(stride=[2**62]), None),  # a huge step is no error: one output position
    (direct_affine(dilation=[2**62]), "the sizes must fit in 63 bits"),
    (direct_affine(padding=[2**62]), "the sizes must fit in 63 bits"),
    (direct_affine(padding=[1, 1, 1]), "`padding` must have one value or 2, got (1, 1, 1)"),
    (direct_affine(groups=3), "`groups` must divide the output channels (4), got 3"),
    (direct_affine(padding_mode="mirror"), "`padding_mode` must be 'zeros'"),
    (direct_affine(output_padding=[1]), "`output_padding` must be 0 unless"),
    (direct_affine(bias=torch.ones(3)), "`bias` must have shape (4,), got (3,)"),
    (direct_affine(bias=BIAS.double()), "`bias` must have the dtype of `weight`"),
    (direct_affine(rows=[0, 49]), "`rows` must be (start, stop) with 0 <= start <= stop <= 48"),
    (direct_affine(rows=[1]), "got (1,)"),
    (direct_fused(torch.ones(48)), "`linear_weight` must have 2 dimensions, got shape (48,)"),
    (direct_fused(torch.ones(5, 47)), "`linear_weight` must have shape (5, 48), got (5, 47)"),
    (direct_fused(LINEAR.half()), "`linear_weight` must have the dtype of `conv_weight`"),
    (direct_fused(linear_bias=torch.ones(4)), "`linear_bias` must have shape (5,), got (4,)"),
    (direct_fused(conv_bias=torch.ones(5)), "`conv_bias` must have shape (4,), got (5,)"),
    (lambda: torch.ops.linfuse.conv_to_affine_backward(torch.ones(3, 3), [4, 2, 3, 3], [6, 5]),
     "`grad_matrix` must have shape (48, 60), got (3, 3)"),
    (lambda: torch.ops.linfuse.convolve_rows(torch.ones(3, 3), WEIGHT, [6, 5]),
     "`rows` must have shape (F, 60), got (3, 3)"),
    (lambda: torch.ops.linfuse.fuse_conv_linear_backward_conv(
        torch.ones(3, 60), torch.ones(3, 47), [4, 2, 3, 3], [6, 5]),
     "`linear_weight` must have shape (3, 48), got (3, 47)"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(DIRECT)))
def test_direct_callers_meet_the_same_checks(number: int) -> None:
    call, message = DIRECT[number]
    if message is None:
        call()
        return
    with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
        call()
    assert message in str(caught.value)


def test_forward_mode_is_refused_and_not_zero() -> None:
    """A custom op without a forward rule would give a derivative of zeros."""
    for call in (
        lambda weight: functional.conv_to_affine(weight, BIAS, (6, 5))[0],
        lambda weight: functional.fuse_conv_linear(weight, BIAS, LINEAR, None, (6, 5))[0],
        lambda weight: functional.fuse_linear_conv(torch.ones(60, 2), None, weight, None, (6, 5))[
            0
        ],
        lambda weight: functional.fuse_conv_conv(weight, None, torch.ones(1, 4, 1, 1), None)[0],
    ):
        with pytest.raises(ValueError, match="must carry no forward-mode tangent"):
            torch.func.jvp(call, (WEIGHT,), (WEIGHT,))
        with forward_ad.dual_level():
            call(WEIGHT)  # no tangent, no objection


def test_too_large_for_the_machine_is_an_ordinary_error() -> None:
    """A matrix of 10^17 elements: torch's own out-of-memory error, and the process goes on."""
    weight = torch.ones(1, 1, 1)
    with pytest.raises(RuntimeError, match=r"(?i)memory|alloc"):
        functional.conv_to_affine(weight, None, 3 * 10**8)
    assert functional.conv_to_affine(weight, None, 2)[0].sum() == 2
