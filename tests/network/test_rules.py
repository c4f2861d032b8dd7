"""Every composition rule: the one map computes what the two did, or says which rule it breaks."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from linfuse_ext.composition import Conv, Refusal
from linfuse_ext.geometry import make_geometry, make_settings
from linfuse_ext.network.alignment import align, symmetric
from linfuse_ext.network.joins import add, concatenate
from linfuse_ext.network.maps import (
    AffineMap,
    Convolution,
    Deferred,
    Dense,
    Diagonal,
    Shape,
    View,
    dense,
    identity,
)
from linfuse_ext.network.rules import RULES, compose


def random(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64) - 0.5


def known(value: Tensor) -> Deferred:
    return Deferred(value.shape, lambda: value)


def convolution(
    in_shape: Shape, out_channels: int, kernel: Shape, bias: str = "", **settings: Any
) -> Convolution:
    """A random convolution; `bias` is "channel", "map" or nothing."""
    groups = settings.get("groups", 1)
    shape = (out_channels, in_shape[0] // groups, *kernel)
    if settings.get("transposed"):
        shape = (in_shape[0], out_channels // groups, *kernel)
    geometry = make_geometry("test", shape, in_shape[1:], **settings)
    out_shape = (out_channels, *geometry.output_size)
    ones = [1] * len(kernel)
    offset = {
        "": None,
        "channel": known(random(out_channels, *ones)),
        "map": known(random(*out_shape)),
    }[bias]
    conv = Conv.of(make_settings("test", shape, **settings), False)
    return Convolution(in_shape, out_shape, offset, conv, known(random(*shape)))


def assert_same(got: AffineMap | Refusal, want: list[AffineMap]) -> None:
    """One map is several in a row: matrix, adjoint, offset, shapes."""
    assert not isinstance(got, Refusal), got.rule
    assert (got.in_shape, got.out_shape) == (want[0].in_shape, want[-1].out_shape)
    matrix = torch.eye(want[0].cols, dtype=torch.float64)
    offset = torch.zeros(want[0].cols, dtype=torch.float64)
    for affine in want:
        matrix = affine.apply(matrix)
        offset = affine.apply(offset.unsqueeze(1)).squeeze(1)
        own = affine.flat_offset()
        offset = offset if own is None else offset + own
    torch.testing.assert_close(got.matrix(), matrix, rtol=1e-12, atol=1e-12)
    found = got.flat_offset()
    found = torch.zeros_like(offset) if found is None else found
    torch.testing.assert_close(found, offset, rtol=1e-12, atol=1e-12)


CONVOLUTIONS = {
    "plain": ((3, 3), {}),
    "pointwise": ((1, 1), {}),
    "padded": ((3, 2), {"padding": (1, 0)}),
    "full": ((2, 3), {"padding": (1, 2)}),
    "uneven": ((2, 2), {"padding": (0, 1, 2, 0)}),
    "strided": ((2, 2), {"stride": (2, 1)}),
    "dilated": ((2, 2), {"dilation": 2, "groups": 2}),
    "depthwise": ((2, 1), {"groups": 4}),
    "circular": ((3, 3), {"padding": 1, "padding_mode": "circular"}),
    "reflect": ((3, 3), {"padding": 1, "padding_mode": "reflect"}),
    "transposed": ((2, 3), {"transposed": True}),
    "transposed_strided": ((3, 3), {"transposed": True, "stride": 2, "padding": 1,
                                    "output_padding": 1}),
    "transposed_groups": ((2, 2), {"transposed": True, "groups": 2, "stride": 2}),
}  # fmt: skip
BIASES = ("", "channel", "map")


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize(
    ("first", "second"), [pytest.param(*pair, id="-".join(pair))
                          for pair in itertools.product(CONVOLUTIONS, repeat=2)]
)  # fmt: skip
def test_two_convolutions(first: str, second: str, bias: str) -> None:
    torch.manual_seed(1)
    kernel, settings = CONVOLUTIONS[first]
    one = convolution((4, 7, 6), 4, kernel, bias, **settings)
    kernel, settings = CONVOLUTIONS[second]
    two = convolution(one.out_shape, 4, kernel, "channel", **settings)
    merged = compose(two, one)
    if isinstance(merged, Refusal):
        # Nothing between them is refused where the second does not pad and both are of one kind.
        assert two.settings.transposed or any(two.settings.pads) or one.settings.transposed or (
            one.settings.padding_mode != "zeros" and any(one.settings.pads)
        )  # fmt: skip
        return
    assert_same(merged, [one, two])
    even = symmetric(merged) if isinstance(merged, Convolution) else merged
    if not isinstance(even, Refusal):
        assert isinstance(even, Convolution)
        assert all(low == high for low, high in even.settings.padding)
        assert_same(even, [one, two])


def test_a_bias_in_front_of_padding_becomes_a_map() -> None:
    one = convolution((2, 5, 4), 3, (1, 1), "channel")
    two = convolution(one.out_shape, 2, (3, 3), "channel", padding=1)
    merged = compose(two, one)
    assert isinstance(merged, Convolution) and merged.offset is not None
    assert merged.offset.shape == (2, 5, 4)
    assert_same(merged, [one, two])
    unpadded = convolution(one.out_shape, 2, (3, 3), "channel")
    merged = compose(unpadded, one)
    assert isinstance(merged, Convolution) and merged.offset is not None
    assert merged.offset.shape == (2, 1, 1)


def test_padding_that_hides_values_is_refused_by_its_rule() -> None:
    one = convolution((2, 5, 4), 3, (3, 3), padding=1)
    two = convolution(one.out_shape, 2, (3, 3), padding=1)
    merged = compose(two, one)
    assert isinstance(merged, Refusal) and "padding between the layers hides values" in merged.rule


def test_repeating_padding_wider_than_the_input_is_refused() -> None:
    one = convolution((2, 1), 2, (3,), padding=1, padding_mode="circular")
    merged = compose(convolution((2, 1), 2, (3,), padding=1, padding_mode="circular"), one)
    assert isinstance(merged, Refusal) and "wider than the input" in merged.rule


def diagonal(shape: Shape, scale: Shape, shift: Shape | None) -> Diagonal:
    return Diagonal(shape, shape, None if shift is None else known(random(*shift)),
                    known(random(*scale)))  # fmt: skip


def matrix(in_shape: Shape, out_shape: Shape, lead: Shape = (), shift: bool = True) -> Dense:
    rows, cols = (math.prod(shape[len(lead) :]) for shape in (out_shape, in_shape))
    ones = [1] * (len(out_shape) - 1)
    offset = known(random(*(out_shape if not lead else (*ones, out_shape[-1])))) if shift else None
    return Dense(in_shape, out_shape, offset, known(random(rows, cols)), lead)


CHANNEL = diagonal((4, 7, 6), (4, 1, 1), (4, 1, 1))
PAIRS = {
    (Convolution, Diagonal): [
        (convolution((4, 7, 6), 4, kernel, bias, **settings), CHANNEL)
        for kernel, settings in CONVOLUTIONS.values()
        for bias in BIASES
    ],
    (Diagonal, Convolution): [
        (diagonal(conv.out_shape, (4, 1, 1), shift), conv)
        for kernel, settings in CONVOLUTIONS.values()
        for conv in [convolution((4, 7, 6), 4, kernel, "channel", **settings)]
        for shift in (None, (4, 1, 1), (1, 1, conv.out_shape[2]))
    ],
    (Diagonal, Diagonal): [
        (diagonal((4, 3), (4, 1), (1, 3)), diagonal((4, 3), (1, 3), (4, 1))),
        (diagonal((4, 3), (4, 1), None), diagonal((4, 3), (1, 3), None)),
    ],
    (Dense, Dense): [
        (matrix((3,), (2,)), matrix((5,), (3,))),
        (matrix((3,), (2,)), matrix((5,), (3,), shift=False)),
        (matrix((2, 3), (4,)), matrix((5, 2), (2, 3))),
        (matrix((4, 3), (4, 2), (4,)), matrix((4, 5), (4, 3), (4,))),
    ],
    (Dense, Diagonal): [
        (matrix((3,), (2,)), diagonal((3,), (3,), (1,))),
        (matrix((2, 3), (4,)), diagonal((2, 3), (2, 1), (2, 3))),
        (matrix((4, 3), (4, 2), (4,)), diagonal((4, 3), (1, 3), (4, 1))),
        (matrix((4, 3), (4, 2), (4,)), diagonal((4, 3), (1, 3), None)),
    ],
    (Diagonal, Dense): [
        (diagonal((3,), (3,), (1,)), matrix((2,), (3,))),
        (diagonal((4, 3), (1, 3), (4, 1)), matrix((4, 2), (4, 3), (4,))),
    ],
    (Dense, View): [(matrix((6,), (2,)), View((2, 3), (6,), None))],
    (View, Dense): [(View((6,), (2, 3), None), matrix((4,), (6,)))],
    (View, View): [(View((6,), (3, 2), None), View((2, 3), (6,), None))],
}


@pytest.mark.parametrize("kinds", PAIRS, ids=lambda kinds: "-".join(k.__name__ for k in kinds))
def test_a_pair_of_other_kinds(kinds: Any) -> None:
    for second, first in PAIRS[kinds]:
        assert_same(compose(second, first), [first, second])


def test_every_rule_is_tested() -> None:
    assert set(PAIRS) | {(Convolution, Convolution)} == set(RULES)


@pytest.mark.parametrize(
    ("second", "first"),
    [
        (diagonal((4, 7, 6), (1, 7, 1), None), convolution((4, 7, 6), 4, (1, 1))),
        (convolution((4, 7, 6), 4, (1, 1)), diagonal((4, 7, 6), (1, 7, 1), None)),
        (matrix((4, 3), (4, 2), (4,)), diagonal((4, 3), (4, 1), None)),
        (diagonal((4, 3), (4, 1), None), matrix((4, 2), (4, 3), (4,))),
        (matrix((4, 3), (2,)), matrix((4, 3), (4, 3), (4,))),
        (View((4, 7, 6), (168,), None), convolution((4, 7, 6), 4, (1, 1))),
        (matrix((2, 6), (2, 3), (2,)), View((12,), (2, 6), None)),
        (View((4, 3), (12,), None), matrix((4, 2), (4, 3), (4,))),
    ],
)
def test_what_has_no_small_form_is_refused_and_has_a_matrix(second: Any, first: Any) -> None:
    refused = compose(second, first)
    assert isinstance(refused, Refusal) and refused.rule
    found, offset = dense([first, second])
    whole = Dense(first.in_shape, second.out_shape, None, known(found))
    if offset is not None:
        whole = Dense(first.in_shape, second.out_shape, known(offset.reshape(second.out_shape)),
                      known(found))  # fmt: skip
    assert_same(whole, [first, second])


def test_the_identity_is_neutral() -> None:
    affine = convolution((4, 7, 6), 4, (1, 1))
    assert compose(affine, identity((4, 7, 6))) is affine
    assert compose(identity((4, 7, 6)), affine) is affine


# Branches of one input whose outputs have one size, [4, 7, 6] to [4, 7, 6].
BRANCHES = {
    "identity": identity((4, 7, 6)),
    "scale": CHANNEL,
    "1x1": convolution((4, 7, 6), 4, (1, 1), "channel"),
    "3x3": convolution((4, 7, 6), 4, (3, 3), "channel", padding=1),
    "1x3": convolution((4, 7, 6), 4, (1, 3), padding=(0, 1)),
    "2x2": convolution((4, 7, 6), 4, (2, 2), padding=(0, 1, 1, 0)),
    "5x5": convolution((4, 7, 6), 4, (5, 5), "map", padding=2, groups=2),
    "dilated": convolution((4, 7, 6), 4, (3, 3), padding=2, dilation=2),
    "depthwise": convolution((4, 7, 6), 4, (3, 3), padding=1, groups=4),
    "transposed": convolution((4, 7, 6), 4, (3, 3), padding=1, transposed=True),
    "circular": convolution((4, 7, 6), 4, (3, 3), padding=1, padding_mode="circular"),
    "1x1_transposed": convolution((4, 7, 6), 4, (1, 1), "channel", transposed=True),
}


def sum_of(maps: list[AffineMap]) -> Dense:
    found = [dense([affine]) for affine in maps]
    offset = sum((o for _, o in found if o is not None), torch.zeros(maps[0].rows).double())
    whole = torch.stack([m for m, _ in found]).sum(0)
    return Dense(maps[0].in_shape, maps[0].out_shape, known(offset.reshape(maps[0].out_shape)),
                 known(whole))  # fmt: skip


def stack_of(maps: list[AffineMap], dim: int) -> Dense:
    parts, offsets = [], []
    for affine in maps:
        found, offset = dense([affine])
        parts.append(found.reshape(*affine.out_shape, -1))
        offset = torch.zeros(affine.rows).double() if offset is None else offset
        offsets.append(offset.reshape(affine.out_shape))
    whole, offset = torch.cat(parts, dim), torch.cat(offsets, dim)
    return Dense(maps[0].in_shape, tuple(offset.shape), known(offset),
                 known(whole.flatten(0, -2)))  # fmt: skip


@pytest.mark.parametrize(
    "names", list(itertools.combinations_with_replacement(BRANCHES, 2)), ids="-".join
)
def test_branches_add_and_stack(names: tuple[str, str]) -> None:
    maps = [BRANCHES[name] for name in names]
    if "circular" in names and set(names) & {"3x3", "1x3", "2x2", "5x5", "dilated", "depthwise",
                                             "transposed"}:  # fmt: skip
        refused = add(maps)
        assert isinstance(refused, Refusal) and "padding mode" in refused.rule
        return
    assert_same(add(maps), [sum_of(maps)])
    assert_same(concatenate(maps, 0), [stack_of(maps, 0)])


def test_many_branches_add() -> None:
    maps = [BRANCHES[name] for name in BRANCHES if name != "circular"]
    merged = add(maps)
    assert isinstance(merged, Convolution)
    assert merged.settings.kernel_size == (5, 5)
    assert_same(merged, [sum_of(maps)])


def test_strided_branches_add_and_stack() -> None:
    for transposed in (False, True):
        rest = {"stride": 2, "transposed": transposed}
        extra = {"output_padding": 1} if transposed else {}
        uneven = 0 if transposed else (1, 0, 0, 1)
        maps = [
            convolution((4, 7, 6), 4, (3, 3), "channel", padding=1, **rest, **extra),
            convolution((4, 7, 6), 4, (1, 1), padding=0, **rest, **extra),
            convolution((4, 7, 6), 4, (2, 2), padding=uneven, **rest),
        ]  # fmt: skip
        assert len({affine.out_shape for affine in maps}) == 1
        assert_same(add(maps), [sum_of(maps)])
        assert_same(concatenate(maps, 0), [stack_of(maps, 0)])


def test_strides_that_differ_are_refused() -> None:
    one = convolution((2, 4, 4), 2, (3, 3), stride=2, padding=1)
    two = convolution((2, 4, 4), 2, (3, 3), stride=1)
    refused = add([one, two])
    assert isinstance(refused, Refusal) and "strides" in refused.rule
    # With one position the stride plays no part.
    one = convolution((2, 3, 3), 2, (3, 3), stride=2)
    two = convolution((2, 3, 3), 2, (3, 3))
    assert_same(add([one, two]), [sum_of([one, two])])


def test_matrices_add_and_stack() -> None:
    maps = [matrix((6,), (6,)), identity((6,)), diagonal((6,), (6,), (6,))]
    assert_same(add(maps), [sum_of(maps)])
    assert_same(concatenate(maps, 0), [stack_of(maps, 0)])
    maps = [matrix((4, 6), (4, 6), (4,)), identity((4, 6)), diagonal((4, 6), (1, 6), (4, 1))]
    assert_same(add(maps), [sum_of(maps)])
    assert_same(concatenate(maps, 1), [stack_of(maps, 1)])
    refused = concatenate(maps, 0)
    assert isinstance(refused, Refusal)


def test_scales_add() -> None:
    maps = [CHANNEL, identity((4, 7, 6)), diagonal((4, 7, 6), (1, 7, 1), (1, 1, 6))]
    merged = add(maps)
    assert isinstance(merged, Diagonal)
    assert_same(merged, [sum_of(maps)])


@pytest.mark.parametrize("transposed", [False, True])
def test_uneven_padding_is_made_even_by_zeros_in_the_kernel(transposed: bool) -> None:
    torch.manual_seed(2)
    count = 0
    for stride, dilation, kernel, low, high, size in itertools.product(
        (1, 2, 3), (1, 2), (1, 2, 3), (0, 1, 2), (0, 1, 3), (4, 5)
    ):
        try:
            affine = convolution((2, size), 2, (kernel,), stride=stride, dilation=dilation,
                                 padding=(low, high), transposed=transposed)  # fmt: skip
        except ValueError:
            continue  # nothing is left of such an input
        even = symmetric(affine)
        assert isinstance(even, Convolution)
        assert even.settings.padding[0][0] == even.settings.padding[0][1]
        assert_same(even, [affine])
        count += 1
    assert count > 100


def test_an_uneven_padding_that_no_window_reads_needs_no_zeros() -> None:
    affine = convolution((1, 6), 1, (3,), stride=2, padding=(1, 0))
    even = symmetric(affine)
    assert isinstance(even, Convolution)
    assert even.settings.kernel_size == (3,) and even.settings.padding == ((1, 1),)


def test_align_refuses_two_kinds() -> None:
    one = convolution((2, 3), 2, (2,), stride=2, transposed=True)
    two = convolution((2, 3), 2, (1,), padding=(1, 2))
    assert isinstance(align([one, two]), Refusal)
