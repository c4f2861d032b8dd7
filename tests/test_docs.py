"""The documentation: its examples run and print what it shows, its links and lists are complete.

How a page is written:

    ```python     is run, in order, in one namespace for each page and in a folder of its own
    ```text       right behind it is what it prints; so is a table behind `<!-- output -->`
    ```console    has commands behind `$ `, and what they print
    ```sh, ...    is not run

A number such as 1.2e-07 is a rounding error, which differs between machines: its size is compared,
to a factor of ten. What an archive of torch takes differs between its versions, and is not.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

import linfuse_ext as lf
from linfuse_ext import batch_norm, functional, modules, pooling, storage
from linfuse_ext.cli.main import main, make_parser
from linfuse_ext.network import collapse as network_collapse
from linfuse_ext.network.rules import RULES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
LANGUAGES = {"python", "text", "console", "sh", "yaml", "json"}
RUN = {"python", "console"}

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"\n*<!-- output -->\n+((?:\|[^\n]*\n)+)")
SMALL = re.compile(r"\d\.\d+e[+-]\d+")
ARCHIVE = re.compile(r"^(\S+\.pt2: )\d.*$", re.MULTILINE)


class Block(NamedTuple):
    language: str
    text: str
    line: int
    shown: str | None  # what it prints, as the page has it


def blocks_of(text: str) -> list[Block]:
    """The fenced blocks of a page, those that show an output joined to what prints it."""
    blocks: list[Block] = []
    end = 0
    for fence in FENCE.finditer(text):
        language, inside = fence[1], fence[2]
        line = text.count("\n", 0, fence.start()) + 1
        assert language in LANGUAGES, f"line {line}: a block in {language!r}"
        if language == "text":
            alone = (
                not blocks or blocks[-1].language != "python" or text[end : fence.start()].strip()
            )
            assert not alone, f"line {line}: no python block prints this text"
            blocks[-1] = blocks[-1]._replace(shown=inside)
        else:
            blocks.append(Block(language, inside, line, None))
        end = fence.end()
        table = TABLE.match(text, end)
        if table and language == "python":
            blocks[-1] = blocks[-1]._replace(shown=table[1])
    return blocks


def read(page: str) -> str:
    return (DOCS / page).read_text()


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def same_output(got: str, shown: str) -> bool:
    """Whether a text is the one that a page shows, but for the size of rounding errors."""
    texts = [[line.rstrip() for line in text.rstrip().splitlines()] for text in (got, shown)]
    got, shown = (ARCHIVE.sub(r"\1", "\n".join(lines)) for lines in texts)
    if SMALL.sub("#", got) != SMALL.sub("#", shown):
        return False
    pairs = zip(SMALL.findall(got), SMALL.findall(shown), strict=True)
    return all(0.1 <= float(one) / float(other) <= 10 for one, other in pairs)


def check_output(got: str, shown: str, where: str) -> None:
    assert same_output(got, shown), f"{where} prints\n{got}\nand the page shows\n{shown}"


def names_of_facts(text: str) -> list[str]:
    return [re.split(r"  +", line)[0] for line in text.strip().splitlines()]


def run_command(line: str) -> str:
    """What `linfuse ...` or `python -m linfuse_ext ...` prints, in this process."""
    words = shlex.split(line, comments=True)
    assert not set(words) & {"|", ">", "&&", ";"}, f"{line}: a single command is run, no shell"
    module = ["python", "-m", "linfuse_ext"]
    assert words[0] == "linfuse" or words[:3] == module, f"{line}: no command of this package"
    arguments = words[3:] if words[:3] == module else words[1:]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main(arguments)
        except SystemExit as stop:
            if stop.code:
                print(f"exit status {stop.code}")
    return out.getvalue()


def run_console(block: Block, where: str) -> None:
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        got = run_command(command)
        if command.endswith(" info"):
            # The facts are those of the machine, and with a card there are more of them.
            missing = set(names_of_facts(shown)) - set(names_of_facts(got))
            assert not missing, f"{where}: `info` does not tell {missing}"
        else:
            check_output(got, shown, f"{where}: {command}")


def needed_packages(blocks: list[Block]) -> set[str]:
    """What the examples import; not all of it is there wherever the tests run."""
    text = "\n".join(block.text for block in blocks if block.language == "python")
    return set(re.findall(r"^\s*(?:import|from) (\w+)", text, flags=re.MULTILINE))


def run_page(text: str, page: str) -> dict[str, Any]:
    """Runs the examples of a page in order; returns the names that they leave."""
    blocks = blocks_of(text)
    for package in sorted(needed_packages(blocks)):
        pytest.importorskip(package)
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks:
        where = f"docs/{page}, line {block.line}"
        if block.language == "console":
            run_console(block, where)
        if block.language != "python":
            continue
        # As many lines as stand before it, for the line numbers of a traceback.
        code = compile("\n" * block.line + block.text, str(DOCS / page), "exec")
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(code, names)
        if block.shown is None:
            assert not out.getvalue(), f"{where}: it prints what the page does not show"
        else:
            check_output(out.getvalue(), block.shown, where)
    return names


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for the files of a page, and torch's defaults back when it is done."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["linfuse"])
    monkeypatch.setenv("COLUMNS", "100")
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        yield tmp_path
    torch.set_default_dtype(dtype)


# The examples -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if RUN & {block.language for block in blocks_of(read(page))}]
)
def test_the_examples_of_a_page_run_and_print_what_it_shows(page: str, folder: Path) -> None:
    names = run_page(read(page), page)
    if page == "representations.md":
        check_layers(names["LAYERS"])


def check_layers(rows: list[tuple[Any, ...]]) -> None:
    """The layers of the table are those of the benchmarks, by their names."""
    known = {
        layer["name"]: layer
        for layer in json.loads((ROOT / "bench" / "layers.json").read_text())["layers"]
    }
    shared = [row for row in rows if row[0] in known]
    assert len(shared) >= 6
    for name, weight_size, input_size, settings, features in shared:
        conv = known[name]["conv"]
        groups = conv.get("groups", 1)
        channels = (conv["out"], conv["in"] // groups)
        if conv.get("transposed"):
            channels = (conv["in"], conv["out"] // groups)
        assert weight_size == (*channels, *conv["kernel"]), name
        assert list(input_size) == known[name]["input"], name
        assert features == known[name]["linear"], name
        defaults = {"groups": 1, "transposed": False, "dilation": [1] * len(input_size)}
        for setting in ("stride", "padding", "groups", "transposed", "dilation"):
            want = conv.get(setting, defaults.get(setting))
            given = settings.get(setting, {"stride": 1, "padding": 0}.get(setting))
            if isinstance(want, list):
                given = want if given is None else [given] * len(want)
            elif given is None:
                given = want
            assert given == want, f"{name}: {setting}"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("```python\nprint(2)\n```\n\n```text\n3\n```\n", "the page shows"),
        ("```python\nprint(2)\n```\n\n<!-- output -->\n| 3 |\n", "the page shows"),
        ("```python\nprint(2)\n```\n", "does not show"),
        ("```python\nassert 1 == 2\n```\n", None),
        ("```console\n$ linfuse --version\n9.9.9\n```\n", "the page shows"),
        ("```console\n$ linfuse info\ncolour of the box  red\n```\n", "does not tell"),
        ("```console\n$ rm file\n```\n", "no command of this package"),
        ("```text\n3\n```\n", "no python block"),
        ("```\n3\n```\n", "a block in ''"),
    ],
)
def test_a_page_that_is_wrong_is_noticed(text: str, error: str | None, folder: Path) -> None:
    with pytest.raises(AssertionError, match=error):
        run_page(text, "made_up.md")


@pytest.mark.parametrize(
    ("got", "shown", "same"),
    [
        ("error 1.2e-07\n", "error 3.4e-07", True),
        ("error 1.2e-07\n", "error 3.4e-05", False),
        ("error 1.2e-07, 3 layers", "error 1.2e-07, 4 layers", False),
        ("a  \nb\n\n", "a\nb", True),
        ("small.pt2: 368 kB, large.pt2 was 563 kB", "small.pt2: 370 kB, large.pt2 was 1 MB", True),
        ("small.pt2: 368 kB", "other.pt2: 368 kB", False),
        ("layer.npz: 1.26 MB", "layer.npz: 1.27 MB", False),
    ],
)
def test_only_the_size_of_a_rounding_error_is_compared(got: str, shown: str, same: bool) -> None:
    assert same_output(got, shown) == same


# The pages ----------------------------------------------------------------------------------------


def navigation() -> list[str]:
    _, _, nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")
    lines = nav.split("\n\n")[0].splitlines()
    return [line.rsplit(" ", 1)[-1] for line in lines if line.endswith(".md")]


def test_every_page_is_in_the_navigation_once() -> None:
    assert sorted(navigation()) == PAGES


def test_the_site_asks_no_other_host() -> None:
    config = (ROOT / "mkdocs.yml").read_text()
    assert re.search(r"^  font: false$", config, flags=re.MULTILINE)
    assert "http" not in config and "analytics" not in config
    for page in PAGES:
        assert not re.search(r"!\[[^]]*\]\(http|<(script|iframe|link|img)\b", read(page)), page


def slug(heading: str) -> str:
    """The anchor of a heading, as Python-Markdown makes it."""
    words = re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower()
    return re.sub(r"[-\s]+", "-", words)


def entries_of(page: str) -> list[str]:
    return re.findall(r"^::: (\S+)$", read(page), flags=re.MULTILINE)


def anchors_of(page: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", read(page)), flags=re.MULTILINE)
    return {slug(heading) for heading in headings} | set(entries_of(page))


def links_of(page: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", without_code(read(page)))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in links_of(page):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (DOCS / page).parent / path if path else DOCS / page
        assert target.is_file(), f"docs/{page}: {link}"
        if anchor:
            inside = target.resolve().relative_to(DOCS).as_posix()
            assert anchor in anchors_of(inside), f"docs/{page}: {link}"


@pytest.mark.parametrize("page", PAGES)
def test_names_that_are_linked_have_entries(page: str) -> None:
    entries = {entry for each in PAGES for entry in entries_of(each)}
    assert set(re.findall(r"\]\[([\w.]+)\]", FENCE.sub("", read(page)))) <= entries


def test_anchors_are_those_of_the_headings() -> None:
    assert slug("When *not* to fuse: `collapse`") == "when-not-to-fuse-collapse"
    assert {"linfuse_ext.collapse", "a-whole-network"} <= anchors_of("api/collapse.md")


# The reference ------------------------------------------------------------------------------------


def public_names() -> set[str]:
    """What stands in an __all__ that users meet, by the name that they use."""
    names = {f"linfuse_ext.{name}" for name in lf.__all__}
    names |= {f"linfuse_ext.functional.{name}" for name in functional.__all__}
    for module in (modules, batch_norm, pooling, storage, network_collapse):
        module_names = {name for name in module.__all__}
        assert module_names <= set(lf.__all__), "exported at the top as well"
    return names


# Those modules that have no __all__, or more names than users need.
ALSO_PUBLIC = {
    "linfuse_ext.cli.main.main",
    "linfuse_ext.cli.main.make_parser",
    "linfuse_ext.geometry.Geometry",
    "linfuse_ext.geometry.make_geometry",
    "linfuse_ext.geometry.make_settings",
    "linfuse_ext.network.layers.BiasMap",
    "linfuse_ext.network.layers.ScaleShift",
    "linfuse_ext.network.report.Report",
    "linfuse_ext.network.report.Row",
    "linfuse_ext.sparse.Diagonals",
    "linfuse_ext.sparse.count_stored",
}


def functions_of(module: ModuleType) -> set[str]:
    return {
        f"{module.__name__}.{name}"
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    }


def test_every_public_name_has_an_entry() -> None:
    entries = [entry for page in PAGES for entry in entries_of(page)]
    assert len(entries) == len(set(entries))
    wanted = public_names() | ALSO_PUBLIC
    wanted |= functions_of(importlib.import_module("linfuse_ext.reference"))
    wanted |= functions_of(importlib.import_module("linfuse_ext.info"))
    assert wanted - set(entries) == set()


def object_of(entry: str) -> Any:
    parts = entry.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise AssertionError(f"there is no {entry}")


@pytest.mark.parametrize("entry", [entry for page in PAGES for entry in entries_of(page)])
def test_an_entry_names_something_that_is_explained(entry: str) -> None:
    found = object_of(entry)
    assert isinstance(found, str) or (found.__doc__ and found.__doc__.strip())


def test_every_operator_is_on_its_page() -> None:
    schemas = (ROOT / "csrc" / "ops" / "library.cpp").read_text()
    operators = set(re.findall(r'm\.def\(\s*"(\w+)\(', schemas))
    assert len(operators) > 5
    told = set(re.findall(r"`(\w+)`", read("api/operators.md")))
    assert operators - told == set()
    assert all(hasattr(torch.ops.linfuse, name) for name in operators)


def options() -> Iterator[tuple[str, str]]:
    """Commands and their options."""
    parser = make_parser()
    for action in parser._actions:
        if not isinstance(action, argparse._SubParsersAction):
            yield from (("", option) for option in action.option_strings)
            continue
        for command, inner in action.choices.items():
            for each in inner._actions:
                yield from ((command, option) for option in each.option_strings)


@pytest.mark.parametrize(
    ("command", "option"),
    [each for each in options() if each[0] == "" or each[1] not in ("-h", "--help")],
)
def test_every_option_of_the_command_is_explained(command: str, option: str) -> None:
    text = read("command_line.md")
    if command:
        text = re.split(rf"^## `linfuse {command}`$", text, flags=re.MULTILINE)[1]
        text = text.split("\n## ")[0]
    assert option == "-h" or re.search(rf"`{option}\b", text)


# The rules and their drawings ---------------------------------------------------------------------


def sections(page: str) -> dict[str, str]:
    parts = re.split(r"^## (.+)$", read(page), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rules() -> dict[str, str]:
    """The sections of the page on exactness that explain a rule."""
    return {title: text for title, text in sections("exactness.md").items() if "![" in text}


def test_every_rule_of_the_table_has_its_section() -> None:
    (table,) = (text for text in sections("exactness.md").values() if text.count("](#") > 5)
    linked = set(re.findall(r"\]\(#([\w-]+)\)", table))
    assert linked == {slug(title) for title in rules()}


@pytest.mark.parametrize("title", rules())
def test_a_rule_has_a_drawing_and_an_example_that_checks_it(title: str) -> None:
    text = rules()[title]
    code = "".join(block.text for block in blocks_of(text) if block.language == "python")
    assert "images/rules/" in text and ("assert " in code or "refusal(" in code)


def test_every_pair_of_forms_that_a_rule_composes_is_told() -> None:
    text = read("exactness.md")
    for second, first in RULES:
        assert f"| {first.__name__} | {second.__name__} |" in text


def named_pictures() -> set[str]:
    links = [((DOCS / page).parent / link).resolve() for page in PAGES for link in links_of(page)]
    return {link.relative_to(DOCS).as_posix() for link in links if link.suffix in (".svg", ".png")}


def test_the_drawings_are_those_that_the_pages_show(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    script = [sys.executable, str(DOCS / "drawings.py"), str(tmp_path)]
    subprocess.run(script, check=True, cwd=tmp_path, capture_output=True)
    drawn = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.svg")}
    kept = {path.relative_to(DOCS / "images").as_posix() for path in DOCS.rglob("*.svg")}
    assert drawn == kept
    assert drawn == {
        name.removeprefix("images/") for name in named_pictures() if name.endswith(".svg")
    }
    for name in drawn:
        assert "dc:date" not in (tmp_path / name).read_text(), "it would change with every run"
