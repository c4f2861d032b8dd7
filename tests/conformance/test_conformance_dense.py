"""Linear behind Linear: every combination of biases, long chains, what lies between.

After the tests of DNNV's squeezed Gemms (with and without their third operand), of overparam's
OverparamLinear, and the questions onnxsim#258 and forum 93088.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from conformance_nets import assert_equals, collapsed, drawn, filled, left
from torch import Tensor, nn

import linfuse_ext as lf

BIASES = list(itertools.product((False, True), repeat=2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("first", "second"), BIASES)
def test_every_combination_of_biases(first: bool, second: bool, dtype: torch.dtype) -> None:
    trap = "a bias that is missing is read, or the first one is not taken through the second layer"
    pair = [nn.Linear(5, 10, bias=first), nn.Linear(10, 7, bias=second)]
    model = filled(nn.Sequential(*pair), trap).to(dtype)
    x = drawn(100, 5, name=trap).to(dtype)
    fused = lf.fuse_linear_linear(*model)
    assert (fused.bias is not None) == (first or second), trap
    assert_equals(fused(x), model, x, trap)
    out = collapsed(model, x)
    assert left(out.model) == ["Linear"]
    assert_equals(out.model(x), model, x, trap)


def test_the_order_of_the_product() -> None:
    """Square weights fit either way around: `W1 W2` raises no error."""
    first, second = filled(nn.Linear(6, 6), "first"), filled(nn.Linear(6, 6), "second")
    fused = lf.fuse_linear_linear(first, second)
    weight = torch.einsum("fm,md->fd", second.weight, first.weight)
    torch.testing.assert_close(fused.weight.data, weight, rtol=1e-13, atol=1e-13)
    other = torch.einsum("fm,md->fd", first.weight, second.weight)
    assert (fused.weight - other).abs().max() > 0.1
    bias = second.bias + torch.einsum("fm,m->f", second.weight, first.bias)
    torch.testing.assert_close(fused.bias.data, bias.detach(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("biases", ["all", "none", "every other"])
@pytest.mark.parametrize(
    ("depth", "width"), [(2, 32), (4, 4), (4, 8), (4, 32), (8, 4), (8, 8), (16, 4), (16, 8)]
)
def test_long_chains(depth: int, width: int, biases: str) -> None:
    trap = "the pass stops after one pair, or loses the bias of a layer in the middle"
    sizes = itertools.pairwise([8, *[width] * (depth - 1), 8])
    has = {"all": lambda n: True, "none": lambda n: False, "every other": lambda n: n % 2 == 0}
    layers = [nn.Linear(i, o, bias=has[biases](n)) for n, (i, o) in enumerate(sizes)]
    model, x = filled(nn.Sequential(*layers), trap), drawn(16, 8, name=trap)
    fused = functools.reduce(lf.fuse_linear_linear, model)
    assert fused.weight.shape == (8, 8) and (fused.bias is None) == (biases == "none")
    assert_equals(fused(x), model, x, trap)
    if width == 8:  # of the widths the network cares for none
        out = collapsed(model, x)
        assert left(out.model) == ["Linear"], trap
        assert_equals(out.model(x), model, x, trap)


class Overparametrised(nn.Module):
    def __init__(self, depth: int, interval: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))
        self.norms = nn.ModuleList(nn.BatchNorm1d(8) for _ in range(depth))
        self.interval = interval

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for number, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True), start=1):
            y = norm(layer(values[-1]))
            if number % self.interval == 0:
                y = y + values[number - self.interval]
            values.append(y)
        return values[-1]


@pytest.mark.parametrize(("depth", "interval"), [(1, 1), (4, 1), (4, 2), (8, 2), (8, 4)])
def test_norms_and_residuals_between(depth: int, interval: int) -> None:
    trap = "a BatchNorm on features is no channel scale, and a residual is the unit matrix"
    model, x = filled(Overparametrised(depth, interval), trap), drawn(16, 8, name=trap)
    out = collapsed(model, x)
    assert left(out.model) == ["Linear"], trap
    assert_equals(out.model(x), model, x, trap)


class Gemms(nn.Module):
    """ONNX's Gemm, `alpha A B + beta C` with B given either way around, and a Linear."""

    def __init__(self, alpha: float, beta: float, transposed: bool) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros((6, 5) if transposed else (5, 6)))
        self.bias = nn.Parameter(torch.zeros(6))
        self.last = nn.Linear(6, 4)
        self.options = {"alpha": alpha, "beta": beta}
        self.transposed = transposed

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.matrix.t() if self.transposed else self.matrix
        return self.last(torch.addmm(self.bias, x, matrix, **self.options))


GEMMS = [(1, 1, False), (1, 1, True), (2, 1, False), (1, 0.5, False), (3, 2, True), (2, 0, True)]


@pytest.mark.parametrize(("alpha", "beta", "transposed"), GEMMS)
def test_alpha_beta_and_the_transposed_operand(alpha, beta, transposed: bool) -> None:
    trap = "alpha, beta and the transposition of a Gemm are passed over"
    model, x = filled(Gemms(alpha, beta, transposed), trap), drawn(9, 5, name=trap)
    assert_equals(collapsed(model, x).model(x), model, x, trap)


@pytest.mark.parametrize(("alpha", "beta", "transposed"), GEMMS)
def test_a_gemm_is_a_linear(alpha, beta, transposed: bool) -> None:
    model, x = filled(Gemms(alpha, beta, transposed), "gemm"), drawn(9, 5, name="gemm")
    assert left(collapsed(model, x).model) == ["Linear"]


def test_a_linear_over_tokens_is_no_linear_over_all_of_them() -> None:
    trap = "Linears on the last axis are merged as if they mixed the tokens"
    model = filled(nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 5)), trap)
    x = drawn(3, 7, 6, name=trap)
    out = collapsed(model, x)
    assert left(out.model) == ["Linear"] and out.model(x).shape == (3, 7, 5)
    assert sum(p.numel() for p in out.model.parameters()) == 6 * 5 + 5, trap
    assert_equals(out.model(x), model, x, trap)
