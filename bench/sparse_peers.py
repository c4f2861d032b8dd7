"""The other ways to a convolution's matrix in CSR: what one would write without this package.

Each is ``f(layer, conv_weight, conv_bias) -> (matrix, offset)`` with a matrix of layout
torch.sparse_csr.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.layers import Layer
from bench.peers import Affine, matrix_indexed_write, offset, tap_indices


def csr_dense(layer: Layer, cw: Tensor, cb: Tensor) -> Affine:
    """The dense matrix by one indexed write, then ``to_sparse_csr``."""
    matrix, bias = matrix_indexed_write(layer, cw, cb)
    return matrix.to_sparse_csr(), bias


def csr_coalesce(layer: Layer, cw: Tensor, cb: Tensor) -> Affine:
    """All taps as a torch.sparse_coo tensor, which torch sorts and turns into CSR."""
    row, col, tap_at = tap_indices(layer, cw)
    values = cw.flatten(2)[:, :, tap_at].flatten()
    indices = torch.stack([t.flatten() for t in torch.broadcast_tensors(row, col)])
    matrix = torch.sparse_coo_tensor(indices, values, (layer.rows, layer.cols))
    return matrix.coalesce().to_sparse_csr(), offset(layer, cb)


def csr_zeros(layer: Layer, cw: Tensor, cb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The floor: the memory of values, columns and row pointers, written to once."""
    return (
        torch.zeros(layer.stored, dtype=cw.dtype, device=cw.device),
        torch.zeros(layer.stored, dtype=torch.int64, device=cw.device),
        torch.zeros(layer.rows + 1, dtype=torch.int64, device=cw.device),
    )
