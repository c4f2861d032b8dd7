"""The matrix of a convolution as a file, written block by block: it may be larger than memory."""

from __future__ import annotations

import errno
import importlib.util
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from .functional import Size
from .geometry import DTYPES, as_int, make_geometry
from .matrix_files import Advance, BlockedMatrix, write_npz, write_safetensors
from .meshes import check_not_sharded
from .modules import _CONVOLUTIONS, _TRANSPOSED, _check_module, _conv_keywords, _parameters

__all__ = ["save_matrix"]

_OP = "save_matrix"
_SUFFIXES = {torch.strided: ".safetensors", torch.sparse_csr: ".npz"}


def _keep(file: BinaryIO) -> None:
    """Brings to the disk what was written."""
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _naming(path: Path | None) -> Iterator[None]:
    """Gives an error of the system the name of the file, which one of a write does not have."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` once it is complete, and is removed if it is not."""
    partial = path.with_name(f".linfuse-{secrets.token_hex(4)}.partial")
    try:
        with _naming(path), partial.open("xb") as file:
            yield file
            _keep(file)  # the name must not reach the disk before the elements do
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def _progress_bar(label: str, total: int, show: bool) -> Iterator[Advance]:
    """A bar on the terminal if there is one, and rich to draw it."""
    if not (show and importlib.util.find_spec("rich")):
        yield lambda rows: None
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label.replace("[", r"\["), total=total)
        yield lambda rows: bar.advance(task, rows)


def _check_arguments(path: str | os.PathLike[str], layout: Any, dtype: Any) -> Path:
    if not isinstance(layout, torch.layout):
        raise TypeError(f"{_OP}: `layout` must be a torch.layout, got {layout!r}")
    if layout not in _SUFFIXES:
        raise ValueError(f"{_OP}: `layout` must be torch.strided or torch.sparse_csr, got {layout}")
    if dtype not in DTYPES:
        raise TypeError(
            f"{_OP}: `dtype` must be float32, float64, float16 or bfloat16, got {dtype!r}"
        )
    if layout == torch.sparse_csr and dtype == torch.bfloat16:
        raise ValueError(
            f"{_OP}: `dtype` must be float32, float64 or float16 in a .npz, as numpy has no "
            f"bfloat16, got {dtype}"
        )
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{_OP}: `path` must be a str or a path, got {type(path).__name__}")
    if Path(path).suffix != _SUFFIXES[layout]:
        raise ValueError(
            f"{_OP}: `path` must end in .safetensors for torch.strided and in .npz for "
            f"torch.sparse_csr, got {os.fspath(path)!r} for {layout}"
        )
    real = Path(os.path.realpath(path))  # a link stays, what it points to is replaced
    if real.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"{_OP}: `path` must be a file", str(path))
    if not real.parent.is_dir():
        raise FileNotFoundError(
            errno.ENOENT, f"{_OP}: `path` must be in a folder that exists", str(path)
        )
    return real


def _check_space(path: Path, size: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise OSError(
            errno.ENOSPC,
            f"{_OP}: `path` needs {size / 1e9:.3g} GB, but its disk has only {free / 1e9:.3g} GB",
            str(path),
        )


def save_matrix(
    path: str | os.PathLike[str],
    conv: nn.Module,
    input_size: Size,
    dtype: torch.dtype | None = None,
    layout: torch.layout = torch.strided,
    *,
    block_bytes: int = 256 * 2**20,
    progress: bool = True,
) -> None:
    """Writes the matrix and offset of a convolution layer to a file, block by block.

    `conv(x).flatten(1) == x.flatten(1) @ matrix.T + offset`. The matrix may be larger than memory:
    no more than `block_bytes` of it are held at a time. The file appears when it is complete: until
    then the rows go to a hidden file beside it, which an error or an interrupt removes.

    A dense matrix goes to `.safetensors` as the tensors `matrix` and `offset`; its metadata has
    `geometry`, the settings of the layer as JSON. A sparse one goes to `.npz` as
    scipy.sparse.save_npz writes it, uncompressed, with the array `offset` added:
    `scipy.sparse.load_npz(path)` and `numpy.load(path)["offset"]` read it. Neither library is
    needed for writing.

    Args:
        path: The file, ending in `.safetensors` for a dense and in `.npz` for a sparse matrix; an
            existing one is replaced.
        conv: A Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d or ConvTranspose3d with any
            settings. Subclasses are accepted where they compute the same.
        input_size: Spatial size of the convolution's input, in positions: an int or one per axis.
        dtype: What the layer's parameters are converted to first: float32, float64, float16 or (not
            in .npz) bfloat16; their own if None.
        layout: torch.strided or torch.sparse_csr.
        block_bytes: The most memory that one block of rows may take. With less than the default the
            C library may keep some freed blocks, up to about 100 MiB.
        progress: Whether to draw a progress bar, if rich is installed and the standard error is a
            terminal.

    Raises:
        TypeError: `conv` is no such layer, overrides its forward, or an argument has a wrong type.
        ValueError: `input_size` does not fit, `path` does not end as `layout` wants, one row is
            larger than `block_bytes`, or `conv` has hooks, holds no values, or is not initialised.
        OSError: The disk has not enough room, or `path` cannot be written.

    Examples:
        >>> import tempfile
        >>> from safetensors.torch import load_file
        >>> folder = tempfile.TemporaryDirectory()
        >>> conv = torch.nn.Conv2d(2, 5, 3, padding=1)
        >>> save_matrix(folder.name + "/conv.safetensors", conv, (6, 7))
        >>> tensors = load_file(folder.name + "/conv.safetensors")
        >>> x = torch.rand(4, 2, 6, 7)
        >>> y = x.flatten(1) @ tensors["matrix"].T + tensors["offset"]
        >>> torch.allclose(conv(x).flatten(1), y, atol=1e-6)
        True
    """
    _check_module(_OP, "conv", conv, _CONVOLUTIONS + _TRANSPOSED)
    weight, bias = _parameters(conv)
    dtype = weight.dtype if dtype is None else dtype
    target = _check_arguments(path, layout, dtype)
    check_not_sharded(_OP, "conv.weight", weight)
    if weight.is_meta:
        raise ValueError(f"{_OP}: `conv` must hold values, got parameters on the meta device")
    block_bytes = as_int(_OP, "block_bytes", block_bytes)
    geometry = make_geometry(_OP, weight.shape, input_size, **_conv_keywords(conv))
    weight = weight.detach().to(dtype)
    bias = None if bias is None else bias.detach().to(dtype)
    matrix = BlockedMatrix(weight, bias, geometry, layout == torch.sparse_csr, block_bytes)
    if block_bytes < matrix.row_bytes:
        raise ValueError(
            f"{_OP}: `block_bytes` must hold at least one row, {matrix.row_bytes} bytes here, "
            f"got {block_bytes}"
        )
    _check_space(target, matrix.file_bytes)
    write = write_npz if matrix.sparse else write_safetensors
    steps = geometry.rows * (3 if matrix.sparse else 1)
    with _progress_bar(target.name, steps, progress) as advance, _replacing(target) as file:
        write(file, matrix, advance)
