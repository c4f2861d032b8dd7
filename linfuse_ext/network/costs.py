"""What a sample costs in every form: floating-point operations, and numbers to store.

A product and its sum are two operations. Padding is counted like any other input, as the usual
counts do, so that a layer's cost is that of its formula and not of an implementation.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from .maps import AffineMap, Convolution, Dense, Diagonal, View


class Cost(NamedTuple):
    """Of one sample; costs of layers in a row add up."""

    flops: int
    params: int

    def plus(self, other: Cost) -> Cost:
        """Both."""
        return Cost(self.flops + other.flops, self.params + other.params)


NOTHING = Cost(0, 0)


def flops_of(affine: AffineMap) -> int:
    """Operations of a map, by its formula."""
    shifts = affine.rows if affine.offset is not None else 0
    if isinstance(affine, Convolution):
        settings = affine.settings
        positions = (affine.in_shape if settings.transposed else affine.out_shape)[1:]
        products = math.prod(positions) * math.prod(settings.kernel_size)
        channels = settings.in_channels * settings.out_channels // settings.groups
        return 2 * products * channels + shifts
    if isinstance(affine, Dense):
        return 2 * math.prod(affine.lead) * math.prod(affine.weight.shape) + shifts
    if isinstance(affine, Diagonal):
        return affine.rows + shifts
    if isinstance(affine, View):
        return shifts
    raise TypeError(f"the operations of {type(affine).__name__} are known where it is read")


def cost_of(affine: AffineMap) -> Cost:
    """What a merged layer costs, in the form that it is in."""
    stored = 0
    if isinstance(affine, (Convolution, Dense)):
        stored = math.prod(affine.weight.shape)
    elif isinstance(affine, Diagonal):
        stored = math.prod(affine.scale.shape)
    if affine.offset is not None:
        stored += math.prod(affine.offset.shape)
    return Cost(flops_of(affine), stored)


def cost_of_linear(cols: int, rows: int, shifts: bool) -> Cost:
    """What the same map costs as one Linear."""
    return Cost(2 * rows * cols + (rows if shifts else 0), rows * cols + (rows if shifts else 0))
