"""Several maps of one value as one: their sum, and their concatenation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..composition import Refusal
from .alignment import Grid, align, of_one_kind, placed, refusal, weight_shape
from .maps import (
    AffineMap,
    Convolution,
    Deferred,
    Dense,
    Diagonal,
    Shape,
    as_diagonal,
    is_identity,
)
from .rules import as_convolution, as_dense, by_channel, name_of, sum_of_offsets


def _terms(maps: list[AffineMap], dim: int | None) -> list[AffineMap]:
    """Scales and identities in the form that the others have, where it is one."""
    if all(isinstance(affine, Diagonal) or is_identity(affine) for affine in maps):
        if dim is None:
            return [as_diagonal(affine) for affine in maps]
        return [as_convolution(affine) for affine in maps]
    leads = {affine.lead for affine in maps if isinstance(affine, Dense)}
    if len(leads) == 1:
        lead = leads.pop()
        return [as_dense(affine, lead) for affine in maps]
    return [as_convolution(affine) for affine in maps]


def _aligned(maps: list[AffineMap]) -> tuple[list[Convolution], Grid] | Refusal:
    convolutions = of_one_kind([affine for affine in maps if isinstance(affine, Convolution)])
    grid = align(convolutions)
    return grid if isinstance(grid, Refusal) else (convolutions, grid)


def add(maps: list[AffineMap]) -> AffineMap | Refusal:
    """The map `x -> sum of maps(x)`, for maps of the same shapes.

    Args:
        maps: At least one.

    Returns:
        The map; or the rule that it has no form but a matrix.
    """
    maps = _terms(maps, None)
    in_shape, out_shape = maps[0].in_shape, maps[0].out_shape
    offset = sum_of_offsets(*(affine.offset for affine in maps))
    if all(isinstance(affine, Diagonal) for affine in maps):
        scales = [affine.scale for affine in maps if isinstance(affine, Diagonal)]
        scale = sum_of_offsets(*scales)
        assert scale is not None
        return Diagonal(in_shape, out_shape, offset, scale)
    if all(isinstance(affine, Dense) for affine in maps):
        matrices = [affine for affine in maps if isinstance(affine, Dense)]
        weight = sum_of_offsets(*(affine.weight for affine in matrices))
        assert weight is not None
        return Dense(in_shape, out_shape, offset, weight, matrices[0].lead)
    if not all(isinstance(affine, Convolution) for affine in maps):
        return refusal(f"a sum of {_several(maps)} has no form but a matrix")
    aligned = _aligned(maps)
    if isinstance(aligned, Refusal):
        return aligned
    convolutions, grid = aligned

    def make() -> Tensor:
        total = placed(convolutions[0], grid, 0)
        for n, affine in enumerate(convolutions[1:], start=1):
            total += placed(affine, grid, n)
        return total

    weight = Deferred(weight_shape(grid.settings), make)
    return Convolution(in_shape, out_shape, offset, grid.settings, weight)


def _several(maps: list[AffineMap]) -> str:
    return ", ".join(sorted({name_of(affine) for affine in maps}))


def _stacked_offset(maps: list[AffineMap], dim: int, out_shape: Shape) -> Deferred | None:
    offsets = [affine.offset for affine in maps]
    if all(offset is None for offset in offsets):
        return None
    constant = all(offset is None or by_channel(offset) for offset in offsets) and dim == 0
    shapes = [
        (affine.out_shape[0], *[1] * (len(affine.out_shape) - 1)) if constant else affine.out_shape
        for affine in maps
    ]

    def make() -> Tensor:
        zero = torch.zeros((), dtype=torch.float64)
        values = [zero if offset is None else offset.value for offset in offsets]
        each = [value.expand(shape) for value, shape in zip(values, shapes, strict=True)]
        return torch.cat(each, dim)

    stacked = (out_shape[0], *[1] * (len(out_shape) - 1)) if constant else out_shape
    return Deferred(stacked, make)


def concatenate(maps: list[AffineMap], dim: int) -> AffineMap | Refusal:
    """The map `x -> concatenation of maps(x)` along an axis of the sample.

    Args:
        maps: At least one, with the same shape before them.
        dim: The axis, 0 for the channels.

    Returns:
        The map; or the rule that it has no form but a matrix.
    """
    maps = _terms(maps, dim)
    in_shape = maps[0].in_shape
    out_shape = list(maps[0].out_shape)
    out_shape[dim] = sum(affine.out_shape[dim] for affine in maps)
    offset = _stacked_offset(maps, dim, tuple(out_shape))
    matrices = [affine for affine in maps if isinstance(affine, Dense)]
    if len(matrices) == len(maps):
        lead = matrices[0].lead
        if len(out_shape) == len(lead) + 1 and dim == len(lead):
            rows = sum(affine.weight.shape[0] for affine in matrices)
            weight = Deferred(
                (rows, matrices[0].weight.shape[1]),
                lambda: torch.cat([affine.weight.value for affine in matrices]),
            )
            return Dense(in_shape, tuple(out_shape), offset, weight, lead)
    if dim != 0 or not all(isinstance(affine, Convolution) for affine in maps):
        return refusal(f"a concatenation of {_several(maps)} has no form but a matrix")
    # On the grid all must put out as many channels; only positions count there.
    aligned = _aligned(maps)
    if isinstance(aligned, Refusal):
        return aligned
    convolutions, grid = aligned
    settings = grid.settings._replace(groups=1, out_channels=out_shape[0])
    grid = Grid(settings, grid.places)
    side = 1 if settings.transposed else 0

    def make() -> Tensor:
        return torch.cat([placed(a, grid, n) for n, a in enumerate(convolutions)], side)

    weight = Deferred(weight_shape(settings), make)
    return Convolution(in_shape, tuple(out_shape), offset, settings, weight)
