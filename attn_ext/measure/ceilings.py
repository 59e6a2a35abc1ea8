"""What the machine can reach: measured on a CPU by csrc/cpu/measure, on a GPU with torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from attn_ext.measure.cases import Case


@dataclass(frozen=True)
class Ceilings:
    """Rates of the whole device, on the threads that torch uses"""

    fp32: float  # GFLOP/s of multiply-adds
    half: float  # GFLOP/s of bfloat16 (on GPUs: also float16) products into float32
    read: float  # GB/s from memory
    exp: float = 0.0  # 10^9 exponentials a second; 0: not measured

    def flops(self, dtype: str) -> float:
        """FLOP/s for a dtype of `cases.DTYPES`; fp64 runs at half of fp32"""
        rate = {"fp32": self.fp32, "fp64": self.fp32 / 2}.get(dtype, self.half)
        return 1e9 * (rate or self.fp32)

    def least_seconds(self, case: Case) -> float:
        """The roofline: the time that arithmetic or memory needs, whichever is longer"""
        return max(case.flops / self.flops(case.dtype), case.bytes / (1e9 * self.read))

    def bound(self, case: Case) -> str:
        """ "compute" or "memory": which of the two it is"""
        memory = case.bytes / (1e9 * self.read)
        return "memory" if memory > case.flops / self.flops(case.dtype) else "compute"

    def as_dict(self) -> dict:
        """Numbers for result files"""
        return {name: round(value, 1) for name, value in asdict(self).items()}


class CpuCeilings(Ceilings):
    """A CPU computes float16 in float32"""

    def flops(self, dtype: str) -> float:
        """FLOP/s for a dtype"""
        return super().flops("fp32" if dtype == "fp16" else dtype)


def measure_cpu(seconds: float = 0.15, threads: int | None = None) -> Ceilings:
    """The ceilings of this CPU with `threads` threads (torch's number if None)"""
    from attn_ext import _C

    threads = threads or torch.get_num_threads()
    return CpuCeilings(
        fp32=_C.ceilings("fma", "", threads, seconds),
        half=_C.ceilings("bf16", "", threads, seconds),
        read=_C.ceilings("read", "", threads, seconds),
        exp=_C.ceilings("exp", "", threads, seconds),
    )


def again(before: Ceilings, case: Case, seconds: float = 0.04) -> Ceilings:
    """The figure that bounds `case` measured once more, since clocks drift; the other ones kept.

    A figure that fell by more than 15 % was disturbed by another process: the one before counts.
    """
    from attn_ext import _C

    if case.device != "cpu":
        return before
    fields = asdict(before)
    if before.bound(case) == "memory":
        name, native = "read", "read"
    else:
        half = case.dtype == "bf16" and before.half > 0
        name, native = ("half", "bf16") if half else ("fp32", "fma")
    value = _C.ceilings(native, "", torch.get_num_threads(), seconds)
    if value > 0.85 * fields[name]:
        fields[name] = value
    return CpuCeilings(**fields)


def _rate(run, work: float, clock, turns: int = 5) -> float:
    """10^9 units of `work` a second, the best of some turns"""
    from attn_ext.measure.timing import Candidate

    candidate = Candidate("", run)
    for turn in range(turns):
        clock.turn(candidate, candidate.seconds[-1] if turn else 0.0)
    return work / candidate.best / 1e9


def measure_cuda(device: str = "cuda") -> Ceilings:
    """The ceilings of a GPU: torch's own matrix products and the sum of a large tensor"""
    from attn_ext.measure.timing import clock_for

    clock, n = clock_for(device), 8192
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    half = _rate(lambda: a @ a, 2 * n**3, clock)
    b = torch.randn(n // 2, n // 2, dtype=torch.float32, device=device)
    fp32 = _rate(lambda: b @ b, 2 * (n // 2) ** 3, clock)
    c = torch.empty(1 << 30, dtype=torch.int8, device=device).zero_().view(torch.float32)
    return Ceilings(fp32, half, _rate(c.sum, c.numel() * 4, clock))


def measure(device: str = "cpu") -> Ceilings:
    """The ceilings of a device"""
    return measure_cuda(device) if torch.device(device).type == "cuda" else measure_cpu()
