"""The largest singular value of the operator itself, padded with zeros and strided.

pytorch#13505 and #99149, sngan_projection#37, lip4conv#2: torch's spectral norm is that of the
reshaped kernel, and the Fourier formula (Sedghi et al., arXiv:1805.10408) is that of an operator
that wraps around. Neither is the layer that runs.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conformance_nets import drawn
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import svds
from torch import Tensor

from linfuse_ext import functional

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

# A singular value of a matrix is off by a few eps times the largest one; iterations are run until
# they agree to this, which is far below the difference that a wrong operator makes.
CLOSE = 1e-9

LAYERS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "padded": ((4, 3, 3, 3), (9, 8), {"padding": 1}),
    "padded, strided": ((4, 3, 3, 3), (9, 8), {"padding": 1, "stride": 2}),
    "rectangular": ((4, 3, 3, 2), (8, 9), {"padding": (2, 0), "stride": (2, 1)}),
    "grouped, dilated": ((4, 2, 3, 3), (9, 8), {"padding": 2, "dilation": 2, "groups": 2}),
    "transposed": ((3, 4, 4, 4), (5, 4), {"padding": 1, "stride": 2, "transposed": True}),
    "1-d": ((5, 3, 4), (40,), {"padding": 3, "stride": 3}),
    "3-d": ((2, 2, 2, 3, 2), (4, 3, 5), {"padding": 1}),
}


def layer(name: str) -> tuple[Tensor, tuple[int, ...], dict[str, Any]]:
    weight, size, options = LAYERS[name]
    # The shift keeps the largest singular value apart from the next: iterations find it soon.
    return drawn(*weight, name=name) + 0.5, size, options


def sparse(name: str) -> Tensor:
    weight, size, options = layer(name)
    return functional.conv_to_affine(weight, None, size, layout=torch.sparse_csr, **options)[0]


def dense(name: str) -> Tensor:
    """The operator by plain torch: what the layer makes of the unit images."""
    weight, size, options = layer(name)
    transposed = options.get("transposed", False)
    options = {key: value for key, value in options.items() if key != "transposed"}
    channels = weight.shape[0] if transposed else weight.shape[1] * options.get("groups", 1)
    unit = torch.eye(channels * torch.Size(size).numel(), dtype=torch.float64)
    kind = "conv_transpose" if transposed else "conv"
    forward = getattr(F, f"{kind}{len(size)}d")
    return forward(unit.view(-1, channels, *size), weight, **options).flatten(1).T


def norm(name: str) -> float:
    return torch.linalg.svdvals(dense(name))[0].item()


@pytest.mark.parametrize("name", LAYERS)
def test_randomised_decomposition_of_the_sparse_matrix(name: str) -> None:
    """torch.svd_lowrank works on the sparse tensor: it needs products alone."""
    torch.manual_seed(0)
    _, values, _ = torch.svd_lowrank(sparse(name), q=8, niter=200)
    wanted = torch.linalg.svdvals(dense(name))
    torch.testing.assert_close(values[:2], wanted[:2], rtol=CLOSE, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_lanczos_on_the_arrays(name: str) -> None:
    """scipy takes values, columns and row pointers as they are."""
    matrix = sparse(name)
    arrays = (matrix.values().numpy(), matrix.col_indices().numpy(), matrix.crow_indices().numpy())
    values = svds(csr_matrix(arrays, shape=matrix.shape), k=3, return_singular_vectors=False, rng=0)
    wanted = torch.linalg.svdvals(dense(name))[:3]
    torch.testing.assert_close(torch.tensor(sorted(values)[::-1]), wanted, rtol=CLOSE, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_power_iteration(name: str) -> None:
    """What a training loop does: two products a step, the second by the adjoint."""
    matrix = sparse(name)
    adjoint = matrix.t().to_sparse_csr()
    values = torch.linalg.svdvals(dense(name)).tolist()
    first = values[0]  # more than once where a dilation parts the image in equal halves
    second = next(value for value in values if value < first * (1 - CLOSE))
    # The other directions shrink by (second / first)^2 a step, and count squared in the value.
    steps = math.ceil(math.log(1e14) / (4 * math.log(first / second)))
    assert steps < 5000, "too small a gap for a test of seconds"
    x = drawn(matrix.shape[1], 1, name="start")
    for _ in range(steps):
        x = adjoint @ (matrix @ x)
        x = x / x.norm()
    assert (matrix @ x).norm().item() == pytest.approx(first, rel=CLOSE)


def test_the_norm_of_the_reshaped_kernel_is_another() -> None:
    for name in ("padded", "padded, strided"):
        weight, _, _ = layer(name)
        reshaped = torch.linalg.matrix_norm(weight.flatten(1), ord=2).item()
        assert abs(reshaped - norm(name)) > 0.1 * norm(name), name


def circular_norm(weight: Tensor, size: tuple[int, ...]) -> float:
    """By the Fourier transform of the kernel: one small matrix for each frequency."""
    axes = tuple(range(2, weight.dim()))
    frequencies = torch.fft.fftn(weight, s=size, dim=axes).flatten(2).permute(2, 0, 1)
    return torch.linalg.svdvals(frequencies).max().item()


def test_the_norm_by_the_fourier_transform_is_that_of_a_circular_layer() -> None:
    weight, size, options = layer("padded")
    by_fourier = circular_norm(weight, size)
    assert abs(by_fourier - norm("padded")) > 0.01 * norm("padded")
    # The formula is right for what it is about, which our matrix can be as well.
    matrix, _ = functional.conv_to_affine(weight, None, size, padding_mode="circular", **options)
    assert torch.linalg.svdvals(matrix)[0].item() == pytest.approx(by_fourier, rel=CLOSE)


def test_a_stride_is_not_seen_by_the_fourier_transform() -> None:
    """Leaving rows out can only lower the norm, and here it does."""
    weight, size, _ = layer("padded, strided")
    assert norm("padded, strided") < 0.99 * circular_norm(weight, size)


def test_a_layer_divided_by_its_norm_does_not_stretch() -> None:
    weight, size, options = layer("rectangular")
    matrix, _ = functional.conv_to_affine(weight / norm("rectangular"), None, size, **options)
    values = torch.linalg.svdvals(matrix)
    assert values[0].item() == pytest.approx(1, rel=CLOSE)
    x = drawn(50, 3, *size, name="stretch")
    y = F.conv2d(x, weight / norm("rectangular"), **options)
    assert (y.flatten(1).norm(dim=1) <= x.flatten(1).norm(dim=1) * (1 + CLOSE)).all()


def test_the_norm_is_differentiable_in_the_kernel() -> None:
    """Its derivative is `u^T (dA/dw) v`: the layer's weight gradient between singular vectors."""
    weight, size, options = layer("padded")
    weight.requires_grad_()
    matrix, _ = functional.conv_to_affine(weight, None, size, **options)
    torch.linalg.matrix_norm(matrix, ord=2).backward()
    u, _, v = torch.linalg.svd(matrix.detach())
    left = u[:, 0].view(1, 4, 9, 8)
    right = v[0].view(1, 3, 9, 8)
    wanted = torch.nn.grad.conv2d_weight(right, weight.shape, left, **options)
    torch.testing.assert_close(weight.grad, wanted, rtol=1e-8, atol=1e-10)
