"""Random geometries, dtypes and row blocks against the reference."""

from __future__ import annotations

import torch
from cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conv_to_affine import call as to_affine
from test_fuse_conv_linear import assert_equals_the_reference, operands
from test_fuse_conv_linear import call as fuse
from tolerance import DTYPES, assert_close

from linfuse_ext import reference


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    """Geometries that are valid by construction; the kernel may still not fit, which is skipped."""
    axes = draw(st.integers(1, 3))
    most = {1: 14, 2: 8, 3: 5}[axes]

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    transposed = draw(st.booleans())
    mode = (
        "zeros"
        if transposed
        else draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    )
    groups = draw(st.integers(1, 3))
    channels = (groups * draw(st.integers(1, 3)), draw(st.integers(1, 4)))
    input_size, kernel = each(1, most), each(1, 4)
    stride, dilation = each(1, 4), each(1, 3)
    highest = {"reflect": min(input_size) - 1, "circular": min(input_size)}.get(mode, 5)
    extra = tuple(
        draw(st.integers(0, max(s, d) - 1)) if transposed else 0
        for s, d in zip(stride, dilation, strict=True)
    )
    padding = tuple(draw(st.integers(0, min(5, highest))) for _ in range(2 * axes))
    return Case(
        "random", "", (*channels, *kernel), input_size, stride, padding, dilation, groups,
        transposed, extra, mode, draw(st.booleans()),
    )  # fmt: skip


def fits(case: Case) -> bool:
    try:
        return case.geometry().rows * case.geometry().cols < 200_000
    except ValueError:
        return False


@settings(max_examples=250, deadline=None)
@given(case=random_cases().filter(fits), dtype=st.sampled_from(DTYPES), data=st.data())
def test_conv_to_affine(case: Case, dtype: torch.dtype, data: st.DataObject) -> None:
    weight, bias = case.weight(dtype), case.bias_vector(dtype)
    rows = case.geometry().rows
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    matrix, offset = to_affine(case, weight, bias, rows=(start, stop))
    wide = weight.double(), None if bias is None else bias.double()
    exact, exact_offset = reference.conv_to_affine(*wide, *case.arguments(), **case.keywords())
    magnitude, _ = reference.conv_to_affine(
        wide[0].abs(), None, *case.arguments(), **case.keywords()
    )
    assert_close(matrix, exact[start:stop], magnitude[start:stop], weight[0, 0].numel())
    assert torch.equal(offset.double(), exact_offset[start:stop])


@settings(max_examples=250, deadline=None)
@given(
    case=random_cases().filter(fits),
    dtype=st.sampled_from(DTYPES),
    features=st.integers(0, 40),
)
def test_fuse_conv_linear(case: Case, dtype: torch.dtype, features: int) -> None:
    tensors = operands(case, dtype, features)
    weight, bias = fuse(case, *tensors)
    assert_equals_the_reference(case, tensors, weight, bias)
