"""Ctrl-C, SIGTERM, a full disk: files are whole or as they were, and the error says what it is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from every_op import run_python
from torch import nn

import linfuse_ext as lf
from linfuse_ext import _C

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")

OLD = b"as it was"


@pytest.fixture(autouse=True)
def signals_arrive() -> Iterator[None]:
    """What runs in a shell's background ignores SIGINT, and so would all that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(*command: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", *command],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def partial_files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix == ".partial"]


def stop_while_it_writes(
    process: subprocess.Popen[str], folder: Path, number: signal.Signals, least_bytes: int = 1
) -> tuple[int, str]:
    """Sends the signal once the hidden file has content; returns the exit status and stderr."""
    try:
        until = time.monotonic() + 60
        while not any(path.stat().st_size >= least_bytes for path in partial_files(folder)):
            assert process.poll() is None and time.monotonic() < until, "it wrote nothing"
            time.sleep(0.001)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, errors


# Calls -----------------------------------------------------------------------------------------

CALLS = """
import os, signal, threading, time
from every_op import OPS, make_operands, same_bits

for op in OPS:
    small = make_operands()
    right = op(small, (5, 4))
    image = (16, 16) if op.name in ("dense", "diagonals") else (48, 48)
    operands = make_operands(96 if op.name == "fuse_conv_conv" else 8, image, 400)
    threading.Timer(0.15, os.kill, (os.getpid(), signal.SIGINT)).start()
    until = time.monotonic() + 30
    try:
        while time.monotonic() < until:
            op(operands, image)
    except KeyboardInterrupt:
        print(op.name, flush=True)
    assert same_bits(op(small, (5, 4)), right), op.name

print("last", flush=True)
while True:
    op(operands, image)
"""


def test_ctrl_c_ends_a_call_and_the_process_goes_on(tmp_path: Path) -> None:
    """At the latest when the kernel at hand is done; and uncaught, it ends the process."""
    script = f"import sys; sys.path[:0] = {sys.path!r}\n{CALLS}"
    process = start("-c", script, folder=tmp_path)
    try:
        names = []
        for line in process.stdout:
            names.append(line.strip())
            if names[-1] == "last":
                break
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert names == [
        "dense", "csr", "coo", "diagonals", "fuse_conv_linear", "fuse_linear_conv",
        "fuse_conv_conv", "last",
    ], f"{names} {errors}"  # fmt: skip
    assert errors.strip().endswith("KeyboardInterrupt")
    assert process.returncode in (-signal.SIGINT, 130)


# Files of a matrix -----------------------------------------------------------------------------

SAVE = """
import sys, torch
from linfuse_ext import save_matrix

layout = torch.sparse_csr if sys.argv[1].endswith(".npz") else torch.strided
channels, image = (16, 256) if layout == torch.sparse_csr else (4, 96)
layer = torch.nn.Conv2d(channels, channels, 3, padding=1)
save_matrix(sys.argv[1], layer, image, layout=layout, block_bytes=1 << 20)
"""


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("m.safetensors", signal.SIGINT),
        ("m.safetensors", signal.SIGTERM),
    ],
)
def test_save_matrix_is_stopped(name: str, number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(OLD)
    process = start("-c", SAVE, name, folder=tmp_path)
    status, errors = stop_while_it_writes(process, tmp_path, number, 1 << 20)
    assert (tmp_path / name).read_bytes() == OLD
    if number == signal.SIGINT:
        assert os.listdir(tmp_path) == [name]
        assert errors.strip().endswith("KeyboardInterrupt")
        assert status in (-signal.SIGINT, 130)
    else:  # nothing of Python runs any more: what is left has another name
        assert status == -signal.SIGTERM
        assert set(tmp_path.iterdir()) == {tmp_path / name, *partial_files(tmp_path)}


ANY_TIME = """
import os, signal, sys, time, torch
from pathlib import Path
from linfuse_ext import save_matrix

os.chdir(sys.argv[1])
signal.signal(signal.SIGALRM, signal.default_int_handler)
layer = torch.nn.Conv2d(2, 3, 3, padding=1)
for name, layout in (("m.safetensors", torch.strided), ("m.npz", torch.sparse_csr)):
    def save():
        save_matrix(name, layer, 12, layout=layout, block_bytes=10_000)
    save()
    begin = time.perf_counter()
    save()
    took, interrupted, rounds = time.perf_counter() - begin, 0, 60
    whole = Path(name).read_bytes()
    for number in range(rounds):
        Path(name).write_bytes(b"as it was")
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, took * (number + 1) / rounds)
                save()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            interrupted += 1
        assert os.listdir() == [name], (number, os.listdir())
        found = Path(name).read_bytes()
        if found not in (b"as it was", whole):
            differs = [n for n, pair in enumerate(zip(found, whole)) if pair[0] != pair[1]]
            raise AssertionError((name, number, len(found), len(whole), differs[:9]))
    Path(name).unlink()
    print(interrupted, flush=True)
"""


@pytest.mark.skipif(
    _C.build_info()["instrument"] == "coverage", reason="coverage waits for a lock of its own"
)
def test_save_matrix_is_stopped_at_any_time(tmp_path: Path) -> None:
    result = run_python(ANY_TIME, str(tmp_path))
    assert result.returncode == 0, f"{result.stdout}{result.stderr}"
    assert all(int(count) > 20 for count in result.stdout.split()), result.stdout


IN_ZIPFILE = """
import os, signal, sys, torch, zipfile
from linfuse_ext import save_matrix

def stop(frame, event, argument):
    if event == "return" and frame.f_code is zipfile.ZipFile.open.__code__:
        sys.setprofile(None)
        signal.raise_signal(signal.SIGINT)

os.chdir(sys.argv[1])
layer = torch.nn.Conv2d(2, 3, 3)
sys.setprofile(stop)
try:
    save_matrix("m.npz", layer, 12, layout=torch.sparse_csr)
except KeyboardInterrupt:
    print("interrupted", os.listdir())
"""


def test_ctrl_c_between_the_parts_of_an_npz_stays_one(tmp_path: Path) -> None:
    result = run_python(IN_ZIPFILE, str(tmp_path))
    assert result.stdout == "interrupted []\n", result.stderr


# The command line ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network whose archive takes a while to write, and whose layer has a large matrix."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 24 * 24, 3000), nn.ReLU(), nn.Linear(3000, 3000),
    )  # fmt: skip
    path = tmp_path_factory.mktemp("archive") / "net.pt2"
    torch.export.save(torch.export.export(net.eval(), (torch.rand(2, 3, 24, 24),)), path)
    return path


COMMANDS = {
    "matrix": ("out.safetensors", ("--layer", "0", "--dtype", "float64", "--block-bytes", "1MiB")),
    "collapse": ("out.pt2", ("--policy", "never")),
}


@pytest.mark.parametrize(
    ("command", "number"),
    [("matrix", signal.SIGINT), ("collapse", signal.SIGINT), ("collapse", signal.SIGTERM)],
)
def test_a_command_is_stopped(
    command: str, number: signal.Signals, archive: Path, tmp_path: Path
) -> None:
    name, options = COMMANDS[command]
    (tmp_path / name).write_bytes(OLD)
    process = start(
        "-m", "linfuse_ext", command, str(archive), "-o", name, *options, folder=tmp_path
    )
    status, errors = stop_while_it_writes(process, tmp_path, number)
    assert (tmp_path / name).read_bytes() == OLD
    if number == signal.SIGINT:
        assert status == 130 and os.listdir(tmp_path) == [name]
        assert errors == "interrupted: no file is left half-written\n"
    else:
        assert status == -signal.SIGTERM
        assert set(tmp_path.iterdir()) == {tmp_path / name, *partial_files(tmp_path)}


IN_WRITER = """
import io, os, signal, sys, torch
from pathlib import Path
from linfuse_ext.cli import archives, files

class Stop:
    def __init__(self, event, number):
        self.event, self.left = event, number

    def __call__(self, frame, event, argument):
        if event == self.event and frame.f_code is archives._Writer.write.__code__:
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(signal.SIGINT)

program = archives.load_program(sys.argv[1])
os.chdir(sys.argv[2])
for event in ("call", "return"):
    try:
        sys.setprofile(Stop(event, 4))
        with files.replacing(Path("out.pt2")) as file:
            archives.save_program(file, program)
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
    assert os.listdir() == ["out.pt2"], event
"""


def test_ctrl_c_at_the_edge_of_a_write_does_not_crash(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 300)).eval()
    path, folder = tmp_path / "net.pt2", tmp_path / "out"
    folder.mkdir()
    torch.export.save(torch.export.export(net, (torch.rand(2, 300),)), path)
    (folder / "out.pt2").write_bytes(OLD)
    result = run_python(IN_WRITER, str(path), str(folder))
    assert result.returncode == 0, result.stderr[:200]


# A full disk -----------------------------------------------------------------------------------

FULL = """
import contextlib, io, os, resource, sys, torch
from pathlib import Path
from torch import nn
from linfuse_ext import save_matrix
from linfuse_ext.__main__ import main

os.chdir(sys.argv[1])
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 300), nn.Linear(300, 200))
torch.export.save(torch.export.export(net.eval(), (torch.rand(2, 2, 5, 5),)), "net.pt2")

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

def command(*arguments):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = main(arguments)
    if status:
        assert status == 1 and said.getvalue().count("\\n") == 1, said.getvalue()
        raise OSError(said.getvalue())

def save(path, **options):
    return lambda: save_matrix(path, net[0], 5, block_bytes=1000, **options)

WRITES = {
    "m.safetensors": save("m.safetensors"),
    "m.npz": save("m.npz", layout=torch.sparse_csr),
    "0.npz": lambda: command("matrix", "net.pt2", "--layer", "0", "-o", "0.npz"),
    "out.pt2": lambda: command("collapse", "net.pt2", "-o", "out.pt2"),
    "same.pt2": lambda: command("collapse", "net.pt2", "-o", "same.pt2", "--policy", "never"),
}
for name, write in WRITES.items():
    write()
    size = os.path.getsize(name)
    for most in (100, size // 2, size - 1):
        Path(name).write_bytes(b"as it was")
        limit(most)
        try:
            write()
            print(name, most, "of", size, "was enough?")
        except OSError as error:
            print(name, str(error).strip())
        finally:
            limit(resource.RLIM_INFINITY)
        assert Path(name).read_bytes() == b"as it was", (name, most)
        assert set(os.listdir()) == {name, "net.pt2"}, (name, most, os.listdir())
    limit(size)
    write()
    limit(resource.RLIM_INFINITY)
    assert os.path.getsize(name) == size
    Path(name).unlink()

limit(size - 1)
try:
    command(*"collapse net.pt2 -o out.pt2 --policy never --report report.json".split())
except OSError as error:
    print("both", str(error).strip(), "leaves", *os.listdir())
"""


@pytest.fixture(scope="module")
def errors_of_a_full_disk(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    result = run_python(FULL, str(tmp_path_factory.mktemp("full")))
    assert result.returncode == 0, f"{result.stdout}{result.stderr}"
    return [line for line in result.stdout.splitlines() if line]


def test_a_full_disk_leaves_files_as_they_were(errors_of_a_full_disk: list[str]) -> None:
    assert len(errors_of_a_full_disk) == 5 * 3 + 1
    for line in errors_of_a_full_disk:
        assert "File too large" in line, line


def test_the_error_of_a_full_disk_names_the_file(errors_of_a_full_disk: list[str]) -> None:
    for line in errors_of_a_full_disk[:-1]:
        name, _, error = line.partition(" ")
        assert name in error, line


def test_model_and_report_appear_both_or_not_at_all(errors_of_a_full_disk: list[str]) -> None:
    assert errors_of_a_full_disk[-1].endswith("leaves net.pt2"), errors_of_a_full_disk[-1]


def test_a_disk_that_is_too_small_is_named_beforehand(tmp_path: Path) -> None:
    """A matrix of 4.5 PB."""
    with pytest.raises(OSError, match=r"m\.safetensors") as caught:
        lf.save_matrix(tmp_path / "m.safetensors", nn.Conv2d(32, 32, 3, padding=1), 1024)
    assert caught.value.filename == str(tmp_path / "m.safetensors")
    assert not os.listdir(tmp_path)
