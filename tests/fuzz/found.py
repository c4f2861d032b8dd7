"""Defects that the searches found, each by its smallest call, which test_fuzz.py makes again.

A defect that is not mended yet says which calls the searches pass over, so that they go on; its own
call is expected to fail. Once it is mended that test says so, and `open_for` goes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .calls import FUNCTIONAL, OPS, Call

KNOWN = "known defects"


class Defect(NamedTuple):
    """What was wrong, and the smallest call that showed it."""

    reason: str
    valid: bool
    call: Call
    open_for: Callable[[Call, dict[str, Any]], bool] | None = None  # the calls to pass over
    seconds: float | None = None  # for a call that never ended, scaled down: what it may take


SEEDED = "generator=torch.Generator().manual_seed(0)"
DEFECTS = [
    Defect(
        "a merged weight that is not contiguous where a gradient is wanted",
        True,
        Call(
            FUNCTIONAL,
            "fuse_conv_conv",
            {
                "first_weight": "torch.ones(1, 1, 2).permute(2, 1, 0)",
                "first_bias": "None",
                "second_weight": "torch.ones(2, 1, 2, requires_grad=True)",
                "second_bias": "None",
                "second_stride": "2",
                "second_groups": "2",
                "second_transposed": "True",
            },
        ),
    ),
    Defect(
        # https://github.com/pytorch/pytorch/issues/169688, on processors that multiply bfloat16
        "torch's bfloat16 convolution is wrong where the last axis has a stride and comes to one "
        "position",
        True,
        Call(
            OPS,
            "convolve_rows",
            {
                "rows": f"torch.randn([5, 60], {SEEDED}).bfloat16()",
                "conv_weight": f"torch.randn([16, 1, 3, 1, 3], {SEEDED}).bfloat16()",
                "input_size": "[5, 4, 3]",
                "stride": "[1, 2, 2]",
            },
        ),
    ),
    Defect(
        "the op's checks are missing where a gradient is wanted, and on meta: the imaginary part "
        "is dropped, groups of 0 are divided by",
        False,
        Call(
            OPS,
            "fuse_conv_conv",
            {
                "first_weight": "torch.ones(1, 1, 1, dtype=torch.complex64)",
                "first_bias": "None",
                "second_weight": "torch.ones(1, 1, 1, requires_grad=True)",
                "second_bias": "None",
            },
        ),
    ),
    Defect(
        "the derivative in conv_bias of a Linear without rows: view(0, C, -1)",
        True,
        Call(
            FUNCTIONAL,
            "fuse_conv_linear",
            {
                "conv_weight": "torch.ones(1, 1, 1)",
                "conv_bias": "torch.ones(1, requires_grad=True)",
                "linear_weight": "torch.ones(0, 1)",
                "linear_bias": "None",
                "input_size": "1",
            },
        ),
    ),
    Defect(
        "torch's engine, which CUDA goes by, on a Linear without rows: reshape(0, C, -1)",
        True,
        Call(
            OPS,
            "fuse_conv_linear_by_torch",
            {
                "conv_weight": "torch.ones(1, 1, 1)",
                "conv_bias": "torch.ones(1)",
                "linear_weight": "torch.ones(0, 1)",
                "linear_bias": "None",
                "input_size": "[1]",
            },
        ),
    ),
    Defect(
        "a parameter without a shape yet: torch's own ValueError, which does not name the op",
        False,
        Call(
            FUNCTIONAL,
            "conv_to_affine",
            {
                "weight": "torch.nn.parameter.UninitializedParameter()",
                "bias": "None",
                "input_size": "1",
            },
        ),
    ),
    Defect(
        "a tensor on meta where a number is wanted: RuntimeError from its __index__",
        False,
        Call(
            FUNCTIONAL,
            "conv_to_affine",
            {
                "weight": "torch.ones(1, 1, 1)",
                "bias": "None",
                "input_size": "torch.tensor(2, device='meta')",
            },
        ),
    ),
    Defect(
        "numbers of fuse_conv_conv beyond 63 bits are not checked: torch's own RuntimeError",
        False,
        Call(
            FUNCTIONAL,
            "fuse_conv_conv",
            {
                "first_weight": "torch.ones(1, 1, 1)",
                "first_bias": "None",
                "second_weight": "torch.ones(1, 1, 1)",
                "second_bias": "None",
                "first_stride": "2**63",
            },
        ),
    ),
    Defect(
        "the step of a kernel of one element, which plays no part, is cut to 32 bits by torch's "
        "convolution where a gradient is wanted",
        False,  # the oracle cannot take such steps; what is asked is that it is no error of torch
        Call(
            FUNCTIONAL,
            "fuse_conv_conv",
            {
                "first_weight": "torch.ones(1, 1, 2, requires_grad=True)",
                "first_bias": "None",
                "second_weight": "torch.ones(1, 1, 1)",
                "second_bias": "None",
                "second_dilation": "2**31",
            },
        ),
    ),
    Defect(
        "a merged bias of more than 63 bits of bytes: torch's own RuntimeError",
        False,
        Call(
            FUNCTIONAL,
            "fuse_linear_linear",
            {
                "first_weight": "torch.ones(1, 1)",
                "first_bias": "None",
                "second_weight": "torch.ones(1, 1).expand(2**61, 1)",
                "second_bias": "None",
            },
        ),
    ),
    Defect(
        "a number for a matrix: IndexError, as its shape is asked for before it is checked",
        False,
        Call(
            OPS,
            "fuse_conv_linear_backward_conv",
            {
                "grad_weight": "torch.ones(())",
                "linear_weight": "torch.ones(1, 1)",
                "weight_size": "[1, 1, 1]",
                "input_size": "[1]",
            },
        ),
    ),
    Defect(
        "an operand that does not fit once it is contiguous: 'API call failed', and not what fails",
        False,
        Call(
            FUNCTIONAL,
            "conv_to_affine",
            {
                "weight": "torch.ones(1, 1, 1).expand(2**45, 1, 1)",
                "bias": "None",
                "input_size": "1",
                "rows": "(0, 0)",
            },
        ),
    ),
    Defect(
        "None for a tensor: AttributeError, as its shape is asked for before it is checked",
        False,
        Call(
            OPS,
            "convolve_rows",
            {"rows": "torch.ones(1, 1)", "conv_weight": "None", "input_size": "[1]"},
        ),
    ),
    Defect(
        "diagonals of a weight without numbers: NotImplementedError from nonzero",
        False,
        Call(
            FUNCTIONAL,
            "conv_to_diagonals",
            {"weight": "torch.ones(1, 1, 1, device='meta')", "bias": "None", "input_size": "1"},
        ),
    ),
    Defect(
        "three output positions, and a turn of a loop for every position of the replicated rim",
        True,
        Call(
            FUNCTIONAL,
            "fuse_conv_linear",
            {
                "conv_weight": "torch.ones(1, 1, 1)",
                "conv_bias": "None",
                "linear_weight": "torch.ones(1, 3)",
                "linear_bias": "None",
                "input_size": "1",
                "stride": "2**26",
                "padding": "2**26",
                "padding_mode": "'replicate'",
            },
        ),
        seconds=0.1,
    ),
    Defect(
        "one row of a sparse matrix, and tables of all of its rows; where these do not fit, a bare "
        "MemoryError",
        True,
        Call(
            FUNCTIONAL,
            "conv_to_affine",
            {
                "weight": "torch.ones(1, 1, 1)",
                "bias": "None",
                "input_size": "1",
                "padding": "2**22",
                "padding_mode": "'replicate'",
                "layout": "torch.sparse_csr",
                "rows": "(0, 1)",
            },
        ),
        seconds=0.1,
    ),
]


def is_known(call: Call, arguments: dict[str, Any]) -> bool:
    return any(
        defect.open_for is not None and defect.open_for(call, arguments) for defect in DEFECTS
    )
