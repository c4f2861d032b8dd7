"""What was merged, what was not, and why: rows that can be read by people and programs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import overload

VERDICTS = ("fused", "declined", "refused")


@dataclass(frozen=True)
class Row:
    """One run of neighbouring affine layers.

    Attributes:
        layers: Qualified names of the layers, in order; an operation that is no module of its own
            has the name of the module that it is in and its node's.
        verdict: "fused": they are one layer now, exactly. "declined": they could be, exactly, but
            the policy does not want it. "refused": no exact merge exists, or none that is safe.
        reason: What they became, what the merge would have cost, or the rule that it breaks.
        flops_before: Operations for a sample, without the merge.
        flops_after: With it, also where it was declined; as before where it was refused.
        params_before: Parameters, without the merge.
        params_after: With it, likewise.
        error: Of what was fused: the largest difference on the example inputs between the new layer
            in the model's dtype and the old layers in float64, over the largest value; else None.
    """

    layers: tuple[str, ...]
    verdict: str
    reason: str
    flops_before: int
    flops_after: int
    params_before: int
    params_after: int
    error: float | None = None


class Report(Sequence[Row]):
    """The rows of a collapse, in the order of the network.

    `str(report)` is a table, `report.to_json()` the same for programs.
    """

    def __init__(self, rows: Iterable[Row], policy: str, params: tuple[int, int]) -> None:
        """Keeps the rows; `params` are the parameters of the network before and after."""
        self._rows = tuple(rows)
        self.policy = policy
        self._params = params

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Row, ...]: ...

    def __getitem__(self, index: int | slice) -> Row | tuple[Row, ...]:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"<Report of {len(self)} rows, policy {self.policy!r}>"

    @property
    def totals(self) -> dict[str, int]:
        """Rows by verdict, and what the merges together changed.

        Parameters are counted once in the whole network: one that other layers share stays.
        """
        fused = [row for row in self if row.verdict == "fused"]
        return {
            **{verdict: sum(row.verdict == verdict for row in self) for verdict in VERDICTS},
            "flops_saved": sum(row.flops_before - row.flops_after for row in fused),
            "params_saved": self._params[0] - self._params[1],
        }

    def to_json(self) -> str:
        """The policy, the rows and the totals as a JSON object."""
        rows = [asdict(row) | {"error": _number(row.error)} for row in self]
        told = {"policy": self.policy, "rows": rows, "totals": self.totals}
        return json.dumps(told, indent=2, allow_nan=False)

    def __str__(self) -> str:
        header = ("verdict", "layers", "FLOPs", "parameters", "error", "reason")
        lines = [header, *(cells(row) for row in self)]
        widths = [max(len(line[n]) for line in lines) for n in range(len(header) - 1)]
        text = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)),
                       line[-1]]).rstrip()
            for line in lines
        ]  # fmt: skip
        totals = self.totals
        verdicts = ", ".join(f"{totals[verdict]} {verdict}" for verdict in VERDICTS)
        text.append(
            f"{verdicts} under policy '{self.policy}': "
            f"{_signed(-totals['flops_saved'])} FLOPs a sample, "
            f"{_signed(-totals['params_saved'])} parameters"
        )
        return "\n".join(text)


def _number(error: float | None) -> float | str | None:
    """JSON has no infinity."""
    return error if error is None or math.isfinite(error) else str(error)


def cells(row: Row) -> tuple[str, ...]:
    """A row as text: verdict, layers, operations, parameters, error, reason."""
    return (
        row.verdict,
        " + ".join(row.layers),
        f"{count(row.flops_before)} -> {count(row.flops_after)}",
        f"{count(row.params_before)} -> {count(row.params_after)}",
        "" if row.error is None else f"{row.error:.1e}",
        row.reason,
    )


def count(number: int) -> str:
    """A number with three digits: 1.23 M."""
    size, unit = float(number), ""
    for larger in ("k", "M", "G", "T", "P"):
        if abs(size) < 999.5:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}".strip() if unit else str(number)


def _signed(number: int) -> str:
    return f"{'+' if number > 0 else ''}{count(number)}"
