"""Layers that share: a value that two read, a module that is called twice, weights that are tied.

After Marabou's tests of merged weighted sums and the unsoundness mended in its PR #736, and the
guards of MCT and torch.fx: one reader, one call, one owner.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conformance_nets import Case, assert_equals, collapsed, drawn, every, filled, left
from torch import Tensor, nn

import linfuse_ext as lf


def set_linear(layer: nn.Linear, weight: list[list[float]], bias: list[float]) -> nn.Linear:
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.copy_(torch.tensor(bias))
    return layer.double()


def test_nothing_to_merge_leaves_everything() -> None:
    trap = "layers on both sides of an activation are taken for neighbours"
    model = filled(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2), nn.Sigmoid(),
                                 nn.Linear(2, 2)), trap)  # fmt: skip
    x = drawn(9, 2, name=trap)
    out = collapsed(model, x)
    assert [name for name in left(out.model) if name != "sigmoid"] == ["Linear"] * 3
    assert out.report.totals["fused"] == 0
    assert torch.equal(out.model(x), model(x)), trap


def test_one_pair_by_hand() -> None:
    """All numbers on paper: small integers are exact."""
    first = set_linear(nn.Linear(2, 3), [[1, 2], [0, -1], [3, 1]], [1, -2, 0])
    second = set_linear(nn.Linear(3, 2), [[2, 0, 1], [-1, 3, 0]], [5, 7])
    model = nn.Sequential(nn.ReLU(), first, second, nn.ReLU()).eval()
    out = collapsed(model, torch.rand(4, 2).double())
    (merged,) = (m for m in out.model.modules() if isinstance(m, nn.Linear))
    # [2*1 + 3, 2*2 + 1], [-1, -2 - 3];  5 + 2*1 + 0, 7 - 1*1 + 3*(-2)
    assert merged.weight.tolist() == [[5, 5], [-1, -5]] and merged.bias.tolist() == [7, 0]


class ThreeSources(nn.Module):
    """A weighted sum of three values behind three activations, and one more behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(3, 2) for _ in range(3))
        self.sums = nn.ModuleList(nn.Linear(2, 4) for _ in range(3))
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        one, two, three = self.sums
        y = one(F.relu(self.a(x))) + two(F.relu(self.b(x))) + three(F.relu(self.c(x)))
        return self.last(y)


def test_a_sum_of_several_sources() -> None:
    trap = "the pair is merged for one of its sources and lost for the others"
    model, x = filled(ThreeSources(), trap), drawn(9, 3, name=trap)
    out = collapsed(model, x)
    assert_equals(out.model(x), model, x, trap)
    # What cannot be merged is told.
    assert any("last" in row.layers and row.verdict == "refused" for row in out.report), trap


class TwoReaders(nn.Module):
    """The first layer's value is read by the second and by something else."""

    def __init__(self, other: str, kernel: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, kernel)
        self.second = nn.Conv2d(3, 4, 3)
        self.other = other
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        z = self.second(y)
        if self.other == "returned":
            return torch.cat([z.flatten(1), y.flatten(1)], 1)
        if self.other == "activation":
            return torch.cat([z.flatten(1), F.relu(y).flatten(1)], 1)
        if self.other == "head":
            return torch.cat([F.relu(z).flatten(1), self.head(F.relu(y.mean((2, 3))))], 1)
        return z + F.relu(y)[:, :1, 1:-1, 1:-1]


READERS = [
    Case(other, "a value that something else reads is merged away (Marabou #736)",
         lambda other=other: TwoReaders(other), (2, 8, 9))
    for other in ("returned", "activation", "head", "sum")
]  # fmt: skip


@pytest.mark.parametrize("policy", ["cheaper", "always"])
@every(READERS)
def test_a_value_that_two_read_is_kept(case: Case, policy: str) -> None:
    model, x = case.model(), case.samples()
    out = lf.collapse(model, x, policy=policy)
    assert_equals(out.model(x), model, x, case.trap)
    if case.name != "returned":  # there all of it is one map
        rows = [row for row in out.report if {"first", "second"} <= set(row.layers)]
        assert rows and rows[0].verdict == "refused" and "used elsewhere" in rows[0].reason


class BothReturned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.first(x)
        return self.second(y), y


def test_an_intermediate_that_is_an_output() -> None:
    trap = "a value that is returned disappears into the layer behind it"
    model, x = filled(BothReturned(), trap), drawn(2, 2, 8, 9, name=trap)
    out = collapsed(model, x)
    assert len(out.model(x)) == 2
    for number, got in enumerate(out.model(x)):
        one = nn.Sequential(model.first, model.second) if number == 0 else model.first
        assert_equals(got, one, x, trap)


def test_a_norm_and_a_second_reader() -> None:
    trap = "the norm is folded into a convolution whose own value is read as well"

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return F.relu(self.norm(y)) + F.relu(y)

    model, x = filled(Model(), trap), drawn(2, 2, 8, 9, name=trap)
    for policy in ("cheaper", "always"):
        assert_equals(lf.collapse(model, x, policy=policy).model(x), model, x, trap)


# One module, several calls ------------------------------------------------------------------------


class Shared(nn.Module):
    """One layer that is called twice, in a row or on two values."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3)
        self.before, self.after = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "in a row":
            return self.after(self.layer(self.layer(x)))
        if self.how == "across an activation":
            return self.after(self.layer(F.relu(self.layer(self.before(x)))))
        return self.after(self.layer(x) + self.layer(self.before(x)))


@pytest.mark.parametrize("policy", ["cheaper", "always"])
@pytest.mark.parametrize(
    ("how", "layers"), [("in a row", 1), ("across an activation", 2), ("on two values", 1)]
)
def test_a_module_that_is_called_twice(how: str, layers: int, policy: str) -> None:
    trap = "a merge is written into the module, and its other call changes as well"
    model, x = filled(Shared(how), trap), drawn(2, 3, 8, 9, name=trap)
    before = copy.deepcopy(model.state_dict())
    out = lf.collapse(model, x, policy=policy)
    assert_equals(out.model(x), model, x, trap)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), trap
    if policy == "always":
        assert len(left(out.model)) == layers, trap


class Tied(nn.Module):
    """An autoencoder whose decoder is the encoder's weight, turned."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 5)
        self.shift = nn.Parameter(torch.zeros(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        code = F.relu(self.encoder(x))
        return self.head(F.linear(code, self.encoder.weight.t(), self.shift))


def test_tied_weights_are_not_changed() -> None:
    trap = "a merged layer overwrites the weight that another layer reads"
    model, x = filled(Tied(), trap), drawn(4, 8, name=trap)
    before = copy.deepcopy(model.state_dict())
    out = collapsed(model, x)
    assert left(out.model).count("Linear") == 2, trap
    assert_equals(out.model(x), model, x, trap)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), trap
    with torch.no_grad():
        for parameter in out.model.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), trap


@pytest.mark.parametrize("kind", ["chain", "branches"])
def test_a_layer_shared_by_layers(kind: str) -> None:
    trap = "two modules with one weight: their merge is no longer that weight"
    one, two = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.Conv2d(3, 3, 3, padding=1, bias=False)
    two.weight = one.weight
    if kind == "chain":
        model: nn.Module = nn.Sequential(one, nn.ReLU(), two, nn.Conv2d(3, 2, 1))
    else:

        class Both(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.one, self.two = one, two

            def forward(self, x: Tensor) -> Tensor:
                return self.one(x) + self.two(x).flip(1)

        model = Both()
    model, x = filled(model, trap), drawn(2, 3, 8, 9, name=trap)
    out = collapsed(model, x)
    assert_equals(out.model(x), model, x, trap)


def test_numbers_of_the_batch_stay_apart() -> None:
    trap = "a reshape that moves samples into the image is flattened as if it did not"

    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(2, 3, 3), nn.Linear(3 * 6, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)  # [N, 3, 6, 7]: one row of numbers for each column of the image
            y = y.permute(0, 3, 1, 2).reshape(-1, 3 * 6)
            return self.linear(y).reshape(x.shape[0], -1)

    model, x = filled(Folded(), trap), drawn(3, 2, 8, 9, name=trap)
    out = collapsed(model, x)
    assert_equals(out.model(x), model, x, trap)
    for n in range(3):
        torch.testing.assert_close(out.model(x[n : n + 1])[0], out.model(x)[n])
