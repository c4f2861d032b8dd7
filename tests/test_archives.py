"""Archives from strangers: nothing in them is run, and what is wrong with them fills one line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export
from torch.export.pt2_archive import PT2ArchiveWriter

from linfuse_ext.__main__ import main
from linfuse_ext.cli.archive_text import ArchiveError, check_graph
from linfuse_ext.cli.archives import Program, load_program, save_program


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.head = nn.Linear(18, 3)
        self.register_buffer("shift", torch.ones(3), persistent=False)  # a constant of the archive

    def forward(self, x, extra):
        y = self.head(self.conv(x).flatten(1)) + self.shift
        return {"y": y * extra["scale"], "n": [x.shape[0] * 2]}


INPUTS = (torch.randn(2, 1, 5, 5), {"scale": torch.ones(1)})
SHAPES = {"x": {0: Dim("batch", max=64)}, "extra": {"scale": None}}


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    return export(Net().eval(), INPUTS, dynamic_shapes=SHAPES)


@pytest.fixture(scope="module")
def members(program: ExportedProgram) -> dict[str, bytes]:
    """Of a good archive, by name."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"note.txt": "as it was"})
    with zipfile.ZipFile(buffer) as archive:
        found = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    # torch's writer adds these itself.
    return {name: data for name, data in found.items() if "/" in name and name[0] != "."}


def write(path: Path, members: dict[str, bytes]) -> Path:
    with PT2ArchiveWriter(str(path)) as writer:
        for name, data in members.items():
            writer.write_bytes(name, data)
    return path


def with_graph(members: dict[str, bytes], change: Callable[[Any], None]) -> dict[str, bytes]:
    graph = json.loads(members["models/model.json"])
    change(graph)
    return members | {"models/model.json": json.dumps(graph).encode()}


def test_a_good_archive_comes_and_goes_as_it_is(program, members, tmp_path: Path) -> None:
    loaded = load_program(write(tmp_path / "m.pt2", members))
    assert loaded.extra_files == {"note.txt": "as it was"}
    with (tmp_path / "again.pt2").open("wb") as file:
        save_program(file, loaded)
    again = load_program(tmp_path / "again.pt2")
    assert again.extra_files == loaded.extra_files
    x = torch.randn(7, 1, 5, 5)
    expected = program.module()(x, {"scale": torch.full((1,), 2.0)})
    for found in (loaded, again):
        result = found.exported.module()(x, {"scale": torch.full((1,), 2.0)})
        assert torch.equal(result["y"], expected["y"]) and result["n"] == [14]


class Sizes(nn.Module):
    """Symbolic sums, guards, assertions, control flow, an equation."""

    def forward(self, x, y, mode: str = "none"):
        if x.shape[0] % 2 == 0:
            x = x + 1
        count = y.sum().to(torch.int64).item()
        torch._check(count >= 2)
        torch._check(count < 50)
        x = x.reshape(x.shape[0] // 2, -1)[: max(3, x.shape[0] // 3)]
        with torch.no_grad():
            y = torch.einsum("...i,ij->...j", y, torch.ones(4, 4))
        y = torch.cond(y.sum() > 0, lambda v: v + 1, lambda v: v - 1, (y,))
        return nn.functional.gelu(x, approximate=mode), (y, torch.zeros(count))


@pytest.mark.parametrize("strict", [False, True])
def test_all_that_torch_itself_writes_is_read(strict: bool, tmp_path: Path) -> None:
    x = torch.ones(8, 4)
    shapes = {"x": {0: Dim.AUTO}, "y": {0: Dim.AUTO}, "mode": None}
    exported = export(Sizes().eval(), (x, x, "tanh"), dynamic_shapes=shapes, strict=strict)
    assert exported._guards_code, "there are guards to be read"
    torch.export.save(exported, tmp_path / "m.pt2")
    loaded = load_program(tmp_path / "m.pt2").exported
    expected, found = (each.module()(x, x, "tanh") for each in (exported, loaded))
    torch.testing.assert_close(found, expected)


def legacy(program: ExportedProgram, members: dict[str, bytes]) -> dict[str, bytes]:
    """As torch 2.8 wrote it: weights and constants each a pickle."""
    from torch._export.serde.serialize import serialize

    whole = serialize(program)
    kept = {name: data for name, data in members.items() if "/weights/" not in name}
    kept = {name: data for name, data in kept.items() if "/constants/" not in name}
    return kept | {
        "data/weights/model.pt": whole.state_dict,
        "data/constants/model.pt": whole.constants,
    }


def test_archives_of_older_releases_are_read(program, members, tmp_path: Path) -> None:
    loaded = load_program(write(tmp_path / "m.pt2", legacy(program, members)))
    assert torch.equal(loaded.exported.state_dict["conv.weight"], program.state_dict["conv.weight"])


# What would be run -------------------------------------------------------------------------------


class Planted:
    """Pickled, it makes a folder when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def torch_pickle(mark: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save((Planted(mark),), buffer)
    return buffer.getvalue()


def edit_config(members: dict[str, bytes], kind: str, tensor: str, **values: Any):
    name = f"data/{kind}/model_{kind}_config.json"
    config = json.loads(members[name])
    config["config"][tensor].update(values)
    return members | {name: json.dumps(config).encode()}


def in_example_inputs(program, members, mark):
    return members | {"data/sample_inputs/model.pt": torch_pickle(mark)}


def in_example_inputs_of_old_format(program, members, mark):
    buffer = io.BytesIO()
    torch.save((Planted(mark),), buffer, _use_new_zipfile_serialization=False)
    return members | {"data/sample_inputs/model.pt": buffer.getvalue()}


def in_bare_example_inputs(program, members, mark):
    return members | {"data/sample_inputs/model.pt": pickle.dumps((Planted(mark),))}


def in_a_weight(program, members, mark):
    changed = edit_config(members, "weights", "conv.weight", use_pickle=True)
    return changed | {"data/weights/weight_0": torch_pickle(mark)}


def in_a_constant(program, members, mark):
    changed = edit_config(members, "constants", "shift", use_pickle=True)
    return changed | {"data/constants/tensor_0": torch_pickle(mark)}


def in_an_opaque_object(program, members, mark):
    changed = edit_config(members, "constants", "shift", path_name="opaque_obj_0")
    return changed | {"data/constants/opaque_obj_0": pickle.dumps(Planted(mark))}


def in_an_opaque_object_of_another_name(program, members, mark):
    """Behind the name of an extra file."""
    path = "../../extra/opaque_obj_0"
    changed = edit_config(members, "constants", "shift", path_name=path)
    return changed | {"extra/opaque_obj_0": pickle.dumps(Planted(mark))}


def in_a_custom_object(program, members, mark):
    changed = edit_config(members, "constants", "shift", path_name="custom_obj_0")
    return changed | {"data/constants/custom_obj_0": torch_pickle(mark)}


def in_all_weights(program, members, mark):
    return legacy(program, members) | {"data/weights/model.pt": torch_pickle(mark)}


def in_all_constants(program, members, mark):
    return legacy(program, members) | {"data/constants/model.pt": torch_pickle(mark)}


def in_all_weights_beside_good_ones(program, members, mark):
    return members | {"data/weights/model.pt": torch_pickle(mark)}


PICKLES = [
    in_example_inputs,
    in_example_inputs_of_old_format,
    in_bare_example_inputs,
    in_a_weight,
    in_a_constant,
    in_an_opaque_object,
    in_an_opaque_object_of_another_name,
    in_a_custom_object,
    in_all_weights,
    in_all_constants,
    in_all_weights_beside_good_ones,
]


def code(mark: Path) -> str:
    return f"__import__('os').mkdir('{mark}')"


def signature(graph: Any) -> Any:
    return graph["graph_module"]["module_call_graph"][0]["signature"]


def in_a_size(graph, mark):
    for meta in graph["graph_module"]["graph"]["tensor_values"].values():
        for size in meta["sizes"]:
            if "as_expr" in size:
                size["as_expr"]["expr_str"] = code(mark)


def in_a_symbol(graph, mark):
    in_a_size(graph, mark)
    text = json.dumps(graph).replace(code(mark), f"Symbol('s0', positive={code(mark)})")
    graph.update(json.loads(text))


def in_a_guard(graph, mark):
    graph["guards_code"] = [f"{code(mark)} is None"]


def in_a_guard_behind_a_key(graph, mark):
    graph["guards_code"] = [f"L['x\\' + {code(mark)} + \\'']"]


def in_an_operator(graph, mark):
    graph["verifiers"] = []
    node = json.loads(json.dumps(graph["graph_module"]["graph"]["nodes"][-1]))
    argument = {"name": "", "arg": {"as_string": str(mark)}, "kind": 1}
    node.update(target="torch.os.mkdir", inputs=[argument], outputs=[], name="made")
    graph["graph_module"]["graph"]["nodes"].insert(0, node)


def in_a_library(graph, mark):
    in_an_operator(graph, mark)
    graph["graph_module"]["graph"]["nodes"][0]["target"] = "torch.ops.load_library"


def in_an_operator_on_files(graph, mark):
    in_an_operator(graph, mark)
    graph["graph_module"]["graph"]["nodes"][0]["target"] = "torch.ops.aten.from_file.default"


def in_an_operator_of_torchscript(graph, mark):
    in_an_operator(graph, mark)
    graph["graph_module"]["graph"]["nodes"][0]["target"] = "torch.ops.aten.save.default"


def in_an_operator_that_is_an_argument(graph, mark):
    graph["graph_module"]["graph"]["nodes"][0]["inputs"][0]["arg"] = {
        "as_operator": "torch.os.system"
    }


def in_a_name(graph, mark):
    text = json.dumps(graph).replace('"x"', json.dumps(f"x={code(mark)}"))
    graph.update(json.loads(text))


def in_an_argument(graph, mark):
    signature(graph)["forward_arg_names"] = ["x", f"extra={code(mark)}"]


def in_a_parameter(graph, mark):
    for spec in graph["graph_module"]["signature"]["input_specs"]:
        if "parameter" in spec:
            spec["parameter"]["parameter_name"] = f'conv"), {code(mark)}, ("'


def in_an_inner_name(graph, mark):
    for spec in graph["graph_module"]["signature"]["input_specs"]:
        if "parameter" in spec:
            spec["parameter"]["parameter_name"] = "__class__.__init__"


def in_an_input_that_is_a_string(graph, mark):
    graph["graph_module"]["graph"]["inputs"][0] = {"as_string": f"' or {code(mark)} or '"}


def in_a_key(graph, mark):
    key = f'a" + str({code(mark)}) + "b'
    spec = json.loads(signature(graph)["in_spec"])
    spec[1]["children_spec"][0]["children_spec"][1]["context"] = json.dumps([key])
    signature(graph)["in_spec"] = json.dumps(spec)


def in_an_enum(graph, mark):
    spec = json.loads(signature(graph)["out_spec"])
    spec[1]["context"] = json.dumps({"__enum__": True, "fqn": "antigravity:fly", "name": "a"})
    signature(graph)["out_spec"] = json.dumps(spec)


def in_the_factory_of_a_dict(graph, mark):
    factory = {"default_factory_module": "antigravity", "default_factory_name": "geohash"}
    spec = json.loads(signature(graph)["out_spec"])
    spec[1].update(type="collections.defaultdict", context=factory | {"dict_context": "[]"})
    signature(graph)["out_spec"] = json.dumps(spec)


def in_a_custom_input(graph, mark):
    graph["graph_module"]["graph"]["custom_obj_values"] = {"x": {"name": "x", "class_fqn": "a.b"}}


def in_a_text_for_the_terminal(graph, mark):
    node = graph["graph_module"]["graph"]["nodes"][0]
    node["metadata"]["nn_module_stack"] = "L__self__,\x1b]0;owned\x07,Net"


def in_the_name_of_a_module(graph, mark):
    """A merged layer has the names of those that it replaces."""
    for node in graph["graph_module"]["graph"]["nodes"]:
        metadata = node["metadata"]
        name = f'conv"), {code(mark)}, ("'
        metadata["nn_module_stack"] = f"L__self__,,Net;a,{name},torch.nn.modules.conv.Conv2d"


TEXTS = [
    in_a_size,
    in_a_symbol,
    in_a_guard,
    in_a_guard_behind_a_key,
    in_an_operator,
    in_a_library,
    in_an_operator_on_files,
    in_an_operator_of_torchscript,
    in_an_operator_that_is_an_argument,
    in_a_name,
    in_an_argument,
    in_a_parameter,
    in_an_inner_name,
    in_an_input_that_is_a_string,
    in_a_key,
    in_an_enum,
    in_the_factory_of_a_dict,
    in_a_custom_input,
    in_a_text_for_the_terminal,
    in_the_name_of_a_module,
]


def in_a_key_of_the_example(program, members, mark):
    """Loaded as plain data, it would end a string of a guard's message, which is code."""
    key = f'a" + str({code(mark)}) + "b'
    buffer = io.BytesIO()
    torch.save(((INPUTS[0], {key: INPUTS[1]["scale"]}), {}), buffer)
    return members | {"data/sample_inputs/model.pt": buffer.getvalue()}


def in_compiled_code(program, members, mark):
    return members | {"data/aotinductor/model/model.so": b"\x7fELF"}


PLANTS = {
    **{plant.__name__: plant for plant in (*PICKLES, in_a_key_of_the_example, in_compiled_code)},
    **{
        plant.__name__: lambda program, members, mark, plant=plant: with_graph(
            members, lambda graph: plant(graph, mark)
        )
        for plant in TEXTS
    },
}


@pytest.fixture
def refused(tmp_path: Path, capsys) -> Iterator[Callable[[Path], str]]:
    """Runs both commands on an archive: they fail with one line, which is returned."""

    def run(path: Path) -> str:
        lines = set()
        for command in (
            ["collapse", str(path), "-o", str(tmp_path / "out.pt2")],
            ["matrix", str(path), "--list"],
        ):
            assert main(command) == 1
            captured = capsys.readouterr()
            assert captured.out == "" and not (tmp_path / "out.pt2").exists()
            lines.add(captured.err)
        (line,) = lines
        start = f"linfuse: {path} is not loaded: "
        assert line.startswith(start) and line.endswith("\n") and line.count("\n") == 1
        assert line[:-1].isprintable()
        return line[len(start) : -1]

    yield run


@pytest.mark.parametrize("name", PLANTS)
def test_nothing_planted_is_run(name: str, program, members, tmp_path: Path, refused) -> None:
    mark = tmp_path / "planted"
    path = write(tmp_path / "m.pt2", PLANTS[name](program, members, mark))
    before = set(sys.modules)
    message = refused(path)
    assert not mark.exists()
    assert "antigravity" not in set(sys.modules) - before
    assert not message.startswith("it cannot be read"), "it is recognised, not stumbled over"


@pytest.mark.parametrize("name", ["in_example_inputs", "in_a_weight", "in_a_size", "in_a_guard"])
def test_torch_itself_would_run_it(name: str, program, members, tmp_path: Path) -> None:
    """Or else the plants would show nothing."""
    mark = tmp_path / "planted"
    path = write(tmp_path / "m.pt2", PLANTS[name](program, members, mark))
    with contextlib.suppress(Exception):
        torch.export.load(path).module()(*INPUTS)
    if not mark.exists():
        pytest.skip("this torch runs it no more")


@pytest.mark.parametrize("plant", PICKLES, ids=lambda plant: plant.__name__)
def test_the_planted_pickles_are_alive(plant, program, members, tmp_path: Path) -> None:
    mark = tmp_path / "planted"
    changed = plant(program, members, mark)
    (data,) = (data for name, data in changed.items() if b"posix" in data and b"mkdir" in data)
    with contextlib.suppress(Exception):
        torch.load(io.BytesIO(data), weights_only=False)
    if not mark.exists():
        pickle.loads(data)
    assert mark.exists()


def test_the_switch_is_forced_and_given_back(members, tmp_path: Path, monkeypatch) -> None:
    """Whatever torch's loader asks for: a pickle that gets that far is loaded as weights only."""
    from linfuse_ext.cli import archives

    mark = tmp_path / "planted"
    path = write(tmp_path / "m.pt2", in_example_inputs(None, members, mark))
    monkeypatch.setattr(archives, "_check", lambda file: None)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    with pytest.raises(ArchiveError, match="cannot be read"):
        load_program(path)
    assert not mark.exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize(
    ("expression", "verdict"),
    [
        ("Add(Mul(Integer(2), Symbol('s0', positive=True, integer=True)), Integer(-1))", None),
        ("Pow(Symbol('s0', integer=True), Integer(-2))", None),
        ("Max(1, 3 * L['x'].size()[0] ** 2)", None),
        ("2*s0 + 1", None),
        ("(L['x']['a'].size()[0] // 2) % 3 == 0 and math.floor(L['y'].size()[1]) <= 7", None),
        ("9**9**9**9", "not by a number"),
        ("Pow(Integer(9), Symbol('s0'))", "not by a number"),
        ("(9**50)**50", "too large"),
        ("Pow(Pow(Symbol('s0'), Integer(60)), Integer(60))", "too large"),
        ("LShift(Integer(1), Integer(1000000000))", "no sum or comparison"),
        ("Float('0.1', precision=1000000000000)", "no sum or comparison"),
        ("s0" + " + s0" * 10_000, "too long"),
        ("-" * 5_000 + "1", ""),
        ("(lambda: 1)()", "no sum or comparison"),
        ("L['x'].__class__", "no sum or comparison"),
        ("[s0 for s0 in L]", "no sum or comparison"),
        ("f'{s0}'", "no sum or comparison"),
        ("open", "no sum or comparison"),
        ("s0\n.real", "invalid syntax"),
        ("", "invalid syntax"),
    ],
)
def test_expressions(expression: str, verdict: str | None) -> None:
    text = json.dumps({"guards_code": [expression], "size": {"expr_str": expression}}).encode()
    if verdict is None:
        check_graph(text)
    else:
        with pytest.raises(ArchiveError, match="an expression that might be run as code") as error:
            check_graph(text)
        assert verdict in str(error.value)


FORMS = [
    *(
        ({key: "p_conv_weight"}, {key: wrong})
        for key in ("name", "as_name")
        for wrong in ("a b", 7)
    ),
    *(
        ({key: {"s0": {"min_val": 2}}}, {key: {"s 0": {}}})
        for key in ("range_constraints", "sym_bool_values", "sym_float_values", "sym_int_values")
    ),
    ({"tensor_values": {"x": {"device": {"type": "cpu"}}}}, {"tensor_values": {"torch.load": {}}}),
    ({"tensor_values": {"x": {"layout": 7}}}, {"tensor_values": {"x": {"layout": "f()"}}}),
    ({"forward_arg_names": ["x", "self_"]}, {"forward_arg_names": ["x", "*a"]}),
    ({"as_custom_obj": None}, {"as_custom_obj": {"name": "x", "class_fqn": "a"}}),
    ({"custom_obj": None}, {"custom_obj": {"arg": {}}}),
    ({"fqn": "features.0"}, {"fqn": "features.0()"}),
    ({"as_string": "...ij,jk->...ik"}, {"as_string": "it's"}),
    (
        {"name": "assert_msg", "arg": {"as_string": "failed: u0 >= 2 on node 'ge_1'"}},
        {"name": "other", "arg": {"as_string": "failed: u0 >= 2 on node 'ge_1'"}},
    ),
    (
        {"name": "assert_msg", "arg": {"as_string": "'"}},
        {"name": "assert_msg", "arg": {"as_operator": "torch.os.system"}},
    ),
    ({"target": "torch.ops.aten.conv2d.default"}, {"target": "torch.ops.aten.conv2d"}),
    ({"target": "torch.ops.aten.conv2d.padding"}, {"target": "torch.ops.aten.nothing.default"}),
    ({"target": "_operator.floordiv"}, {"target": "_operator.attrgetter"}),
    ({"target": "torch.sym_max"}, {"target": "torch.hub.load"}),
    ({"target": "torch.ops.higher_order.cond"}, {"target": "torch.ops.higher_order.print"}),
    ({"target": "torch.ops.linfuse.conv_to_affine.default"}, {"target": "torch.ops.c10d.send"}),
]


@pytest.mark.parametrize("number", range(len(FORMS)))
def test_forms(number: int) -> None:
    """Of each pair, the second is one that torch never writes."""
    good, wrong = FORMS[number]
    check_graph(json.dumps({"inner": [good]}).encode())
    with pytest.raises(ArchiveError):
        check_graph(json.dumps({"inner": [wrong]}).encode())


# What is no archive ------------------------------------------------------------------------------


def zipped(members: dict[str, bytes], **options: Any) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def good(members: dict[str, bytes]) -> dict[str, bytes]:
    head = {"m/archive_format": b"pt2", "m/archive_version": b"0", "m/.data/version": b"6\n"}
    return head | {f"m/{name}": data for name, data in members.items()}


def larger_than_itself(members: dict[str, bytes]) -> bytes:
    """The directory says 4 GB of a member of two bytes."""
    data = zipped({"m/extra/a": b"ab"})
    return data.replace(struct.pack("<II", 2, 2), struct.pack("<II", 2**32 - 2, 2**32 - 2))


def two_of_one_name(members: dict[str, bytes]) -> bytes:
    return zipped(good(members) | {"m/models/MODEL.json": b"{}"})


def torch_saved(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(2)}, buffer)
    return buffer.getvalue()


def without(members: dict[str, bytes], name: str) -> dict[str, bytes]:
    return {key: data for key, data in good(members).items() if key != f"m/{name}"}


def of_empty_weight(members: dict[str, bytes]) -> bytes:
    sizes = [{"as_int": 1 << 40}]
    meta = json.loads(members["data/weights/model_weights_config.json"])["config"]["head.bias"]
    meta["tensor_meta"].update(sizes=sizes, strides=[{"as_int": 1}])
    changed = edit_config(members, "weights", "head.bias", **meta)
    return zipped(good(changed | {f"data/weights/{meta['path_name']}": b""}))


def of_outside_weight(members: dict[str, bytes]) -> bytes:
    meta = json.loads(members["data/weights/model_weights_config.json"])["config"]["head.bias"]
    meta["tensor_meta"]["storage_offset"] = {"as_int": 1 << 20}
    return zipped(good(edit_config(members, "weights", "head.bias", **meta)))


def nested_deeply(members: dict[str, bytes]) -> bytes:
    return zipped(good(members | {"models/model.json": b"[" * 200_000}))


NO_ARCHIVES = {
    "empty": (lambda m: b"", "it is no archive of torch.export.save"),
    "text": (lambda m: b"hello\n" * 100, "it is no archive of torch.export.save"),
    "cut short": (lambda m: zipped(good(m))[:-2000], "it is cut short or damaged"),
    "cut to nearly nothing": (lambda m: zipped(good(m))[:100], "it is cut short or damaged"),
    "something before it": (lambda m: b"#!/bin/sh\n" + zipped(good(m)), ""),
    "compressed": (
        lambda m: zipped(good(m), compression=zipfile.ZIP_DEFLATED),
        "it is compressed, which torch.export.save never does",
    ),
    "bomb": (
        lambda m: zipped({"m/models/model.json": bytes(10**7)}, compression=zipfile.ZIP_DEFLATED),
        "it is compressed",
    ),
    "bomb of example inputs": (
        lambda m: zipped(
            good(
                m
                | {
                    "data/sample_inputs/model.pt": zipped(
                        {"a/data.pkl": bytes(10**7)}, compression=zipfile.ZIP_DEFLATED
                    )
                }
            )
        ),
        "of its example inputs: it is compressed",
    ),
    "larger than itself": (larger_than_itself, "its members are larger than itself"),
    "absolute": (lambda m: zipped({"/etc/passwd": b"x"}), "it has a member outside of it"),
    "above": (lambda m: zipped({"m/../../x": b"x"}), "it has a member outside of it"),
    "backslash": (lambda m: zipped({"m/..\\x": b"x"}), "it has a member outside of it"),
    "two of one name": (two_of_one_name, "it has two members of one name"),
    "two folders": (lambda m: zipped(good(m) | {"n/extra/a": b"a"}), "it is no archive"),
    "no folder": (lambda m: zipped(m), "it is no archive"),
    "something else": (
        lambda m: zipped(good(m) | {"m/data/weights/run.sh": b"x"}),
        "it has a member that torch.export.save does not write, 'data/weights/run.sh'",
    ),
    "of torch.save": (torch_saved, "it has what torch.save or torch.jit.save writes, 'data.pkl'"),
    "of torch 2.7": (
        lambda m: zipped({"m/serialized_exported_program.json": b"{}"}),
        "it has an export of torch 2.7 or older",
    ),
    "no program": (
        lambda m: zipped({"m/archive_format": b"pt2", "m/archive_version": b"0"}),
        "it must have one exported program, and has 0",
    ),
    "two programs": (
        lambda m: zipped(good(m) | {"m/models/other.json": b"{}"}),
        "it must have one exported program, and has 2",
    ),
    "without a weight": (
        lambda m: zipped(without(m, "data/weights/weight_0")),
        "the values of conv.weight are missing",
    ),
    "without weights": (
        lambda m: zipped(without(m, "data/weights/model_weights_config.json")),
        "",
    ),
    "a weight of nothing": (of_empty_weight, "elements, of which none is stored"),
    "a weight out of bounds": (of_outside_weight, "out of bounds"),
    "no JSON": (lambda m: zipped(good(m | {"models/model.json": b"\xff{"})), "it cannot be read"),
    "a JSON list": (lambda m: zipped(good(m | {"models/model.json": b"[]"})), "no JSON object"),
    "nested deeply": (nested_deeply, "RecursionError"),
}


@pytest.mark.parametrize("name", NO_ARCHIVES)
def test_what_is_no_archive(name: str, members, tmp_path: Path, refused) -> None:
    make, message = NO_ARCHIVES[name]
    path = tmp_path / "m.pt2"
    path.write_bytes(make(members))
    assert message in refused(path)


def test_damage_anywhere_is_one_line(members, tmp_path: Path) -> None:
    """Bytes changed at random: an archive as good as before, or an ArchiveError."""
    data = write(tmp_path / "m.pt2", members).read_bytes()
    chance = random.Random(0)
    refusals = 0
    for _ in range(100):
        damaged = bytearray(data)
        for _ in range(chance.choice((1, 3, 30))):
            damaged[chance.randrange(len(data))] = chance.randrange(256)
        (tmp_path / "m.pt2").write_bytes(damaged)
        try:
            load_program(tmp_path / "m.pt2")
        except ArchiveError as error:
            assert str(error).startswith(f"{tmp_path / 'm.pt2'} is not loaded: ")
            refusals += 1
    assert refusals > 50


# Writing -----------------------------------------------------------------------------------------


class FailingFile(io.BytesIO):
    """A disk that is full after so many bytes."""

    def __init__(self, room: int, error: BaseException) -> None:
        super().__init__()
        self.room, self.error = room, error

    def write(self, data: Any) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise self.error
        return super().write(data)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("room", [0, 1000, 10_000])
def test_a_write_that_fails_is_an_error(program, room: int, error: BaseException) -> None:
    """And not the end of the process, as with torch's writer alone."""
    with pytest.raises(type(error)):
        save_program(FailingFile(room, error), Program(program, {}))
