"""What broke collapse once, or would break it unseen: memory, infinity, dtypes, odd inputs."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import linfuse_ext as lf

INF = float("inf")


def layers_of(model: nn.Module) -> list[str]:
    return [type(m).__name__ for m in model.modules() if not list(m.children())]


def assert_same(model: nn.Module, out: Any, *inputs: Tensor) -> None:
    want, got = model(*inputs), out.model(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


class CopiesBefore(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("held", torch.zeros(2, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        old = self.held.clone()
        self.held.add_(1)
        return old, x * 2


def test_a_copy_of_what_is_written_to_stays_a_copy() -> None:
    model = CopiesBefore().eval()
    out = lf.collapse(model, torch.rand(2, 3))
    x = torch.rand(2, 3)
    for _ in range(2):
        assert_same(model, out, x)


class WritesItsInput(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.clone()
        x.add_(1)
        return y, x * 2


def test_inputs_that_a_model_writes_to_are_written_once_and_not_by_collapse() -> None:
    example = torch.zeros(2, 3)
    out = lf.collapse(WritesItsInput().eval(), example)
    assert torch.equal(example, torch.zeros(2, 3))
    x = torch.zeros(4, 3)
    y, z = out.model(x)
    assert torch.equal(y, torch.zeros(4, 3)) and torch.equal(z, torch.full((4, 3), 2.0))
    assert torch.equal(x, torch.ones(4, 3))


def test_a_copy_that_is_returned_is_no_alias() -> None:
    class Copies(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.clone()

    x = torch.rand(2, 3)
    y = lf.collapse(Copies().eval(), torch.rand(2, 3)).model(x)
    assert y.data_ptr() != x.data_ptr()


def test_gradients_stop_where_the_model_stops_them() -> None:
    class Stops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 + (x * 3).detach()

    x = torch.rand(2, 3, requires_grad=True)
    lf.collapse(Stops().eval(), torch.rand(2, 3)).model(x).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full((2, 3), 2.0))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.register_buffer("mask", torch.tensor([0.0, 1.0, -INF]).reshape(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x) + self.mask)[:, :2]


def test_zero_times_infinity_is_not_made_a_weight() -> None:
    model = Masked().eval()
    out = lf.collapse(model, torch.rand(2, 3, 4, 4))
    assert_same(model, out, torch.rand(2, 3, 4, 4))
    assert all(row.verdict != "fused" for row in out.report)
    assert any("not finite" in row.reason for row in out.report)


class MaskedAtTheEnd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mask", torch.triu(torch.full((4, 4), -INF), 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * 0.5 + self.mask


def test_infinities_of_the_model_itself_leave_report_and_values_whole() -> None:
    model = MaskedAtTheEnd().eval()
    out = lf.collapse(model, torch.rand(2, 4, 4))
    x = torch.rand(3, 4, 4)
    want, got = model(x), out.model(x)
    assert torch.equal(want.isinf(), got.isinf()) and not got.isnan().any()
    json.loads(out.report.to_json(), parse_constant=lambda name: pytest.fail(name))


def test_what_overflows_its_dtype_is_refused() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)).half().eval()
    with torch.no_grad():
        for layer in model:
            layer.weight.fill_(1000)
            layer.bias.zero_()
    x = torch.full((2, 1), 1e-3).half()
    out = lf.collapse(model, x)
    assert [row.verdict for row in out.report] == ["refused"]
    assert "not finite in torch.float16" in out.report[0].reason
    assert torch.equal(out.model(x), model(x))


@pytest.mark.parametrize("policy", ["cheaper", "always"])
def test_hundreds_of_layers(policy: str) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(200))).double().eval()
    out = lf.collapse(model, torch.rand(2, 4).double(), policy=policy)
    assert layers_of(out.model) == ["Linear"]
    assert_same(model, out, torch.rand(3, 4).double())


class Shifts(nn.Module):
    """Needs an even batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.linears(x).reshape(-1, 2, 3).flip(1).reshape(-1, 3)


def test_a_batch_that_must_be_even() -> None:
    model = Shifts().eval()
    shapes = ({0: 2 * torch.export.Dim("half")},)
    program = torch.export.export(model, (torch.rand(4, 3),), dynamic_shapes=shapes)
    out = lf.collapse(program)
    assert [row.verdict for row in out.report] == ["fused"]
    assert_same(model, out, torch.rand(6, 3))


class Biased(nn.Module):
    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", torch.rand(5, 3))
        self.register_buffer("bias", bias)
        self.last = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.linear(x, self.weight, self.bias))


@pytest.mark.parametrize("shape", [(1,), (), (5,), (1, 5), (4, 5)], ids=str)
def test_a_bias_of_any_shape(shape: tuple[int, ...]) -> None:
    model = Biased(torch.rand(shape)).eval()
    program = torch.export.export(model, (torch.rand(4, 3),))
    out = lf.collapse(program, policy="always")
    # One bias for each sample is no bias of a layer.
    assert [row.verdict for row in out.report] == ([] if shape == (4, 5) else ["fused"])
    assert_same(model, out, torch.rand(4, 3))


@pytest.mark.parametrize("shape", [(4, 1), (1, 4), (4,), (1,)], ids=str)
def test_addmm_with_a_square_batch(shape: tuple[int, ...]) -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.rand(3, 4))
            self.register_buffer("bias", torch.rand(shape))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight) * 2

    model = Product().eval()
    out = lf.collapse(torch.export.export(model, (torch.rand(4, 3),)), policy="always")
    assert_same(model, out, torch.rand(4, 3))


def test_callers_in_inference_mode_get_layers_that_can_be_trained() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Flatten(),
        nn.Linear(256, 5),
    ).eval()  # fmt: skip
    with torch.inference_mode():
        out = lf.collapse(model, torch.rand(2, 3, 6, 6))
    assert layers_of(out.model) == ["Linear"]
    out.model(torch.rand(2, 3, 6, 6)).sum().backward()


class AnyKeywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.linears(inputs["x"])


def test_any_keywords() -> None:
    model = AnyKeywords().eval()
    x = torch.rand(4, 3)
    # torch.export has no words for the shapes of such arguments, but takes them fixed.
    with pytest.raises(ValueError, match=r"torch.export can capture"):
        lf.collapse(model, {"x": x})
    out = lf.collapse(torch.export.export(model, (), {"x": x}))
    torch.testing.assert_close(out.model(x=x), model(x=x))


def test_what_is_returned_copies() -> None:
    out = lf.collapse(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).eval(), torch.rand(2, 3))
    x = torch.rand(2, 3)
    assert torch.equal(copy.deepcopy(out).model(x), out.model(x))


def test_a_convolution_as_large_as_its_image_is_bounded_as_well() -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.ReLU())
    out = lf.collapse(model.eval(), torch.rand(2, 16, 56, 56), max_bytes=10**6)
    (row,) = out.report
    assert row.verdict == "refused" and "6.42 MB are more than max_bytes=1000000" in row.reason
    out = lf.collapse(model.eval(), torch.rand(2, 16, 56, 56))
    assert out.report[0].verdict == "fused"


def test_errors_of_models_without_values() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).eval()
    with pytest.raises(ValueError, match=r"must hold values, got 0.weight on the meta device"):
        lf.collapse(copy.deepcopy(model).to("meta"), torch.rand(2, 3, device="meta"))
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(3, 4)).eval()
    with pytest.raises(ValueError, match="must not be made in inference mode"):
        lf.collapse(model, torch.rand(2, 3))


class Aliased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.register_buffer("whole", torch.rand(2, 4))
        self.register_buffer("part", self.whole[:1])

    def forward(self, x: Tensor) -> Tensor:
        self.whole.add_(1)
        return self.linear(x) + self.part


def test_a_part_of_a_buffer_that_is_written_to_is_no_constant() -> None:
    model = Aliased().eval()
    try:
        out = lf.collapse(model, torch.rand(5, 3))
    except ValueError as error:  # some releases of torch cannot capture it
        assert "torch.export can capture" in str(error)
    else:
        assert_same(model, out, torch.rand(5, 3))


def test_errors_are_numbers_or_words_in_json() -> None:
    row = lf.collapse(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).eval(), torch.rand(2, 3))
    assert row.report[0].error is not None and math.isfinite(row.report[0].error)
