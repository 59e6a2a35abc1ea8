"""What the examples share: options, a progress bar, a table, pictures, and the check that a model
learned.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
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
