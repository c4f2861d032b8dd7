"""The launchers on numpy arrays; mirrors runner.cpp. Half types travel as their bits, in uint16."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

STORAGE: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float16": np.dtype(np.uint16),
    "bfloat16": np.dtype(np.uint16),
}
_DTYPES = list(STORAGE)  # in the order of enum DType


@dataclass(frozen=True)
class Schedule:
    """How a grid is run: see shim/grid.h."""

    order: str = "forward"
    seed: int = 0
    most_blocks: int = 0
    without_barrier: int = 0
    capability: int = 8
    shared_bytes: int = 99 * 1024


@dataclass(frozen=True)
class Problem:
    """A geometry in full, as Geometry.op_arguments has it, and a block of its rows."""

    weight_size: tuple[int, ...]
    input_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool
    output_padding: tuple[int, ...]
    padding_mode: str
    rows: tuple[int, int]
    cols: int
    dtype: str

    @property
    def storage(self) -> np.dtype:
        return STORAGE[self.dtype]


class _CProblem(ctypes.Structure):
    _fields_ = (
        ("axes", ctypes.c_int64),
        *(
            (name, ctypes.POINTER(ctypes.c_int64))
            for name in ("weight_size", "input_size", "stride", "padding", "dilation")
        ),
        ("groups", ctypes.c_int64),
        ("transposed", ctypes.c_int64),
        ("output_padding", ctypes.POINTER(ctypes.c_int64)),
        ("padding_mode", ctypes.c_char_p),
        ("row_start", ctypes.c_int64),
        ("row_stop", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
    )


def _ints(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def _c_problem(problem: Problem) -> _CProblem:
    return _CProblem(
        len(problem.input_size),
        _ints(problem.weight_size),
        _ints(problem.input_size),
        _ints(problem.stride),
        _ints(problem.padding),
        _ints(problem.dilation),
        problem.groups,
        problem.transposed,
        _ints(problem.output_padding),
        problem.padding_mode.encode(),
        *problem.rows,
        _DTYPES.index(problem.dtype),
    )


def _pointer(array: np.ndarray | None) -> ctypes.c_void_p:
    assert array is None or array.flags.c_contiguous
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


class KernelError(RuntimeError):
    """What a launcher or the shim complained about; `outputs` is what the kernels left behind."""

    def __init__(self, message: str, outputs: tuple[np.ndarray, ...]) -> None:
        super().__init__(message)
        self.outputs = outputs


class Kernels:
    """A library that build.py made."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        for name in (
            "conv_to_affine",
            "conv_to_affine_backward",
            "conv_to_csr",
            "conv_to_csr_backward",
            "fuse_conv_linear",
            "planted",
        ):
            getattr(self._library, name).restype = ctypes.c_char_p

    def conv_to_affine(
        self, schedule: Schedule, problem: Problem, weight: np.ndarray, bias: np.ndarray | None
    ) -> tuple[np.ndarray, ...]:
        """Returns (matrix, offset)."""
        rows = problem.rows[1] - problem.rows[0]
        outputs = (
            np.zeros((rows, problem.cols), problem.storage),
            np.zeros(rows, problem.storage),
        )
        inputs = (_pointer(weight), _pointer(bias))
        return self._call("conv_to_affine", schedule, _c_problem(problem), inputs, outputs)

    def conv_to_affine_backward(
        self, schedule: Schedule, problem: Problem, grad_matrix: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Returns (grad_weight,)."""
        outputs = (np.zeros(problem.weight_size, problem.storage),)
        inputs = (_pointer(grad_matrix),)
        return self._call("conv_to_affine_backward", schedule, _c_problem(problem), inputs, outputs)

    def conv_to_csr(
        self,
        schedule: Schedule,
        problem: Problem,
        weight: np.ndarray,
        stored: int,
        index32: bool,
    ) -> tuple[np.ndarray, ...]:
        """Returns (values, columns, row_pointers)."""
        rows = problem.rows[1] - problem.rows[0]
        index = np.int32 if index32 else np.int64
        outputs = (
            np.zeros(stored, problem.storage),
            np.zeros(stored, index),
            np.zeros(rows + 1, index),
        )
        inputs = (ctypes.c_int64(index32), _pointer(weight))
        return self._call("conv_to_csr", schedule, _c_problem(problem), inputs, outputs)

    def conv_to_csr_backward(
        self, schedule: Schedule, problem: Problem, grad_values: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Returns (grad_weight,)."""
        outputs = (np.zeros(problem.weight_size, problem.storage),)
        inputs = (_pointer(grad_values),)
        return self._call("conv_to_csr_backward", schedule, _c_problem(problem), inputs, outputs)

    def fuse_conv_linear(
        self,
        schedule: Schedule,
        problem: Problem,
        way: str,
        conv_weight: np.ndarray,
        conv_bias: np.ndarray | None,
        linear_weight: np.ndarray,
        linear_bias: np.ndarray | None,
    ) -> tuple[np.ndarray, ...]:
        """Returns (weight, bias); "auto" and the packed ways make the bias."""
        features = len(linear_weight)
        outputs = (
            np.zeros((features, problem.cols), problem.storage),
            np.zeros(features, problem.storage),
        )
        operands = (conv_weight, conv_bias, linear_weight, linear_bias)
        inputs = (
            ctypes.c_char_p(way.encode()),
            ctypes.c_int64(features),
            *map(_pointer, operands),
        )
        return self._call("fuse_conv_linear", schedule, _c_problem(problem), inputs, outputs)

    def planted(self, schedule: Schedule, name: str, values: np.ndarray) -> tuple[np.ndarray, ...]:
        """Runs a kernel of planted/ on float32 values; returns (out,)."""
        outputs = (np.zeros_like(values),)
        inputs = (ctypes.c_int64(values.size), _pointer(values))
        return self._call("planted", schedule, ctypes.c_char_p(name.encode()), inputs, outputs)

    def widen(self, dtype: str, bits: np.ndarray) -> np.ndarray:
        """Converts bits of a half type to float32."""
        wide = np.zeros(bits.shape, np.float32)
        self._library.widen(
            _DTYPES.index(dtype), _pointer(bits), _pointer(wide), ctypes.c_int64(bits.size)
        )
        return wide

    def narrow(self, dtype: str, values: np.ndarray) -> np.ndarray:
        """Rounds float32 to the bits of a half type."""
        bits = np.zeros(values.shape, np.uint16)
        self._library.narrow(
            _DTYPES.index(dtype), _pointer(values), _pointer(bits), ctypes.c_int64(bits.size)
        )
        return bits

    def _call(
        self,
        name: str,
        schedule: Schedule,
        what: _CProblem | ctypes.c_char_p,
        inputs: tuple[ctypes.c_void_p | ctypes.c_int64 | ctypes.c_char_p, ...],
        outputs: tuple[np.ndarray, ...],
    ) -> tuple[np.ndarray, ...]:
        self._library.set_schedule(
            ("forward", "reverse", "shuffle").index(schedule.order),
            ctypes.c_uint64(schedule.seed),
            schedule.most_blocks,
            schedule.without_barrier,
            schedule.capability,
            schedule.shared_bytes,
        )
        first = ctypes.byref(what) if isinstance(what, _CProblem) else what
        message = getattr(self._library, name)(first, *inputs, *map(_pointer, outputs))
        if message is not None:
            raise KernelError(message.decode(), outputs)
        return outputs
