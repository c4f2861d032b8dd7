"""`matrix`: the matrix of one layer of a torch.export archive, to a file."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from . import tables
from .files import byte_count, target

if TYPE_CHECKING:
    from .layers import Layer

__all__ = ["add"]

_DESCRIPTION = """
Writes the matrix of a convolution or Linear of a model that torch.export.save wrote:
layer(x).flatten(1) == x.flatten(1) @ matrix.T + offset. It may be larger than memory.
"""
_LAYOUTS = {".safetensors": torch.strided, ".npz": torch.sparse_csr}
_DTYPES = ("float32", "float64", "float16", "bfloat16")


def add(commands: Any) -> None:
    """Adds the command to the parser."""
    command = commands.add_parser(
        "matrix",
        help="write the matrix of one layer of a model",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: %(prog)s model.pt2 --layer features.0 -o layer.npz",
    )
    command.add_argument("model", help="the archive (.pt2), of one exported program")
    command.add_argument("--list", action="store_true", help="list the layers and their sizes")
    command.add_argument("--layer", metavar="NAME", help="the layer, by its name or its node's")
    command.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help=".safetensors for the dense matrix, .npz for the sparse one, as "
        "scipy.sparse.load_npz reads it",
    )
    command.add_argument("--dtype", choices=_DTYPES, help="convert the weights first")
    command.add_argument(
        "--block-bytes",
        metavar="SIZE",
        type=byte_count,
        default="256MiB",
        help="the most memory for a block of rows (default: 256MiB)",
    )
    command.set_defaults(run=_run, parser=command)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.list:
        _show(_layers(arguments.model), arguments.dtype, sys.stdout)
    else:
        _save(arguments)


def _layers(model: str) -> list[Layer]:
    from .archives import load_program  # what reads them takes a second to import
    from .layers import find_layers

    return find_layers(load_program(model).exported)


def _save(arguments: argparse.Namespace) -> None:
    fail, output = arguments.parser.error, arguments.output
    if arguments.layer is None or output is None:
        fail("--layer and -o/--output are needed, or --list")
    suffix = Path(output).suffix
    if suffix not in _LAYOUTS:
        fail(f"-o/--output must end in .safetensors or .npz, got {output!r}")
    if os.path.realpath(output) == os.path.realpath(arguments.model):
        fail("-o/--output must be another file than the model")
    target(output)

    import linfuse_ext

    layer = _find(_layers(arguments.model), arguments)
    linfuse_ext.save_matrix(
        output,
        layer.with_values(),
        layer.input_size,
        _dtype(arguments.dtype),
        _LAYOUTS[suffix],
        block_bytes=arguments.block_bytes,
    )
    geometry = layer.matrix(sparse=False).geometry
    print(
        f"{output}: {geometry.rows} x {geometry.cols}, "
        f"{tables.size_text(os.path.getsize(output))}, the matrix of {layer.name}, {layer.title}"
    )


def _find(layers: list[Layer], arguments: argparse.Namespace) -> Layer:
    if not layers:
        raise ValueError(f"{arguments.model} has no convolution and no Linear")
    named = {layer.node: layer for layer in layers} | {layer.name: layer for layer in layers}
    layer = named.get(arguments.layer)
    if layer is None:
        _show(layers, arguments.dtype, sys.stderr)
        raise ValueError(f"{arguments.model} has no layer {arguments.layer!r}, but those above")
    if layer.conv is None:
        raise ValueError(f"{layer.name} has no matrix: {layer.remark}")
    return layer


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


def _show(layers: list[Layer], dtype: str | None, file: TextIO) -> None:
    columns = ("layer", " input", " matrix", " dense", " sparse", "what")
    rows = [_row(layer, _dtype(dtype)) for layer in layers]
    console = tables.terminal(file)
    if console is None:
        print(tables.lines(columns, rows), file=file)
    else:
        tables.draw(console, columns, rows)


def _row(layer: Layer, dtype: torch.dtype | None) -> tuple[str, ...]:
    if layer.conv is None:
        return layer.name, "", "", "", "", f"{layer.what}: no matrix, {layer.remark}"
    dense, sparse = layer.matrix(False, dtype), layer.matrix(True, dtype)
    return (
        layer.name,
        " x ".join(map(str, layer.input_size)),
        f"{dense.geometry.rows} x {dense.geometry.cols}",
        tables.size_text(dense.file_bytes),
        tables.size_text(sparse.file_bytes),
        layer.title,
    )
