"""Tensors of every kind: the result of the plain call, or an error that names op and argument."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from every_op import BY_NAME, OPS, Op, Operands, bits, make_operands, parts, same_bits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from linfuse_ext import _C, functional

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
]

IMAGE = (5, 4)
all_ops = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


class Plain(Tensor):
    """A subclass with nothing of its own."""


class Watched(Tensor):
    """One that sees every function."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), keywords=None):
        return super().__torch_function__(function, types, arguments, keywords or {})


class Wrapper(Tensor):
    """One that holds another tensor, and has no memory itself."""

    @staticmethod
    def __new__(cls, held):
        return Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        def unwrap(value):
            return value.held if isinstance(value, Wrapper) else value

        made = function(*tree_map(unwrap, arguments), **tree_map(unwrap, keywords or {}))
        return tree_map(lambda value: Wrapper(value) if _is_plain(value) else value, made)


def _is_plain(value: Any) -> bool:
    return type(value) is Tensor and value.layout == torch.strided


def spread(tensor: Tensor) -> Tensor:
    """The same values, not next to each other."""
    wide = torch.full((*(2 * n for n in tensor.shape),), torch.nan, dtype=tensor.dtype)
    view = wide[tuple(slice(1, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def shifted(tensor: Tensor) -> Tensor:
    """The same values, one element behind where a vector would begin."""
    flat = torch.full((tensor.numel() + 1,), torch.nan, dtype=tensor.dtype)
    return flat[1:].copy_(tensor.flatten()).view(tensor.shape)


def misaligned(tensor: Tensor) -> Tensor:
    """The same values, at an address that is no multiple of the element's size."""
    if _C.build_info()["instrument"] == "sanitize":
        pytest.skip("our processors read it, as torch's own kernels do, but C++ promises nothing")
    size = tensor.numel() * tensor.element_size()
    memory = bytearray(size + 1)
    view = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=1)
    return view.copy_(tensor.flatten()).view(tensor.shape)


def negated(tensor: Tensor) -> Tensor:
    view = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert view.is_neg()
    return view


def turned(tensor: Tensor) -> Tensor:
    """The same values, the dimensions in memory the other way round."""
    order = list(range(tensor.dim()))[::-1]
    return tensor.permute(order).contiguous().permute(order)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def in_inference(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


SAME: dict[str, Callable[[Tensor], Tensor]] = {
    "spread": spread,
    "shifted": shifted,
    "misaligned": misaligned,
    "turned": turned,
    "flipped": lambda t: t.flip(0).flip(0),
    "channels last": channels_last,
    "negated": negated,
    "real part of a conjugate": lambda t: torch.complex(t, t).conj().real,
    "imaginary part": lambda t: torch.complex(t, t).imag,
    "inference": in_inference,
    "parameter": torch.nn.Parameter,
    "buffer": torch.nn.Buffer,
    "data of a parameter": lambda t: torch.nn.Parameter(t).data,
    "wants gradients": lambda t: t.clone().requires_grad_(),
    "result with a graph": lambda t: t.clone().requires_grad_() * 1,
    "subclass": lambda t: t.as_subclass(Plain),
    "watched": lambda t: t.as_subclass(Watched),
    "wrapper": Wrapper,
    "numpy's memory": lambda t: torch.from_numpy(t.numpy().copy()),
    "memory of several processes": lambda t: t.clone().share_memory_(),
}


def plain(tensor: Tensor) -> Tensor:
    tensor = tensor.held if isinstance(tensor, Wrapper) else tensor
    return tensor.detach().as_subclass(Tensor)


@all_ops
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", SAME)
def test_the_same_values_in_another_guise(name: str, grad: bool, op: Op) -> None:
    operands = make_operands()
    with torch.set_grad_enabled(grad):
        right = op(operands, IMAGE)
        dressed = {key: SAME[name](tensor) for key, tensor in operands.items()}
        before = {key: bits(plain(tensor)).clone() for key, tensor in dressed.items()}
        versions = {key: version(tensor) for key, tensor in dressed.items()}
        made = op(dressed, IMAGE)
    if name in ("wants gradients", "result with a graph") and grad and op.name == "fuse_conv_conv":
        for ours, exact in zip(made, right, strict=True):  # torch's convolution computes it
            assert torch.allclose(plain(ours), exact, rtol=1e-5, atol=1e-5)
    else:
        assert same_bits([plain(part) for part in made], right)
    if not grad:
        assert not any(part.requires_grad for part in made)
    for key, tensor in dressed.items():
        assert torch.equal(bits(plain(tensor)), before[key]), f"{key} was changed"
        assert version(tensor) == versions[key]


def version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


@all_ops
def test_one_operand_in_another_guise(op: Op) -> None:
    """Each alone, so that operands of several kinds meet."""
    operands = make_operands()
    right = op(operands, IMAGE)
    for key in op.operands:
        for name in ("spread", "turned", "negated", "inference", "subclass", "watched", "wrapper"):
            made = op(operands | {key: SAME[name](operands[key])}, IMAGE)
            assert same_bits([plain(part) for part in made], right), (key, name)


@all_ops
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_in_another_guise(op: Op, dtype: torch.dtype) -> None:
    operands = make_operands(dtype=dtype)
    right = op(operands, IMAGE)
    for dress in (spread, shifted, misaligned, turned):
        assert same_bits(op({k: dress(t) for k, t in operands.items()}, IMAGE), right)


@all_ops
def test_elements_that_share_their_memory(op: Op) -> None:
    """Expanded, overlapping, and one tensor in two places."""
    operands = make_operands(channels=2, features=3)
    shared: Operands = {}
    for key, tensor in operands.items():
        memory = torch.randn(tensor.numel() + 1, generator=torch.Generator().manual_seed(3))
        shared[key] = memory.as_strided(tensor.shape, [1] * tensor.dim())  # neighbours overlap
    copies = {
        key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in shared.items()
    }
    assert same_bits(op(shared, IMAGE), op(copies, IMAGE))
    expanded = {key: torch.tensor(0.5).expand(tensor.shape) for key, tensor in operands.items()}
    assert all(set(tensor.stride()) == {0} for tensor in expanded.values())
    full = {key: torch.full(tensor.shape, 0.5) for key, tensor in operands.items()}
    assert same_bits(op(expanded, IMAGE), op(full, IMAGE))


@all_ops
def test_results_are_fresh(op: Op) -> None:
    """Contiguous, and none shares memory with an operand or another result."""
    operands = make_operands()
    made = op(operands, IMAGE)
    if op.name != "diagonals":  # these are rows of one tensor
        taken = [part.untyped_storage().data_ptr() for part in made if part.numel()]
        assert len(set(taken)) == len(taken) or op.name == "coo"  # its indices are one tensor
    before = [part.clone() for part in made]
    for tensor in operands.values():
        tensor.data.fill_(7.0)
    assert same_bits(made, before)
    for part in made:
        if op.name != "coo":
            assert part.is_contiguous()
        part.data.zero_()
    assert all((tensor == 7).all() for tensor in operands.values())


# Nothing to compute -------------------------------------------------------------------------------


def test_sizes_of_zero_where_they_mean_something() -> None:
    operands = make_operands()
    cols = operands["behind"].shape[1]
    none = {"behind": torch.ones(0, cols), "behind_bias": torch.ones(0)}
    weight, bias = BY_NAME["fuse_conv_linear"](operands | none, IMAGE)
    assert weight.shape == (0, cols) and bias.shape == (0,)
    weight, bias = BY_NAME["fuse_linear_conv"](operands | {"before": torch.ones(cols, 0)}, IMAGE)
    right = BY_NAME["fuse_linear_conv"](operands, IMAGE)[1]
    assert weight.shape == (cols, 0) and same_bits([bias], [right])
    for layout in (torch.strided, torch.sparse_csr, torch.sparse_coo):
        matrix, offset = functional.conv_to_affine(
            operands["weight"], operands["bias"], IMAGE, rows=(3, 3), layout=layout
        )
        assert matrix.shape == (0, cols) and offset.shape == (0,)


@all_ops
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_an_empty_kernel_is_refused(op: Op, dim: int) -> None:
    operands = make_operands()
    operands["weight"] = operands["weight"].narrow(dim, 0, 0)
    with pytest.raises(ValueError, match=rf"^{op.says}.*weight must have no empty dimension"):
        op(operands, IMAGE)


@pytest.mark.parametrize(
    "name", ["dense", "fuse_conv_linear", "fuse_linear_conv", "fuse_conv_conv"]
)
def test_an_empty_batch(name: str) -> None:
    op, operands = BY_NAME[name], make_operands()
    right = op(operands, IMAGE)
    batched = torch.ones(0, *operands["weight"].shape)
    made = torch.vmap(lambda weight: tuple(op(operands | {"weight": weight}, IMAGE)))(batched)
    assert [part.shape for part in made] == [(0, *part.shape) for part in right]


# Tensors without values ---------------------------------------------------------------------------


@all_ops
def test_on_the_meta_device(op: Op) -> None:
    """Shapes and dtypes without values, or an error of ours."""
    operands = make_operands()
    right = op(operands, IMAGE)
    try:
        made = op({key: tensor.to("meta") for key, tensor in operands.items()}, IMAGE)
    except (ValueError, TypeError) as error:
        assert str(error).startswith(f"{op.says}: `weight`")
        return
    assert all(part.is_meta for part in made)
    assert [(p.shape, p.dtype) for p in made] == [(p.shape, p.dtype) for p in right]


@all_ops
def test_fake_tensors(op: Op, caplog) -> None:
    operands = make_operands()
    right = op(operands, IMAGE)
    with FakeTensorMode() as mode:
        try:
            made = op({key: mode.from_tensor(each) for key, each in operands.items()}, IMAGE)
        except (ValueError, TypeError) as error:
            assert str(error).startswith(f"{op.says}: `weight`")
            return
    assert [(p.shape, p.dtype) for p in made] == [(p.shape, p.dtype) for p in right]


@all_ops
def test_operands_on_two_devices(op: Op) -> None:
    operands = make_operands()
    for key in op.operands:
        for others, one in (("cpu", "meta"), ("meta", "cpu")):
            mixed = {name: tensor.to(others) for name, tensor in operands.items()}
            mixed[key] = operands[key].to(one)
            with pytest.raises(ValueError, match=rf"^{op.says}: `\w+` must be on the device of"):
                op(mixed, IMAGE)


@pytest.mark.parametrize("op", [o for o in OPS if o.name != "diagonals"], ids=lambda o: o.name)
def test_tensors_of_functionalize(op: Op) -> None:
    operands = make_operands()
    right = op(operands, IMAGE)

    def call(weight: Tensor) -> tuple[Tensor, ...]:
        if op.name in ("csr", "coo"):
            flat = torch.ops.linfuse.conv_to_csr(weight, list(IMAGE), padding=[1])
            return (flat[0],)
        return tuple(op(operands | {"weight": weight}, IMAGE))

    made = torch.func.functionalize(call)(operands["weight"])
    values = [part for part in right if part.is_floating_point()]
    assert same_bits(list(made)[:1], values[:1])


# What is refused ----------------------------------------------------------------------------------

REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "complex": lambda t: torch.complex(t, t),
    "conjugated": lambda t: torch.complex(t, t).conj(),
    "int": lambda t: t.int(),
    "bool": lambda t: t.bool(),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "coo": lambda t: t.to_sparse(),
    "csr": lambda t: t.reshape(t.shape[0], -1).to_sparse_csr(),
    "mkldnn": lambda t: t.to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor([t]),
    "jagged": lambda t: torch.nested.nested_tensor([t], layout=torch.jagged),
    "numpy": lambda t: t.numpy(),
    "list": lambda t: t.tolist(),
    "another dtype": lambda t: t.double(),
    "half": lambda t: t.half(),
}


ARGUMENTS = {
    "conv_to_affine": ("weight", "bias"),
    "conv_to_diagonals": ("weight", "bias"),
    "fuse_conv_linear": ("conv_weight", "conv_bias", "linear_weight", "linear_bias"),
    "fuse_linear_conv": ("linear_weight", "linear_bias", "conv_weight", "conv_bias"),
    "fuse_conv_conv": ("first_weight", "first_bias", "second_weight", "second_bias"),
}


@all_ops
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_op_and_argument(name: str, op: Op) -> None:
    """Each operand in turn, whatever the others are."""
    operands = make_operands()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrong = {key: REFUSED[name](operands[key]) for key in op.operands}
    before = {key: bits(tensor).clone() for key, tensor in operands.items()}
    for key in op.operands:
        with pytest.raises((TypeError, ValueError), match=rf"^{op.says}: `\w+` must") as caught:
            op(operands | {key: wrong[key]}, IMAGE)
        named = str(caught.value).split("`")[1]
        argument = ARGUMENTS[op.says][op.operands.index(key)]
        # Where two good dtypes differ it may be the other that is named.
        assert named == argument or name in ("another dtype", "half"), caught.value
    assert all(torch.equal(bits(operands[key]), value) for key, value in before.items())


def test_parts_of_a_result_are_all_there() -> None:
    """The table compares what a user gets."""
    found = {op.name: len(parts(op.call(*(make_operands()[k] for k in op.operands), IMAGE)))
             for op in OPS}  # fmt: skip
    assert found["dense"] == 2 and found["csr"] == 4 and found["coo"] == 3
    assert found["diagonals"] > 10
