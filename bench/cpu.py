"""attn_ext against every peer installed, on the CPU: each result checked, then medians of turns.

    python bench/cpu.py                               every row, about 15 minutes on 2 cores
    python bench/cpu.py --quick                       one shape, fp32 and bf16, forward
    python bench/cpu.py --rows "forward bf16 1,8,4096,64;decode" --peers torch --budget 1
    python bench/cpu.py --rows decode --peers ggml --threads 1    one thread, beside ggml's one
    python bench/cpu.py --resume --seconds 100        the rows that the file lacks, in parts

Writes bench/results/cpu.json, cpu.md and cpu.png (cpu-part.* where rows or peers are restricted,
unless --json says where).  How times, FLOPs and ceilings are counted: docs/guide/benchmarks.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from attn_ext.measure import ceilings, plots
from attn_ext.measure.cases import CPU_TABLE, Case, make
from attn_ext.measure.measure import measure_all
from attn_ext.measure.peers import OURS, chosen
from attn_ext.measure.results import Report, ceilings_line, machine
from attn_ext.measure.timing import CpuClock

RESULTS = Path(__file__).parent / "results"


def all_cases() -> dict[str, list[Case]]:
    """The rows by the name of their group"""
    return {group: preset.cases() for group, preset in CPU_TABLE.items()}


def select(text: str) -> list[Case]:
    """The cases of "WORD WORD;WORD ...": alternatives by ";", in each all words must match: a group
    of CPU_TABLE, a dtype, causal or full, fwd, bwd or fwd+bwd, or the beginning of a shape.
    """
    found = []
    for alternative in text.split(";"):
        words = alternative.split()
        for group, cases in all_cases().items():
            for case in cases:
                mask = "causal" if case.causal else "full"
                names = {group, case.dtype, mask, case.direction}
                if all(word in names or case.shape.startswith(word) for word in words):
                    found.append(case)
    if not found:
        raise SystemExit(f"--rows: no row matches {text!r}; groups are {', '.join(CPU_TABLE)}")
    return list(dict.fromkeys(found))


def print_case(case: Case, rows, skipped, console: Console, show_skipped: set) -> None:
    """One line: ours, share of the ceiling, then every peer with its ratio"""
    for skip in skipped:
        reason = (skip["peer"], skip["reason"])
        if reason not in show_skipped:
            show_skipped.add(reason)
            console.print(f"  left out: {skip['peer']}: {skip['reason']}", style="dim")
    ours = next((row for row in rows if row.peer == OURS), None)
    share = f"{ours.share:4.0%}" if ours and ours.share is not None else "  - "
    ms = f"{ours.median_ms:9.3f}" if ours and ours.median_ms else "   failed"
    others = [r for r in rows if r.peer != OURS and r.median_ms]
    parts = [f"{r.peer} {r.median_ms:.3f} ({r.ratio or 0:.2f}x)" for r in others]
    bad = [f"{r.peer} {r.state}: {r.error:.1e} > {r.allowed:.1e}" for r in rows if r.state != "ok"]
    console.print(f"{case.name:<38}{ms} ms {share}  {'  '.join(parts + bad)}", highlight=False)


def summary(report: Report) -> Table:
    """A row a case: ours, torch's, the best other peer's, with ratios"""
    table = Table(title=report.title)
    for name in ("case", "attn_ext ms", "of ceiling", "torch ms", "x", "best other", "ms", "x"):
        table.add_column(name, justify="left" if name in ("case", "best other") else "right")
    best = report.best_other()
    by = {(row.case, row.peer): row for row in report.rows}
    for name in dict.fromkeys(row.case for row in report.rows):
        ours, torch_row, other = by.get((name, OURS)), by.get((name, "torch")), best.get(name)
        cells = [name]
        cells.append(f"{ours.median_ms:.3f}" if ours and ours.median_ms else "-")
        cells.append(f"{ours.share:.0%}" if ours and ours.share is not None else "-")
        for column, row in enumerate((torch_row, other)):
            if column:
                cells.append(row.peer if row else "-")
            timed = row is not None and row.median_ms
            cells.append(f"{row.median_ms:.3f}" if timed else "-")
            cells.append(f"{row.ratio:.2f}" if timed and row.ratio else "-")
        table.add_row(*cells)
    return table


def main(argv: list[str] | None = None) -> int:
    """Run; 1 when attn_ext itself failed a check or a case"""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rows", help="e.g. 'forward bf16 causal' or 'decode;1,8,4096,64 fp32 fwd+bwd'")
    add("--shape", action="append", help="a shape B,H,S,D of your own (with --dtype ...)")
    add("--dtype", default="fp32", help="of --shape")
    add("--direction", default="fwd", help="of --shape: fwd, bwd, fwd+bwd")
    add("--causal", action="store_true", help="of --shape")
    add("--quick", action="store_true", help="1,8,1024,64 forward only, short")
    add("--peers", help="comma-separated; default: all that are installed, but flex")
    add("--threads", type=int, help="default: torch's number")
    add("--budget", type=float, default=4.0, help="seconds of timing a row (default 4)")
    add("--turns", type=int, default=11, help="at most so many turns a peer")
    add("--json", type=Path, help="result file; .md and .png are written beside it")
    add("--resume", action="store_true", help="keep the file's rows, measure those it lacks")
    add("--seconds", type=float, default=float("inf"), help="begin no case after so long")
    add("--list", action="store_true", help="print the rows and stop")
    options = parser.parse_args(argv)
    if options.threads is not None:
        if options.threads < 1:
            parser.error(f"--threads must be at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    if options.quick and not options.rows:
        options.rows, options.budget = "forward 1,8,1024,64", min(1.0, options.budget)
    cases = [c for group in all_cases().values() for c in group]
    try:
        if options.rows:
            cases = select(options.rows)
        if options.shape:
            kind = (options.dtype, options.causal, options.direction)
            cases = [make(shape, *kind) for shape in options.shape]
        peers = chosen(options.peers.split(",") if options.peers else None)
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    console = Console(width=200, soft_wrap=True)
    part = bool(options.rows or options.shape or options.peers or options.threads)
    json_path = options.json or RESULTS / ("cpu-part.json" if part else "cpu.json")
    json_path.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    report = Report("attn_ext on the CPU")
    if options.resume and json_path.exists():
        try:
            report = Report.load(json_path)
        except ValueError as error:
            parser.error(f"--resume: {error}")
        done = {row.case for row in report.rows}
        cases = [case for case in cases if case.name not in done]
    report.machine, report.ceilings = machine(), ceilings.measure_cpu()
    report.save_to = [json_path.with_suffix(".json"), json_path.with_suffix(".md")]
    m = report.machine
    console.print(
        f"{m['cpu']}, {m['isa']}, {m['threads']} threads: {ceilings_line(report.ceilings)}"
    )
    shown: set = set()
    try:
        measure_all(
            report, cases, peers, CpuClock(), turns=options.turns, budget=options.budget,
            seconds=options.seconds - (time.perf_counter() - start),
            on_case=lambda case, rows, skips: print_case(case, rows, skips, console, shown),
        )  # fmt: skip
    except KeyboardInterrupt:
        console.print(f"interrupted: {len(report.rows)} finished rows are in {json_path}")
        return 130
    console.print(summary(report))
    plots.bars(report, json_path.with_suffix(".png"))
    took = time.perf_counter() - start
    console.print(f"{took:.0f} s; wrote {json_path} (.md, .png)")
    if not report.complete:
        console.print("not every case was begun: go on with --resume")
        return 0
    failed = {c.name for c in cases} - {r.case for r in report.rows if r.peer == OURS}
    wrong = [row for row in report.rows if row.peer == OURS and row.state == "wrong"]
    return int(bool(failed or wrong))


if __name__ == "__main__":
    sys.exit(main())
