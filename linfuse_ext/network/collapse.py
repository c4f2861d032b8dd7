"""A whole network in one call: `linfuse_ext.collapse`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from ..meshes import check_not_sharded
from .capture import Captured, Inputs, capture
from .constants import Constants
from .layers import BiasMap
from .measuring import error_of, run_example
from .naming import names_of
from .planning import POLICIES, Planner, Segment
from .report import Report, Row, count
from .rewriting import Made, Rewriter, drop_nothing, make_layer
from .stretches import Graph, Step

__all__ = ["Collapsed", "collapse"]

_OP = "collapse"


@dataclass(frozen=True)
class Collapsed:
    """What `collapse` returns.

    Attributes:
        model: The network, in eval mode; takes and returns what the given model does, with any
            batch size. It shares no parameter with the given model.
        report: What was merged, and why the rest was not.
    """

    model: GraphModule
    report: Report
    _inputs: Inputs = field(repr=False)

    def export(self) -> ExportedProgram:
        """The network as a program, for torch.export.save; its batch is dynamic if it was."""
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            check_not_sharded("export", name, tensor)
        return torch.export.export(
            self.model,
            self._inputs.arguments,
            self._inputs.keywords,
            dynamic_shapes=self._inputs.dynamic_shapes(self.model.forward),
        )


def _check(policy: Any, max_bytes: Any) -> None:
    if not isinstance(policy, str):
        raise TypeError(f"{_OP}: `policy` must be a str, got {policy!r}")
    if policy not in POLICIES:
        raise ValueError(f"{_OP}: `policy` must be one of {', '.join(POLICIES)}, got {policy!r}")
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int):
        raise TypeError(f"{_OP}: `max_bytes` must be an int, got {max_bytes!r}")
    if max_bytes < 0:
        raise ValueError(f"{_OP}: `max_bytes` must be non-negative, got {max_bytes}")


def collapse(
    model: Any, example_inputs: Any = None, *, policy: str = "cheaper", max_bytes: int = 2**30
) -> Collapsed:
    """Merges every stretch of affine layers of a network, where that is exact and wanted.

    Affine are convolutions, transposed convolutions and Linears, BatchNorm in eval mode, average
    pooling and means over positions, padding of every mode, nearest and (bi-, tri-)linear
    upsampling, PixelShuffle, flatten, reshape, permute, slices, scales and shifts by constants,
    sums, concatenations, and Dropout and Identity, which vanish. A stretch is as long as what lies
    in it is used nowhere else; where it is cut is chosen by the cost of all ways together. A merge
    becomes a convolution, a convolution with a bias per position (`BiasMap`), or a Linear. It is
    computed in float64 and rounded once.

    Args:
        model: An nn.Module in eval mode, captured by torch.export; or a
            torch.export.ExportedProgram, whatever way it was made. It is not changed. A module may
            be sharded (linfuse_ext.distributed): every rank gathers layer after layer, merges, and
            keeps its shards.
        example_inputs: A tensor, a sequence of positional inputs or a mapping of keyword inputs, on
            which torch.export runs. Axis 0 of every tensor with as many samples as the first is the
            batch. All other sizes are fixed by the example. None for a program: its own.
        policy: "cheaper" merges only where that saves floating-point operations a sample, or else
            parameters; "always" wherever it is exact, down to the fewest layers in a row; "never"
            nowhere, to see the report.
        max_bytes: The most that a merged layer may take, unless it is smaller than what it
            replaces; beyond that it is refused.

    Returns:
        `.model`, a torch.fx.GraphModule, and `.report`, a sequence of rows; `.export()` makes a
        program of it.

    Raises:
        TypeError: An argument has a wrong type.
        ValueError: The model is in training mode, torch.export cannot capture it, or an argument
            has a wrong value.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(
        ...     nn.Conv2d(1, 5, 5, stride=2, padding=1), nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(5),
        ...     nn.Flatten(), nn.Linear(845, 10), nn.ReLU(), nn.Linear(10, 10)).eval()
        >>> out = collapse(model, torch.rand(2, 1, 28, 28))
        >>> [(row.layers, row.verdict) for row in out.report]
        [(('0', '1', '2', '4'), 'fused')]
        >>> x = torch.rand(3, 1, 28, 28)
        >>> torch.allclose(out.model(x), model(x), atol=1e-5)
        True
    """
    _check(policy, max_bytes)
    # Parameters made in inference mode could never be trained.
    with torch.inference_mode(False):
        return _collapse(capture(model, example_inputs), policy, max_bytes)


def _collapse(captured: Captured, policy: str, max_bytes: int) -> Collapsed:
    constants = Constants(captured.module)
    graph = Graph(captured.module, constants)
    if drop_nothing(captured.module, graph):
        graph = Graph(captured.module, constants)
    planner = Planner(graph, policy, max_bytes)
    cuts = planner.plan()
    merged = [segment for segment in _segments(cuts) if segment.layer is not None]
    made: dict[Node, Made] = {}
    errors: dict[Node, float | None] = {}
    if policy != "never":
        values = run_example(captured, {segment.start for segment in merged})
        for segment in merged:
            layer = make_layer(segment, constants)
            if layer.is_finite():
                made[segment.end] = layer
                errors[segment.end] = error_of(segment, layer, values, constants)
                layer.shard_like(segment.steps, constants)
        del values
    rows = list(_Rows(planner, graph, policy, made, errors).of(cuts))
    before = _count_parameters(captured.module)
    rewriter = Rewriter(captured.module, graph, constants)
    inside: set[Node] = set()
    for segment in merged:
        if segment.end in made:
            inside |= {step.node for step in segment.steps}
            rewriter.replace(segment, made[segment.end])
    for node, step in graph.steps.items():
        if node not in inside:
            rewriter.keep(step)
    result = rewriter.finish()
    report = Report(rows, policy, (before, _count_parameters(result)))
    return Collapsed(result, report, captured.inputs)


def _count_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _segments(cuts: list[list[Segment]]) -> Iterator[Segment]:
    """Every segment, those inside nets that stay included."""
    for cut in cuts:
        for segment in cut:
            yield segment
            yield from _segments(segment.inside)


def _multiplies(segment: Segment) -> bool:
    return any(step.multiplies for step in segment.steps)


class _Rows:
    """Writes the rows of a report."""

    def __init__(
        self,
        planner: Planner,
        graph: Graph,
        policy: str,
        made: dict[Node, Made],
        errors: dict[Node, float | None],
    ) -> None:
        self._planner = planner
        self._graph = graph
        self._policy = policy
        self._made = made
        self._errors = errors

    def of(self, cuts: list[list[Segment]]) -> Iterator[Row]:
        """The rows of stretches, in their order."""
        for cut in cuts:
            layers = [s for s in cut if s.layer is not None or _multiplies(s)]
            yield from self._across(cut, layers)
            for n, segment in enumerate(layers):
                if segment.layer is not None:
                    yield self._merged(segment)
                elif len(segment.steps) > 1:
                    yield from self.of(segment.inside)
                    yield self._not_merged([segment], cut)
                if n + 1 < len(layers):
                    yield self._not_merged(layers[n : n + 2], cut)

    def _merged(self, segment: Segment) -> Row:
        layer = segment.layer
        assert layer is not None
        after = layer.weight.cost
        if segment.end in self._made:
            verdict, reason = "fused", f"one {_described(self._made[segment.end])}"
        elif self._policy == "never":
            verdict = "declined"
            reason = f"exact as one {layer.kind}, but policy 'never' merges nothing"
        else:
            verdict, after = "refused", segment.before
            dtype = segment.start.meta["val"].dtype
            reason = f"as one {layer.kind} they would have weights that are not finite in {dtype}"
        return Row(
            names_of(segment.steps),
            verdict,
            reason,
            segment.before.flops,
            after.flops,
            segment.before.params,
            after.params,
            self._errors.get(segment.end),
        )

    def _not_merged(self, neighbours: list[Segment], cut: list[Segment]) -> Row:
        """Neighbours that stay apart, with what lies between them."""
        first, last = cut.index(neighbours[0]), cut.index(neighbours[-1])
        links = [link for segment in cut[first : last + 1] for link in segment.links]
        steps = [step for link in links for step in link.steps]
        flops = sum(segment.weight.cost.flops for segment in cut[first : last + 1])
        params = sum(segment.weight.cost.params for segment in cut[first : last + 1])
        run = self._planner.run(links)
        if not run.layers:
            reason = "; ".join(run.refusals)
            return Row(names_of(steps), "refused", reason, flops, flops, params, params)
        layer = self._planner.best(run.layers)
        after = layer.weight.cost
        reason = (
            f"exact as one {layer.kind}, but with {count(after.flops)} FLOPs in place of "
            f"{count(flops)} and {count(after.params)} parameters in place of {count(params)}"
        )
        for refusal in run.refusals:
            reason += f"; no smaller form: {refusal}"
        return Row(names_of(steps), "declined", reason, flops, after.flops, params, after.params)

    def _across(self, cut: list[Segment], layers: list[Segment]) -> Iterator[Row]:
        """What keeps a stretch from being longer, where the value before it is affine as well."""
        start = cut[0].start
        step = self._graph.steps.get(start)
        if step is None or not layers:
            return
        before = self._layers_before(step)
        if not before:
            return
        if len(start.users) > 1:
            reason = "the value between them is used elsewhere as well, so that it must be kept"
        else:
            reason = "values that are not affine maps of one value meet between them"
        flops = sum(s.flops for s in before) + layers[0].weight.cost.flops
        params = sum(s.params for s in before) + layers[0].weight.cost.params
        names = names_of([*before, *layers[0].steps])
        yield Row(names, "refused", reason, flops, flops, params, params)

    def _layers_before(self, step: Step) -> list[Step]:
        """The layers that a value comes from, looking past what only moves; up to the next sum."""
        if step.multiplies:
            return [step]
        found = []
        for operand, _ in step.operands:
            before = self._graph.steps.get(operand)
            while before is not None and not before.multiplies:
                before = None if before.join else self._graph.steps.get(before.operands[0][0])
            if before is not None:
                found.append(before)
        return found


def _described(made: Made) -> str:
    if made.module is None:
        return "reshape"
    if isinstance(made.module, BiasMap):
        return f"{made.module.layer} with a bias for each position"
    return str(made.module)
