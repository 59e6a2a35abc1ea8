"""attn-ext bench: the profiling engine with tables, files and figures."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from attn_ext.backends import registry
from attn_ext.cli.errors import BadArgument
from attn_ext.measure import ceilings, timing
from attn_ext.measure.cases import PRESETS, Case, make
from attn_ext.measure.measure import measure_all
from attn_ext.measure.peers import chosen
from attn_ext.measure.results import COLUMNS, Report, ceilings_line, cells, machine

FILES = ("bench.json", "bench.csv", "bench.md")


def cases(preset, shapes, dtypes, causal, backward, device) -> list[Case]:
    """The cases that the options ask for"""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise BadArgument(f"--device must be cpu or cuda, got {device!r}")
    if device != "cpu" and not torch.cuda.is_available():
        raise BadArgument(f"--device {device}: torch sees no CUDA device here")
    if preset is not None and preset not in PRESETS:
        raise BadArgument(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    directions = ["fwd+bwd"] if backward else None
    try:
        if preset is not None:
            if causal:
                raise BadArgument("--causal belongs to --shape; a preset has its own masks")
            if backward and preset == "decode":
                raise BadArgument("--backward: decode has no backward")
            found = PRESETS[preset].cases(dtypes, directions, device)
        else:
            kind = (directions or ["fwd"])[0]
            dtypes = dtypes or ["fp32", "bf16"]
            found = [make(s, d, causal, kind, device) for s in shapes for d in dtypes]
    except ValueError as error:
        raise BadArgument(f"--{error}") from None
    for case in found:
        tensors = 6 * case.bytes if backward else 3 * case.bytes
        if tensors > 0.8 * _free(device):
            raise BadArgument(
                f"--shape {case.shape} needs about {tensors / 2**30:.0f} GiB for its tensors, "
                f"{_free(device) / 2**30:.0f} GiB are free"
            )
    return found


def _free(device: str) -> int:
    from attn_ext.measure.peers import available_bytes

    return available_bytes(device)


def run(wanted: list[Case], peer_names, budget: float, out: Path | None, as_json: bool) -> int:
    """Measure, print, write; 1 when attn_ext failed a check or a case"""
    try:
        names = chosen(peer_names)
    except ValueError as error:
        raise BadArgument(f"--{error}") from None
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Table

    device = wanted[0].device
    if device == "cpu" and registry.get("cpu").available():
        raise BadArgument("no backend of attn_ext works here; see attn-ext doctor")
    console = Console(highlight=False, markup=False, stderr=as_json)
    begun = time.perf_counter()
    report = Report("attn-ext bench", machine(device))
    if out:
        report.save_to = [out / name for name in FILES]
    interrupted = False
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("ceilings", total=len(wanted))
        try:
            report.ceilings = ceilings.measure(device)

            def advance(case, rows, skipped):
                progress.update(task, advance=1, description=case.name)

            measure_all(
                report, wanted, names, timing.clock_for(device), budget=budget, on_case=advance
            )
        except KeyboardInterrupt:
            interrupted = True
            report.save()
    if as_json:
        print(report.to_json(), end="")
    else:
        table = Table(title=f"{report.machine.get('gpu') or report.machine['cpu']}, "
                            f"torch {report.machine['torch']}")  # fmt: skip
        for name in COLUMNS:
            text = name in ("case", "peer", "of ceiling", "check")
            table.add_column(name, justify="left" if text else "right", no_wrap=True)
        last = None
        for row in report.rows:
            values = cells(row)
            values[0] = "" if values[0] == last else values[0]
            last = row.case
            style = "bold" if row.peer == "attn_ext" else "red" if row.state == "wrong" else None
            table.add_row(*values, style=style)
        wide = Console(highlight=False, markup=False, width=max(console.width, 150))
        wide.print(table)
        if report.ceilings:
            console.print(f"ceilings: {ceilings_line(report.ceilings)}")
        for line in report.skipped_lines():
            console.print(f"left out: {line}", style="dim", soft_wrap=True)
    if out and report.rows:
        _figures(report, out, console)
        console.print(f"wrote {out}/{', '.join(FILES)}", soft_wrap=True)
    if interrupted:
        print(f"attn-ext: interrupted after {len(report.rows)} rows", file=sys.stderr)
        return 130
    console.print(f"{time.perf_counter() - begun:.0f} s", style="dim")
    ours = [row for row in report.rows if row.peer == "attn_ext"]
    return int(len(ours) < len(wanted) or any(row.state == "wrong" for row in ours))


def _figures(report: Report, out: Path, console) -> None:
    try:
        from attn_ext.measure import plots

        plots.bars(report, out / "bars.png")
        plots.roofline(report, out / "roofline.png")
        console.print(f"wrote {out}/bars.png, roofline.png", soft_wrap=True)
    except ImportError as error:
        console.print(f"no figures: {error}")
