"""A link of a stretch as affine maps: its small form where the rules give one, else the net."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from ..composition import Refusal
from .joins import add, concatenate
from .maps import AffineMap, Deferred, Shape, identity, is_identity
from .rules import compose
from .stretches import Link, Step


def composed(second: AffineMap | Refusal, first: AffineMap | Refusal) -> AffineMap | Refusal:
    """What rules.compose gives, of forms that may not exist."""
    if isinstance(first, Refusal):
        return first
    return second if isinstance(second, Refusal) else compose(second, first)


def form_of(link: Link) -> AffineMap | Refusal:
    """The small form of a link, or the rule that it has none."""
    forms: dict[Node, AffineMap | Refusal] = {link.start: identity(_shape(link.start))}
    for step in link.steps:
        forms[step.node] = _form_of_step(step, forms)
    return forms[link.end]


def _form_of_step(step: Step, forms: dict[Node, AffineMap | Refusal]) -> AffineMap | Refusal:
    terms: list[AffineMap] = []
    for operand, maps in step.operands:
        term = forms[operand]
        for affine in maps:
            term = composed(affine, term)
        if isinstance(term, Refusal):
            return term
        terms.append(term)
    if step.join is None:
        return terms[0]
    return add(terms) if step.join.dim is None else concatenate(terms, step.join.dim)


def maps_of(link: Link) -> list[AffineMap]:
    """A link as maps in a row, from which its matrix can be made."""
    if len(link.steps) == 1 and link.steps[0].join is None:
        return link.steps[0].operands[0][1]
    form = form_of(link)
    if isinstance(form, Refusal):
        return [_as_net(link)]
    return [] if is_identity(form) else [form]


def _shape(node: Node) -> Shape:
    return tuple(node.meta["val"].shape[1:])


@dataclass(frozen=True)
class Net(AffineMap):
    """Steps between two values, applied one by one."""

    link: Link

    def apply(self, columns: Tensor) -> Tensor:
        """From the first step to the last."""
        return self._run(columns, with_offsets=False)

    def _run(self, columns: Tensor, with_offsets: bool) -> Tensor:
        values = {self.link.start: columns}
        for step in self.link.steps:
            terms = []
            for operand, maps in step.operands:
                term = values[operand]
                for affine in maps:
                    term = affine.apply(term)
                    own = affine.flat_offset() if with_offsets else None
                    term = term if own is None else term + own.unsqueeze(1)
                terms.append(term)
            values[step.node] = _joined(step, terms)
        return values[self.link.end]

    def apply_adjoint(self, rows: Tensor) -> Tensor:
        """From the last step to the first; what a value is used for several times adds up."""
        parts: dict[Node, Tensor] = {self.link.end: rows}
        for step in reversed(self.link.steps):
            each = _parted(step, parts.pop(step.node))
            for (operand, maps), part in zip(step.operands, each, strict=True):
                for affine in reversed(maps):
                    part = affine.apply_adjoint(part)
                parts[operand] = parts[operand] + part if operand in parts else part
        return parts[self.link.start]


def _joined(step: Step, terms: list[Tensor]) -> Tensor:
    if step.join is None:
        return terms[0]
    if step.join.dim is None:
        return torch.stack(terms).sum(0)
    shaped = [
        term.reshape(*shape, -1) for term, shape in zip(terms, _term_shapes(step), strict=True)
    ]
    return torch.cat(shaped, step.join.dim).flatten(0, -2)


def _parted(step: Step, rows: Tensor) -> list[Tensor]:
    if step.join is None or step.join.dim is None:
        return [rows] * len(step.operands)
    dim = step.join.dim
    sizes = [shape[dim] for shape in _term_shapes(step)]
    parts = torch.split(rows.reshape(-1, *_shape(step.node)), sizes, dim + 1)
    return [part.flatten(1) for part in parts]


def _term_shapes(step: Step) -> list[Shape]:
    return [maps[-1].out_shape if maps else _shape(operand) for operand, maps in step.operands]


def _as_net(link: Link) -> Net:
    before, behind = _shape(link.start), _shape(link.end)
    every = [affine for step in link.steps for _, maps in step.operands for affine in maps]
    net = Net(before, behind, None, link)
    if all(affine.offset is None for affine in every):
        return net

    def make() -> Tensor:
        zero = torch.zeros(net.cols, 1, dtype=torch.float64)
        return net._run(zero, with_offsets=True).reshape(behind)

    return Net(before, behind, Deferred(behind, make), link)
