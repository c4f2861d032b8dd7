"""Timing: everyone in a group is warmed up, then measured in alternating rounds.

Alternating matters more than many rounds: a machine that slows down for a while then slows down
everyone, and the ratios stay true.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress

import torch

Call = Callable[[], object]

# One sample lasts at least this long, so that neither clock's resolution shows.
_MIN_SAMPLE_SECONDS = 4e-3
_TRIALS = 3  # of how many calls last so long
_MAX_ROUNDS = 40
# The longer a call, the less it is disturbed, and the fewer rounds are enough: seconds, rounds.
_LEAST_ROUNDS = ((0.3, 7), (1.5, 3), (float("inf"), 2))
# Where fresh pages may be of either price, the median must not be of the dear ones.
_LEAST_ROUNDS_OF_LARGE = ((1.0, 11), (3.0, 7), (float("inf"), 3))
_BRIEF_ROUNDS = 3

_LARGE_BYTES = 64_000_000
# From here on glibc takes every block afresh, unless a larger one was freed in its heap.
_FRESH_BYTES = 32 << 20
_TOUCHED = 4  # times what a call takes
_MOST_TOUCHED = 0.6  # of what is free


def prepare(device: str) -> None:
    """Puts torch into the state that every row is measured in.

    On CUDA cuDNN may search for its best algorithm, and float32 means float32.
    """
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False


def touch_pages(size: int) -> None:
    """Writes to that many bytes of fresh memory, if there are as many, and frees them.

    The host of a virtual machine finds memory for it at the first touch, several times slower
    than the machine's own kernel hands out pages later, and may take it back seconds after it was
    freed. Without this, the first rounds of a group would all be spent on that.
    """
    with suppress(ValueError, OSError, AttributeError):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        torch.zeros(int(min(_MOST_TOUCHED * free, size)), dtype=torch.uint8)


def give_back_kept() -> None:
    """Returns to the system what the C library has kept of freed memory, where it can.

    What one call frees, the next may find in place, without a page to bring in. Whoever is
    measured for writing fresh memory must find none, whoever was measured before.
    """
    with suppress(OSError, AttributeError):  # glibc's own
        ctypes.CDLL(None).malloc_trim(0)


def _seconds_cpu(call: Call, iterations: int) -> float:
    start = time.perf_counter()
    for _ in range(iterations):
        # a large result is alone in its sample and freed after the clock has stopped: giving its
        # pages back is not part of making it
        result = call()
    seconds = time.perf_counter() - start
    del result
    return seconds / iterations


def _seconds_afresh(call: Call, iterations: int) -> float:
    seconds = 0.0
    for _ in range(iterations):
        give_back_kept()
        seconds += _seconds_cpu(call, 1)
    return seconds / iterations


def _seconds_cuda(call: Call, iterations: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(iterations):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / iterations


def _rounds(sample: float, once: float, share: float, brief: bool, large: bool) -> int:
    """How many rounds somebody takes part in, whose samples last that long."""
    table = _LEAST_ROUNDS_OF_LARGE if large else _LEAST_ROUNDS
    least = next(rounds for limit, rounds in table if once < limit)
    if brief:
        return min(least, _BRIEF_ROUNDS)
    return min(max(int(share / sample), least), _MAX_ROUNDS)


def interleaved(
    calls: Mapping[str, Call],
    device: str,
    seconds: float,
    brief: Collection[str] = (),
    memory: int = 0,
    fresh: bool = False,
) -> dict[str, list[float]]:
    """Measures the calls in alternating rounds.

    Args:
        calls: What to measure, by name; each has been called once already.
        device: "cpu" (wall clock) or "cuda" (events on the current stream).
        seconds: About how long to measure all of them together. Someone whose share of that
            is used up sits out the later rounds, after seven (fewer if a call is long, more if
            it takes much memory).
        brief: Those for whom three rounds are enough.
        memory: About how many bytes a call takes. On a CPU, where that is much, several times
            as many are touched beforehand.
        fresh: Whether results of a size that is commonly fresh memory are so for everyone here.

    Returns:
        Seconds per call, one per round, by name.
    """

    clock = _seconds_cuda if device == "cuda" else _seconds_cpu
    if fresh and device == "cpu" and memory >= _FRESH_BYTES:
        clock = _seconds_afresh
    large = device == "cpu" and memory >= _LARGE_BYTES
    if large:
        touch_pages(_TOUCHED * memory)
    share = seconds / max(1, len(set(calls) - set(brief)))
    samples: dict[str, list[float]] = {}
    iterations, rounds = {}, {}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for name, call in calls.items():
            once, iterations[name] = clock(call, 1), 1
            # A first call of some 10 us, in nobody's caches, may take ten times as long.
            for _ in range(_TRIALS):
                if once * iterations[name] >= _MIN_SAMPLE_SECONDS:
                    break
                iterations[name] = math.ceil(_MIN_SAMPLE_SECONDS / once)
                once = clock(call, iterations[name])
            sample = once * iterations[name]
            rounds[name] = _rounds(sample, once, share, name in brief, large)
            # a single long call is as good a sample as any later one
            samples[name] = [once] if iterations[name] == 1 else []
        names = list(calls)
        for turn in range(max(rounds.values())):
            # a new order each round: nobody always runs in the caches another one left behind
            at = turn % len(names)
            for name in names[at:] + names[:at]:
                if len(samples[name]) < rounds[name]:
                    samples[name].append(clock(calls[name], iterations[name]))
    finally:
        if collecting:
            gc.enable()
    return samples


class ReplayClock:
    """A timer for pytest-benchmark that moves only when told to.

    pytest-benchmark measures all rounds of one benchmark before the next one. The rounds here
    have been measured already, in alternation; each is played back as one round.
    """

    __name__ = "replay"

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        """The time, as `time.perf_counter` gives it."""
        return self._now

    def play(self, seconds: float) -> None:
        """Lets that much time pass."""
        self._now += seconds


CLOCK = ReplayClock()
