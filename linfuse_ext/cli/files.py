"""Names and sizes on the command line, and files that appear when they are complete."""

from __future__ import annotations

import argparse
import errno
import os
import re
from pathlib import Path

from ..storage import _keep as keep
from ..storage import _naming as naming
from ..storage import _replacing as replacing

__all__ = ["byte_count", "keep", "naming", "replacing", "target"]

_UNITS = {
    "": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate(("", "k", "m", "g", "t"))},
    **{f"{letter}ib": 1024**power for power, letter in enumerate(("k", "m", "g", "t"), 1)},
}


def byte_count(text: str) -> int:
    """Reads a number of bytes.

    Raises:
        argparse.ArgumentTypeError: It is none, or not positive.

    Examples:
        >>> byte_count("1000"), byte_count("1.5 MB"), byte_count("2GiB")
        (1000, 1500000, 2147483648)
    """
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?) *([a-z]*)", text.strip().lower())
    size = int(float(found[1]) * _UNITS[found[2]]) if found and found[2] in _UNITS else 0
    if size < 1:
        raise argparse.ArgumentTypeError(
            f"must be a number of bytes such as 1000000, 256MiB or 2GB, got {text!r}"
        )
    return size


def target(path: str) -> Path:
    """Returns where a file is to be written; of a link what it points to, so that it stays.

    Raises:
        OSError: There can be no such file.
    """
    real = Path(os.path.realpath(path))
    if real.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not real.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "its folder does not exist", path)
    return real
