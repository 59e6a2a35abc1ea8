"""attn-ext tune: measures the kernels of this machine, so that "auto" takes the fastest."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import statistics
import time

import torch

from attn_ext.backends import registry, tuned
from attn_ext.cli.errors import BadArgument
from attn_ext.measure import tuning

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
TILES = "attn_ext.triton_kernels.tune"


def run(minutes, device, anew, head_dims, dtype, out, as_json) -> int:
    """Measure for so many minutes and print the table; 1 where it cannot be kept.  `out` gets a
    copy of it."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        here = "cpu or cuda" if torch.cuda.is_available() else "cpu here, where torch sees no GPU"
        raise BadArgument(f"--device must be {here}, got {device!r}")
    if device == "cpu" and os.environ.get("ATTN_EXT_ISA"):
        raise BadArgument("ATTN_EXT_ISA must not be set, since instruction sets are compared")
    if device == "cpu" and registry.get("cpu").available():
        raise BadArgument(f"nothing to measure: {registry.get('cpu').available()}")
    from rich.console import Console

    console = Console(highlight=False, markup=False, stderr=as_json)
    end = time.monotonic() + 60 * minutes
    if device == "cuda" and importlib.util.find_spec("triton") is not None:
        tune_tiles(time.monotonic() + 30 * minutes, head_dims, dtype, console.print)
    try:
        table, left_out = _measured(device, end - time.monotonic(), anew, console)
    except OSError as error:
        console.print(f"attn-ext: the table cannot be kept: {error}", style="red", soft_wrap=True)
        return 1
    path = tuned.path(device)
    if as_json:
        rows = [row._asdict() for row in table.rows]
        answer = {"file": str(path), "complete": table.complete, "rows": rows, "left_out": left_out}
        print(json.dumps(answer, indent=1))
    else:
        _print(console, table, left_out)
    if not table.complete:
        console.print("the time is up: attn-ext tune goes on from here when it is run again")
    if out is not None and path.exists():
        shutil.copyfile(path, out)
    return 0


def tune_tiles(end: float, head_dims: list[int], dtype: str, report) -> None:
    """Tune the Triton kernels' tiles, one direction and width after the other, until `end`."""
    module = importlib.import_module(TILES)
    configs = importlib.import_module("attn_ext.triton_kernels.configs")
    tasks = [(d, kind) for d in head_dims for kind in configs.DIRECTIONS]
    where = torch.device("cuda", torch.cuda.current_device())
    for index, (head_dim, kind) in enumerate(tasks):
        if time.monotonic() > end:
            report(f"the time is up: {len(tasks) - index} of {len(tasks)} tiles keep their values")
            return
        module.tune([kind], [head_dim], 4096, getattr(torch, dtype), where, report=report)


def _measured(device, seconds, anew, console) -> tuple[tuned.Table, list[dict]]:
    """The table, and which engines were left out of which class and why, with a progress bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    left_out = []
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("tune", total=len(tuning.cases(device)))

        def tell(done: int, total: int, found: tuning.Found) -> None:
            progress.update(task, completed=done, description=str(found.row))
            for name, why in found.left_out.items():
                left_out.append({"class": str(found.row), "engine": name, "reason": why})

        return tuning.run(device, seconds, tell, anew), left_out


def _ratio(rows, name: str) -> float | None:
    """How many times the fastest engine's time `name` takes, in the median of the rows"""
    ratios = [row.seconds[name] / min(row.seconds.values()) for row in rows if name in row.seconds]
    return statistics.median(ratios) if ratios else None


def _print(console, table: tuned.Table, left_out: list[dict]) -> None:
    from rich.table import Table

    names = list(dict.fromkeys(name for row in table.rows for name in row.seconds))
    shown = Table("class of calls", *(f"{name}, ms" for name in names), title="the fastest in bold")
    for row in table.rows:
        best = min(row.seconds, key=row.seconds.__getitem__, default=None)
        cells = [f"{row.seconds[n] * 1e3:.3g}" if n in row.seconds else "-" for n in names]
        shown.add_row(str(row), *(f"[bold]{c}[/]" if n == best else c
                                  for n, c in zip(names, cells, strict=True)))  # fmt: skip
    wide = type(console)(highlight=False, width=max(console.width, 120))
    wide.print(shown)
    for name in names:
        best = sum(min(r.seconds, key=r.seconds.__getitem__) == name for r in table.rows)
        console.print(f"{name}: fastest in {best} of {len(table.rows)}; in the median "
                      f"{_ratio(table.rows, name):.2f} times the fastest")  # fmt: skip
    reasons: dict[tuple[str, str], int] = {}
    for one in left_out:
        key = (one["engine"], one["reason"])
        reasons[key] = reasons.get(key, 0) + 1
    for (name, why), count in reasons.items():
        console.print(f"left out {name}: {why} ({count})", style="dim")
