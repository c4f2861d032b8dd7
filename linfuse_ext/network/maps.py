"""The algebra: affine maps `y = A x + b` of one sample, in the few forms that matter.

    Convolution  any convolution or transposed one, also padding, pooling, upsampling, choosing
                 channels: all that is the same at every position
    Dense        a matrix, on the whole sample or on the last axis of each of its leading positions
    Diagonal     a scale of each element
    View         the same elements in another shape
    Operator     any other linear map: torch's own operation

Each has a shape before and behind, without the batch, and an offset b. Everything is float64, and
nothing is computed before it is asked for: a plan weighs many merges and makes few of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..composition import Conv

Shape = tuple[int, ...]


class Deferred:
    """A float64 tensor whose shape is known and whose values are made when they are asked for."""

    def __init__(self, shape: Iterable[int], make: Callable[[], Tensor]) -> None:
        """Keeps `make`, which returns a tensor of `shape`."""
        self.shape: Shape = tuple(shape)
        self._make = make

    @property
    def size(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def value(self) -> Tensor:
        """The tensor: made once inside `keeping_values`, anew each time outside of it."""
        kept = _KEPT.get()
        value = None if kept is None else kept.get(self)
        if value is None:
            value = self._make().to(torch.float64).expand(self.shape)
            if kept is not None:
                kept[self] = value
        return value


_KEPT: ContextVar[dict[Deferred, Tensor] | None] = ContextVar("kept values", default=None)


@contextmanager
def keeping_values() -> Iterator[None]:
    """Makes every value that is asked for inside once, and drops them all in the end.

    So that what one merge was made of is gone before the next is made: a network may be larger
    than the memory that holds it sharded.
    """
    token = _KEPT.set({})
    try:
        yield
    finally:
        _KEPT.reset(token)


def deferred_full(shape: Iterable[int], fill: float) -> Deferred:
    """A tensor of one value, which takes the memory of one."""
    shape = tuple(shape)
    return Deferred(shape, lambda: torch.full([1] * len(shape), fill, dtype=torch.float64))


@dataclass(frozen=True)
class AffineMap:
    """What every form has.

    Attributes:
        in_shape: Of a sample before the map.
        out_shape: Of a sample behind it.
        offset: Of as many axes as `out_shape`, of size 1 where it is the same along an axis; None
            for zeros.
    """

    in_shape: Shape
    out_shape: Shape
    offset: Deferred | None

    @property
    def cols(self) -> int:
        """Elements of a sample before the map."""
        return math.prod(self.in_shape)

    @property
    def rows(self) -> int:
        """Elements of a sample behind the map."""
        return math.prod(self.out_shape)

    def apply(self, columns: Tensor) -> Tensor:
        """`A @ columns`: `[cols, D]` to `[rows, D]`."""
        raise NotImplementedError

    def apply_adjoint(self, rows: Tensor) -> Tensor:
        """`rows @ A`: `[F, rows]` to `[F, cols]`."""
        raise NotImplementedError

    def matrix(self) -> Tensor:
        """A, `[rows, cols]`."""
        if self.rows <= self.cols:
            return self.apply_adjoint(_eye(self.rows))
        return self.apply(_eye(self.cols))

    def flat_offset(self) -> Tensor | None:
        """The offset of each element, `[rows]`."""
        return None if self.offset is None else self.offset.value.expand(self.out_shape).flatten()


def _eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


@dataclass(frozen=True)
class Convolution(AffineMap):
    """A convolution of `[C_in, *in]`; `settings` are those of composition.py, without bias."""

    settings: Conv
    weight: Deferred

    def _keywords(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "input_size": self.in_shape[1:],
            "stride": settings.stride,
            "padding": tuple(value for pair in settings.padding for value in pair),
            "dilation": settings.dilation,
            "groups": settings.groups,
            "transposed": settings.transposed,
            "output_padding": settings.output_padding,
            "padding_mode": settings.padding_mode,
        }

    def apply(self, columns: Tensor) -> Tensor:
        """As a Linear and the convolution behind it."""
        weight = self.weight.value
        return functional.fuse_linear_conv(columns, None, weight, None, **self._keywords())[0]

    def apply_adjoint(self, rows: Tensor) -> Tensor:
        """As the convolution and a Linear behind it."""
        weight = self.weight.value
        return functional.fuse_conv_linear(weight, None, rows, None, **self._keywords())[0]

    def matrix(self) -> Tensor:
        """Written, not multiplied."""
        return functional.conv_to_affine(self.weight.value, None, **self._keywords())[0]


@dataclass(frozen=True)
class Dense(AffineMap):
    """A matrix `[F, K]` on what follows the `lead` axes; with lead, `in_shape` is `(*lead, K)`."""

    weight: Deferred
    lead: Shape = ()

    def _each(self, columns: Tensor, matrix: Tensor) -> Tensor:
        columns = columns.reshape(math.prod(self.lead), matrix.shape[1], -1)
        return (matrix @ columns).flatten(0, 1)

    def apply(self, columns: Tensor) -> Tensor:
        """At each leading position."""
        return self._each(columns, self.weight.value)

    def apply_adjoint(self, rows: Tensor) -> Tensor:
        """At each leading position."""
        return self._each(rows.T, self.weight.value.T).T

    def matrix(self) -> Tensor:
        """With leading positions, one block for each on the diagonal."""
        return self.weight.value if not self.lead else super().matrix()


@dataclass(frozen=True)
class Diagonal(AffineMap):
    """A scale of each element, of as many axes as the sample."""

    scale: Deferred

    def apply(self, columns: Tensor) -> Tensor:
        """Scales rows."""
        return columns * self.scale.value.expand(self.in_shape).reshape(-1, 1)

    def apply_adjoint(self, rows: Tensor) -> Tensor:
        """Scales columns."""
        return rows * self.scale.value.expand(self.in_shape).flatten()


@dataclass(frozen=True)
class View(AffineMap):
    """The same elements, in the same order, in another shape."""

    def apply(self, columns: Tensor) -> Tensor:
        """Nothing to do."""
        return columns

    def apply_adjoint(self, rows: Tensor) -> Tensor:
        """Nothing to do."""
        return rows


@dataclass(frozen=True)
class Operator(AffineMap):
    """A linear map that torch computes: `run` takes `[N, *in_shape]` to `[N, *out_shape]`."""

    run: Callable[[Tensor], Tensor]

    def apply(self, columns: Tensor) -> Tensor:
        """A sample for each column."""
        with torch.no_grad():
            samples = self.run(columns.T.reshape(-1, *self.in_shape))
        return samples.reshape(-1, self.rows).T

    def apply_adjoint(self, rows: Tensor) -> Tensor:
        """By autograd; at which point does not matter to a linear map."""
        with torch.enable_grad():
            at = torch.zeros(rows.shape[0], *self.in_shape, dtype=rows.dtype, requires_grad=True)
            samples = self.run(at)
        (grad,) = torch.autograd.grad(samples, at, rows.reshape(samples.shape))
        return grad.reshape(-1, self.cols)


def identity(shape: Shape) -> View:
    """The map that changes nothing."""
    return View(shape, shape, None)


def is_identity(affine: AffineMap) -> bool:
    """Whether a map is known to change nothing."""
    return (
        isinstance(affine, View) and affine.in_shape == affine.out_shape and affine.offset is None
    )


def as_diagonal(affine: AffineMap) -> AffineMap:
    """The identity as a scale of ones; any other map as it is."""
    if not is_identity(affine):
        return affine
    unit = deferred_full([1] * len(affine.in_shape), 1.0)
    return Diagonal(affine.in_shape, affine.in_shape, None, unit)


def dense(maps: list[AffineMap], block_bytes: int = 2**28) -> tuple[Tensor, Tensor | None]:
    """The matrix and offset of maps in a row, the first first.

    It starts at a matrix that is there, or at the end with fewer elements, and goes on from there
    to both sides, so that no product has two large matrices.

    Args:
        maps: At least one.
        block_bytes: How much of the rows is taken back through the maps at a time.

    Returns:
        The matrix, `[rows, cols]`, and the offset, `[rows]`, or None where no map has one.
    """
    first, last = maps[0], maps[-1]
    whole = [n for n, affine in enumerate(maps) if isinstance(affine, Dense) and not affine.lead]
    start = whole[-1] if whole else (len(maps) - 1 if last.rows <= first.cols else 0)
    before, behind = maps[:start][::-1], maps[start + 1 :]
    matrix = maps[start].matrix()
    if before:
        widest = max(affine.cols for affine in before)
        count = max(1, block_bytes // (8 * widest))
        blocks = []
        for rows in torch.split(matrix, count):
            for affine in before:
                rows = affine.apply_adjoint(rows)
            blocks.append(rows)
        matrix = torch.cat(blocks)
    for affine in behind:
        matrix = affine.apply(matrix)
    offset: Tensor | None = None
    for affine in maps:
        if offset is not None:
            offset = affine.apply(offset.unsqueeze(1)).squeeze(1)
        own = affine.flat_offset()
        if own is not None:
            offset = own if offset is None else offset + own
    return matrix, offset
