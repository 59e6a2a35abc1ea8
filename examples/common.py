"""What the examples share: options, a progress bar, a table, pictures, and the check that a model
learned.
"""

from __future__ import annotations

import argparse
import datetime
import os
import socket
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

console = Console()


def options(doc: str, name: str, parser: argparse.ArgumentParser | None = None):
    """--short and --out DIR (made if missing), with what `parser` adds; seeds torch."""
    parser = parser or argparse.ArgumentParser()
    parser.description = doc.splitlines()[0]
    parser.add_argument("--short", action="store_true", help="a short run that still must learn")
    parser.add_argument("--out", type=Path, default=Path("out") / name)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    return chosen


def steps(total: int, text: str = "training"):
    """Yields (step, say) for each step under a progress bar; say(text) changes its label."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task(text, total=total)
        for step in range(total):
            yield step, lambda label: progress.update(bar, description=label)
            progress.update(bar, advance=1)


def table(title: str, headings: list[str], rows: list[list[str]]) -> None:
    """Print a table, its first column to the left."""
    out = Table(title=title)
    for index, heading in enumerate(headings):
        out.add_column(heading, justify="right" if index else "left")
    for row in rows:
        out.add_row(*map(str, row))
    console.print(out)


def save(figure, path: Path) -> None:
    """Write a picture and say so."""
    figure.savefig(path, dpi=90, bbox_inches="tight")
    plt.close(figure)
    console.print(f"wrote {path}")


def learned(what: str, value: float, baseline: float, goal: float, higher: bool = True) -> None:
    """Print the held-out figure beside its baseline; AssertionError unless it reaches `goal` and
    beats the baseline.
    """
    console.print(f"held out: {what} {value:.4g}, baseline {baseline:.4g}, asked for {goal:.4g}")
    good = min(value - goal, value - baseline) >= 0 if higher else value <= min(goal, baseline)
    assert good, f"{what} must reach {goal:.4g} and beat {baseline:.4g}, got {value:.4g}"
    console.print("learned")


def _rank(rank: int, main, chosen, place: dict) -> None:
    """One process of `started`."""
    os.environ.update(place, RANK=os.environ.get("RANK", str(rank)))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    console.quiet = dist.get_rank() > 0
    try:
        main(chosen)
    finally:
        dist.destroy_process_group()


def started(main, chosen, processes: int = 2) -> None:
    """main(chosen) on each process of a group: those of torchrun, or else of forks of this one."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _rank(0, main, chosen, {})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    start = torch.multiprocessing.start_processes
    start(_rank, (main, chosen, place), processes, start_method="fork")
