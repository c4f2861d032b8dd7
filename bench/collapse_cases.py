"""Whole networks before and after `collapse`: how long it takes, what is left, how fast that runs.

Two kinds of groups a network: the making of it, and the running of it at one size of batch. They
look like `bench.cases.Case` to whoever measures them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import optimization
from torch.utils.flop_counter import FlopCounterMode

import linfuse_ext
from bench.cases import OURS, TOLERANCE
from bench.networks import NETWORKS, Network

COLLAPSE = "collapse"
BEFORE, CAPTURE, FX_FUSE = "before", "capture", "fx_fuse"
BATCHES = (1, 64)

_QUICK = ("cryptonets", "repvgg_stage")
_CHECKED = 2  # samples whose outputs are compared in float64
_SECONDS = 1.5
_DTYPE = torch.float32


class Ready(NamedTuple):
    """A network, what is made of it, and what it computes.

    Attributes:
        models: By entrant.
        program: The network as torch.export captures it.
        exact: Its outputs in float64 for the first samples.
        facts: What its rows say besides times.
    """

    models: dict[str, nn.Module]
    program: ExportedProgram
    exact: Tensor
    facts: dict[str, Any]


@cache
@torch.no_grad()
def ready(network: Network) -> Ready:
    """Prepares a network, once for all its groups."""
    before = network.trained()
    program = _capture(network, before)
    after = linfuse_ext.collapse(program)
    models: dict[str, nn.Module] = {OURS: after.model, BEFORE: before}
    peer = optimization.fuse(before)
    if _norms(peer) < _norms(before):
        models[FX_FUSE] = peer
    x = network.inputs(_CHECKED)
    exact = deepcopy(before).double()(x.double())
    graphs = {"before": program.graph, "after": after.export().graph}
    totals = after.report.totals
    facts = {
        "network": network.name,
        "source": network.source,
        "dtype": str(_DTYPE).removeprefix("torch."),
        "input": network.size,
        **{verdict: totals[verdict] for verdict in ("fused", "declined", "refused")},
        "operations": {name: _operations(graph) for name, graph in graphs.items()},
        "parameters": {"before": _parameters(before), "after": _parameters(after.model)},
        "mflop": {"before": _mflop(before, x[:1]), "after": _mflop(after.model, x[:1])},
        "error": {"before": _error(before(x), exact), "after": _error(after.model(x), exact)},
    }
    return Ready(models, program, exact, facts)


def _capture(network: Network, model: nn.Module) -> ExportedProgram:
    inputs = (network.inputs(2),)
    return torch.export.export(model, inputs, dynamic_shapes=({0: Dim("batch")},))


def _norms(model: nn.Module) -> int:
    return sum(isinstance(part, nn.BatchNorm2d) for part in model.modules())


def _operations(graph: torch.fx.Graph) -> int:
    """Operations that make a tensor, as torch.export writes them."""
    made = (node.meta["val"] for node in graph.nodes if node.op == "call_function")
    return sum(isinstance(value, Tensor) for value in made)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _mflop(model: nn.Module, sample: Tensor) -> float:
    """Of the convolutions and products, by torch's own count."""
    with FlopCounterMode(display=False) as counter:
        model(sample)
    return counter.get_total_flops() / 1e6


def _error(got: Tensor, exact: Tensor) -> float:
    """Largest difference, over the largest value."""
    return float((got.double() - exact).abs().max() / exact.abs().max())


@dataclass(frozen=True)
class Making:
    """The making of a network's collapsed one: the capture by torch.export, and the rest."""

    network: Network
    device = "cpu"
    seconds = _SECONDS
    entrants = (OURS, CAPTURE)
    brief = frozenset(entrants)

    @property
    def group(self) -> str:
        """Name of the group."""
        return f"{COLLAPSE}/{self.network.name}/making"

    @property
    def facts(self) -> dict[str, Any]:
        """What a row says besides times."""
        return {"op": COLLAPSE, "device": self.device, **ready(self.network).facts}

    def skip_reason(self, entrant: str) -> None:
        """Why an entrant does not take part: both always do."""

    def inputs(self) -> tuple[Tensor, ...]:
        """What everyone is given: the network has it already."""
        return ()

    def call(self, entrant: str, _: tuple[Tensor, ...]) -> Callable[[], tuple[Tensor, ...]]:
        """The entrant as a function of nothing, to the parameters of what it makes."""
        prepared = ready(self.network)
        before, program = prepared.models[BEFORE], prepared.program
        if entrant == CAPTURE:
            return lambda: tuple(_capture(self.network, before).parameters())
        return lambda: tuple(linfuse_ext.collapse(program).model.parameters())

    def check(self, result: tuple[Tensor, ...], _: tuple[Tensor, ...]) -> None:
        """Raises AssertionError unless the result has the parameters of one of the networks."""
        known = ready(self.network).facts["parameters"].values()
        assert sum(t.numel() for t in result) in known, f"{self.group}: other parameters"


@dataclass(frozen=True)
class Running:
    """The running of a network at one size of batch: before, collapsed, and by torch's fuse."""

    network: Network
    batch: int
    device = "cpu"
    seconds = _SECONDS
    entrants = (OURS, BEFORE, FX_FUSE)
    brief = frozenset[str]()

    @property
    def group(self) -> str:
        """Name of the group."""
        return f"{COLLAPSE}/{self.network.name}/batch {self.batch}"

    @property
    def facts(self) -> dict[str, Any]:
        """What a row says besides times."""
        own = {"op": COLLAPSE, "device": self.device, "batch": self.batch}
        return {**own, **ready(self.network).facts}

    def skip_reason(self, entrant: str) -> str | None:
        """Why an entrant does not take part, or None."""
        here = entrant in ready(self.network).models
        return None if here else "no convolution or Linear with a BatchNorm that it would fold"

    def inputs(self) -> tuple[Tensor, ...]:
        """The batch."""
        return (self.network.inputs(self.batch),)

    def call(self, entrant: str, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
        """The entrant as a function of nothing."""
        model = ready(self.network).models[entrant]

        def run() -> Tensor:
            with torch.inference_mode():
                return model(*inputs)

        return run

    def check(self, result: Tensor, _: tuple[Tensor, ...]) -> None:
        """Raises AssertionError unless the first outputs are those of the network in float64."""
        expected = ready(self.network).exact[: self.batch]
        error = _error(result[:_CHECKED], expected)
        # written so that NaN fails
        assert error <= TOLERANCE[_DTYPE], f"{self.group}: relative error {error:.1e}"


def collapse_cases(quick: bool = False) -> Iterator[Making | Running]:
    """The groups of every network."""
    for network in NETWORKS:
        if quick and network.name not in _QUICK:
            continue
        yield Making(network)
        for batch in BATCHES:
            yield Running(network, batch)
