"""Random networks under every policy: what must hold of any model, whatever it is made of.

A longer search, with other examples in every run:

    LINFUSE_EXAMPLES=2000 python -m pytest tests/network/test_random_networks.py
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_networks import BATCH, Network, Op, networks  # noqa: F401 (Op is in their repr)
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from linfuse_ext import collapse

EXAMPLES = os.environ.get("LINFUSE_EXAMPLES")
POLICIES = ("cheaper", "always", "never")
# Without Linears, what can be a convolution is one; many of the Linears here take more than 4096.
MOST_BYTES = (0, 4096, 2**30)

# A value of these networks is a sum of fewer than 10^4 products per layer and of at most 15 layers,
# so that either way of computing it errs by less than 15 * 10^4 eps < 10^-10 of the sum of absolute
# products (N. J. Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). That sum is
# a few times the largest value that the network goes through, as its weights are of the size that
# keeps values as they are. A wrong rim, index or bias is off by far more than 10^-9 of it.
BOUND = 1e-9

# torch's own, about even kernels; they are drawn on purpose
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")

longer = settings(
    max_examples=int(EXAMPLES or 50),
    deadline=None,
    derandomize=EXAMPLES is None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True, scope="module")
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def tensors(tree: Any) -> list[Tensor]:
    return pytree.tree_leaves(tree)


def assert_equal_outputs(actual: Any, expected: Any, largest: float) -> None:
    """Same structure and shapes, and values that differ by rounding only."""
    assert pytree.tree_structure(actual) == pytree.tree_structure(expected)
    for number, (one, two) in enumerate(zip(tensors(actual), tensors(expected), strict=True)):
        assert one.shape == two.shape, f"output {number}: {one.shape} in place of {two.shape}"
        assert one.dtype == two.dtype
        error = (one - two).abs().max().item()
        assert error <= BOUND * largest, f"output {number} is off by {error:.1e} of {largest:.1e}"


def export(model: nn.Module, inputs: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    shapes = tuple({0: torch.export.Dim("batch")} for _ in inputs)
    return torch.export.export(model, inputs, dynamic_shapes=shapes)


# --- what a model costs, counted where it runs and not where it is planned


class Counter(TorchDispatchMode):
    """Counts the operations of everything that is run, and the layers among it."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.layers = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in FLOPS:
            self.flops += FLOPS[name](args, kwargs or {}, result)
        self.layers += name in LAYERS
        return result


def _of_convolution(args: Any, kwargs: Any, result: Tensor) -> int:
    value, weight, bias, *_, transposed, _, _ = args
    moving = value if transposed else result
    return 2 * moving.numel() * weight[0].numel() + (0 if bias is None else result.numel())


def _of_product(args: Any, kwargs: Any, result: Tensor) -> int:
    return 2 * result.numel() * args[-2].shape[-1]


def _of_product_and_bias(args: Any, kwargs: Any, result: Tensor) -> int:
    return _of_product(args, kwargs, result) + result.numel()


def _of_sum(args: Any, kwargs: Any, result: Tensor) -> int:
    scaled = kwargs.get("alpha", args[2] if len(args) > 2 else 1) not in (1, -1)
    return result.numel() * (1 + scaled)


def _of_window(args: Any, kwargs: Any, result: Tensor) -> int:
    return result.numel() * math.prod(args[1])


def _of_interpolation(taps: int) -> Callable[..., int]:
    return lambda args, kwargs, result: 2 * taps * result.numel()


FLOPS: dict[str, Callable[..., int]] = {
    "convolution": _of_convolution,
    "mm": _of_product,
    "bmm": _of_product,
    "addmm": _of_product_and_bias,
    "native_batch_norm": lambda args, kwargs, result: 2 * args[0].numel(),
    "add": _of_sum,
    "sub": _of_sum,
    "rsub": _of_sum,
    "mul": lambda args, kwargs, result: result.numel(),
    "div": lambda args, kwargs, result: result.numel(),
    "avg_pool2d": _of_window,
    "avg_pool3d": _of_window,
    "_adaptive_avg_pool2d": lambda args, kwargs, result: args[0].numel(),
    "_adaptive_avg_pool3d": lambda args, kwargs, result: args[0].numel(),
    "mean": lambda args, kwargs, result: args[0].numel(),
    "sum": lambda args, kwargs, result: args[0].numel(),
    "upsample_linear1d": _of_interpolation(2),
    "upsample_bilinear2d": _of_interpolation(4),
    "upsample_trilinear3d": _of_interpolation(8),
    "upsample_bicubic2d": _of_interpolation(16),
}
LAYERS = {
    "convolution", "mm", "bmm", "addmm", "native_batch_norm", "avg_pool2d", "avg_pool3d",
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "mean",
}  # fmt: skip


def counted(model: nn.Module, inputs: tuple[Tensor, ...]) -> Counter:
    with Counter() as counter:
        model(*inputs)
    return counter


# --- neighbours in a graph, found by trying and not by knowing operations


class Probe(Interpreter):
    """Runs a graph on three samples, and then its nodes on other values, to see what they do."""

    SAMPLES = 3

    def __init__(self, module: GraphModule, network: Network) -> None:
        super().__init__(module)
        self.values: dict[Node, Any] = {}
        self.depends: set[Node] = set()  # on an input; sizes do not count
        self.run(*network.example(self.SAMPLES, seed=1))

    def run_node(self, n: Node) -> Any:
        value = self.values[n] = super().run_node(n)
        moves = any(source in self.depends for source in n.all_input_nodes)
        if isinstance(value, Tensor) and (moves or n.op == "placeholder"):
            self.depends.add(n)
        return value

    def _on(self, node: Node, source: Node | None = None, value: Any = None) -> Any:
        args, kwargs = map_arg(
            (node.args, node.kwargs), lambda n: value if n is source else self.values[n]
        )
        return getattr(self, node.op)(node.target, args, kwargs)

    def source(self, node: Node) -> Node | None:
        """The value that a node is an affine map of, sample by sample; None if there is none."""
        if self._is_token(node):
            return None
        sources = [source for source in node.all_input_nodes if source in self.depends]
        if len(sources) != 1 or node.op == "output" or node not in self.depends:
            return None
        (source,) = sources
        before, behind = self.values[source], self.values[node]
        batched = before.shape[:1] == behind.shape[:1] == (self.SAMPLES,)
        if not batched or not before.is_floating_point():
            return None
        one, two = torch.randn_like(before), torch.randn_like(before)
        mixed = torch.cat([one[:1], two[1:]])
        of_one, of_two = self._on(node, source, one), self._on(node, source, two)
        of_none = self._on(node, source, torch.zeros_like(before))
        is_affine = torch.allclose(of_one + of_two, self._on(node, source, one + two) + of_none)
        alone = torch.allclose(
            self._on(node, source, mixed), torch.cat([of_one[:1], of_two[1:]])
        ) and torch.allclose(self._on(node, source, one.flip(0)), of_one.flip(0))
        return source if is_affine and alone else None

    def _is_token(self, node: Node) -> bool:
        """Whether a constant, expanded over the samples, is put beside them: not merged either."""
        return node.target is torch.ops.aten.cat.default and bool(set(node.args[0]) - self.depends)

    def is_layer(self, node: Node) -> bool:
        with Counter() as counter:
            self._on(node)
        return counter.layers > 0


def neighbours(module: GraphModule, network: Network, max_bytes: int) -> list[tuple[str, str, int]]:
    """Two layers in a row of which one Linear could be made: names, and the Linear's bytes."""
    probe = Probe(module, network)
    found = []
    for node in module.graph.nodes:
        if probe.source(node) is None or not probe.is_layer(node):
            continue
        value = node
        while True:
            before = probe.source(value)
            if before is None or len(before.users) > 1:
                break
            value = before
            if probe.source(value) is not None and probe.is_layer(value):
                start = probe.values[probe.source(value)]
                size = start[0].numel() * probe.values[node][0].numel() * start.element_size()
                if size <= max_bytes:
                    found.append((value.name, node.name, size))
                break
    return found


# --- what must hold


def assert_rows_are_consistent(out: Any, never: Any, network: Network, policy: str) -> None:
    fused = [row for row in out.report if row.verdict == "fused"]
    for row in out.report:
        assert row.verdict in ("fused", "declined", "refused")
        assert row.layers and all(isinstance(name, str) and name for name in row.layers)
        assert row.reason
        costs = (row.flops_before, row.flops_after, row.params_before, row.params_after)
        assert all(isinstance(cost, int) and cost >= 0 for cost in costs)
        if row.verdict == "refused":
            assert costs[::2] == costs[1::2]
        if row.verdict == "fused":
            assert 0 <= row.error <= BOUND
        else:
            assert row.error is None
        before, after = (row.flops_before, row.params_before), (row.flops_after, row.params_after)
        if policy == "cheaper" and row.verdict == "fused":
            assert after < before, str(row)
    assert not (fused and policy == "never")
    assert len(json.loads(out.report.to_json())["rows"]) == len(out.report)
    assert all(row.verdict in str(out.report) for row in out.report)

    inputs = network.example(BATCH)
    flops = counted(never.model, inputs).flops - counted(out.model, inputs).flops
    told = sum(row.flops_before - row.flops_after for row in fused)
    assert flops == BATCH * told, f"{flops / BATCH} operations a sample saved, {told} told"
    if policy == "cheaper":
        assert flops >= 0


def assert_collapses(network: Network, policy: str, max_bytes: int, as_program: bool) -> None:
    model, example = network.build(), network.example(BATCH)
    before = copy.deepcopy(model.state_dict())
    given = export(model, example) if as_program else model
    told = None if as_program else example
    out = collapse(given, told, policy=policy, max_bytes=max_bytes)

    for batch in (1, 4):
        inputs = network.example(batch, seed=batch)
        expected = model(*(x.clone() for x in inputs))
        largest = max(1.0, model.trace(inputs))
        assert_equal_outputs(out.model(*inputs), expected, largest)
        assert all(map(torch.equal, inputs, network.example(batch, seed=batch)))

    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    if as_program:
        assert all(torch.equal(given.state_dict[name], before[name]) for name in given.state_dict)

    never = out if policy == "never" else collapse(model, example, policy="never")
    assert_rows_are_consistent(out, never, network, policy)
    if policy == "always":
        found = neighbours(out.model, network, max_bytes)
        assert not found, f"one Linear would do for {found}"

    again = collapse(out.model, example, policy=policy, max_bytes=max_bytes)
    assert not [row for row in again.report if row.verdict == "fused"], str(again.report)
    inputs = network.example(4, seed=4)
    assert counted(again.model, inputs).layers == counted(out.model, inputs).layers
    for one, two in zip(tensors(again.model(*inputs)), tensors(out.model(*inputs)), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("policy", POLICIES)
@longer
@given(network=networks(), max_bytes=st.sampled_from(MOST_BYTES), as_program=st.booleans())
def test_random_networks(policy: str, network: Network, max_bytes: int, as_program: bool) -> None:
    assert_collapses(network, policy, max_bytes, as_program)


@longer
@given(network=networks())
def test_networks_are_what_they_say(network: Network) -> None:
    """The generator: every network runs, prints as it is, and mixes samples only where told."""
    assert eval(repr(network)) == network
    model = network.build()
    inputs = network.example(4)
    outputs = tensors(model(*inputs))
    assert all(map(torch.equal, inputs, network.example(4))), "an input was written to"
    assert all(y.dtype == torch.float64 and y.isfinite().all() for y in outputs)
    if not network.mixes_samples:
        alone = tensors(model(*(x[1:2] for x in inputs)))
        for one, all_of_them in zip(alone, outputs, strict=True):
            torch.testing.assert_close(one, all_of_them[1:2])
