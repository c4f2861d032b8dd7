"""A call as the code that makes it, so that what a failure prints is what was run."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

import linfuse_ext
from linfuse_ext import functional

IMPORTS = "import numpy as np, torch, linfuse_ext\nfrom linfuse_ext import functional"
_NAMES = {"np": np, "torch": torch, "linfuse_ext": linfuse_ext, "functional": functional}

FUNCTIONAL, OPS = "functional", "torch.ops.linfuse"


class Call(NamedTuple):
    """A function and the code of each of its arguments, by name.

    >>> Call("functional", "fuse_linear_linear", {"first_weight": "torch.ones(1, 2)"})
    functional.fuse_linear_linear(
        first_weight=torch.ones(1, 2),
    )
    """

    where: str
    op: str
    code: dict[str, str]

    def __repr__(self) -> str:
        lines = [f"    {name}={code},\n" for name, code in self.code.items()]
        return f"{self.where}.{self.op}(\n{''.join(lines)})"

    def replace(self, **code: str) -> Call:
        return self._replace(code={**self.code, **code})

    def arguments(self) -> dict[str, Any]:
        return {name: eval(code, _NAMES) for name, code in self.code.items()}

    def function(self) -> Any:
        return eval(f"{self.where}.{self.op}", _NAMES)
