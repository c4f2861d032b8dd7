"""Both sides of a choice: `fuse_conv_linear` by our own kernels and by torch's convolution.

The package chooses between them by shape and dtype (``LINFUSE_ENGINE`` overrules it). Here each
side is forced in turn, so that a row shows whether the choice was right.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import linfuse_ext

ENGINES = ("own", "torch")


def missing() -> str | None:
    """Why no engine can be forced, or None."""
    if hasattr(linfuse_ext._C, "set_engine"):
        return None
    return "this build has no switch between engines"


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Makes `fuse_conv_linear` use that engine ("own", "torch" or "auto") for a while."""
    before = linfuse_ext._C.set_engine(name)
    try:
        yield
    finally:
        linfuse_ext._C.set_engine(before)
