"""The command line: what it writes, what it prints, and how it fails."""

from __future__ import annotations

import doctest
import importlib.util
import io
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import rich.console
import scipy.sparse
import torch
from safetensors import safe_open
from torch import nn
from torch.export import Dim, export

import linfuse_ext as lf
from linfuse_ext.__main__ import main
from linfuse_ext.cli import archives, files, layers, tables

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("module", [files, tables], ids=lambda module: module.__name__)
def test_examples_in_docstrings(module) -> None:
    result = doctest.testmod(module)
    assert result.failed == 0 and result.attempted > 0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.AvgPool2d(2), nn.ReLU()
        )
        self.head = nn.Sequential(nn.Linear(4 * 4 * 4, 30), nn.Linear(30, 5))

    def forward(self, x):
        return self.head(self.features(x).flatten(1))


def save(path: Path, model: nn.Module, *inputs: torch.Tensor, dynamic: bool = True) -> Path:
    batch = Dim("batch")
    shapes = tuple({0: batch} for _ in inputs) if dynamic else None
    torch.export.save(export(model.eval(), inputs, dynamic_shapes=shapes), path)
    return path


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def saved(net: nn.Module, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("models") / "net.pt2"
    return save(path, net, torch.randn(2, 3, 8, 8)).read_bytes()


@pytest.fixture
def model(saved: bytes, tmp_path: Path, monkeypatch) -> str:
    """The name of an archive in the current folder, which is otherwise empty."""
    monkeypatch.chdir(tmp_path)
    Path("net.pt2").write_bytes(saved)
    return "net.pt2"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def on_terminal(monkeypatch) -> Callable[..., str]:
    """Runs a command with a terminal of 80 columns as stdout; returns what it shows there."""
    make = rich.console.Console

    def console(file) -> rich.console.Console:
        return make(file=file, force_terminal=True, width=80, color_system=None)

    def run(*command: str) -> str:
        shown = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(rich.console, "Console", console)
            patch.setattr(sys, "stdout", shown)
            assert main(command) == 0
        return shown.getvalue()

    return run


def fails(command: list[str], capsys, status: int = 1) -> str:
    """The one line on stderr of a command that fails, and prints and writes nothing."""
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert main(command) == status
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
    return captured.err.removesuffix("\n")


def wrong_usage(command: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(command)
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.out == ""
    return captured.err.splitlines()[-1]


# collapse ----------------------------------------------------------------------------------------


def check_smaller(path: str | Path, net: nn.Module) -> int:
    """The archive computes what the network does, for other batches too; returns its operations."""
    smaller = torch.export.load(path)
    for batch in (2, 5):
        x = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(smaller.module()(x), net(x), atol=1e-5, rtol=1e-4)
    return sum(node.op == "call_function" for node in smaller.graph.nodes)


def test_collapse(model: str, net, capsys) -> None:
    before = Path(model).read_bytes()
    assert main(["collapse", model, "-o", "smaller.pt2"]) == 0
    captured = capsys.readouterr()
    for word in ("features.0 + features.1", "head.0 + head.1", "fused", "FLOPs", "smaller.pt2: "):
        assert word in captured.out
    assert Path(model).read_bytes() == before
    assert sorted(os.listdir()) == [model, "smaller.pt2"]
    assert check_smaller("smaller.pt2", net) < check_smaller(model, net)
    assert main(["matrix", "smaller.pt2", "--list"]) == 0, "it is an archive like any other"


def test_collapse_writes_the_report_as_well(model: str, capsys) -> None:
    Path("report.json").write_text("old")
    command = ["collapse", model, "-o", "out.pt2", "--report", "report.json", "--json"]
    assert main([*command, "--policy", "always"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(Path("report.json").read_text())
    assert printed["policy"] == "always" and printed["totals"]["fused"] >= 2
    assert sorted(os.listdir()) == [model, "out.pt2", "report.json"]


def test_collapse_only_reports(model: str, capsys) -> None:
    assert main(["collapse", model, "--policy", "never", "--report", "report.json"]) == 0
    assert json.loads(Path("report.json").read_text())["totals"]["fused"] == 0
    assert "policy 'never'" in capsys.readouterr().out
    assert sorted(os.listdir()) == [model, "report.json"]


def test_collapse_limits_a_merged_weight(tmp_path: Path, monkeypatch, capsys) -> None:
    """A Linear from 64 to 128 features takes 32 KiB and its bias."""
    monkeypatch.chdir(tmp_path)
    pair = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 128))  # together less than that
    save(tmp_path / "m.pt2", pair, torch.randn(2, 64))
    fused = {}
    for size in ("1GiB", "16 KiB"):
        command = ["collapse", "m.pt2", "-o", "out.pt2", "--max-bytes", size, "--json"]
        assert main([*command, "--policy", "always"]) == 0
        fused[size] = json.loads(capsys.readouterr().out)["totals"]["fused"]
    assert fused == {"1GiB": 1, "16 KiB": 0}


def test_collapse_of_an_archive_into_itself(model: str, net) -> None:
    os.symlink(model, "link.pt2")
    assert main(["collapse", model, "-o", "link.pt2"]) == 0
    assert Path("link.pt2").is_symlink() and sorted(os.listdir()) == ["link.pt2", model]
    check_smaller(model, net)


def test_collapse_keeps_extra_files(model: str) -> None:
    program = torch.export.load(model)
    torch.export.save(program, "extra.pt2", extra_files={"labels.txt": "cat dog"})
    assert main(["collapse", "extra.pt2", "-o", "out.pt2"]) == 0
    found = {"labels.txt": ""}
    torch.export.load("out.pt2", extra_files=found)
    assert found == {"labels.txt": "cat dog"}


def test_collapse_draws_on_a_terminal(model: str, on_terminal) -> None:
    drawn = on_terminal("collapse", model, "-o", "out.pt2")
    assert "─────" in drawn and "features.0 + features.1" in drawn and "under policy" in drawn
    assert all(len(line) <= 80 for line in drawn.splitlines())


@pytest.mark.parametrize("report", [[], ["--report", "report.json"]], ids=["", "report"])
@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted: no file is left half-written"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (
            RuntimeError("odd\nand more"),
            1,
            "unexpected RuntimeError: odd (--traceback shows where)",
        ),
        (MemoryError(), 1, "unexpected MemoryError: MemoryError (--traceback shows where)"),
    ],
    ids=["interrupt", "full disk", "bug", "memory"],
)
def test_a_run_that_ends_early_changes_nothing(
    error, status: int, line: str, report, model: str, monkeypatch, capsys
) -> None:
    Path("out.pt2").write_bytes(b"as it was")
    write, calls = archives._Writer.write, []

    def failing(self, data) -> int:
        calls.append(sorted(os.listdir()))
        if len(calls) == 30:
            # torch calls this from C++, where an error would end the process
            monkeypatch.setattr(self.file, "write", None, raising=False)
            self.error = error
        return write(self, data)

    monkeypatch.setattr(archives._Writer, "write", failing)
    found = fails(["collapse", model, "-o", "out.pt2", *report], capsys, status)
    assert found.endswith(line)
    assert len(calls) > 30 and any("partial" in name for name in calls[-1])


def test_a_report_that_fails_keeps_the_old_model(model: str, monkeypatch, capsys) -> None:
    """Both files or none."""
    Path("out.pt2").write_bytes(b"as it was")

    def interrupted(self) -> str:
        if any("partial" in name for name in os.listdir()):
            raise KeyboardInterrupt
        return "{}"

    from linfuse_ext.network.report import Report

    monkeypatch.setattr(Report, "to_json", interrupted)
    fails(["collapse", model, "-o", "out.pt2", "--report", "report.json"], capsys, 130)
    assert Path("out.pt2").read_bytes() == b"as it was"


def test_a_refusal_of_collapse_is_one_line(model: str, monkeypatch, capsys) -> None:
    def refusing(*arguments, **keywords):
        raise ValueError("collapse: `model` must be something else\nand why")

    monkeypatch.setattr(lf, "collapse", refusing)
    line = fails(["collapse", model, "-o", "out.pt2"], capsys)
    assert line == "linfuse: collapse: `model` must be something else"
    with pytest.raises(ValueError, match="and why"):
        main(["--traceback", "collapse", model, "-o", "out.pt2"])


# matrix ------------------------------------------------------------------------------------------


class Reparametrised(nn.Module):
    """A weight that is computed, and one that depends on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 3, 3))

    def forward(self, x):
        return nn.functional.conv1d(self.normed(x), x[:1, :, :3].repeat(2, 2, 1)[:, :3] * 1.0)


class Block(nn.Module):
    """Convolutions of all kinds, each called in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(2, 4, 3, 2, 2, 2, 2)
        self.flat = nn.Conv2d(4, 4, (3, 2), (2, 1), (2, 0), bias=False)
        self.same = nn.Conv2d(4, 4, (2, 4), padding="same")
        self.reflect = nn.Conv2d(4, 4, 3, padding=(1, 2), padding_mode="reflect")
        self.even = nn.Conv2d(4, 4, (2, 4), padding="same", padding_mode="replicate")
        self.circular = nn.Conv2d(4, 4, 3, padding=2, groups=2, padding_mode="circular")
        self.cube = nn.Conv3d(1, 2, (2, 3, 1), padding=(1, 0, 2))
        self.line_up = nn.ConvTranspose1d(8, 4, 3, 3, 1, 2, 2)
        self.flat_up = nn.ConvTranspose2d(4, 6, 3, 2, 1, (1, 0), 2, dilation=2)
        self.cube_up = nn.ConvTranspose3d(2, 1, 2, 2, 1)
        self.linear = nn.Linear(7, 3)
        self.bare = nn.Linear(3, 2, bias=False)

    def forward(self, x):
        y = self.line(x)[:, :, None, :].repeat(1, 1, 8, 1)
        y = self.reflect(self.same(self.same(self.flat(y))))
        y = self.circular(self.even(y))
        z = self.cube_up(self.cube(y.flatten(1)[:, None, :60].reshape(-1, 1, 3, 4, 5)))
        a = self.line_up(y.flatten(2)[:, :, :8].repeat(1, 2, 1))
        b = self.flat_up(y[:, :, :4, :3])
        c = self.bare(self.linear(y.flatten(1)[:, :7]))
        return a, b, c, z


CALLED = [
    "line", "flat", "same", "same@1", "reflect", "even", "circular", "cube", "cube_up", "line_up",
    "flat_up", "linear", "bare",
]  # fmt: skip


@pytest.fixture(scope="module")
def block(tmp_path_factory) -> tuple[nn.Module, Path, Path]:
    """A model, its archive, and the one of its decomposed program."""
    torch.manual_seed(0)
    folder, model, x = tmp_path_factory.mktemp("models"), Block().eval(), torch.randn(2, 2, 16)
    program = export(model, (x,), dynamic_shapes=({0: Dim("batch")},))
    torch.export.save(program, folder / "block.pt2")
    torch.export.save(program.run_decompositions(), folder / "decomposed.pt2")
    return model, folder / "block.pt2", folder / "decomposed.pt2"


def seen_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """The input of every call of a layer, by the name of the call."""
    seen: dict[str, torch.Tensor] = {}

    def hook(name: str):
        def note(module, inputs) -> None:
            names = (f"{name}@{n}" if n else name for n in itertools.count())
            seen[next(each for each in names if each not in seen)] = inputs[0]

        return note

    handles = [
        module.register_forward_pre_hook(hook(name))
        for name, module in model.named_modules()
        if name and not list(module.children())
    ]
    model(torch.randn(2, 2, 16))
    for handle in handles:
        handle.remove()
    return seen


def affine(path: str) -> tuple[torch.Tensor, torch.Tensor]:
    if path.endswith(".npz"):
        offset = numpy.load(path)["offset"]
        return torch.from_numpy(scipy.sparse.load_npz(path).toarray()), torch.from_numpy(offset)
    with safe_open(path, "pt") as file:
        return file.get_tensor("matrix"), file.get_tensor("offset")


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
@pytest.mark.parametrize("name", CALLED)
def test_matrix_of_every_layer(name: str, suffix: str, block, tmp_path: Path, capsys) -> None:
    model, archive, _ = block
    path = str(tmp_path / f"m.{suffix}")
    assert main(["matrix", str(archive), "--layer", name, "-o", path]) == 0
    matrix, offset = affine(path)
    layer, x = model.get_submodule(name.partition("@")[0]), seen_inputs(model)[name]
    with torch.no_grad():
        y = layer(x).flatten(1)
    torch.testing.assert_close(x.flatten(1) @ matrix.T + offset, y, atol=1e-5, rtol=1e-4)
    assert f"{y.shape[1]} x {x[0].numel()}" in (printed := capsys.readouterr().out)
    assert str(layer) in printed, "the settings are those of the layer, padding modes included"


@pytest.mark.parametrize("name", ["line", "flat", "same", "cube", "cube_up", "flat_up", "linear"])
def test_matrix_of_a_decomposed_program(name: str, block, tmp_path: Path) -> None:
    """There, all convolutions are one operation, and a Linear is a product."""
    made = []
    for archive in block[1:]:
        path = str(tmp_path / "m.safetensors")
        assert main(["matrix", str(archive), "--layer", name, "-o", path]) == 0
        made.append(affine(path))
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))


def test_what_a_matrix_leaves_out_is_said(block, tmp_path: Path, capsys) -> None:
    """Decomposed, the padding of a padding mode is several operations in front."""
    model, _, decomposed = block
    path = str(tmp_path / "m.safetensors")
    assert main(["matrix", str(decomposed), "--layer", "circular", "-o", path]) == 0
    assert "alone, behind the " in capsys.readouterr().out
    x = nn.functional.pad(seen_inputs(model)["circular"], (2, 2, 2, 2), "circular")
    with torch.no_grad():
        y = nn.functional.conv2d(x, model.circular.weight, model.circular.bias, groups=2)
    matrix, offset = affine(path)
    torch.testing.assert_close(x.flatten(1) @ matrix.T + offset, y.flatten(1))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_matrix_in_another_dtype(dtype: str, block, tmp_path: Path) -> None:
    model, archive, _ = block
    path = str(tmp_path / "m.safetensors")
    command = ["matrix", str(archive), "--layer", "linear", "-o", path, "--dtype", dtype]
    assert main([*command, "--block-bytes", "100"]) == 0
    matrix, offset = affine(path)
    assert matrix.dtype == offset.dtype == getattr(torch, dtype)
    assert torch.equal(matrix, model.linear.weight.to(matrix.dtype))
    assert torch.equal(offset, model.linear.bias.to(matrix.dtype))


def test_layers_are_listed(block, capsys) -> None:
    assert main(["matrix", str(block[1]), "--list"]) == 0
    first, *rows = capsys.readouterr().out.splitlines()
    assert first.split() == ["layer", "input", "matrix", "dense", "sparse", "what"]
    assert [row.split()[0] for row in rows] == CALLED
    line = next(row for row in rows if row.startswith("linear"))
    assert "3 x 7" in line and "96 B" in line and "Linear(in_features=7" in line


def test_layers_are_listed_on_a_terminal(block, on_terminal) -> None:
    drawn = on_terminal("matrix", str(block[1]), "--list")
    assert "─────" in drawn and all(name in drawn for name in CALLED)


def test_a_layer_may_be_named_by_its_node(block, tmp_path: Path) -> None:
    _, archive, _ = block
    found = layers.find_layers(torch.export.load(archive))
    node = next(layer.node for layer in found if layer.name == "same@1")
    for name in ("same@1", node):
        path = str(tmp_path / f"{name}.npz")
        assert main(["matrix", str(archive), "--layer", name, "-o", path]) == 0
    assert (tmp_path / "same@1.npz").read_bytes() == (tmp_path / f"{node}.npz").read_bytes()


def test_weights_that_are_computed(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    model, x = Reparametrised().eval(), torch.randn(2, 2, 9)
    save(tmp_path / "m.pt2", model, x, dynamic=False)
    assert main(["matrix", "m.pt2", "--layer", "normed", "-o", "m.safetensors"]) == 0
    matrix, offset = affine("m.safetensors")
    expected = model.normed(x).flatten(1)
    torch.testing.assert_close(x.flatten(1) @ matrix.T + offset, expected)
    capsys.readouterr()
    line = fails(["matrix", "m.pt2", "--layer", "conv1d_1", "-o", "n.npz"], capsys)
    assert line == "linfuse: conv1d_1 has no matrix: its weight depends on the input, or is changed"


def test_inputs_of_no_fixed_size(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    shapes = ({0: Dim("batch"), 2: Dim("height", min=4)},)
    program = export(
        nn.Sequential(nn.Conv2d(1, 1, 3)), (torch.ones(2, 1, 5, 6),), dynamic_shapes=shapes
    )
    torch.export.save(program, "m.pt2")
    assert main(["matrix", "m.pt2", "--list"]) == 0
    assert "no matrix, its input has no fixed size" in capsys.readouterr().out
    line = fails(["matrix", "m.pt2", "--layer", "0", "-o", "m.npz"], capsys)
    assert "0 has no matrix: its input has no fixed size (s" in line and "x 6)" in line


def test_an_unknown_layer_lists_the_known(model: str, capsys) -> None:
    assert main(["matrix", model, "--layer", "features.9", "-o", "m.npz"]) == 1
    captured = capsys.readouterr()
    *table, line = captured.err.splitlines()
    assert captured.out == "" and os.listdir() == [model]
    assert line == "linfuse: net.pt2 has no layer 'features.9', but those above"
    assert [row.split()[0] for row in table] == ["layer", "features.0", "head.0", "head.1"]


def test_a_model_without_layers(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "m.pt2", nn.ReLU(), torch.ones(2, 3))
    line = fails(["matrix", "m.pt2", "--layer", "0", "-o", "m.npz"], capsys)
    assert line == "linfuse: m.pt2 has no convolution and no Linear"


# Wrong usage and missing files -------------------------------------------------------------------

WRONG = [
    ([], "the following arguments are required: COMMAND"),
    (["fuse"], "invalid choice: 'fuse'"),
    (["collapse"], "the following arguments are required: model"),
    (["collapse", "net.pt2"], "-o/--output is needed, except with --policy never"),
    (["collapse", "net.pt2", "-o", "out.pt"], "-o/--output must end in .pt2, got 'out.pt'"),
    (["collapse", "net.pt2", "-o", "out.pt2", "--policy", "all"], "invalid choice: 'all'"),
    (["collapse", "net.pt2", "-o", "out.pt2", "--max-bytes", "lots"],
     "must be a number of bytes such as 1000000, 256MiB or 2GB, got 'lots'"),
    (["collapse", "net.pt2", "-o", "out.pt2", "--max-bytes", "0"], "got '0'"),
    (["collapse", "net.pt2", "-o", "out.pt2", "--max-bytes", "-1"], "--max-bytes"),
    (["collapse", "net.pt2", "-o", "out.pt2", "--report", "./out.pt2"],
     "--report must be another file than the model and the output, got './out.pt2'"),
    (["collapse", "net.pt2", "-o", "out.pt2", "--report", "net.pt2"], "--report must be another"),
    (["matrix", "net.pt2"], "--layer and -o/--output are needed, or --list"),
    (["matrix", "net.pt2", "--layer", "head.0"], "--layer and -o/--output are needed, or --list"),
    (["matrix", "net.pt2", "--layer", "head.0", "-o", "m.txt"],
     "-o/--output must end in .safetensors or .npz, got 'm.txt'"),
    (["matrix", "net.pt2", "--layer", "head.0", "-o", "m.npz", "--dtype", "int8"], "'int8'"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "message"), WRONG, ids=lambda value: " ".join(value)[:40])
def test_wrong_usage(command: list[str], message: str, model: str, capsys) -> None:
    assert message in wrong_usage(command, capsys)
    assert os.listdir() == [model]


FAILING = [
    (["collapse", "no.pt2", "-o", "out.pt2"], "no.pt2: No such file or directory"),
    (["collapse", "folder", "-o", "out.pt2"], "folder: Is a directory"),
    (["collapse", "net.pt2", "-o", "no/out.pt2"], "no/out.pt2: its folder does not exist"),
    (["collapse", "net.pt2", "-o", "d.pt2"], "d.pt2: Is a directory"),
    (["collapse", "net.pt2", "-o", "out.pt2", "--report", "no/r.json"],
     "no/r.json: its folder does not exist"),
    (["matrix", "no.pt2", "--list"], "no.pt2: No such file or directory"),
    (["matrix", "net.pt2", "--layer", "head.0", "-o", "no/m.npz"],
     "no/m.npz: its folder does not exist"),
    (["matrix", "net.pt2", "--layer", "head.0", "-o", "m.npz", "--dtype", "bfloat16"],
     "save_matrix: `dtype` must be float32, float64 or float16 in a .npz, as numpy has no "
     "bfloat16, got torch.bfloat16"),
    (["matrix", "net.pt2", "--layer", "head.0", "-o", "m.safetensors", "--block-bytes", "9"],
     "save_matrix: `block_bytes` must hold at least one row, 288 bytes here, got 9"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "message"), FAILING, ids=lambda value: " ".join(value)[:40])
def test_failures_are_one_line(command: list[str], message: str, model: str, capsys) -> None:
    Path("folder").mkdir()
    Path("d.pt2").mkdir()
    assert fails(command, capsys) == f"linfuse: {message}"


# info, help and the process ----------------------------------------------------------------------


def test_info_draws_on_a_terminal(on_terminal) -> None:
    drawn = on_terminal("info")
    assert torch.__version__ in drawn and "ready on the CPU" in drawn


def test_without_rich_it_is_plain_text(model: str, on_terminal, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "verdict " in on_terminal("info")
    for command in (["matrix", model, "--list"], ["collapse", model, "-o", "out.pt2"]):
        text = on_terminal(*command)
        assert "features.0" in text and "─" not in text


@pytest.mark.parametrize("command", ["info", "collapse", "matrix"])
def test_help_has_an_example_that_parses(command: str, capsys) -> None:
    from linfuse_ext.cli.main import make_parser

    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    *_, last = capsys.readouterr().out.strip().splitlines()
    words = last.removeprefix("example: ").split()
    assert words[:2] == ["linfuse", command]
    make_parser().parse_args(words[1:])


def python(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        **options,
    )


def test_as_a_process(tmp_path: Path, saved: bytes) -> None:
    (tmp_path / "net.pt2").write_bytes(saved)
    result = python("-m", "linfuse_ext", "matrix", str(tmp_path / "net.pt2"), "--list")
    assert result.returncode == 0 and "head.1" in result.stdout
    result = python("-m", "linfuse_ext", "collapse", "no.pt2", "-o", "no/out.pt2")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr == "python -m linfuse_ext: no/out.pt2: its folder does not exist\n"


def test_rich_and_what_reads_archives_are_imported_only_when_needed() -> None:
    script = (
        "import sys\n"
        "from linfuse_ext.__main__ import main\n"
        "assert main(['info', '--json']) == 0\n"
        "assert not {'rich', 'torch._inductor', 'linfuse_ext.cli.archives'} & set(sys.modules)\n"
    )
    result = python("-c", script)
    assert result.returncode == 0, result.stderr


def test_a_reader_that_has_gone_is_no_matter() -> None:
    """As in `linfuse info | head -1`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "linfuse_ext", "info"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait() == 1 and errors == b""
    process.stderr.close()


def test_the_installed_command_is_this_one() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert 'scripts.linfuse = "linfuse_ext.__main__:main"' in text
