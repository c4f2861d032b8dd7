"""Turns neighbouring linear layers of a network into one, exactly and fast.

    import linfuse_ext as lf

    lf.conv_to_linear(conv, input_size)            a convolution as a Linear
    lf.fuse_conv_linear(conv, linear, input_size)  a convolution and the Linear behind it as one
    lf.fuse_linear_conv(linear, conv, input_size)  a Linear and the convolution behind it
    lf.fuse_conv_conv(first, second)               two convolutions, or FusionError with the rule
    lf.fuse_linear_linear(first, second)           two Linears
    lf.fuse_bn(layer, bn)                          a BatchNorm behind a layer
    lf.fuse_bn_into(bn, layer)                     a BatchNorm before it
    lf.pool_to_conv(pool, channels)                an average pooling as a convolution
    lf.save_matrix(path, conv, input_size)         a matrix larger than memory, to a file
    lf.collapse(model, example_inputs)             a whole network

`linfuse_ext.functional` has the same on tensors, differentiable. The command `linfuse`, or `python
-m linfuse_ext`, works on exported archives; `linfuse info` says what is installed and whether it
fits the machine.
"""

from . import _loader
from ._version import __version__

_C = _loader.load()

# These need the ops that the compiled module defines.
from . import functional  # noqa: E402
from . import registrations as _registrations  # noqa: E402, F401
from .batch_norm import fuse_bn, fuse_bn_into  # noqa: E402
from .errors import FusionError  # noqa: E402
from .modules import (  # noqa: E402
    conv_to_linear,
    fuse_conv_conv,
    fuse_conv_linear,
    fuse_linear_conv,
    fuse_linear_linear,
)
from .network.collapse import Collapsed, collapse  # noqa: E402
from .pooling import pool_to_conv  # noqa: E402
from .storage import save_matrix  # noqa: E402

__all__ = [
    "Collapsed",
    "FusionError",
    "__version__",
    "collapse",
    "conv_to_linear",
    "functional",
    "fuse_bn",
    "fuse_bn_into",
    "fuse_conv_conv",
    "fuse_conv_linear",
    "fuse_linear_conv",
    "fuse_linear_linear",
    "pool_to_conv",
    "save_matrix",
]
