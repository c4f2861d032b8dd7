"""The one table of geometries. Every op is tested on all of it; each case says why it is here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linfuse_ext.geometry import Geometry, make_geometry

Ints = int | Sequence[int]


@dataclass(frozen=True)
class Case:
    """One geometry: a weight's shape, an input size and the settings of the convolution."""

    name: str
    why: str
    weight_size: tuple[int, ...]
    input_size: Ints
    stride: Ints = 1
    padding: Ints | str = 0
    dilation: Ints = 1
    groups: int = 1
    transposed: bool = False
    output_padding: Ints = 0
    padding_mode: str = "zeros"
    bias: bool = True

    def arguments(self) -> tuple[Any, ...]:
        """Positional arguments from input_size on."""
        return (self.input_size, self.stride, self.padding, self.dilation, self.groups)

    def keywords(self) -> dict[str, Any]:
        return {
            "transposed": self.transposed,
            "output_padding": self.output_padding,
            "padding_mode": self.padding_mode,
        }

    def geometry(self) -> Geometry:
        return make_geometry("case", self.weight_size, *self.arguments(), **self.keywords())

    def weight(self, dtype: torch.dtype = torch.float64, **options: Any) -> Tensor:
        return _random(self.weight_size, 1, dtype, **options)

    def bias_vector(self, dtype: torch.dtype = torch.float64, **options: Any) -> Tensor | None:
        if not self.bias:
            return None
        return _random((self.geometry().out_channels,), 2, dtype, **options)

    def linear_weight(
        self, features: int = 4, dtype: torch.dtype = torch.float64, **options: Any
    ) -> Tensor:
        return _random((features, self.geometry().rows), 3, dtype, **options)

    def linear_bias(
        self, features: int = 4, dtype: torch.dtype = torch.float64, **options: Any
    ) -> Tensor:
        return _random((features,), 4, dtype, **options)


def _random(size: Sequence[int], seed: int, dtype: torch.dtype, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tuple(size), generator=generator, dtype=torch.float64)
    return values.to(dtype=dtype, **options)


CASES = [
    # 2-d, the plain and the rectangular
    Case("unit", "everything one", (1, 1, 1, 1), (1, 1)),
    Case("plain3x3", "the common kernel, no padding", (3, 2, 3, 3), (5, 5)),
    Case("same3x3", "the common layer", (4, 3, 3, 3), (6, 6), padding=1),
    Case("wide", "rectangular: H and W must not be swapped", (2, 3, 3, 3), (8, 9), padding=1),
    Case("tall", "rectangular the other way", (2, 3, 3, 3), (9, 8), padding=1),
    Case(
        "kernel3x2", "rectangular kernel, padding on one axis", (2, 2, 3, 2), (9, 8), padding=(2, 0)
    ),
    Case("stride2x1", "stride differs by axis", (2, 2, 3, 3), (8, 9), stride=(2, 1), padding=1),
    Case(
        "all_differ",
        "no two settings alike",
        (4, 3, 3, 2),
        (7, 10),
        stride=(3, 2),
        padding=(2, 1),
        dilation=(2, 3),
    ),
    Case("no_bias", "the offset is zeros", (2, 2, 3, 3), (5, 6), padding=1, bias=False),
    Case("forum", "the question of the forum", (50, 5, 5, 5), (13, 13), stride=2),
    Case("gist", "the gist's own sizes", (5, 2, 3, 3), (6, 7), stride=2, padding=1),
    # borders
    Case(
        "pad_beyond_kernel",
        "output positions that read padding only",
        (2, 2, 2, 2),
        (3, 4),
        padding=(3, 5),
    ),
    Case(
        "asymmetric",
        "top, bottom, left, right all differ",
        (2, 2, 3, 3),
        (5, 6),
        padding=(0, 2, 1, 3),
    ),
    Case(
        "asymmetric_stride",
        "asymmetric padding that a stride skips over",
        (2, 1, 3, 3),
        (7, 8),
        stride=(2, 3),
        padding=(1, 0, 0, 2),
    ),
    Case(
        "left_over", "the stride leaves input positions unread", (2, 2, 2, 2), (7, 9), stride=(3, 4)
    ),
    Case(
        "stride_holes",
        "stride beyond the kernel: most columns are empty",
        (3, 2, 2, 2),
        (9, 9),
        stride=4,
    ),
    Case("kernel_is_image", "one output position", (3, 2, 4, 5), (4, 5)),
    Case(
        "kernel_beyond_image",
        "kernel larger than the unpadded image",
        (2, 2, 5, 5),
        (3, 3),
        padding=1,
    ),
    Case("size_one_axis", "an axis of one position", (2, 2, 1, 3), (1, 7), padding=(0, 1)),
    Case("valid", "padding by name", (2, 2, 3, 3), (5, 6), padding="valid"),
    Case(
        "same_even", "'same' with even kernels is asymmetric", (2, 2, 2, 4), (5, 6), padding="same"
    ),
    Case(
        "same_dilated",
        "'same' with dilation",
        (2, 2, 3, 2),
        (7, 6),
        padding="same",
        dilation=(2, 3),
    ),
    # kernels and channels
    Case("pointwise", "1x1: a plain matrix product", (5, 7, 1, 1), (3, 4)),
    Case("pointwise_strided", "1x1 with holes", (4, 3, 1, 1), (5, 6), stride=2),
    Case("patches", "stride equals kernel: taps never overlap", (6, 3, 4, 4), (8, 12), stride=4),
    Case("dilated", "dilation with padding", (2, 3, 3, 3), (9, 8), padding=4, dilation=4),
    Case("grouped", "two groups", (4, 3, 3, 3), (5, 6), padding=1, groups=2),
    Case(
        "grouped_dilated",
        "groups with dilation and stride",
        (6, 2, 3, 2),
        (9, 8),
        stride=(2, 1),
        padding=(2, 0),
        dilation=(1, 2),
        groups=3,
    ),
    Case("depthwise", "one channel a group", (5, 1, 3, 3), (6, 5), padding=1, groups=5),
    Case(
        "depthwise_multiplier",
        "one channel in, two out per group",
        (6, 1, 3, 3),
        (5, 5),
        padding=1,
        groups=3,
    ),
    Case(
        "many_channels",
        "more channels than a register tile holds",
        (17, 29, 3, 3),
        (4, 4),
        padding=1,
    ),
    Case("grouped_many", "tiles must not cross groups", (26, 14, 2, 2), (3, 3), groups=2),
    # padding that repeats
    Case(
        "circular",
        "taps that wrap around meet",
        (2, 2, 3, 3),
        (4, 5),
        padding=1,
        padding_mode="circular",
    ),
    Case(
        "circular_full",
        "padding as large as the image",
        (2, 1, 3, 3),
        (2, 3),
        padding=(2, 3),
        padding_mode="circular",
    ),
    Case(
        "reflect",
        "taps that are mirrored meet",
        (2, 2, 3, 3),
        (4, 5),
        padding=1,
        padding_mode="reflect",
    ),
    Case(
        "reflect_full",
        "the largest reflect padding",
        (2, 1, 5, 5),
        (3, 4),
        padding=(2, 3),
        padding_mode="reflect",
    ),
    Case(
        "replicate",
        "many taps meet at the rim",
        (2, 2, 3, 3),
        (4, 5),
        padding=(1, 2),
        padding_mode="replicate",
    ),
    Case(
        "replicate_wide",
        "padding wider than the image",
        (2, 1, 4, 4),
        (2, 3),
        padding=(5, 4),
        padding_mode="replicate",
    ),
    Case(
        "replicate_asymmetric",
        "repeats on one side only",
        (2, 2, 3, 3),
        (4, 5),
        padding=(2, 0, 0, 3),
        padding_mode="replicate",
    ),
    Case(
        "circular_grouped",
        "repeats with groups, stride and dilation",
        (4, 1, 3, 2),
        (5, 6),
        stride=(2, 1),
        padding=(2, 1),
        dilation=(2, 1),
        groups=2,
        padding_mode="circular",
    ),
    Case(
        "reflect_same",
        "'same' with an even kernel, mirrored",
        (2, 2, 4, 2),
        (5, 6),
        padding="same",
        padding_mode="reflect",
    ),
    Case(
        "circular_no_padding",
        "a mode that has nothing to do",
        (2, 2, 3, 3),
        (4, 5),
        padding_mode="circular",
    ),
    # 1-d and 3-d
    Case("audio", "1-d, strided, one channel", (8, 1, 10), (40,), stride=5),
    Case(
        "conv1d", "1-d with everything", (4, 2, 3), (11,), stride=2, padding=2, dilation=2, groups=2
    ),
    Case("conv1d_pair", "a (low, high) pair on one axis", (2, 2, 3), (6,), padding=(0, 3)),
    Case("conv1d_int_size", "input_size as an int", (2, 2, 3), 6, padding=1),
    Case(
        "conv1d_replicate", "1-d with repeats", (2, 2, 4), (5,), padding=3, padding_mode="replicate"
    ),
    Case(
        "conv3d",
        "3-d with everything per axis",
        (4, 2, 2, 3, 1),
        (4, 5, 3),
        stride=(1, 2, 1),
        padding=(1, 0, 2),
        dilation=(2, 1, 1),
    ),
    Case(
        "voxels", "3-d, strided, grouped", (4, 1, 3, 3, 3), (4, 5, 6), stride=2, padding=1, groups=2
    ),
    Case(
        "conv3d_circular",
        "3-d with repeats on all axes",
        (2, 1, 3, 2, 3),
        (3, 3, 4),
        padding=1,
        padding_mode="circular",
    ),
    Case(
        "conv3d_asymmetric",
        "six different paddings",
        (1, 2, 2, 2, 2),
        (3, 4, 3),
        padding=(0, 1, 2, 0, 1, 3),
    ),
    # transposed
    Case("transposed", "channels swap places in the weight", (3, 2, 3, 3), (4, 5), transposed=True),
    Case(
        "upsample",
        "the generator's layer",
        (4, 3, 4, 4),
        (5, 6),
        stride=2,
        padding=1,
        transposed=True,
    ),
    Case(
        "output_padding",
        "positions at the high end that may read nothing",
        (2, 3, 3, 3),
        (4, 5),
        stride=(3, 2),
        padding=(1, 0),
        output_padding=(2, 1),
        transposed=True,
    ),
    Case(
        "output_padding_dilated",
        "output_padding beyond the stride, within the dilation",
        (2, 2, 2, 2),
        (4, 3),
        stride=1,
        dilation=3,
        output_padding=2,
        transposed=True,
    ),
    Case(
        "transposed_grouped",
        "groups index the weight differently",
        (6, 2, 3, 2),
        (4, 3),
        stride=2,
        padding=(1, 0),
        groups=3,
        transposed=True,
    ),
    Case(
        "transposed_depthwise",
        "one channel a group, transposed",
        (4, 1, 3, 3),
        (4, 4),
        padding=1,
        groups=4,
        transposed=True,
    ),
    Case(
        "transposed_cropped",
        "padding larger than the kernel cuts inputs off",
        (2, 2, 2, 2),
        (6, 7),
        padding=(2, 3),
        transposed=True,
    ),
    Case(
        "transposed_holes",
        "stride beyond the kernel: rows without a tap",
        (2, 2, 2, 2),
        (3, 4),
        stride=4,
        transposed=True,
    ),
    Case(
        "transposed_pair",
        "asymmetric crop",
        (2, 2, 3, 3),
        (4, 5),
        stride=2,
        padding=(0, 2, 1, 0),
        output_padding=1,
        transposed=True,
    ),
    Case(
        "transposed_beyond",
        "asymmetric crop of all that a tap reaches; output_padding is left",
        (1, 2, 1),
        (2,),
        stride=3,
        padding=(5, 0),
        output_padding=2,
        transposed=True,
    ),
    Case(
        "transposed1d",
        "1-d, transposed, dilated",
        (3, 2, 3),
        (5,),
        stride=2,
        padding=1,
        dilation=2,
        transposed=True,
    ),
    Case(
        "transposed3d",
        "3-d, transposed, per axis",
        (2, 3, 2, 3, 2),
        (3, 2, 3),
        stride=(1, 2, 3),
        padding=(0, 1, 0),
        output_padding=(0, 1, 2),
        transposed=True,
    ),
    Case(
        "transposed_no_bias",
        "no bias, transposed",
        (2, 2, 3, 3),
        (3, 3),
        transposed=True,
        bias=False,
    ),
]

BY_NAME = {case.name: case for case in CASES}
assert len(BY_NAME) == len(CASES), "names must be unique"

# A handful that between them meet every branch, for the tests that take seconds a case.
FEW = [
    BY_NAME[name]
    for name in (
        "all_differ",
        "asymmetric_stride",
        "grouped_dilated",
        "circular_grouped",
        "replicate_asymmetric",
        "reflect",
        "conv1d",
        "conv3d",
        "transposed_grouped",
        "transposed_pair",
        "no_bias",
    )
]
