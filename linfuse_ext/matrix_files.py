"""The file formats of a matrix, written as a stream of row blocks.

The formats are written here and not by their libraries, because these want the whole matrix at
once:

    .safetensors  8 bytes with the length of a JSON header, the header, the elements:
                  https://github.com/huggingface/safetensors#format
    .npz          a zip archive of .npy files, each a header and the elements:
                  https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
                  with the names that scipy.sparse.load_npz looks for
"""

from __future__ import annotations

import ctypes
import json
import math
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from .geometry import Geometry
from .sparse import count_stored

__all__ = ["Advance", "BlockedMatrix", "write_npz", "write_safetensors"]

_SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_NUMPY_NAMES = {
    torch.float64: "<f8",
    torch.float32: "<f4",
    torch.float16: "<f2",
    torch.int64: "<i8",
    torch.int32: "<i4",
}
_LARGEST_INT32 = 2**31 - 1

Advance = Callable[[int], None]  # told of so many rows that are written


class BlockedMatrix(NamedTuple):
    """The matrix and offset of a convolution, made by blocks of rows."""

    weight: Tensor
    bias: Tensor | None
    geometry: Geometry
    sparse: bool
    block_bytes: int

    @property
    def stored(self) -> int:
        """Elements of the sparse matrix."""
        stored = count_stored(self.geometry, None)
        assert stored is not None, "only symbolic sizes have no count"
        return stored

    @property
    def index_dtype(self) -> torch.dtype:
        """Of all indices in the file: scipy has one for columns and row pointers."""
        fits = max(self.stored, self.geometry.cols) <= _LARGEST_INT32
        return torch.int32 if fits else torch.int64

    @property
    def row_bytes(self) -> int:
        """The most memory that a row takes while it is made, its share of the offset included."""
        geometry, item = self.geometry, self.weight.element_size()
        elements = geometry.cols * item
        if self.sparse:
            taps = geometry.in_channels // geometry.groups * math.prod(geometry.kernel_size)
            elements = min(taps, geometry.cols) * (item + self.index_dtype.itemsize)
        return elements + 4 * torch.int64.itemsize

    @property
    def file_bytes(self) -> int:
        """The size of the file, but for its headers."""
        rows, cols = self.geometry.rows, self.geometry.cols
        item = self.weight.element_size()
        if not self.sparse:
            return rows * (cols + 1) * item
        return (self.stored + rows) * item + (self.stored + rows + 1) * self.index_dtype.itemsize

    def blocks(self) -> Iterator[tuple[int, int]]:
        """The blocks, as (start, stop) of their rows, all of about the same size.

        Of the default size, they are large enough for the C library to give them back when freed.
        """
        rows = self.geometry.rows
        count = -(-rows // (self.block_bytes // self.row_bytes))
        step = -(-rows // count)
        for start in range(0, rows, step):
            yield start, min(start + step, rows)

    def dense(self, start: int, stop: int) -> Tensor:
        """These rows, `[stop - start, cols]`."""
        matrix: Tensor = torch.ops.linfuse.conv_to_affine(
            self.weight,
            None,
            *self.geometry.op_arguments,
            **self.geometry.op_keywords,
            rows=(start, stop),
        )[0]
        return matrix

    def csr(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Values, columns and row pointers of these rows."""
        values, columns, row_pointers = torch.ops.linfuse.conv_to_csr(
            self.weight,
            *self.geometry.op_arguments,
            **self.geometry.op_keywords,
            rows=(start, stop),
            index32=self.index_dtype == torch.int32,
        )
        return values, columns, row_pointers

    def offset(self, start: int, stop: int) -> Tensor:
        """The offset of these rows: the bias of the channel of each."""
        if self.bias is None:
            return self.weight.new_zeros(stop - start)
        rows = torch.arange(start, stop, device=self.bias.device)
        return self.bias[rows // math.prod(self.geometry.output_size)]


def _write(file: Any, tensor: Tensor) -> None:
    """Appends the elements of a tensor, without a copy where it lies in main memory."""
    tensor = tensor.cpu().contiguous()
    size = tensor.numel() * tensor.element_size()
    if size:
        file.write((ctypes.c_char * size).from_address(tensor.data_ptr()))


# No name holds a block in what follows: it must be gone before the next is made.


def _safetensors_header(matrix: BlockedMatrix) -> bytes:
    geometry, dtype = matrix.geometry, matrix.weight.dtype
    entries: dict[str, Any] = {
        "__metadata__": {"format": "pt", "geometry": json.dumps(geometry._asdict())}
    }
    end = 0
    for name, shape in (("matrix", (geometry.rows, geometry.cols)), ("offset", (geometry.rows,))):
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": _SAFETENSORS_NAMES[dtype],
            "shape": shape,
            "data_offsets": (start, end),
        }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)  # so that the elements are aligned
    return struct.pack("<Q", len(header)) + header


def write_safetensors(file: BinaryIO, matrix: BlockedMatrix, advance: Advance) -> None:
    """Writes the tensors `matrix` and `offset`.

    Args:
        file: Where to.
        matrix: The matrix, not sparse.
        advance: Called behind every block.
    """
    file.write(_safetensors_header(matrix))
    for start, stop in matrix.blocks():
        _write(file, matrix.dense(start, stop))
        advance(stop - start)
    for start, stop in matrix.blocks():
        _write(file, matrix.offset(start, stop))


def _npy_header(descr: str, shape: tuple[int, ...]) -> bytes:
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
    size = 10 + len(text) + 1  # 6 bytes of magic, 2 of version, 2 of length; a newline at the end
    text += " " * (-size % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode("latin1")


@contextmanager
def _archive(file: BinaryIO) -> Iterator[zipfile.ZipFile]:
    """A zip archive that is closed when it is complete, and otherwise left as it is.

    ZipFile's own `with` complains of a member that is open still, in the place of the interrupt
    that came in between.
    """
    archive = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED)
    try:
        yield archive
    except BaseException:
        archive.fp = None  # it counts as closed
        raise
    archive.close()


@contextmanager
def _member(
    archive: zipfile.ZipFile, name: str, descr: str, shape: tuple[int, ...]
) -> Iterator[Any]:
    # An entry made by hand has no time stamp: the same matrix gives the same file.
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
        file.write(_npy_header(descr, shape))
        yield file


def write_npz(file: BinaryIO, matrix: BlockedMatrix, advance: Advance) -> None:
    """Writes the arrays of scipy.sparse.save_npz, and `offset`.

    They lie one behind the other, so that each takes a pass over the rows: making the blocks anew
    is cheaper than keeping them, or writing them twice.

    Args:
        file: Where to.
        matrix: The matrix, sparse.
        advance: Called behind every block, of which there are three passes.
    """
    rows, stored = matrix.geometry.rows, matrix.stored
    value, index = _NUMPY_NAMES[matrix.weight.dtype], _NUMPY_NAMES[matrix.index_dtype]
    with _archive(file) as archive:
        with _member(archive, "format", "|S3", ()) as member:
            member.write(b"csr")
        with _member(archive, "shape", "<i8", (2,)) as member:
            member.write(struct.pack("<2q", rows, matrix.geometry.cols))
        with _member(archive, "indptr", index, (rows + 1,)) as member:
            pointers = torch.zeros(1, dtype=matrix.index_dtype)
            _write(member, pointers)
            for start, stop in matrix.blocks():
                pointers = matrix.csr(start, stop)[2][1:].cpu() + pointers[-1]
                _write(member, pointers)
                advance(stop - start)
        with _member(archive, "indices", index, (stored,)) as member:
            for start, stop in matrix.blocks():
                _write(member, matrix.csr(start, stop)[1])
                advance(stop - start)
        with _member(archive, "data", value, (stored,)) as member:
            for start, stop in matrix.blocks():
                _write(member, matrix.csr(start, stop)[0])
                advance(stop - start)
        with _member(archive, "offset", value, (rows,)) as member:
            for start, stop in matrix.blocks():
                _write(member, matrix.offset(start, stop))
