"""Loads the compiled module, or says why it cannot be loaded and what to type."""

import importlib
import platform
from types import ModuleType

from ._version import __version__

MINIMUM_TORCH = (2, 11)
NEEDED = f"torch >= {MINIMUM_TORCH[0]}.{MINIMUM_TORCH[1]}"

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError(
        f"linfuse_ext needs {NEEDED}, which is not installed for this Python "
        f"({platform.python_version()}). Type: pip install torch"
    ) from None


def _torch_release() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def load() -> ModuleType:
    """Imports linfuse_ext._C, which registers torch.ops.linfuse.

    Returns:
        The compiled module.

    Raises:
        ImportError: The binary is missing or does not fit; the message holds a diagnosis.
    """
    running = (
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}"
    )
    if _torch_release() < MINIMUM_TORCH:
        raise ImportError(
            f"linfuse_ext needs {NEEDED}; running: {running}. Type: pip install --upgrade torch"
        )
    try:
        compiled = importlib.import_module("linfuse_ext._C")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "linfuse_ext._C":
            why = "the compiled module was not built for this Python"
            what = (
                "in the source folder, `python setup.py build_ext --inplace`; elsewhere, "
                "`pip install --force-reinstall --no-deps linfuse_ext`"
            )
        else:
            why = f"the compiled module does not load ({error})"
            what = "`pip install --force-reinstall --no-deps --no-cache-dir linfuse_ext`"
        raise ImportError(f"linfuse_ext: {why}; running: {running}. Type: {what}") from error
    if (built := compiled.build_info()["version"]) != __version__:
        raise ImportError(
            f"linfuse_ext: the Python files are version {__version__}, the compiled module is "
            f"{built}; running: {running}. Type: in the source folder, `python setup.py build_ext "
            "--inplace`"
        )
    return compiled
