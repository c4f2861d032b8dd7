"""Whole networks: collapsing changes how they compute, and nothing that can be seen from outside.

The reports are compared with the texts in `golden/`. After a change that is meant, write them
anew with

    LINFUSE_WRITE_GOLDEN=1 python -m pytest tests/network/test_models.py -k report

and read the difference. Errors, which are rounding and so differ from machine to machine, are
masked in them.
"""

from __future__ import annotations

import collections
import copy
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS, PUBLISHED, Entry, build
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from linfuse_ext import collapse

GOLDEN = Path(__file__).parent / "golden"
WRITE_GOLDEN = "LINFUSE_WRITE_GOLDEN"
pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"  # torch's, about its own
)
POLICIES = ("cheaper", "always", "never")

# A sum of n terms in another order errs by at most n eps and typically by sqrt(n) eps (N. J.
# Higham, Accuracy and Stability of Numerical Algorithms, sections 3.1 and 4.5). The unit below is
# a network's typical error, the bound its worst: sqrt(n) apart, n < 10^4 for all networks here.
WORST_OVER_TYPICAL = 100


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def dynamic_batch(inputs: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda _: {0: torch.export.Dim.DYNAMIC}, inputs)


def export(model: nn.Module, inputs: tuple[Any, ...]) -> ExportedProgram:
    return torch.export.export(model, inputs, dynamic_shapes=dynamic_batch(inputs))


@cache
def rounding_unit(name: str) -> tuple[float, ...]:
    """How far each output of a network is off in float32, in units of the machine epsilon.

    The arguments and parameters are float32 numbers, so that this is what its own sums round off:
    how the network amplifies the errors of its layers is measured and not guessed.
    """
    epsilon = torch.finfo(torch.float32).eps
    inputs = MODELS[name].inputs(8, seed=1, dtype=torch.float32)
    exact = tensors(build(name)(*MODELS[name].inputs(8, seed=1)))
    rounded = tensors(build(name, torch.float32)(*inputs))
    return tuple(
        max((one - two).abs().max().item() / epsilon, one.abs().max().item())
        for one, two in zip(exact, rounded, strict=True)
    )


def assert_equal_outputs(name: str, actual: Any, expected: Any) -> None:
    """Same structure and shapes, and values that differ by rounding only; `expected` is float64."""
    assert pytree.tree_structure(actual) == pytree.tree_structure(expected)
    pairs = zip(tensors(actual), tensors(expected), rounding_unit(name), strict=True)
    for number, (one, two, unit) in enumerate(pairs):
        assert one.shape == two.shape
        bound = WORST_OVER_TYPICAL * unit * torch.finfo(one.dtype).eps
        error = (one.double() - two).abs().max().item()
        assert error <= bound, f"output {number} is off by {error:.2e}, the bound is {bound:.2e}"


@dataclass
class Case:
    """One network, collapsed under one policy."""

    name: str
    policy: str
    model: nn.Module
    before: Any  # what can be seen of the model, before
    inputs: tuple[Any, ...]
    out: Any

    @property
    def entry(self) -> Entry:
        return MODELS[self.name]

    @cached_property
    def program(self) -> ExportedProgram:
        return self.out.export()


def visible(model: nn.Module) -> Any:
    """All that collapsing could change of its argument: values, identities, flags, hooks."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    identities = [(name, id(value), value.requires_grad, value.grad) for name, value in tensors]
    flags = [
        (
            name,
            id(module),
            module.training,
            sorted(vars(module)),
            *(len(value) for key, value in vars(module).items() if key.endswith("_hooks")),
        )
        for name, module in model.named_modules(remove_duplicate=False)
    ]
    return state, identities, flags


@cache
def exported(name: str) -> tuple[ExportedProgram, str]:
    """The network as a program, and that as text."""
    program = export(build(name), MODELS[name].inputs(2, seed=2))
    return program, str(program.graph)


@pytest.fixture(
    scope="module",
    params=[(name, policy) for name in MODELS for policy in POLICIES],
    ids=lambda pair: "-".join(pair),
)
def case(request: pytest.FixtureRequest) -> Case:
    name, policy = request.param
    if name in PUBLISHED:
        pytest.importorskip("transformers", minversion="5.23")  # whose names the reports have
    inputs = MODELS[name].inputs(2, seed=2)
    model = build(name)
    # Both kinds of argument on every network: the module is given once, its program otherwise.
    if policy == "cheaper":
        model(*inputs)  # some set up hooks of their own at the first call
        before = visible(model)
        out = collapse(model, inputs, policy=policy)
    else:
        before = None
        out = collapse(exported(name)[0], policy=policy)
    return Case(name, policy, model, before, inputs, out)


def test_outputs_are_equal(case: Case) -> None:
    for batch in (1, 3, 5):
        inputs = case.entry.inputs(batch, seed=batch)
        expected = case.model(*inputs)
        assert_equal_outputs(case.name, case.out.model(*inputs), expected)
        if any(tensor.dim() == 4 for tensor in tensors(inputs)):
            last = pytree.tree_map_only(Tensor, channels_last, inputs)
            assert_equal_outputs(case.name, case.out.model(*last), expected)


def channels_last(tensor: Tensor) -> Tensor:
    if tensor.dim() != 4:
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last)


def test_argument_is_not_changed(case: Case) -> None:
    if case.before is None:
        program, graph = exported(case.name)
        fresh = build(case.name).state_dict()
        assert all(torch.equal(value, fresh[name]) for name, value in program.state_dict.items())
        assert str(program.graph) == graph
        return
    state, identities, flags = visible(case.model)
    assert list(state) == list(case.before[0])
    assert all(torch.equal(value, case.before[0][name]) for name, value in state.items())
    assert identities == case.before[1]
    assert flags == case.before[2]


def test_result_shares_no_memory_with_the_argument(case: Case) -> None:
    own = {tensor.data_ptr() for tensor in tensors(case.model.state_dict())}
    made = {tensor.data_ptr() for tensor in tensors(case.out.model.state_dict())}
    assert not (own & made) - {0}


KINDS = {
    "conv": r"conv(_transpose)?\dd|convolution",
    "linear": r"linear",
    "batch_norm": r"_?(native_)?batch_norm.*",
    "pool": r"(_?adaptive_)?avg_pool\dd|mean",
    "add": r"add_?",
    "mul": r"mul_?",
    "cat": r"cat|concat",
    "dropout": r".*dropout_?",
}


def counts(program: ExportedProgram) -> collections.Counter[str]:
    """How many operations of each kind a program has."""
    found: collections.Counter[str] = collections.Counter()
    for node in program.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        # Arithmetic on sizes is not on values.
        if isinstance(node.meta.get("val"), Tensor):
            name = node.target._schema.name.split("::")[1]
            found.update(kind for kind, names in KINDS.items() if re.fullmatch(names, name))
    found["layers"] = found["conv"] + found["linear"]
    return found


def test_as_many_layers_are_left_as_the_mathematics_says(case: Case) -> None:
    found = counts(case.program)
    assert not found["dropout"]
    if case.policy == "never":
        given = counts(exported(case.name)[0])
        left = {kind: given[kind] for kind in ("conv", "linear", "batch_norm", "pool", "cat")}
    else:
        left = getattr(case.entry, case.policy)
    assert {kind: found[kind] for kind in left} == left
    idle = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity)
    assert not [module for module in case.out.model.modules() if isinstance(module, idle)]


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_parameters_saved_are_those_that_are_gone(case: Case) -> None:
    saved = parameter_count(case.model) - parameter_count(case.out.model)
    assert case.out.report.totals["params_saved"] == saved


def products(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    """As torch counts them: those of convolutions and matrices."""
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops()


def test_cheaper_never_multiplies_more(case: Case) -> None:
    before, after = (products(model, case.inputs) for model in (case.model, case.out.model))
    assert case.policy == "always" or after <= before
    # Scales, shifts and pools, which torch does not count, are a small part of what is saved.
    saved = case.out.report.totals["flops_saved"] * 2  # two samples
    assert 0 <= saved - (before - after) < 0.2 * before


def test_rows_say_what_was_done(case: Case) -> None:
    rows = list(case.out.report)
    assert len(rows) == len(case.out.report)
    for row in rows:
        assert row.verdict in ("fused", "declined", "refused")
        assert row.layers and all(isinstance(layer, str) and layer for layer in row.layers)
        assert row.reason
        assert row.flops_before >= 0 and row.params_before >= 0
        if row.verdict == "fused":
            assert case.policy != "never"
            # The largest difference over the largest value: the same bound, for one stretch.
            assert 0 <= row.error < WORST_OVER_TYPICAL * 1e3 * torch.finfo(torch.float64).eps
        else:
            assert row.error is None
        before, after = (row.flops_before, row.params_before), (row.flops_after, row.params_after)
        if case.policy == "cheaper" and row.verdict == "fused":
            assert after < before
        if case.policy == "cheaper" and row.verdict == "declined":
            assert after >= before
    expected = {"cheaper": case.entry.cheaper_rows, "always": case.entry.always_rows}
    for verdict, layers in expected.get(case.policy, ()):
        found = [row.layers for row in rows if row.verdict == verdict]
        assert any(set(layers) <= set(names) for names in found), (
            f"no row says {verdict} of {', '.join(layers)}:\n{case.out.report}"
        )


def test_names_are_those_of_the_model(case: Case) -> None:
    modules = dict(case.model.named_modules(remove_duplicate=False))
    for row in case.out.report:
        for layer in row.layers:  # an operation of no module of its own: where it is, and its name
            assert layer in modules or layer.rpartition(".")[0] in modules, layer


def test_state_dict_makes_a_round_trip(case: Case) -> None:
    expected = tensors(case.out.model(*case.inputs))
    file = io.BytesIO()
    torch.save(case.out.model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = copy.deepcopy(case.out.model)
    for tensor in other.state_dict().values():
        tensor.zero_()
    assert other.load_state_dict(state).missing_keys == []
    actual = tensors(other(*case.inputs))
    assert all(torch.equal(one, two) for one, two in zip(actual, expected, strict=True))


def test_collapsed_models_can_be_exported(case: Case) -> None:
    assert isinstance(case.program, ExportedProgram)
    again = case.program.module()
    for batch in (1, 4):
        inputs = case.entry.inputs(batch, seed=batch)
        assert_equal_outputs(case.name, again(*inputs), case.model(*inputs))


def masked(case: Case) -> str:
    """The text without errors, numbers of nodes, and the blanks that fill up columns."""
    text = str(case.out.report)
    modules = dict(case.model.named_modules(remove_duplicate=False))
    for name in {layer for row in case.out.report for layer in row.layers} - set(modules):
        text = re.sub(rf"(?<!\S){re.escape(name)}(?!\S)", re.sub(r"_\d+$", "", name), text)
    text = re.sub(r"\b\d\.\de[-+]\d+\b", "#", text)
    return "".join(re.sub(r"  +", "  ", line) + "\n" for line in text.splitlines())


def test_report_is_the_one_on_file(case: Case) -> None:
    path = GOLDEN / f"{case.name}-{case.policy}.txt"
    if os.environ.get(WRITE_GOLDEN):
        path.write_text(masked(case), encoding="utf-8")
    assert masked(case) == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("policy", POLICIES[:2])
@pytest.mark.parametrize("name", ["sesr", "pre_activation", "dbb", "dcgan", "rectangular"])
def test_float32_models_stay_float32_and_equal(name: str, policy: str) -> None:
    model = build(name, torch.float32)
    out = collapse(model, MODELS[name].inputs(2, seed=2, dtype=torch.float32), policy=policy)
    inputs = MODELS[name].inputs(5, seed=5, dtype=torch.float32)
    actual = out.model(*inputs)
    assert all(tensor.dtype == torch.float32 for tensor in tensors(actual))
    assert all(t.dtype == torch.float32 for t in out.model.parameters())
    assert_equal_outputs(name, actual, build(name)(*MODELS[name].inputs(5, seed=5)))


def test_keyword_inputs_stay_keywords() -> None:
    model = build("two_in_two_out")
    image, vector = MODELS["two_in_two_out"].inputs(2, seed=2)
    out = collapse(model, {"image": image, "vector": vector})
    image, vector = MODELS["two_in_two_out"].inputs(5, seed=5)
    actual = out.model(vector=vector, image=image)
    assert_equal_outputs("two_in_two_out", actual, model(image, vector))


def test_one_sample_is_example_enough() -> None:
    model = build("repvgg")
    (image,) = MODELS["repvgg"].inputs(1, seed=2)
    out = collapse(model, image)
    (images,) = MODELS["repvgg"].inputs(5, seed=5)
    assert_equal_outputs("repvgg", out.model(images), model(images))


@pytest.mark.parametrize("name", ["dbb", "two_in_two_out"])
def test_collapsed_models_compile_without_a_break(name: str) -> None:
    model = build(name)
    out = collapse(model, MODELS[name].inputs(2, seed=2))
    compiled = torch.compile(out.model, fullgraph=True, dynamic=True)
    for batch in (2, 3):
        inputs = MODELS[name].inputs(batch, seed=batch)
        assert_equal_outputs(name, compiled(*inputs), model(*inputs))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["cryptonets", "dbb", "dcgan", "repvgg", "two_in_two_out"])
def test_onnx_computes_the_same(name: str) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    out = collapse(build(name, torch.float32), MODELS[name].inputs(2, seed=2, dtype=torch.float32))
    inputs = MODELS[name].inputs(2, seed=2, dtype=torch.float32)
    onnx = torch.onnx.export(
        out.model, inputs, dynamo=True, dynamic_shapes=dynamic_batch(inputs), verbose=False
    )
    file = io.BytesIO()
    onnx.save(file)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for batch in (1, 3, 4):
        inputs = MODELS[name].inputs(batch, seed=batch, dtype=torch.float32)
        feed = dict(zip([node.name for node in session.get_inputs()], tensors(inputs), strict=True))
        found = session.run(None, {key: value.numpy() for key, value in feed.items()})
        expected = build(name)(*MODELS[name].inputs(batch, seed=batch))
        leaves, spec = pytree.tree_flatten(expected)
        assert len(found) == len(tensors(expected))
        values = iter(torch.from_numpy(array) for array in found)
        actual = [next(values) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        assert_equal_outputs(name, pytree.tree_unflatten(actual, spec), expected)
