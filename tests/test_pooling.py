"""Average pooling as a convolution: the same numbers, or a refusal that says why."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import DTYPES
from torch import nn

from linfuse_ext.errors import FusionError
from linfuse_ext.pooling import pool_to_conv

POOLS = {
    "1d": (nn.AvgPool1d(3), (11,)),
    "1d padded": (nn.AvgPool1d(4, 3, 2), (11,)),
    "1d ceil, stride 1": (nn.AvgPool1d(4, 1, 1, ceil_mode=True), (11,)),
    "2d": (nn.AvgPool2d(2), (9, 8)),
    "2d global": (nn.AvgPool2d((9, 8)), (9, 8)),
    "2d kernel 1": (nn.AvgPool2d(1, 2), (9, 8)),
    "2d rectangular": (nn.AvgPool2d((3, 2), (2, 3), (1, 0)), (9, 8)),
    "2d not counted, no padding": (nn.AvgPool2d(3, 2, count_include_pad=False), (9, 8)),
    "2d divisor": (nn.AvgPool2d(3, 2, 1, divisor_override=5), (9, 8)),
    "2d divisor, not counted": (
        nn.AvgPool2d(3, 2, 1, count_include_pad=False, divisor_override=-5),
        (9, 8),
    ),
    "2d ceil, padding of kernel - 1": (nn.AvgPool2d(2, 3, 1, ceil_mode=True), (9, 8)),
    "3d": (nn.AvgPool3d(2, 1), (4, 5, 6)),
    "3d padded": (nn.AvgPool3d((2, 3, 4), (1, 2, 3), (1, 1, 2)), (4, 5, 6)),
    "3d divisor": (nn.AvgPool3d(2, 2, divisor_override=3), (4, 5, 6)),
}


@pytest.mark.parametrize("name", POOLS)
def test_computes_the_same(name: str) -> None:
    pool, size = POOLS[name]
    for channels, dtype in itertools.product((1, 5), (torch.float32, torch.float64)):
        conv = pool_to_conv(pool, channels, dtype=dtype)
        x = torch.randn(3, channels, *size, dtype=dtype)
        torch.testing.assert_close(conv(x), pool(x))
        assert type(conv) is (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(size) - 1]
        assert (
            conv.groups == channels
            and conv.bias is None
            and conv.weight.shape[:2]
            == (
                channels,
                1,
            )
        )


def refused(pool: nn.Module, *arguments: object) -> bool:
    try:
        pool_to_conv(pool, *arguments)
    except FusionError:
        return True
    return False


def per_axis(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


@settings(max_examples=300, deadline=None)
@given(
    kernel=per_axis(1, 5),
    stride=per_axis(1, 5),
    padding=per_axis(0, 2),
    size=per_axis(1, 12),
    ceil_mode=st.booleans(),
    count_include_pad=st.booleans(),
    divisor=st.sampled_from([None, 3]),
)
def test_exact_or_refused_for_a_size(
    kernel, stride, padding, size, ceil_mode, count_include_pad, divisor
) -> None:
    padding = tuple(min(p, k // 2) for p, k in zip(padding, kernel, strict=True))
    if any(s + 2 * p < k for s, p, k in zip(size, padding, kernel, strict=True)):
        return
    pool = nn.AvgPool2d(kernel, stride, padding, ceil_mode, count_include_pad, divisor)
    x = torch.rand(1, 2, *size, dtype=torch.float64) + 0.5
    exact = pool(x)
    try:
        conv = pool_to_conv(pool, 2, size, dtype=torch.float64)
    except FusionError:
        # Rightly so: the plain convolution, with either divisor, computes something else.
        if any(padding) and not count_include_pad and divisor is None:
            return  # for some sizes no window meets the padding, but that is not looked at
        assert exact.shape != nn.AvgPool2d(kernel, stride, padding)(x).shape
    else:
        torch.testing.assert_close(conv(x), exact)


@pytest.mark.parametrize("kernel", range(1, 6))
def test_ceil_mode_is_exact_for_all_sizes_or_refused(kernel: int) -> None:
    """Against torch, on every small size: windows are added for none, or there is an error."""
    for stride, padding in itertools.product(range(1, 6), range(kernel // 2 + 1)):
        up, down = (nn.AvgPool1d(kernel, stride, padding, ceil_mode=mode) for mode in (True, False))
        adds = {
            size: up(torch.ones(1, 1, size)).shape != down(torch.ones(1, 1, size)).shape
            for size in range(max(1, kernel - 2 * padding), 25)
        }
        assert refused(up, 1) == any(adds.values())
        for size, added in adds.items():
            assert refused(up, 1, size) == added


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flags(dtype: torch.dtype) -> None:
    pool = nn.AvgPool2d(3)
    for training in (True, False):
        conv = pool_to_conv(pool.train(training), 4, dtype=dtype)
        assert conv.training == training and not conv.weight.requires_grad
        assert conv.weight.dtype == dtype
        assert torch.equal(conv.weight, torch.full((4, 1, 3, 3), 1 / 9, dtype=dtype))
    assert pool_to_conv(pool, 4, device="meta").weight.is_meta


def test_no_random_number_is_drawn() -> None:
    before = torch.get_rng_state()
    assert pool_to_conv(nn.AvgPool2d(3), 4).weight.dtype == torch.get_default_dtype()
    assert torch.equal(torch.get_rng_state(), before)


class OwnPool(nn.AvgPool2d):
    def forward(self, x):
        return super().forward(x) * 2


NOT_COUNTED = nn.AvgPool2d(3, 2, 1, count_include_pad=False)
CEIL = nn.AvgPool2d(3, 2, ceil_mode=True)
REFUSED = [
    (lambda: pool_to_conv(nn.MaxPool2d(2), 3), TypeError,
     "pool_to_conv: `pool` must be one of AvgPool1d, AvgPool2d, AvgPool3d, got MaxPool2d"),
    (lambda: pool_to_conv(OwnPool(2), 3), TypeError, "but OwnPool overrides forward"),
    (lambda: pool_to_conv(nn.AvgPool2d(2), 0), ValueError,
     "pool_to_conv: `channels` must be positive, got 0"),
    (lambda: pool_to_conv(nn.AvgPool2d(2), 2.0), TypeError,
     "pool_to_conv: `channels` must be an int, got 2.0 (float)"),
    (lambda: pool_to_conv(nn.AvgPool2d(2), 3, dtype=torch.int32), TypeError,
     "pool_to_conv: `dtype` must be float32, float64, float16 or bfloat16, got torch.int32"),
    (lambda: pool_to_conv(nn.AvgPool2d(2), 3, (4, 4, 4)), ValueError,
     "pool_to_conv: `input_size` must have one value or 2, got (4, 4, 4)"),
    (lambda: pool_to_conv(nn.AvgPool2d(2, 0), 3), ValueError,
     "pool_to_conv: `pool.stride` must be positive, got (0,)"),
    (lambda: pool_to_conv(nn.AvgPool2d((3, 2), padding=(1, 2)), 3), ValueError,
     "pool_to_conv: `pool.padding` must be at most half of the kernel size (3, 2), got (1, 2)"),
    (lambda: pool_to_conv(nn.AvgPool2d(2, divisor_override=0), 3), ValueError,
     "pool_to_conv: `pool.divisor_override` must not be zero, got 0"),
    (lambda: pool_to_conv(NOT_COUNTED, 3), FusionError,
     "pool_to_conv: `pool` must count its padding, as windows at the border otherwise divide by "
     "fewer elements than the others; got AvgPool2d(kernel_size=3, stride=2, padding=1) with "
     "count_include_pad=False. Exact instead: "),
    (lambda: pool_to_conv(CEIL, 3), FusionError,
     "pool_to_conv: `pool` must not reach beyond its padded input, as no padding of a convolution "
     "does; ceil_mode=True adds such windows for some input sizes, got AvgPool2d(kernel_size=3, "
     "stride=2, padding=0). Exact instead: `input_size`, if it adds none for that size; or "
     "ceil_mode=False"),
    (lambda: pool_to_conv(CEIL, 3, (7, 8)), FusionError,
     "ceil_mode=True adds such windows for input size (7, 8), got AvgPool2d(kernel_size=3, "
     "stride=2, padding=0). Exact instead: ceil_mode=False"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_refusals_say_why(number: int) -> None:
    call, kind, message = REFUSED[number]
    with pytest.raises(kind) as caught:
        call()
    assert message in str(caught.value)
