"""Runs the conformance matrix: each check on each subject against the float64 reference."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from attn_ext import testing
from attn_ext.backends import reference as reference_backend
from attn_ext.cli.matrix import Check
from attn_ext.core.layout import empty_like_layout
from attn_ext.core.schema import GRADIENTS, Call
from attn_ext.measure.cases import DTYPES
from attn_ext.measure.peers import available_bytes

OUTPUTS = ("out", "lse", "max_logit", "entropy")
LARGE_BYTES = 2 * 2 * (2**31 + 2**20)  # what the large check allocates


@dataclass
class Measure:
    """The error of one result against what the rule of attn_ext.testing allows"""

    name: str
    max_error: float
    rms_error: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Within the allowed error"""
        return self.max_error <= self.allowed


@dataclass
class Outcome:
    """One check on one subject in one dtype.  state: pass, fail, or n/a with a reason"""

    subject: str
    ours: bool
    group: str
    check: str
    dtype: str
    state: str
    reason: str = ""
    measures: list[Measure] = field(default_factory=list)
    seconds: float = 0.0
    sweep: int = 0

    @property
    def worst(self) -> Measure | None:
        """The measure that is nearest to, or furthest above, its allowed error"""
        return max(self.measures, key=lambda m: m.max_error / m.allowed, default=None)

    @property
    def name(self) -> str:
        """group: check, dtype"""
        return f"{self.group}: {self.check}, {self.dtype}"


def compare(name: str, got, truth, naive, kind: str, dtype, cancelled=0.0) -> Measure:
    """`got` against `truth`; NaN and infinities must stand where they stand there"""
    allowed = testing.allowed_error(truth.cpu(), naive.cpu(), kind, dtype, cancelled)
    if got.shape != truth.shape:
        return Measure(name, float("inf"), float("inf"), allowed)
    got, truth = got.detach().double().cpu(), truth.double().cpu()
    if got.numel() == 0:
        return Measure(name, 0.0, 0.0, allowed)
    same = (got == truth) | (got.isnan() & truth.isnan())
    error = torch.where(same, 0.0, (got - truth).abs()).nan_to_num(nan=torch.inf)
    rms = error.square().mean().sqrt().item()
    return Measure(name, error.max().item(), rms, allowed)


@contextlib.contextmanager
def one_thread():
    """The reference on these small problems is faster without torch's other threads"""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Prepared:
    """A check's call in one dtype on one device, with its truths, computed once for all subjects"""

    def __init__(self, check: Check, dtype: str, device: str, seed: int = 0):
        self.check, self.dtype = check, dtype
        arguments = {"heads_q": 2, **check.arguments}
        call = testing.random_call(seed, dtype=DTYPES[dtype], device=device, **arguments)
        self.call = check.prepare(call) if check.prepare else call
        self.grads = call.seqlens_k is None and call.block_table is None
        self._grads = {}
        exact = testing.to_float64(self.call)
        with one_thread():
            self.truth, self.naive = (reference_backend.naive(c) for c in (exact, self.call))
        self.dout = self.dlse = None
        if not self.grads:
            return
        generator = torch.Generator("cpu").manual_seed(seed + 1)
        normal = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
        out, lse = self.naive[:2]
        self.dout = empty_like_layout(self.call.q, self.call.v.shape[-1])
        self.dout.copy_(torch.randn(out.shape, **normal))
        self.dlse = torch.randn(lse.shape, **normal).to(lse)

    def gradients(self, with_lse: bool):
        """(truths, naives) of the five gradients, with or without one through LSE"""
        if with_lse not in self._grads:
            needs = testing.needs_of(self.call)
            dlse = self.dlse if with_lse else None
            exact = testing.to_float64(self.call)
            dlse64 = None if dlse is None else dlse.double()
            run = reference_backend.forward_and_backward
            plain, exact = (c._replace(need_stats=False) for c in (self.call, exact))
            with one_thread():
                self._grads[with_lse] = (
                    run(exact, self.dout.double(), dlse64, needs)[1],
                    run(plain, self.dout, dlse, needs)[1],
                )
        return self._grads[with_lse]

    def measures(self, subject, call: Call | None = None) -> list[Measure]:
        """Run the subject, and compare whatever it gives"""
        call, dtype = call or self.call, self.call.q.dtype
        dlse = self.dlse if subject.ours else None
        outputs, grads = subject.run(call, self.dout, dlse)
        found = []
        for name, got, truth, naive in zip(OUTPUTS, outputs, self.truth, self.naive, strict=True):
            if got is None or truth is None:
                if subject.ours and (got is None) != (truth is None):
                    raise AssertionError(f"{name} must {'not ' * (truth is None)}be given")
                continue
            found.append(compare(name, got, truth, naive, "out", dtype))
        if grads is None:
            return found
        truths, naives = self.gradients(dlse is not None)
        for name, got, truth, naive in zip(GRADIENTS, grads, truths, naives, strict=True):
            if got is None or truth is None:
                if subject.ours and truth is not None:
                    raise AssertionError(f"d{name} must be given")
                continue
            cancelled = testing.cancellation(call, self.dout, outputs[0], name)
            found.append(compare(f"d{name}", got, truth, naive, "grad", dtype, cancelled))
        return found


def _repeat(prepared: Prepared, subject) -> list[Measure]:
    """Three runs must agree in every bit; the measure is the largest difference"""
    runs = [subject.run(prepared.call, prepared.dout, prepared.dlse if subject.ours else None)
            for _ in range(3)]  # fmt: skip
    flat = [[x for part in run if part for x in part if x is not None] for run in runs]
    found = []
    for index, first in enumerate(flat[0]):
        for other in flat[1:]:
            if not torch.equal(first, other[index]):
                difference = (first.double() - other[index].double()).abs().max().item()
                found.append(Measure(f"result {index}", difference, difference, 1e-300))
    return found or [Measure("all", 0.0, 0.0, 1e-300)]


def _stream(prepared: Prepared, subject) -> list[Measure]:
    """The inputs are written on a side stream, late, and the subject is called on that stream"""
    stream = torch.cuda.Stream()
    call = prepared.call
    late = {n: torch.full_like(getattr(call, n), torch.nan) for n in ("q", "k", "v")}
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for name, tensor in late.items():
            tensor.copy_(getattr(call, name), non_blocking=True)
        found = prepared.measures(subject, call._replace(**late))
    stream.synchronize()
    return found


def run_check(check: Check, dtype: str, subjects: list) -> list[Outcome]:
    """The outcomes of one check in one dtype on every subject"""
    outcomes = []
    prepared: dict[str, Prepared] = {}
    for subject in subjects:
        outcome = Outcome(
            subject.name, subject.ours, check.group, check.name, dtype, "pass", sweep=check.sweep
        )
        outcomes.append(outcome)
        start = time.perf_counter()
        try:
            why = _unavailable(check, subject)
            if not why:
                if subject.device not in prepared:
                    prepared[subject.device] = Prepared(check, dtype, subject.device)
                ready = prepared[subject.device]
                why = "; ".join(subject.unsupported(ready.call, ready.grads))
            if why:
                outcome.state, outcome.reason = "n/a", why
                continue
            how: Callable = {"repeat": _repeat, "stream": _stream}.get(check.kind, _measure)
            measures = how(ready, subject)
            if measures is None:
                outcome.state, outcome.reason = "n/a", "left to another backend"
                continue
            outcome.measures = measures
            bad = [m for m in outcome.measures if not m.ok]
            if bad:
                outcome.state = "fail"
                outcome.reason = "; ".join(
                    f"{m.name}: max error {m.max_error:.3g}, allowed {m.allowed:.3g}" for m in bad
                )
        except Exception as error:  # whatever a subject does, the matrix goes on
            lines = str(error).strip().splitlines() or [""]
            reason = f"{type(error).__name__}: {lines[0][:160]}"
            refusal = not subject.ours and isinstance(error, (RuntimeError, NotImplementedError))
            outcome.state, outcome.reason = ("n/a" if refusal else "fail"), reason
        finally:
            outcome.seconds = time.perf_counter() - start
    return outcomes


def _measure(prepared: Prepared, subject) -> list[Measure] | None:
    """By the subject itself where its results are others than a backend's"""
    own = getattr(subject, "measures", None)
    return own(prepared) if own else prepared.measures(subject)


def _unavailable(check: Check, subject) -> str:
    """Why this machine cannot hold a check, or its subject has nothing to do with it, or ""."""
    if hasattr(subject, "measures") and check.kind != "compare":
        return "its results are compared with the truth alone"
    if check.kind == "stream" and subject.device != "cuda":
        return "streams need a CUDA device"
    if check.kind == "large":
        free = available_bytes(subject.device)
        if free < 1.5 * LARGE_BYTES:
            return f"needs {1.5 * LARGE_BYTES / 2**30:.0f} GiB of memory, {free / 2**30:.1f} free"
    return ""
