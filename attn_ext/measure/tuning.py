"""What `attn-ext tune` does: every engine of this machine is checked and then timed on some classes
of calls, and the table goes where `attn_ext.backends.tuned` reads it.

An engine whose result is outside the allowed error is left out of a class, however fast it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from attn_ext.backends import registry, tuned
from attn_ext.integrations import sdpa_calls
from attn_ext.measure.cases import Case, make
from attn_ext.measure.engines import Bound
from attn_ext.measure.measure import measure_case
from attn_ext.measure.peers import Peer, bind_backend
from attn_ext.measure.timing import clock_for
from attn_ext.ops import execute, fast

# "B,H,S,D" of the classes.  Heads are few where sequences are long, so that a class takes seconds.
CPU_SHAPES = tuple(f"{heads},{d}" for d in (64, 128) for heads in
                   ("4,4,64", "2,8,256", "1,8,1024", "1,2,4096"))  # fmt: skip
CPU_DECODE = ("1,32/8,1/4096,128", "4,8,1/1024,64")
GPU_SHAPES = tuple(f"{heads},{d}" for d in (64, 128, 256) for heads in
                   ("16,16,128", "8,16,512", "4,16,2048", "1,16,8192"))  # fmt: skip
GPU_DECODE = ("8,32/8,1/8192,128", "1,32/8,1/32768,128", "64,16,1/1024,64")
LEAST_SECONDS = 0.3  # of timing a class
TURNS = 5


class Found(NamedTuple):
    """What was found of one class: the row, and the reasons why engines are not in it."""

    row: tuned.Row
    left_out: dict[str, str]


def cases(device: str) -> list[Case]:
    """The classes of calls that are measured on a device, as examples of them."""
    cpu = torch.device(device).type == "cpu"
    shapes, decode = (CPU_SHAPES, CPU_DECODE) if cpu else (GPU_SHAPES, GPU_DECODE)
    dtypes = ("fp32", "bf16") if cpu else ("bf16", "fp16")
    found = [
        make(shape, dtype, causal, direction, device)
        for shape in shapes
        for dtype in dtypes
        for causal in (False, True)
        for direction in ("fwd", "fwd+bwd")
    ]
    return found + [
        make(shape, dtype, False, "fwd", device) for shape in decode for dtype in dtypes
    ]


@contextlib.contextmanager
def _instruction_set(name: str) -> Iterator[None]:
    """The CPU's kernels of one instruction set, whatever was measured."""
    from attn_ext import _C

    _C.set_isa(name)
    try:
        yield
    finally:
        _C.set_isa("")


@contextlib.contextmanager
def _hopper(on: bool) -> Iterator[None]:
    """csrc/cuda's kernels for Hopper, or those for sm_80."""
    kernels = registry.get("cuda").kernels()
    before, kernels.sm90 = kernels.sm90, on
    try:
        yield
    finally:
        kernels.sm90 = before


def _engine(name: str, backend: str, context=contextlib.nullcontext) -> Peer:
    bind = bind_backend(backend)

    def bound(case: Case, q, k, v) -> Bound:
        found = bind(case, q, k, v)
        found.context = context
        return found

    return Peer(name, bound)


def engines(device: str) -> dict[str, Peer]:
    """The engines of a device by their names in the table."""
    where = torch.device(device)
    found = {}
    if where.type == "cpu":
        from attn_ext import _C

        sets = _C.supported_isas()
        for isa in sets[1:] or sets:  # the baseline where there is nothing else
            found[f"cpu:{isa}"] = _engine(isa, "cpu", lambda isa=isa: _instruction_set(isa))
    else:
        if not registry.get("cuda").available():
            found["cuda"] = _engine("cuda", "cuda", lambda: _hopper(False))
            if registry.get("cuda").is_hopper(where.index or 0):
                found[tuned.HOPPER] = _engine("Hopper", "cuda", lambda: _hopper(True))
        if not registry.get("triton").available():
            found["triton"] = _engine("triton", "triton")
    return found | {registry.TORCH: _engine("torch", registry.TORCH)}


def measure_class(case: Case, found: dict[str, Peer], clock, budget: float) -> Found:
    """Check and time every engine on one class; budget: seconds of timing."""
    rows, skipped = measure_case(
        case, list(found), clock, turns=TURNS, budget=budget, memory=False, table=found, groups=1
    )
    left_out = {s["peer"]: s["reason"] for s in skipped}
    for row in rows:
        if row.state != "ok":
            left_out[row.peer] = f"is {row.state}: error {row.error:.2g}, allowed {row.allowed:.2g}"
    seconds = {row.peer: row.median_ms / 1e3 for row in rows if row.state == "ok"}
    return Found(_row(case, seconds), left_out)


def _row(case: Case, seconds: dict[str, float]) -> tuned.Row:
    return tuned.Row(
        dtype=str(case.torch_dtype).removeprefix("torch."), grad=case.direction != "fwd",
        causal=case.causal, heads=case.batch * case.heads_q, seqlen_q=case.seqlen_q,
        seqlen_k=case.seqlen_k, head_dim=case.head_dim, seconds=seconds,
    )  # fmt: skip


def save(device: str, table: tuned.Table) -> None:
    """Write a device's table, at once, and let it be in force.  OSError where that cannot be."""
    where = torch.device(device)
    index = where.index or 0
    path = tuned.path(where.type, index)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    text = json.dumps(tuned.content(where.type, index, table), indent=1)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)
    choose_again()


def choose_again() -> None:
    """Read the tables again, and drop what was chosen without them."""
    tuned.forget()
    registry.select.cache_clear()
    for memory in (registry.get("cpu"), registry.part("cpu_second"), execute, fast, sdpa_calls):
        memory.forget()


def run(
    device: str, seconds: float, tell: Callable[[int, int, Found], None], anew: bool = False
) -> tuned.Table:
    """Measure every class that the device's table does not have yet, for about so many seconds,
    and save the table after each; `tell(done, all, found)` hears of it."""
    where = torch.device(device)
    table, _ = tuned.load(where.type, where.index or 0)
    if anew:
        table = table._replace(rows=())
    wanted, known = cases(device), [row._replace(seconds={}) for row in table.rows]
    missing = [case for case in wanted if _row(case, {}) not in known]
    found, clock, end = engines(device), clock_for(device), time.monotonic() + seconds
    for number, case in enumerate(missing, len(wanted) - len(missing) + 1):
        left = end - time.monotonic()
        if left <= 0:
            break
        budget = max(LEAST_SECONDS, left / (len(wanted) - number + 1) / 2)  # half of it is checks
        result = measure_class(case, found, clock, budget)
        rows = (*table.rows, result.row)
        table = table._replace(
            rows=rows, complete=len(rows) == len(wanted), date=time.strftime("%Y-%m-%d")
        )
        save(device, table)
        tell(number, len(wanted), result)
    return table


def mark_verified(device: str, family: str) -> None:
    """Note that a family of kernels has passed `attn-ext verify` on a device."""
    where = torch.device(device)
    table, _ = tuned.load(where.type, where.index or 0)
    if family not in table.verified:
        save(device, table._replace(verified=(*table.verified, family)))
