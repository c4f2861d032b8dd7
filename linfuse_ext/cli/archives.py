"""torch.export archives (.pt2): read without running anything that is in them.

torch.export.load warns of archives from strangers, and rightly so (torch 2.11 to 2.13):

    data/sample_inputs/*.pt         torch.load(weights_only=True), and if that fails with False
    data/weights, data/constants    raw numbers, but torch.load(weights_only=False) for what the
                                    *_config.json says is a pickle; pickle.loads for opaque_obj_*,
                                    TorchScript's unpickler for custom_obj_*; whole .pt in archives
                                    of old releases, which go the way of the example inputs
    data/aotinductor                compiled code, opened as a shared library
    models/*.json                   texts that are evaluated: archive_text.py

So the members are looked at first, as torch's own reader finds them: names, sizes, texts. What is a
pickle must be one that weights_only=True takes, and all else that could run code is refused. While
torch loads, its switch for that is forced as well.
"""

from __future__ import annotations

import io
import os
import re
import signal
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, NamedTuple

import torch
from torch.export import ExportedProgram
from torch.export.pt2_archive import PT2ArchiveReader
from torch.export.pt2_archive._package import load_pt2

from .archive_text import ArchiveError, check_example, check_graph, check_payloads

__all__ = ["ArchiveError", "Program", "load_program", "save_program"]


class Program(NamedTuple):
    """What an archive holds."""

    exported: ExportedProgram
    extra_files: dict[str, Any]


# Members -----------------------------------------------------------------------------------------

_GRAPH = re.compile(r"models/([\w.-]+)\.json")
_ALWAYS = r"archive_format|archive_version|byteorder|version|\.data/(version|serialization_id)"
_OF_PROGRAM = (
    r"models/{0}\.json|data/sample_inputs/{0}\.pt|"
    r"data/weights/(weight_\d+|{0}_weights_config\.json|{0}\.pt)|"
    r"data/constants/(tensor_\d+|{0}_constants_config\.json|{0}\.pt)"
)
_REFUSED = {  # the first that fits
    r"data/aotinductor/.*": "compiled code",
    r".*/(custom|opaque)_obj_.*": "objects of a custom class",
    r"(.*/)?(data|constants)\.pkl": "what torch.save or torch.jit.save writes",
    r"serialized_.*": "an export of torch 2.7 or older",
    r".*": "a member that torch.export.save does not write",
}


def _sizes(file: BinaryIO) -> dict[str, int]:
    """Bytes of every member by its name; nothing is compressed, so they fit into the file."""
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    zipped = file.read(4) == b"PK\x03\x04"
    try:
        members = zipfile.ZipFile(file).infolist()
    except Exception as error:  # zipfile raises whatever it stumbles over
        raise ArchiveError(
            "it is cut short or damaged" if zipped else "it is no archive of torch.export.save"
        ) from error
    names = [member.filename for member in members]
    for name in names:
        if "\\" in name or name.startswith("/") or ".." in name.split("/"):
            raise ArchiveError(f"it has a member outside of it, {name!r}")
    # torch's reader does not tell upper from lower case.
    if len({name.lower() for name in names}) < len(names):
        raise ArchiveError("it has two members of one name")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ArchiveError("it is compressed, which torch.export.save never does")
    if sum(member.file_size for member in members) > length:
        raise ArchiveError("its members are larger than itself")
    folders = {name.split("/")[0] for name in names}
    if len(folders) != 1:
        raise ArchiveError("it is no archive of torch.export.save")
    return {
        name.partition("/")[2]: member.file_size
        for name, member in zip(names, members, strict=True)
    }


def _check_kinds(names: Mapping[str, int]) -> str:
    """Refuses members of other kinds than an exported program has; returns the program's name."""
    programs = [found[1] for name in names if (found := _GRAPH.fullmatch(name))]
    program = programs[0] if programs else ""
    known = re.compile(f"{_ALWAYS}|extra/.*|{_OF_PROGRAM.format(re.escape(program))}")
    for kind, what in _REFUSED.items():
        for name in names:
            if (
                not known.fullmatch(name)
                and re.fullmatch(kind, name)
                and not _GRAPH.fullmatch(name)
            ):
                raise ArchiveError(f"it has {what}, {name!r}, which is not loaded")
    if len(programs) != 1:
        raise ArchiveError(f"it must have one exported program, and has {len(programs)}")
    return program


def _check_pickle(what: str, data: bytes) -> Any:
    """Loads a pickle of tensors and plain containers, or refuses it."""
    try:
        _sizes(io.BytesIO(data))
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
        if unsafe:
            raise ArchiveError(f"a pickle that calls {unsafe[0]!r}, which is never run")
        return torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:  # a pickle can fail in any way
        raise ArchiveError(f"of its {what}: {error}") from error


def _check(file: BinaryIO) -> None:
    """Refuses an archive of which torch.export.load would run a part, or that is none."""
    sizes = _sizes(file)
    name = _check_kinds(sizes)
    file.seek(0)
    with PT2ArchiveReader(file) as reader:
        if sorted(reader.get_file_names()) != sorted(sizes):
            raise ArchiveError("it is cut short or damaged")
        check_graph(reader.read_bytes(f"models/{name}.json"))
        example = reader.read_bytes(f"data/sample_inputs/{name}.pt")
        if example:
            check_example(_check_pickle("example inputs", example))
        for what, prefix in (("weights", "weight_"), ("constants", "tensor_")):
            folder = f"data/{what}/"
            if f"{folder}{name}.pt" in sizes:
                _check_pickle(what, reader.read_bytes(f"{folder}{name}.pt"))
            if f"{folder}{name}_{what}_config.json" in sizes:
                payloads = {
                    member.removeprefix(folder): size
                    for member, size in sizes.items()
                    if member.startswith(folder)
                }
                config = reader.read_bytes(f"{folder}{name}_{what}_config.json")
                check_payloads(config, payloads, prefix)


# Reading -----------------------------------------------------------------------------------------

_FORCED: dict[str, str | None] = {
    "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1",
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": None,
}


@contextmanager
def _weights_only() -> Iterator[None]:
    """Every torch.load inside is one with weights_only=True, whatever it is called with."""
    before = {name: os.environ.get(name) for name in _FORCED}
    try:
        _set_environment(_FORCED)
        yield
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def load_program(path: str | os.PathLike[str]) -> Program:
    """Reads a torch.export archive, without running anything that it brings along.

    Args:
        path: The archive, as torch.export.save writes it, of one program.

    Returns:
        The program and the archive's extra files.

    Raises:
        ArchiveError: It is no such archive, is damaged, or has parts that could run code.
        OSError: It cannot be read.
    """
    with Path(path).open("rb") as file, _weights_only():
        try:
            _check(file)
            file.seek(0)
            contents = load_pt2(file)
            (exported,) = contents.exported_programs.values()
        except ArchiveError as error:
            raise ArchiveError(f"{path} is not loaded: {error}") from error
        except OSError:
            raise
        except Exception as error:  # torch raises whatever it stumbles over
            lines = str(error).strip().splitlines() or [""]
            raise ArchiveError(
                f"{path} is not loaded: it cannot be read ({type(error).__name__}: {lines[0]})"
            ) from error
    return Program(exported, contents.extra_files)


# Writing -----------------------------------------------------------------------------------------


class _Writer(io.RawIOBase):
    """Keeps the first error for later: one in the midst of torch's writer ends the process."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: BaseException | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Does nothing: torch goes back to the start once it is done."""
        return 0

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except BaseException as error:
                self.error = error
        return len(data)


@contextmanager
def _interrupt_kept(writer: _Writer) -> Iterator[None]:
    """Lets Ctrl-C wait until torch's writer is done, which is soon: nothing more is written."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield  # no interrupt comes here
        return

    def keep(number: int, frame: FrameType | None) -> None:
        writer.error = writer.error or KeyboardInterrupt()

    signal.signal(signal.SIGINT, keep)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def save_program(file: BinaryIO, program: Program) -> None:
    """Writes a torch.export archive.

    Args:
        file: Where to.
        program: The program and the extra files.

    Raises:
        OSError: It cannot be written.
    """
    writer = _Writer(file)
    with _interrupt_kept(writer):
        # torch asks for no more than a file that can be written; its types want all of IO.
        torch.export.save(program.exported, writer, extra_files=program.extra_files)  # type: ignore[arg-type]
    if writer.error is not None:
        raise writer.error
