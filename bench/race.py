"""One group of rows: checks everyone's result, then times those whose result is right."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from bench.cases import FLOOR, Case
from bench.measure import interleaved, prepare

Outcome = list[float] | Exception

_MAX_COPIES = 64
_MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}


def _copies(case: Case) -> list[tuple[torch.Tensor, ...]]:
    """The inputs; on CUDA as many sets of them as fill the L2 cache twice.

    Going round the sets, no call finds its inputs in the cache because the last call read them.
    """
    first = case.inputs()
    if case.device != "cuda":
        return [first]
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = math.ceil(2 * cache / sum(t.nbytes for t in first))
    return [first, *(case.inputs(seed) for seed in range(1, min(count, _MAX_COPIES)))]


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    size = 0
    for t in tensors:
        sparse = t.layout == torch.sparse_csr
        parts = (t.values(), t.col_indices(), t.crow_indices()) if sparse else (t,)
        size += sum(part.nbytes for part in parts)
    return size


def race(case: Case, entrants: Iterable[str], seconds: float) -> dict[str, Outcome]:
    """Measures the entrants of a case in alternating rounds.

    Returns:
        Seconds per call, one per round, by entrant; or what it raised instead.
    """
    prepare(case.device)
    copies = _copies(case)
    outcomes: dict[str, Outcome] = {}
    calls = {}
    memory = 0
    for entrant in entrants:
        call = case.call(entrant, *copies)
        try:
            result = call()
            made = result if isinstance(result, tuple) else (result,)
            memory = max(memory, _bytes((*copies[0], *made)))
            if entrant != FLOOR:  # which computes nothing
                case.check(result, copies[0])
        except (AssertionError, ImportError, RuntimeError) as error:
            # the frames in a traceback would keep their tensors alive
            outcomes[entrant] = error.with_traceback(None)
        else:
            calls[entrant] = call
        result = made = None
    if calls:
        fresh = FLOOR in case.entrants
        outcomes.update(interleaved(calls, case.device, seconds, case.brief, memory, fresh))
    if case.device == "cuda":
        del copies, calls, call
        torch.cuda.empty_cache()
    return outcomes


def matmul(device: str, dtype: torch.dtype, seconds: float) -> tuple[float, list[float]]:
    """A large square `torch.matmul`: the arithmetic rate that this machine shows today.

    Returns:
        Its GFLOP, and seconds per call, one per round.
    """
    prepare(device)
    size = _MATMUL_SIZE[device]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    a @ b
    samples = interleaved({"matmul": lambda: a @ b}, device, seconds)
    return 2 * size**3 / 1e9, samples["matmul"]
