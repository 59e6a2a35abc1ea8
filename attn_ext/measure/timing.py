"""Clocks: candidates take turns, and the median of each counts.

On a CPU a turn begins with an untimed call, which wakes the candidate's threads and fills caches
as the call before would have; on a GPU each timed call follows a flush of L2, between two events.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

SLOW = 6.0


@dataclass
class Candidate:
    """Something to time: `run()` does the work once, within `context()` (entered off the clock)"""

    name: str
    run: Callable[[], object]
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median seconds of a call"""
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        """The shortest call in seconds"""
        return min(self.seconds)


class CpuClock:
    """Wall time of calls on the CPU"""

    device = "cpu"
    WARM = 0.03  # seconds: above it a call warms itself up
    BURST = 0.004  # seconds of timed calls in one turn, so that short calls come in numbers
    REST = 0.002  # seconds between turns, in which the threads of the one before stop spinning

    def turn(self, candidate: Candidate, known: float) -> None:
        """Time one turn, given the seconds that a call is known to take (0: unknown)"""
        clock, run = time.perf_counter, candidate.run
        if known < self.WARM:
            time.sleep(self.REST)
            run()
        calls = 1 if known <= 0 else max(1, min(50, round(self.BURST / known)))
        for _ in range(calls):
            start = clock()
            run()
            candidate.seconds.append(clock() - start)

    def peak_mib(self, run) -> float | None:
        """Growth of the resident set over one call in MiB; None where the system does not say"""
        refs = Path("/proc/self/clear_refs")
        try:
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)
            refs.write_text("5")  # the peak starts again from here
            before = status_mib("VmRSS")
            run()
            return max(0.0, status_mib("VmHWM") - before)
        except (OSError, TypeError):
            return None


def status_mib(name: str) -> float:
    """MiB that Linux says of this process: VmRSS, what it has now, or VmHWM, the most so far (not
    getrusage's ru_maxrss, which begins with the memory of the process that started this one).
    OSError on another system.
    """
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) / 1024


class CudaClock:
    """Time between two CUDA events, with L2 flushed before each call"""

    device = "cuda"
    CALLS = 5  # timed calls in a turn
    AHEAD = 1_000_000  # cycles that the GPU waits, so that launches are queued before it is free

    def __init__(self, index: int = 0):
        self.device_index = index
        size = torch.cuda.get_device_properties(index).L2_cache_size
        self._flush = torch.empty(max(4 * size, 64 << 20), dtype=torch.int8, device=f"cuda:{index}")

    def turn(self, candidate: Candidate, known: float) -> None:
        """Time one turn"""
        if known <= 0:
            candidate.run()
        pairs = []
        for _ in range(self.CALLS if known < 0.02 else 1):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            torch.cuda._sleep(self.AHEAD)
            begin.record()
            candidate.run()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize(self.device_index)
        candidate.seconds += [begin.elapsed_time(end) / 1e3 for begin, end in pairs]

    def peak_mib(self, run) -> float | None:
        """Growth of torch's allocations over one call in MiB"""
        torch.cuda.synchronize(self.device_index)
        torch.cuda.reset_peak_memory_stats(self.device_index)
        before = torch.cuda.memory_allocated(self.device_index)
        run()
        torch.cuda.synchronize(self.device_index)
        return (torch.cuda.max_memory_allocated(self.device_index) - before) / 2**20


def clock_for(device: str):
    """The clock of a device"""
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    return CpuClock() if kind == "cpu" else CudaClock(torch.device(device).index or 0)


def interleave(
    candidates: Sequence[Candidate], clock, turns: int = 7, budget: float = 3.0, least: int = 3
) -> None:
    """Fill `seconds` of each: up to `turns` turns each, at least `least`, within about `budget`
    seconds in all.  The order is reversed from turn to turn; who is SLOW times slower than the
    fastest gets `least` turns only, so that the time goes where the comparison is close.
    """
    start = time.perf_counter()
    known = [0.0] * len(candidates)
    order = list(range(len(candidates)))
    for turn in range(turns + 1):
        for i in order:
            candidate = candidates[i]
            if turn > least and known[i] > SLOW * min(known):
                continue
            with candidate.context():
                clock.turn(candidate, known[i])
            known[i] = candidate.best
            # the first turn warms up; of what takes seconds, a single call is kept
            if turn == 0 and known[i] < budget / 2:
                candidate.seconds.clear()
        order.reverse()
        spent = time.perf_counter() - start
        if turn >= least and spent > budget:
            break
        if turn >= 1 and spent * (turn + 2) / (turn + 1) > 2 * budget:
            break
