"""Which neighbours to merge: the cheapest way to cut a stretch into layers.

A stretch of n links has `n (n + 1) / 2` runs of neighbours, and each run one or two forms as a
single layer: the small form that the rules give, and the matrix, which always exists. The best cut
follows from the best cuts of its beginnings, as in the ordering of a chain of matrix products
(T. H. Cormen et al., "Introduction to Algorithms", dynamic programming). A link that is a net of
steps may also stay a net, whose own stretches are then cut in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch.fx import Node

from ..composition import Refusal
from .alignment import symmetric
from .costs import NOTHING, Cost, cost_of, cost_of_linear
from .maps import AffineMap, Convolution, Dense, Diagonal, View
from .nets import composed, form_of, maps_of
from .rules import as_convolution, by_channel
from .stretches import Graph, Link, Step, Stretch, is_view

POLICIES = ("cheaper", "always", "never")


class Weight(NamedTuple):
    """What is compared; the order of the entries is that of the policy."""

    cost: Cost
    layers: int
    nodes: int

    def plus(self, other: Weight) -> Weight:
        """Both."""
        return Weight(
            self.cost.plus(other.cost), self.layers + other.layers, self.nodes + other.nodes
        )


_NO_WEIGHT = Weight(NOTHING, 0, 0)
_KEYS: dict[str, Callable[[Weight], tuple[int, ...]]] = {
    "cheaper": lambda w: (w.cost.flops, w.cost.params),
    "always": lambda w: (w.layers, w.cost.flops, w.cost.params, w.nodes),
}
_KEYS["never"] = _KEYS["cheaper"]


class Layer(NamedTuple):
    """A run of neighbours as one layer.

    Attributes:
        maps: What it does, in a row: one map in a form of its own, or, for a matrix, the maps that
            it is made from.
        is_matrix: Whether it becomes a Linear on the whole sample.
        weight: What it costs.
    """

    maps: list[AffineMap]
    is_matrix: bool
    weight: Weight

    @property
    def kind(self) -> str:
        """What it is called."""
        affine = self.maps[0]
        if self.is_matrix or isinstance(affine, Dense):
            return "Linear"
        if isinstance(affine, Convolution):
            name = "transposed convolution" if affine.settings.transposed else "convolution"
            return name if by_channel_only(affine) else f"{name} with a bias map"
        return "scale and shift" if isinstance(affine, Diagonal) else "reshape"


class Segment(NamedTuple):
    """A run of neighbours that ends up together.

    Attributes:
        links: The run.
        layer: What it becomes; None where it stays as it is, a run of one link.
        inside: The segments inside a link that stays a net.
        weight: Of what it becomes.
        before: What the run costs as it is.
    """

    links: list[Link]
    layer: Layer | None
    inside: list[list[Segment]]
    weight: Weight
    before: Cost

    @property
    def start(self) -> Node:
        """The value before it."""
        return self.links[0].start

    @property
    def end(self) -> Node:
        """The value behind it."""
        return self.links[-1].end

    @property
    def steps(self) -> list[Step]:
        """All its steps."""
        return [step for link in self.links for step in link.steps]


class Run(NamedTuple):
    """What is known of a run of neighbours: its forms as one layer, or why there is none."""

    layers: list[Layer]
    refusals: list[str]


class Planner:
    """Cuts the stretches of a graph under one policy."""

    def __init__(self, graph: Graph, policy: str, max_bytes: int) -> None:
        """For a graph; `max_bytes` bounds a merged Linear."""
        self._graph = graph
        self._key = _KEYS[policy]
        self._max_bytes = max_bytes
        self._maps: dict[tuple[Node, Node], list[AffineMap]] = {}  # of links, by their ends

    def plan(self) -> list[list[Segment]]:
        """The cut of every stretch of the graph, in the graph's order."""
        return self._plan(self._graph.steps)[0]

    def _plan(self, nodes: Iterable[Node]) -> tuple[list[list[Segment]], Weight]:
        planned: set[Node] = set()
        cuts: list[list[Segment]] = []
        total = _NO_WEIGHT
        for node in reversed(list(nodes)):
            if node in planned:
                continue
            stretch = self._graph.stretch(node)
            if stretch is None:  # its operands come from several sources
                planned.add(node)
                total = total.plus(_as_it_is(self._graph.steps[node]))
                continue
            cut = self._cut(stretch)
            for segment in cut:
                total = total.plus(segment.weight)
                planned |= {step.node for step in segment.steps}
            cuts.append(cut)
        return cuts[::-1], total

    def _cut(self, stretch: Stretch) -> list[Segment]:
        links = stretch.links
        forms = self._forms(links)
        best: list[tuple[Weight, list[Segment]]] = [(_NO_WEIGHT, [])]
        for stop in range(1, len(links) + 1):
            ways = []
            for start in reversed(range(stop)):  # of equal ways the one that merges least
                weight, cut = best[start]
                for segment in self._segments(links[start:stop], forms[start, stop]):
                    ways.append((weight.plus(segment.weight), [*cut, segment]))
            best.append(min(ways, key=lambda way: self._key(way[0])))
        return best[-1][1]

    def _segments(self, links: list[Link], form: AffineMap | Refusal) -> list[Segment]:
        before = _cost_before(links)
        segments = []
        if len(links) == 1:
            segments.append(self._left_alone(links[0], before))
        if sum(not is_view(step) for link in links for step in link.steps) < 2:
            return segments  # one operation and reshapes around it: nothing to merge
        for layer in self.run(links, form).layers:
            segments.append(Segment(links, layer, [], layer.weight, before))
        return segments

    def _left_alone(self, link: Link, before: Cost) -> Segment:
        own = _as_it_is(link.steps[-1])
        if len(link.steps) == 1:
            return Segment([link], None, [], own, before)
        cuts, weight = self._plan([step.node for step in link.steps[:-1]])
        return Segment([link], None, cuts, weight.plus(own), before)

    def run(self, links: list[Link], form: AffineMap | Refusal | None = None) -> Run:
        """The forms of neighbouring links as one layer."""
        if form is None:
            form = self._forms(links)[0, len(links)]
        layers, refusals = [], []
        small = form if isinstance(form, Refusal) else as_layer(form)
        if isinstance(small, Layer) and not small.is_matrix:
            too_large = self._too_large(links, small.weight.cost.params)
            small = small if too_large is None else Refusal(too_large, "")
        if isinstance(small, Refusal):
            refusals.append(small.rule)
        elif not small.is_matrix:
            layers.append(small)
        matrix = self._matrix(links, form)
        if isinstance(matrix, Layer):
            layers.append(matrix)
        else:
            refusals.append(matrix)
        return Run(layers, refusals)

    def best(self, layers: list[Layer]) -> Layer:
        """The form that the policy would take."""
        return min(layers, key=lambda layer: self._key(layer.weight))

    def _matrix(self, links: list[Link], form: AffineMap | Refusal) -> Layer | str:
        """All in one Linear, from the small form if that is a matrix; or why not."""
        maps = [affine for link in links for affine in self._maps_of(link)]
        if isinstance(form, Dense) and not form.lead:
            maps = [form]
        if not maps:
            return "they change nothing"
        rows, cols = maps[-1].rows, maps[0].cols
        too_large = self._too_large(links, rows * cols)
        if too_large is not None:
            return f"as one Linear they would need {rows} x {cols} weights: {too_large}"
        shifts = any(affine.offset is not None for affine in maps)
        # A matrix that saves nothing is no gain, however many nodes it replaces.
        nodes = sum(_as_it_is(step).nodes for link in links for step in link.steps)
        return Layer(maps, True, Weight(cost_of_linear(cols, rows, shifts), 1, max(1, nodes)))

    def _too_large(self, links: list[Link], params: int) -> str | None:
        """What a layer of so many parameters would take, if that is too much."""
        size = params * links[0].start.meta["val"].dtype.itemsize
        if size <= self._max_bytes or params <= _cost_before(links).params:
            return None
        return f"{_bytes(size)} are more than max_bytes={self._max_bytes}"

    def _maps_of(self, link: Link) -> list[AffineMap]:
        # Asked for in every run that the link is in.
        key = (link.start, link.end)
        if key not in self._maps:
            self._maps[key] = maps_of(link)
        return self._maps[key]

    def _forms(self, links: list[Link]) -> dict[tuple[int, int], AffineMap | Refusal]:
        """The small form of every run, or the rule that it has none."""
        forms: dict[tuple[int, int], AffineMap | Refusal] = {}
        count = len(links)
        for n, link in enumerate(links):
            forms[n, n + 1] = form_of(link)
        for length in range(2, count + 1):
            for start in range(count - length + 1):
                stop = start + length
                # By halves, so that a form of n links is made in log n steps one in the other.
                for middle in dict.fromkeys(((start + stop) // 2, start + 1, stop - 1)):
                    found = composed(forms[middle, stop], forms[start, middle])
                    if not isinstance(found, Refusal):
                        break
                forms[start, stop] = found  # if none does: what its last link does not merge with
        return forms


def _bytes(count: int) -> str:
    size, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB", "PB", "EB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"


def as_layer(form: AffineMap) -> Layer | Refusal:
    """A small form as a layer of torch."""
    if isinstance(form, Diagonal):
        pointwise = as_convolution(form)
        form = pointwise if by_channel_only(pointwise) else form
    if isinstance(form, Convolution):
        even = symmetric(form)
        if isinstance(even, Refusal):
            return even
        form = even
    if not isinstance(form, (Convolution, Dense, Diagonal, View)):
        return Refusal("a rearrangement is no layer of torch", "leave it")
    return Layer([form], isinstance(form, Dense) and not form.lead, _weight_of(form))


def by_channel_only(form: AffineMap) -> bool:
    """Whether a convolution has no more than one bias per channel."""
    if not isinstance(form, Convolution):
        return False
    return form.offset is None or by_channel(form.offset)


def _weight_of(form: AffineMap) -> Weight:
    return _NO_WEIGHT if isinstance(form, View) else Weight(cost_of(form), 1, 1)


def _as_it_is(step: Step) -> Weight:
    return Weight(Cost(step.flops, step.params), int(step.multiplies), int(not is_view(step)))


def _cost_before(links: list[Link]) -> Cost:
    steps = [step for link in links for step in link.steps]
    return Cost(sum(step.flops for step in steps), sum(step.params for step in steps))
