"""The index map: C++ against its Python mirror, against torch, and against nonsense."""

from __future__ import annotations

import random

import pytest
import torch
from cases import CASES, Case
from hypothesis import given, settings
from hypothesis import strategies as st

from linfuse_ext import _C
from linfuse_ext.geometry import PADDING_MODES, make_geometry


def names(case: Case) -> str:
    return case.name


def in_cpp(case: Case):
    geometry = case.geometry()
    input_size, stride, padding, dilation, groups = geometry.op_arguments
    return _C.make_geometry(
        "case", list(case.weight_size), list(input_size), list(stride), list(padding),
        list(dilation), groups, case.transposed, list(geometry.output_padding), case.padding_mode,
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=names)
def test_python_and_cpp_agree_on_sizes(case: Case) -> None:
    python, cpp = case.geometry(), in_cpp(case)
    assert (cpp.rows, cpp.cols) == (python.rows, python.cols)
    axes = len(python.output_size)
    assert cpp.output_size == (1,) * (3 - axes) + python.output_size
    assert (cpp.in_channels, cpp.out_channels) == (python.in_channels, python.out_channels)


@pytest.mark.parametrize("case", CASES, ids=names)
def test_rows_and_columns_list_the_same_taps(case: Case) -> None:
    cpp = in_cpp(case)
    for axis in range(3):
        by_row = {
            (row, col, k) for row, taps in enumerate(cpp.taps_by_row(axis)) for col, k in taps
        }
        by_column = {
            (row, col, k) for col, taps in enumerate(cpp.taps_by_column(axis)) for row, k in taps
        }
        assert by_row == by_column
        for taps in cpp.taps_by_row(axis) + cpp.taps_by_column(axis):
            assert taps == sorted(taps)


@pytest.mark.parametrize("mode", PADDING_MODES)
def test_padding_reads_where_torch_reads(mode: str) -> None:
    """Padding a row of numbers 0, 1, 2, ... shows which position each padded one reads."""
    import torch
    import torch.nn.functional as F

    size, low, high = 5, 3, 4
    cpp = _C.make_geometry("case", [1, 1, 1], [size], [1], [low, high], [1], 1, False, [0], mode)
    image = torch.arange(1.0, size + 1)[None, None]
    padded = F.pad(image, (low, high), mode="constant" if mode == "zeros" else mode)
    reads = [cpp.fine_position(2, o, 0) + 1 for o in range(size + low + high)]
    assert reads == padded.flatten().tolist()


@pytest.mark.parametrize("transposed", [False, True])
def test_every_kernel_has_its_place_in_the_weight(transposed: bool) -> None:
    groups, out_channels, in_channels = 3, 4, 2  # per group
    size = (
        [groups * in_channels, out_channels] if transposed else [groups * out_channels, in_channels]
    )
    cpp = _C.make_geometry("case", [*size, 5], [9], [1], [0], [1], groups, transposed, [0], "zeros")
    starts = {
        cpp.weight_index(c_out, c_in)
        for c_out in range(groups * out_channels)
        for c_in in range(in_channels)
    }
    assert starts == {5 * n for n in range(groups * out_channels * in_channels)}


def outcome(make) -> tuple[str, object]:
    try:
        geometry = make()
    except ValueError as error:
        return "error", str(error)
    return "sizes", (geometry.rows, geometry.cols)


SMALL = st.integers(-1, 6)
ANY = st.one_of(SMALL, st.sampled_from([2**31, 2**62, 2**63 - 1, -(2**63)]))


@settings(max_examples=600, deadline=None)
@given(
    axes=st.integers(1, 3),
    data=st.data(),
    groups=ANY,
    transposed=st.booleans(),
    mode=st.sampled_from([*PADDING_MODES, "mirror"]),
)
def test_python_and_cpp_accept_and_reject_the_same(axes, data, groups, transposed, mode) -> None:
    """Whatever comes in: the same verdict, the same sizes, and never an overflow."""
    number = data.draw(st.sampled_from([SMALL, ANY]))
    lists = st.lists(number, min_size=axes, max_size=axes)
    weight_size = data.draw(st.lists(number, min_size=axes + 2, max_size=axes + 2))
    input_size, stride, dilation, extra = (data.draw(lists) for _ in range(4))
    padding = data.draw(st.lists(number, min_size=axes, max_size=2 * axes))
    arguments = (
        weight_size,
        input_size,
        stride,
        padding,
        dilation,
        groups,
        transposed,
        extra,
        mode,
    )
    cpp = outcome(lambda: _C.make_geometry("case", *arguments))
    python = outcome(lambda: make_geometry("case", *arguments))
    assert cpp[0] == python[0], (cpp, python)
    if cpp[0] == "sizes":
        assert cpp[1] == python[1]
    else:
        assert cpp[1].startswith("case: ") and python[1].startswith("case: ")


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"transposed": True, "output_padding": [2]}, "smaller than the stride or the dilation"),
        ({"output_padding": [1]}, "0 unless the convolution is transposed, got"),
        (
            {"padding_mode": "reflect", "padding": [4]},
            "`padding` must be smaller than `input_size`",
        ),
        ({"padding_mode": "circular", "padding": [5]}, "`padding` must be at most `input_size`"),
        ({"input_size": [2]}, "leaves none for a kernel that spans 3"),
        ({"transposed": True, "padding": [9]}, "the output must have at least one position"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_python_and_cpp_say_the_same(named: dict[str, object], words: str) -> None:
    """Of what no single argument breaks, but two together."""
    settings = {
        "weight_size": [1, 1, 3],
        "input_size": [4],
        "stride": [2],
        "padding": [0],
        "dilation": [1],
        "groups": 1,
        "transposed": False,
        "output_padding": [0],
        "padding_mode": "zeros",
    } | named
    for make in (_C.make_geometry, make_geometry):
        kind, text = outcome(lambda make=make: make("case", *settings.values()))
        assert kind == "error" and text.startswith("case: ") and words in text


def test_output_sizes_are_those_of_torch() -> None:
    import torch
    import torch.nn.functional as F

    seeded = random.Random(0)
    for _ in range(300):
        size, kernel = seeded.randint(1, 12), seeded.randint(1, 4)
        stride, padding, dilation = seeded.randint(1, 4), seeded.randint(0, 5), seeded.randint(1, 3)
        extra = seeded.randint(0, max(stride, dilation) - 1)
        x, weight = torch.empty(1, 1, size, device="meta"), torch.empty(1, 1, kernel, device="meta")
        for transposed in (False, True):
            try:
                if transposed:
                    expected = F.conv_transpose1d(
                        x, weight, None, stride, padding, extra, 1, dilation
                    ).shape[2]
                else:
                    expected = F.conv1d(x, weight, None, stride, padding, dilation).shape[2]
            except RuntimeError:
                expected = None
            try:
                actual = make_geometry(
                    "case", weight.shape, size, stride, padding, dilation, 1, transposed,
                    extra if transposed else 0,
                ).output_size[0]  # fmt: skip
            except ValueError:
                actual = None
            assert actual == (expected or None)


def test_what_is_remembered_hides_no_error() -> None:
    """1, 1.0 and True are equal and hash alike, but only the first is an int."""
    import numpy as np

    good = make_geometry("case", (4, 2, 3, 3), (6, 7), (1, 1), 1, (1, 1), 1, False)
    for numbers in ([1, 1], (np.int64(1), np.int64(1))):
        assert make_geometry("case", (4, 2, 3, 3), [6, 7], numbers, 1, numbers, 1, False) == good
    for bad in (1.0, True, (1, 1.0), (True, 1), np.float64(1), ("1", "1"), None):
        for name in ("stride", "padding", "dilation", "groups"):
            with pytest.raises(TypeError, match=f"`{name}` must be an int"):
                make_geometry("case", (4, 2, 3, 3), (6, 7), **{name: bad})
    with pytest.raises(TypeError, match="`input_size` must be an int"):
        make_geometry("case", (4, 2, 3, 3), (6.0, 7), (1, 1), 1, (1, 1), 1, False)
    # What shows its memory is spelled like the bytes in it.
    number = np.int64(1)
    assert make_geometry("case", (4, 2, 3, 3), torch.Size([6, 7]), number, number, number) == good
    for same in (number.tobytes(), number.view(np.float64)):
        with pytest.raises(TypeError, match="`stride` must be an int"):
            make_geometry("case", (4, 2, 3, 3), (6, 7), same, number, number)
    # A list may have changed since.
    sizes = [6, 7]
    make_geometry("case", (4, 2, 3, 3), sizes)
    sizes[0] = 9
    assert make_geometry("case", (4, 2, 3, 3), sizes).input_size == (9, 7)
    for bad in (0, [], None):
        with pytest.raises(TypeError, match="`transposed` must be a bool"):
            make_geometry("case", (4, 2, 3, 3), (6, 7), (1, 1), 1, (1, 1), 1, bad)


def test_errors_name_the_op_that_was_called() -> None:
    for op in ("first", "second", "first"):
        with pytest.raises(ValueError, match=f"^{op}: `stride` must be positive"):
            make_geometry(op, (4, 2, 3, 3), (6, 7), 0)
