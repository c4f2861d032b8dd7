"""The public face of collapse: what it takes, gives back, refuses and leaves alone."""

from __future__ import annotations

import copy
import io
import itertools
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linfuse_ext as lf
from linfuse_ext.network.layers import BiasMap, ScaleShift

DIGITS = (1, 28, 28)


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


def cryptonet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 5, 5, stride=2, padding=1), Square(), nn.AvgPool2d(3, 1, 1),
        nn.Conv2d(5, 50, 5, 2), nn.AvgPool2d(3, 1, 1), nn.Flatten(), nn.Linear(1250, 100),
        Square(), nn.Linear(100, 10),
    ).eval()  # fmt: skip


def layers_of(model: nn.Module) -> list[str]:
    return [type(m).__name__ for m in model.modules() if not list(m.children())]


def assert_equal(model: nn.Module, out: Any, *inputs: Tensor, bound: float = 1e-5) -> None:
    want, got = model(*inputs), out.model(*inputs)
    assert (got - want).abs().max() <= bound * want.abs().max()


@pytest.mark.parametrize("policy", ["cheaper", "always"])
def test_the_middle_of_a_cryptonet_is_one_linear(policy: str) -> None:
    model = cryptonet()
    out = lf.collapse(model, torch.rand(2, *DIGITS), policy=policy)
    assert layers_of(out.model) == ["Conv2d", "Linear", "Linear"]
    (row,) = out.report
    assert row.layers == ("2", "3", "4", "6") and row.verdict == "fused"
    pools = 13 * 13 * 5 * 9 + 50 * 25 * 9
    conv, linear = 2 * 50 * 25 * 5 * 25 + 50 * 25, 2 * 1250 * 100 + 100
    assert row.flops_before == pools + conv + linear
    assert row.flops_after == 2 * 845 * 100 + 100
    assert row.params_before == 50 * 5 * 25 + 50 + 1250 * 100 + 100
    assert row.params_after == 845 * 100 + 100
    assert row.error is not None and row.error < 1e-5
    for batch in (1, 2, 7):
        assert_equal(model, out, torch.rand(batch, *DIGITS))


def test_never_only_reports() -> None:
    model = cryptonet()
    out = lf.collapse(model, torch.rand(2, *DIGITS), policy="never")
    assert [row.verdict for row in out.report] == ["declined"]
    assert "never" in out.report[0].reason and out.report[0].error is None
    x = torch.rand(3, *DIGITS)
    assert torch.equal(out.model(x), model(x))
    assert out.report.totals["params_saved"] == 0


def test_the_argument_and_the_result_share_nothing() -> None:
    model = cryptonet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    out = lf.collapse(model, torch.rand(2, *DIGITS))
    for parameter in out.model.parameters():
        with torch.no_grad():
            parameter.fill_(3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not out.model.training
    assert all(parameter.requires_grad for parameter in out.model.parameters())


def test_frozen_parameters_stay_frozen() -> None:
    model = cryptonet().requires_grad_(False)
    out = lf.collapse(model, torch.rand(2, *DIGITS))
    assert not any(parameter.requires_grad for parameter in out.model.parameters())


def test_one_sample_is_enough_for_an_example() -> None:
    model = cryptonet()
    out = lf.collapse(model, torch.rand(1, *DIGITS))
    assert_equal(model, out, torch.rand(4, *DIGITS))


def test_a_program_is_taken_with_its_own_inputs() -> None:
    model = cryptonet()
    x = (torch.rand(2, *DIGITS),)
    for shapes in (None, {"input": {0: torch.export.Dim("batch")}}):
        program = torch.export.export(model, x, dynamic_shapes=shapes)
        out = lf.collapse(program)
        assert [row.verdict for row in out.report] == ["fused"]
        assert_equal(model, out, *x)
    again = out.export()
    y = torch.rand(5, *DIGITS)
    torch.testing.assert_close(again.module()(y), out.model(y))


class TwoInTwoOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(3, 4, 1)
        self.d = nn.Conv2d(4, 4, 3, padding=1)
        self.e = nn.Conv2d(4, 4, 3)

    def forward(self, a: Tensor, *, b: Tensor, flag: bool = True) -> dict[str, Any]:
        y = self.d(self.c(a))
        return {"y": y, "z": (self.e(y) + b[:, :, 1:-1, 1:-1],)}


def test_keyword_inputs_and_nested_outputs() -> None:
    model = TwoInTwoOut().eval()
    inputs = {"a": torch.rand(2, 3, 6, 5), "b": torch.rand(2, 4, 6, 5)}
    out = lf.collapse(model, inputs)
    verdicts = [(row.layers, row.verdict) for row in out.report]
    assert verdicts == [(("c", "d"), "fused"), (("d", "e"), "refused")]
    assert "used elsewhere" in out.report[1].reason
    fused = dict(out.model.named_modules())["c_d"]
    assert isinstance(fused, BiasMap) and fused.bias_map.shape == (4, 6, 5)
    inputs = {"a": torch.rand(3, 3, 6, 5), "b": torch.rand(3, 4, 6, 5)}
    got, want = out.model(**inputs), model(**inputs)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.export().module()(**inputs), got)


class AnyNumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.two(self.one(inputs[0])) + inputs[1]


def test_any_number_of_inputs() -> None:
    model = AnyNumber().eval()
    out = lf.collapse(model, (torch.rand(2, 3), torch.rand(2, 2)))
    assert layers_of(out.model) == ["Linear"]
    assert_equal(model, out, torch.rand(5, 3), torch.rand(5, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_stay_and_are_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Identity(), nn.Dropout(), nn.Linear(6, 3))
    model = model.to(dtype).eval()
    out = lf.collapse(model, torch.rand(2, 6, dtype=dtype), policy="always")
    (linear,) = (m for m in out.model.modules() if isinstance(m, nn.Linear))
    first, second = model[0].double(), model[3].double()
    want = second.weight @ first.weight
    assert linear.weight.dtype == dtype
    torch.testing.assert_close(linear.weight, want.to(dtype), rtol=0, atol=0)
    assert out.report[0].error is not None and out.report[0].error < 20 * torch.finfo(dtype).eps


def test_a_low_rank_bottleneck_stays_and_its_numbers_are_told() -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 64)).eval()
    out = lf.collapse(model, torch.rand(2, 64))
    (row,) = out.report
    assert row.verdict == "declined" and layers_of(out.model) == ["Linear", "Linear"]
    assert (row.flops_before, row.flops_after) == (2 * 2 * 64 * 8 + 8 + 64, 2 * 64 * 64 + 64)
    assert "8.26 k FLOPs in place of 2.12 k" in row.reason
    out = lf.collapse(model, torch.rand(2, 64), policy="always")
    assert out.report[0].verdict == "fused" and layers_of(out.model) == ["Linear"]


def test_the_cut_of_a_chain_is_the_cheapest_and_not_the_first() -> None:
    # Greedy from the left would merge 10 -> 10 -> 100 and be stuck with 100 -> 2 -> 100.
    sizes = (100, 10, 100, 2, 100, 100)
    model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(sizes)))
    out = lf.collapse(model.eval(), torch.rand(2, 100))
    shapes = [tuple(p.shape) for p in out.model.parameters()]
    assert shapes == [(2, 100), (100, 2)]


def test_a_linear_that_is_too_large_is_refused_with_its_size() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)).eval()
    out = lf.collapse(model, torch.rand(2, 3, 6, 6), policy="always", max_bytes=62207)
    (row,) = out.report
    assert row.verdict == "refused"
    assert "padding between the layers hides values" in row.reason and "62.2 kB" in row.reason
    assert (row.flops_after, row.params_after) == (row.flops_before, row.params_before)
    out = lf.collapse(model, torch.rand(2, 3, 6, 6), policy="always", max_bytes=62208)
    assert layers_of(out.model) == ["Linear"]


def test_scales_alone_become_a_scale() -> None:
    class Scales(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ((x * 2 + 1) * 3).relu()

    model = Scales().eval()
    out = lf.collapse(model, torch.rand(2, 5))
    assert any(isinstance(module, ScaleShift) for module in out.model.modules())
    assert_equal(model, out, torch.rand(4, 5))


def test_numbers_of_the_batch_never_mix() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.one(x)
            return self.two(h - h.mean(0, keepdim=True))

    model = Mixed().eval()
    out = lf.collapse(model, torch.rand(3, 4), policy="always")
    assert layers_of(out.model) == ["Linear", "Linear"]
    assert_equal(model, out, torch.rand(6, 4))


def test_what_writes_in_place_is_computed_as_written() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 3)
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            z = self.bn(y)
            y.mul_(2)  # after it was read
            return z + y

    model = Writes().eval()
    out = lf.collapse(model, torch.rand(2, 2, 5, 5), policy="always")
    assert layers_of(out.model) == ["Conv2d"]
    assert_equal(model, out, torch.rand(3, 2, 5, 5))


def test_tied_weights_stay_tied_where_they_stay() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(self.one(x).relu())

    model = Tied().eval()
    out = lf.collapse(model, torch.rand(2, 4))
    assert len(list(out.model.parameters())) == 2
    assert_equal(model, out, torch.rand(3, 4))


class Counts(nn.Module):
    """Writes to a buffer at each call, and to one that scales what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(3))
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.linear(self.linear(x * self.calls))


def test_buffers_that_are_written_to_are_no_constants_and_keep_counting() -> None:
    model = Counts().eval()
    out = lf.collapse(model, torch.rand(2, 3))
    assert model.calls.tolist() == [0, 0, 0]
    x = torch.rand(4, 3)
    for _ in range(3):
        assert_equal(model, out, x)
    assert out.model.calls.tolist() == [3, 3, 3]


class DenseBlock(nn.Module):
    """Every layer reads all values before it: none is used by one layer only."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4 * (n + 1), 4) for n in range(count))

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for layer in self.layers:
            values.append(layer(torch.cat(values, 1)))
        return torch.cat(values, 1)


def test_a_net_of_shared_values_is_one_layer_where_all_of_it_ends_in_one() -> None:
    model = DenseBlock(4).eval()
    out = lf.collapse(model, torch.rand(2, 4), policy="always")
    assert layers_of(out.model) == ["Linear"]
    assert_equal(model, out, torch.rand(3, 4))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2))
        self.two = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(x)


def test_a_net_that_stays_is_merged_inside() -> None:
    model = Branches().eval()
    out = lf.collapse(model, torch.rand(2, 2, 4, 4), max_bytes=0)
    verdicts = [(row.layers, row.verdict) for row in out.report]
    assert (("one.0", "one.1"), "fused") in verdicts and verdicts[-1][1] == "refused"
    assert sorted(layers_of(out.model)) == ["Conv2d", "Linear"]
    assert_equal(model, out, torch.rand(3, 2, 4, 4))


def test_deep_networks_take_seconds() -> None:
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(100))).eval()
    out = lf.collapse(model, torch.rand(2, 6))
    assert layers_of(out.model) == ["Linear"]


def test_the_result_copies_and_pickles() -> None:
    out = lf.collapse(cryptonet(), torch.rand(2, *DIGITS))
    x = torch.rand(3, *DIGITS)
    file = io.BytesIO()
    torch.save(out.model, file)
    file.seek(0)
    for again in (copy.deepcopy(out.model), torch.load(file, weights_only=False)):
        assert torch.equal(again(x), out.model(x))


def test_sizes_of_a_value_are_no_use_of_it() -> None:
    class Shapes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(2, 3, 3), nn.Linear(48, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            flat = y.flatten(1)
            return self.linear((flat * 2).reshape_as(flat).view(y.size(0), -1))

    model = Shapes().eval()
    out = lf.collapse(model, torch.rand(2, 2, 6, 6))
    assert layers_of(out.model) == ["Linear"]
    assert_equal(model, out, torch.rand(3, 2, 6, 6))


def test_a_weight_that_the_model_rounds_is_merged_as_it_rounds_it() -> None:
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # In float64 the quotients would be on the other side of one half.
            self.weight = nn.Parameter(torch.tensor([[0.05, 0.15], [0.25, 0.35]]))
            self.linear = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(nn.functional.linear(x, torch.round(self.weight / 0.1) * 0.1))

    model = Rounded().eval()
    assert_equal(model, lf.collapse(model, torch.rand(2, 2)), torch.rand(4, 2), bound=1e-6)


def test_a_merged_layer_yields_its_name_to_what_stays() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(4)
            self.bn.running_mean.normal_()
            self.bn.weight.data.normal_()

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(x)
            return torch.stack([self.bn(y) + y + y, y, x], 1)

    model = Shared().eval()
    out = lf.collapse(model, torch.rand(2, 4, 3))
    assert [row.verdict for row in out.report].count("fused") == 1
    assert "bn_2" in dict(out.model.named_children()) and "bn.weight" in out.model.state_dict()
    assert_equal(model, out, torch.rand(5, 4, 3))


def test_a_merge_that_saves_nothing_is_not_made() -> None:
    model = nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(2, 2, 3)).eval()
    out = lf.collapse(model, torch.rand(2, 2, 4, 4))
    assert list(out.report) == [] and layers_of(out.model)[-1] == "Conv2d"
    out = lf.collapse(model, torch.rand(2, 2, 4, 4), policy="always")
    assert out.report[0].verdict == "fused"
    (conv,) = (m for m in out.model.modules() if isinstance(m, nn.Conv2d))
    assert conv.padding == (1, 1)


def test_what_nothing_uses_is_not_reported() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.dropout = nn.Linear(2, 1), nn.Dropout()

        def forward(self, x: Tensor) -> Tensor:
            self.dropout(self.linear(2 * x))
            return x + 1

    out = lf.collapse(Dead().eval(), torch.rand(2, 2))
    assert list(out.report) == [] and layers_of(out.model) == ["Collapsed"]


class Everything(nn.Module):
    """Every kind of merge: by rules, into matrices, through operators, with maps of biases."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.shuffle = nn.PixelShuffle(2)
        self.pad = nn.ConstantPad2d((1, 0, 2, 1), 3.0)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")
        self.three, self.head = nn.Conv2d(1, 2, 3, stride=2), nn.Linear(128, 5)
        self.register_buffer("order", torch.tensor([3, 1, 2, 0]))
        self.scale = nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.two(self.one(x[:, self.order]))) + self.scale * x
        y = self.shuffle(y).relu()
        return self.head(self.three(self.up(self.pad(y)).flip(2)).flatten(1))


@pytest.mark.parametrize("policy", ["cheaper", "always"])
def test_merges_are_made_where_the_model_is(device: str, policy: str) -> None:
    torch.manual_seed(0)
    model = Everything().to(device).double().eval()
    x = torch.rand(2, 4, 3, 4, dtype=torch.float64, device=device)
    out = lf.collapse(model, x, policy=policy)
    assert {tensor.device for tensor in out.model.state_dict().values()} == {x.device}
    assert len([row for row in out.report if row.verdict == "fused"]) == 2
    y = torch.rand(5, 4, 3, 4, dtype=torch.float64, device=device)
    assert_equal(model, out, y, bound=1e-12)


def test_a_padding_mode_without_padding() -> None:
    model = nn.Sequential(nn.Conv1d(2, 1, 1, padding_mode="circular"), nn.BatchNorm1d(1)).eval()
    out = lf.collapse(model, torch.rand(2, 2, 3))
    assert layers_of(out.model) == ["Conv1d"]
    assert_equal(model, out, torch.rand(3, 2, 3))


def test_sums_that_become_a_scale_have_their_row() -> None:
    class Doubles(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x + x
            return (y + y).relu()

    out = lf.collapse(Doubles().eval(), torch.rand(2, 3))
    assert [(row.verdict, row.flops_before, row.flops_after) for row in out.report] == [
        ("fused", 6, 3)
    ]


def test_a_report_is_a_sequence_a_table_and_json() -> None:
    report = lf.collapse(cryptonet(), torch.rand(2, *DIGITS)).report
    assert len(report) == 1 and report[:1] == (report[0],) and list(report) == [report[0]]
    text = str(report)
    assert text.splitlines()[0].split() == ["verdict", "layers", "FLOPs", "parameters", "error",
                                            "reason"]  # fmt: skip
    assert "1 fused, 0 declined, 0 refused under policy 'cheaper'" in text
    told = json.loads(report.to_json())
    assert told["policy"] == "cheaper" and told["totals"]["fused"] == 1
    assert told["rows"][0]["layers"] == ["2", "3", "4", "6"]
    assert told["rows"][0]["flops_before"] == report[0].flops_before


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


X = torch.rand(2, *DIGITS)
ERRORS = [
    (lambda: lf.collapse(3, X), TypeError, "`model` must be an nn.Module or a torch.export"),
    (lambda: lf.collapse(cryptonet().train(), X), ValueError, "call model.eval() first"),
    (lambda: lf.collapse(cryptonet()), TypeError, "`example_inputs` must be given for a module"),
    (lambda: lf.collapse(cryptonet(), "x"), TypeError, "`example_inputs` must be a tensor"),
    (lambda: lf.collapse(cryptonet(), []), ValueError, "whose axis 0 is the batch"),
    (lambda: lf.collapse(cryptonet(), X[:0]), ValueError, "at least one sample"),
    (lambda: lf.collapse(cryptonet(), X[:, :, 4:]), ValueError, "torch.export can capture"),
    (lambda: lf.collapse(DataDependent().eval(), X), ValueError, "data-dependent"),
    (lambda: lf.collapse(cryptonet(), X, policy="best"), ValueError, "cheaper, always, never"),
    (lambda: lf.collapse(cryptonet(), X, policy=1), TypeError, "`policy` must be a str"),
    (lambda: lf.collapse(cryptonet(), X, max_bytes=1.5), TypeError, "`max_bytes` must be an int"),
    (lambda: lf.collapse(cryptonet(), X, max_bytes=-1), ValueError, "non-negative, got -1"),
]


@pytest.mark.parametrize(("call", "kind", "words"), ERRORS)
def test_errors_name_the_argument_and_what_it_must_be(call: Any, kind: Any, words: str) -> None:
    with pytest.raises(kind) as raised:
        call()
    assert str(raised.value).startswith("collapse: `") and words in str(raised.value)
