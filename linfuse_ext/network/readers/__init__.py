"""The readers of operations, one family a file; together they fill the table READERS."""

from . import arithmetic, layers, moving, pooling, resizing

__all__ = ["arithmetic", "layers", "moving", "pooling", "resizing"]
