"""The engine: bind every peer to a case, check each result, then time those that are right."""

from __future__ import annotations

import gc
import math
import time

import torch

from attn_ext.measure import ceilings as ceiling
from attn_ext.measure.cases import Case
from attn_ext.measure.checks import Reference
from attn_ext.measure.engines import Bound, Unavailable
from attn_ext.measure.peers import OURS, PEERS, Peer
from attn_ext.measure.results import Report, Row
from attn_ext.measure.timing import Candidate, interleave


def _direction(case: Case, bound: Bound, inputs, dout):
    """(run, results): the timed call, and its results for the check"""
    if case.direction == "fwd":
        return bound.forward, lambda got: (bound.result(got),)
    if not bound.differentiable:
        raise Unavailable("has no backward")
    if case.direction == "fwd+bwd":

        def both():
            out = bound.forward()
            return (out, *torch.autograd.grad(out, inputs, dout))

        return both, lambda got: got
    with bound.context():
        out = bound.forward()

    def backward():
        return torch.autograd.grad(out, inputs, dout, retain_graph=True)

    return backward, lambda got: got


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200].rstrip(": ")


def measure_case(
    case: Case,
    peers: list[str],
    clock,
    ceilings: ceiling.Ceilings | None = None,
    turns: int = 7,
    budget: float = 3.0,
    memory: bool = True,
    table: dict[str, Peer] = PEERS,
    groups: int = 3,
) -> tuple[list[Row], list[dict]]:
    """(rows, skipped) of one case.  `budget`: seconds of timing for all peers together; `table`:
    where their names are looked up; `groups`: heads whose results are checked."""
    q, k, v, dout = case.inputs()
    reference = Reference(case, q, k, v, dout, groups)
    inputs = (q, k, v)
    if case.direction != "fwd":
        for x in inputs:
            x.requires_grad_()
    rows, skipped, timed = [], [], []
    for name in peers:
        try:
            bound = table[name].bind(case, q, k, v)
            run, results = _direction(case, bound, inputs, dout)
            with bound.context():
                verdict = reference.check([x.detach() for x in results(run())])
        except Unavailable as why:
            skipped.append({"case": case.name, "peer": name, "reason": str(why)})
            continue
        except Exception as error:  # a peer may fail in any way; the report says how
            skipped.append({"case": case.name, "peer": name, "reason": _first_line(error)})
            continue
        row = Row(
            case.shape, case.dtype, case.causal, case.direction, case.device, name,
            verdict.state, verdict.error, verdict.allowed,
        )  # fmt: skip
        rows.append(row)
        if verdict.state != "wrong":
            timed.append((row, Candidate(name, run, bound.context)))
    before = ceiling.again(ceilings, case) if ceilings else None
    interleave([candidate for _, candidate in timed], clock, turns, budget)
    after = ceiling.again(ceilings, case) if ceilings else None
    for row, candidate in timed:
        _fill(row, candidate, case)
        if before:
            least = min(before.least_seconds(case), after.least_seconds(case))
            row.share, row.bound = least * 1e3 / row.median_ms, after.bound(case)
        if memory:
            with candidate.context():
                row.peak_mib = clock.peak_mib(candidate.run)
    ours = next((row.median_ms for row in rows if row.peer == OURS), None)
    for row in rows:
        if ours and row.median_ms:
            row.ratio = row.median_ms / ours
    del timed
    gc.collect()  # sessions hold threads and memory
    return rows, skipped


def _fill(row: Row, candidate: Candidate, case: Case) -> None:
    row.median_ms, row.best_ms = candidate.median * 1e3, candidate.best * 1e3
    row.samples = len(candidate.seconds)
    row.tflops = case.flops / candidate.median / 1e12
    row.gb_s = case.bytes / candidate.median / 1e9


def measure_all(
    report: Report, cases: list[Case], peers: list[str], clock, *, on_case=None,
    seconds: float = math.inf, **options,
) -> Report:  # fmt: skip
    """Every case into `report`, which is saved after each.  `on_case(case, rows, skipped)` is told.

    After `seconds` no further case begins, and the report stays incomplete.  KeyboardInterrupt
    passes through: what is finished is written.
    """
    end = time.monotonic() + seconds
    report.complete = False
    for case in cases:
        if time.monotonic() > end:
            return report
        rows, skipped = measure_case(case, peers, clock, report.ceilings, **options)
        report.add(rows, skipped)
        if on_case:
            on_case(case, rows, skipped)
    report.complete = True
    report.save()
    return report
