"""attn-ext verify: the conformance matrix with a progress bar, a table, and an HTML report."""

from __future__ import annotations

import dataclasses
import json
import sys
import time

import torch

from attn_ext.backends import tuned
from attn_ext.cli import matrix, subjects
from attn_ext.cli.conform import Outcome, run_check
from attn_ext.cli.errors import BadArgument
from attn_ext.measure import tuning
from attn_ext.measure.results import machine, rounded

FORMAT = 1


def run(backend, also, full, only, device, strict, report, as_json) -> int:
    """Verify; 1 when a backend of attn_ext fails (with strict: a peer too)"""
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    if device is not None:
        if device not in devices:
            raise BadArgument(f"--device must be {' or '.join(devices)} here, got {device!r}")
        devices = [device]
    try:
        checks = matrix.selected(full, only)
        tested = subjects.ours(backend, devices)
        peers, absent = subjects.also(also or [], devices)
    except ValueError as error:
        raise BadArgument(str(error)) from None
    if not tested:
        raise BadArgument("no backend of attn_ext works here; see attn-ext doctor")
    from rich.console import Console

    console = Console(highlight=False, markup=False, stderr=as_json)
    for line in absent:
        console.print(f"left out: {line}", style="dim")
    begun = time.perf_counter()
    outcomes, interrupted = _run_all(checks, tested + peers, console)
    seconds = time.perf_counter() - begun
    failed = [o for o in outcomes if o.state == "fail" and (o.ours or strict)]
    if not interrupted and only is None:
        remember(outcomes, console)
    data = as_dict(outcomes, full, seconds, not interrupted)
    if as_json:
        print(json.dumps(data, indent=1))
    else:
        _print(console, outcomes, seconds)
    if report:
        from attn_ext.measure.html import verify_page

        report.write_text(verify_page(data), encoding="utf-8")
        console.print(f"wrote {report}", soft_wrap=True)
    if interrupted:
        print(f"attn-ext: interrupted after {len(outcomes)} results", file=sys.stderr)
        return 130
    return int(bool(failed))


FAMILIES = {
    tuned.HOPPER: "the kernels for Hopper",
    tuned.SECOND: "Triton's kernels of second derivatives",
}


def remember(outcomes: list[Outcome], console) -> None:
    """Let each family of FAMILIES serve from now on where it passed the whole matrix: they are off
    until this machine itself has shown that they are right."""
    for family, words in FAMILIES.items():
        own = [o for o in outcomes if o.subject == family]
        if not own:
            continue
        if any(o.state == "fail" for o in own) or not any(o.state == "pass" for o in own):
            console.print(f"{words} failed: they stay off.  Please report it.")
            continue
        try:
            tuning.mark_verified("cuda", family)
        except OSError as error:
            console.print(f"that {words} passed cannot be kept: {error}")
        else:
            console.print(f"{words} passed: they serve on this GPU from now on")


def _run_all(checks, tested, console) -> tuple[list[Outcome], bool]:
    """(outcomes, whether Ctrl-C ended it)"""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    outcomes: list[Outcome] = []
    total = sum(len(check.dtypes) for check in checks)
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("verify", total=total)
        try:
            for check in checks:
                for dtype in check.dtypes:
                    progress.update(task, description=f"{check.group}: {check.name}, {dtype}")
                    outcomes += run_check(check, dtype, tested)
                    progress.advance(task)
        except KeyboardInterrupt:
            return outcomes, True
    return outcomes, False


def groups(outcomes: list[Outcome]) -> list[dict]:
    """A summary per subject and group: counts, and the measure nearest to its allowed error"""
    table: dict[tuple[str, str], dict] = {}
    for o in outcomes:
        key = (o.subject, o.group)
        if key not in table:
            table[key] = {"subject": o.subject, "group": o.group, "ours": o.ours, "pass": 0,
                          "fail": 0, "n/a": 0, "worst": None, "worst_in": ""}  # fmt: skip
        row = table[key]
        row[o.state] += 1
        worst = o.worst
        if worst is None:
            continue
        old = row["worst"]
        if old is None or worst.max_error / worst.allowed > old.max_error / old.allowed:
            row["worst"], row["worst_in"] = worst, f"{o.check}, {o.dtype}"
    return sorted(table.values(), key=lambda row: (not row["ours"], row["subject"]))


def as_dict(outcomes: list[Outcome], full: bool, seconds: float, complete: bool) -> dict:
    """What --json prints and the HTML report shows"""

    def measure(m):
        values = dataclasses.asdict(m)
        return {k: "inf" if v == float("inf") else rounded(v) for k, v in values.items()}

    return {
        "format": FORMAT,
        "machine": machine("cuda" if torch.cuda.is_available() else "cpu"),
        "full": full,
        "complete": complete,
        "seconds": round(seconds, 1),
        "passed": sum(o.state == "pass" for o in outcomes),
        "failed": sum(o.state == "fail" and o.ours for o in outcomes),
        "peers_failed": sum(o.state == "fail" and not o.ours for o in outcomes),
        "not_applicable": sum(o.state == "n/a" for o in outcomes),
        "outcomes": [
            {
                "subject": o.subject, "ours": o.ours, "group": o.group, "check": o.check,
                "dtype": o.dtype, "state": o.state, "reason": o.reason, "sweep": o.sweep,
                "measures": [measure(m) for m in o.measures],
            }
            for o in outcomes
        ],
    }  # fmt: skip


def _print(console, outcomes: list[Outcome], seconds: float) -> None:
    from rich.table import Table

    table = Table(title="max error against the allowed, at the result nearest to it")
    for name in ("subject", "group", "pass", "fail", "n/a", "max error", "rms", "allowed", "where"):
        table.add_column(name, justify="right" if name in ("pass", "fail", "n/a") else "left")
    last = None
    for row in groups(outcomes):
        if last not in (None, row["subject"]):
            table.add_section()
        worst = row["worst"]
        numbers = ["-"] * 3
        if worst and worst.allowed > 1e-299:
            numbers = [f"{x:.1e}" for x in (worst.max_error, worst.rms_error, worst.allowed)]
        elif worst:
            numbers = [f"{worst.max_error:.1e}", "-", "bitwise"]
        where = f"{worst.name}: {row['worst_in']}" if worst else ""
        table.add_row(
            "" if row["subject"] == last else row["subject"], row["group"], str(row["pass"]),
            str(row["fail"]), str(row["n/a"]), *numbers, where,
            style="red" if row["fail"] else None,
        )  # fmt: skip
        last = row["subject"]
    wide = type(console)(highlight=False, markup=False, width=max(console.width, 140))
    wide.print(table)
    for o in outcomes:
        if o.state == "fail":
            style = "bold red" if o.ours else "yellow"
            console.print(f"FAIL {o.subject}: {o.name}: {o.reason}", style=style, soft_wrap=True)
    reasons: dict[tuple[str, str], int] = {}
    for o in outcomes:
        if o.state == "n/a":
            reasons[o.subject, o.reason] = reasons.get((o.subject, o.reason), 0) + 1
    for (subject, reason), count in reasons.items():
        console.print(f"n/a {subject}: {reason} ({count})", style="dim", soft_wrap=True)
    passed = sum(o.state == "pass" and o.ours for o in outcomes)
    failed = sum(o.state == "fail" and o.ours for o in outcomes)
    line = f"attn_ext: {passed} passed, {failed} failed"
    if any(not o.ours for o in outcomes):
        bad = sum(o.state == "fail" and not o.ours for o in outcomes)
        good = sum(o.state == "pass" and not o.ours for o in outcomes)
        line += f"; peers: {good} passed, {bad} failed (--strict counts them)"
    console.print(f"{line}; {seconds:.0f} s", style="bold red" if failed else "bold green")
