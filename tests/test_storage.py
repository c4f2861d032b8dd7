"""Matrices on disk: what the libraries read is the matrix, and no run leaves half a file."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import rich.console
import scipy.sparse
import torch
from safetensors import safe_open
from torch import nn

from linfuse_ext import functional, matrix_files
from linfuse_ext.storage import save_matrix

CSR = torch.sparse_csr
LAYERS = {
    "Conv1d": (nn.Conv1d(4, 6, 3, 2, 2, 2, 2), 11),
    "Conv2d": (nn.Conv2d(3, 4, (3, 2), (2, 1), (2, 0)), (8, 9)),
    "Conv3d": (nn.Conv3d(2, 3, (2, 3, 1), padding=(1, 0, 2)), (3, 4, 2)),
    "unit": (nn.Conv2d(1, 1, 1), 1),
    "same": (nn.Conv2d(2, 3, (2, 4), padding="same"), (5, 6)),
    "replicate": (nn.Conv2d(2, 3, 3, padding=(4, 2), padding_mode="replicate"), (3, 4)),
    "circular": (nn.Conv2d(2, 4, 3, padding=2, groups=2, padding_mode="circular"), (3, 4)),
    "no bias": (nn.Conv2d(2, 3, 3, bias=False), (5, 6)),
    "ConvTranspose2d": (nn.ConvTranspose2d(6, 9, 3, 2, 1, (1, 0), 3), (4, 3)),
    "rows without a tap": (nn.ConvTranspose2d(2, 2, 2, stride=4), (3, 4)),
}
BLOCKS = {"one block": 1 << 20, "some": 3000, "odd": 1789}


def affine(conv, input_size, dtype=None) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrix and offset of a layer, dense, in memory."""
    keywords = {
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
        "groups": conv.groups,
        "padding_mode": conv.padding_mode,
    }
    if isinstance(conv, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        keywords |= {"transposed": True, "output_padding": conv.output_padding}
    weight = conv.weight.detach().to(dtype)
    bias = None if conv.bias is None else conv.bias.detach().to(dtype)
    return functional.conv_to_affine(weight, bias, input_size, **keywords)


@pytest.mark.parametrize("block_bytes", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("name", LAYERS)
def test_dense(name: str, block_bytes: int, tmp_path: Path) -> None:
    conv, input_size = LAYERS[name]
    save_matrix(tmp_path / "m.safetensors", conv, input_size, block_bytes=block_bytes)
    matrix, offset = affine(conv, input_size)
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert set(file.keys()) == {"matrix", "offset"}
        assert torch.equal(file.get_tensor("matrix"), matrix)
        assert torch.equal(file.get_tensor("offset"), offset)
        geometry = json.loads(file.metadata()["geometry"])
    assert geometry["kernel_size"] == list(conv.kernel_size)
    assert geometry["groups"] == conv.groups and geometry["padding_mode"] == conv.padding_mode


@pytest.mark.parametrize("block_bytes", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("name", LAYERS)
def test_sparse(name: str, block_bytes: int, tmp_path: Path) -> None:
    conv, input_size = LAYERS[name]
    path = tmp_path / "m.npz"
    save_matrix(path, conv, input_size, layout=CSR, block_bytes=block_bytes)
    matrix, offset = affine(conv, input_size)
    loaded = scipy.sparse.load_npz(path)
    assert loaded.format == "csr" and loaded.has_canonical_format
    assert loaded.indices.dtype == loaded.indptr.dtype == numpy.int32
    assert numpy.array_equal(loaded.toarray(), matrix.numpy())
    assert numpy.array_equal(numpy.load(path)["offset"], offset.numpy())


def test_layers_of_any_device(device: str, tmp_path: Path) -> None:
    conv, input_size = LAYERS["Conv2d"]
    matrix, _ = affine(conv, input_size)
    conv = copy.deepcopy(conv).to(device)
    save_matrix(tmp_path / "m.safetensors", conv, input_size, block_bytes=2000)
    save_matrix(tmp_path / "m.npz", conv, input_size, layout=CSR, block_bytes=2000)
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("matrix"), matrix)
    assert numpy.array_equal(scipy.sparse.load_npz(tmp_path / "m.npz").toarray(), matrix.numpy())


@pytest.mark.parametrize("dtype", matrix_files._SAFETENSORS_NAMES, ids=str)
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    """The parameters are converted first, so that padding that repeats is summed once more."""
    conv, input_size = LAYERS["circular"]
    matrix, offset = affine(conv, input_size, dtype)
    save_matrix(tmp_path / "m.safetensors", conv, input_size, dtype)
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        for name, exact in (("matrix", matrix), ("offset", offset)):
            assert file.get_tensor(name).dtype == dtype
            assert torch.equal(file.get_tensor(name), exact)
    if dtype == torch.bfloat16:
        return
    save_matrix(tmp_path / "m.npz", conv, input_size, dtype, CSR)
    arrays = numpy.load(tmp_path / "m.npz")
    assert arrays["data"].dtype == matrix.numpy().dtype
    loaded = scipy.sparse.load_npz(tmp_path / "m.npz")
    assert loaded.dtype == arrays["data"].dtype
    # scipy holds float16 and multiplies by it, but has no dense form of it
    assert numpy.array_equal(loaded.astype(numpy.float64).toarray(), matrix.double().numpy())
    assert conv.weight.dtype == torch.float32


def test_sparse_as_scipy_itself_writes_it(tmp_path: Path) -> None:
    conv, input_size = LAYERS["Conv2d"]
    save_matrix(tmp_path / "ours.npz", conv, input_size, layout=CSR, block_bytes=1000)
    theirs = scipy.sparse.csr_matrix(affine(conv, input_size)[0].numpy())
    scipy.sparse.save_npz(tmp_path / "theirs.npz", theirs, compressed=False)
    with numpy.load(tmp_path / "ours.npz") as ours, numpy.load(tmp_path / "theirs.npz") as files:
        for name, array in files.items():
            assert ours[name].dtype == array.dtype and numpy.array_equal(ours[name], array)


def test_indices_of_64_bits_where_they_are_needed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(matrix_files, "_LARGEST_INT32", 100)
    conv, input_size = LAYERS["Conv2d"]
    save_matrix(tmp_path / "m.npz", conv, input_size, layout=CSR, block_bytes=1000)
    arrays = numpy.load(tmp_path / "m.npz")
    assert arrays["indices"].dtype == arrays["indptr"].dtype == numpy.int64
    exact = affine(conv, input_size)[0].numpy()
    assert numpy.array_equal(scipy.sparse.load_npz(tmp_path / "m.npz").toarray(), exact)


@pytest.mark.parametrize(("suffix", "layout"), [("safetensors", torch.strided), ("npz", CSR)])
def test_the_same_file_every_time_and_for_every_block(suffix, layout, tmp_path: Path) -> None:
    conv, input_size = LAYERS["Conv2d"]
    contents = []
    for block_bytes in (1 << 20, 2000):
        path = tmp_path / f"{block_bytes}.{suffix}"
        save_matrix(path, conv, input_size, layout=layout, block_bytes=block_bytes)
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]


def test_the_size_is_known_beforehand(tmp_path: Path) -> None:
    conv, input_size = nn.Conv2d(4, 4, 3), 20
    for name, layout in (("m.safetensors", torch.strided), ("m.npz", CSR)):
        save_matrix(tmp_path / name, conv, input_size, layout=layout)
        geometry = functional.make_geometry("test", conv.weight.shape, input_size)
        made = matrix_files.BlockedMatrix(conv.weight, conv.bias, geometry, layout == CSR, 1 << 20)
        headers = (tmp_path / name).stat().st_size - made.file_bytes
        assert 0 < headers < 2000


def test_gradients_and_subclasses_are_no_matter(tmp_path: Path) -> None:
    class Named(nn.Conv2d):
        note = "nothing new"

    conv = Named(2, 3, 3).requires_grad_()
    with torch.inference_mode():
        save_matrix(str(tmp_path / "m.safetensors"), conv, 5)
    save_matrix(tmp_path / "m.npz", conv, 5, layout=CSR)
    assert sorted(os.listdir(tmp_path)) == ["m.npz", "m.safetensors"]


# Nothing half ------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
@pytest.mark.parametrize(("suffix", "layout"), [("safetensors", torch.strided), ("npz", CSR)])
def test_an_interrupted_run_changes_nothing(
    error, suffix: str, layout: torch.layout, tmp_path: Path, monkeypatch
) -> None:
    path = tmp_path / f"m.{suffix}"
    path.write_bytes(b"as it was")
    conv, input_size = LAYERS["Conv2d"]
    write, calls = matrix_files._write, []

    def interrupted(file, tensor):
        calls.append(sorted(os.listdir(tmp_path)))
        if len(calls) == 5:
            raise error
        write(file, tensor)

    monkeypatch.setattr(matrix_files, "_write", interrupted)
    with pytest.raises(error):
        save_matrix(path, conv, input_size, layout=layout, block_bytes=2000)
    assert len(calls) == 5 and len(calls[-1]) == 2, "it was written to a second file"
    assert os.listdir(tmp_path) == [path.name] and path.read_bytes() == b"as it was"
    monkeypatch.undo()
    save_matrix(path, conv, input_size, layout=layout)
    assert os.listdir(tmp_path) == [path.name] and path.read_bytes() != b"as it was"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    link, real = tmp_path / "m.npz", tmp_path / "folder" / "real"
    link.symlink_to(real)
    save_matrix(link, *LAYERS["Conv2d"], layout=CSR)
    assert link.is_symlink() and scipy.sparse.load_npz(link).nnz and real.is_file()
    assert os.listdir(tmp_path / "folder") == ["real"]


def test_no_room_on_the_disk(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2_000_000))
    with pytest.raises(OSError, match=r"`path` needs 4\.3 GB, but its disk has only 0.002 GB"):
        save_matrix(tmp_path / "m.safetensors", nn.Conv2d(8, 8, 3, padding=1), 64)
    assert not os.listdir(tmp_path)


# The bar -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "layout"), [("safetensors", torch.strided), ("npz", CSR)])
def test_the_bar_gets_to_its_end(suffix: str, layout, tmp_path: Path, monkeypatch) -> None:
    terminal = rich.console.Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(rich.console, "Console", lambda **options: terminal)
    path = tmp_path / f"[red]m.{suffix}"
    save_matrix(path, *LAYERS["Conv2d"], layout=layout, block_bytes=2000)
    drawn = terminal.file.getvalue()
    assert path.name in drawn and "100%" in drawn


def test_silent_without_a_terminal_without_rich_and_on_request(
    tmp_path: Path, capfd, monkeypatch
) -> None:
    save_matrix(tmp_path / "m.npz", *LAYERS["Conv2d"], layout=CSR)
    save_matrix(tmp_path / "m.npz", *LAYERS["Conv2d"], layout=CSR, progress=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    save_matrix(tmp_path / "m.npz", *LAYERS["Conv2d"], layout=CSR)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


# Memory ------------------------------------------------------------------------------------------

MEMORY = """
import re, sys, torch
from linfuse_ext.storage import save_matrix

def peak():  # of this process image; getrusage would still know the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

path, block_bytes = sys.argv[1], int(sys.argv[2])
sparse = path.endswith(".npz")
layout = torch.sparse_csr if sparse else torch.strided
save_matrix(path, torch.nn.Conv2d(1, 1, 3), 9, layout=layout)
before = peak()
channels, size = (16, 128) if sparse else (4, 48)
conv = torch.nn.Conv2d(channels, channels, 3, padding=1)
save_matrix(path, conv, size, layout=layout, block_bytes=block_bytes)
print(peak() - before)
"""


@pytest.mark.lean
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("name", ["m.safetensors", "m.npz"])
def test_memory_stays_below_the_block(name: str, tmp_path: Path) -> None:
    """Files of 300 MB; in a process of its own, as the high-water mark of this one may be above."""
    block_bytes = 128 << 20
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / name), str(block_bytes)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (tmp_path / name).stat().st_size > 2 * block_bytes
    grown = int(result.stdout)
    assert block_bytes // 2 < grown <= block_bytes + (8 << 20)
    (tmp_path / name).unlink()


# Refusals ----------------------------------------------------------------------------------------

CONV = nn.Conv2d(2, 3, 3)
SAFE = "m.safetensors"


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


REFUSED = [
    (lambda: save_matrix(SAFE, nn.Linear(2, 3), 5), TypeError,
     "save_matrix: `conv` must be one of Conv1d, Conv2d, Conv3d, ConvTranspose1d, "
     "ConvTranspose2d, ConvTranspose3d, got Linear"),
    (lambda: save_matrix(SAFE, OwnForward(2, 3, 3), 5), TypeError, "OwnForward overrides forward"),
    (lambda: save_matrix(SAFE, CONV, 5, layout="csr"), TypeError,
     "save_matrix: `layout` must be a torch.layout, got 'csr'"),
    (lambda: save_matrix(SAFE, CONV, 5, layout=torch.sparse_coo), ValueError,
     "save_matrix: `layout` must be torch.strided or torch.sparse_csr, got torch.sparse_coo"),
    (lambda: save_matrix(SAFE, CONV, 5, torch.int32), TypeError,
     "save_matrix: `dtype` must be float32, float64, float16 or bfloat16, got torch.int32"),
    (lambda: save_matrix("m.npz", CONV, 5, torch.bfloat16, CSR), ValueError,
     "save_matrix: `dtype` must be float32, float64 or float16 in a .npz, as numpy has no "
     "bfloat16, got torch.bfloat16"),
    (lambda: save_matrix(7, CONV, 5), TypeError,
     "save_matrix: `path` must be a str or a path, got int"),
    (lambda: save_matrix("m.npz", CONV, 5), ValueError,
     "save_matrix: `path` must end in .safetensors for torch.strided and in .npz for "
     "torch.sparse_csr, got 'm.npz' for torch.strided"),
    (lambda: save_matrix(Path("m.safetensors"), CONV, 5, layout=CSR), ValueError,
     "got 'm.safetensors' for torch.sparse_csr"),
    (lambda: save_matrix("m", CONV, 5), ValueError, "got 'm' for torch.strided"),
    (lambda: save_matrix("nowhere/m.safetensors", CONV, 5), FileNotFoundError,
     "save_matrix: `path` must be in a folder that exists: 'nowhere/m.safetensors'"),
    (lambda: save_matrix("folder.npz", CONV, 5, layout=CSR), IsADirectoryError,
     "save_matrix: `path` must be a file: 'folder.npz'"),
    (lambda: save_matrix(SAFE, nn.Conv2d(2, 3, 3, device="meta"), 5), ValueError,
     "save_matrix: `conv` must hold values, got parameters on the meta device"),
    (lambda: save_matrix(SAFE, CONV, 2), ValueError,
     "save_matrix: the output must have at least one position per axis"),
    (lambda: save_matrix(SAFE, CONV, 5, block_bytes=231), ValueError,
     "save_matrix: `block_bytes` must hold at least one row, 232 bytes here, got 231"),
    (lambda: save_matrix("m.npz", CONV, 5, layout=CSR, block_bytes=0), ValueError,
     "save_matrix: `block_bytes` must hold at least one row, 176 bytes here, got 0"),
    (lambda: save_matrix(SAFE, CONV, 5, block_bytes=1e6), TypeError,
     "save_matrix: `block_bytes` must be an int, got 1000000.0 (float)"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_refusals_say_why(number: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.npz").mkdir()
    call, kind, message = REFUSED[number]
    with pytest.raises(kind) as caught:
        call()
    assert message in str(caught.value)
    assert os.listdir(tmp_path) == ["folder.npz"]
