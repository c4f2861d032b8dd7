"""Turns neighbouring linear layers of a network into one, exactly and fast.

    import linfuse_ext as lf

    lf.conv_to_linear(conv, input_size)            a convolution as a Linear
    lf.fuse_conv_linear(conv, linear, input_size)  a convolution and the Linear behind it as one

`linfuse_ext.functional` has the same on tensors, differentiable. `python -m linfuse_ext info` says
what is installed and whether it fits the machine.
"""

from . import _loader
from ._version import __version__

_C = _loader.load()

# These need the ops that the compiled module defines.
from . import functional  # noqa: E402
from . import registrations as _registrations  # noqa: E402, F401
from .modules import conv_to_linear, fuse_conv_linear  # noqa: E402

__all__ = ["__version__", "conv_to_linear", "functional", "fuse_conv_linear"]
