"""The results model: rows, what was skipped and why, machine, ceilings; written as JSON, CSV and
Markdown after every case, so that an interrupted run leaves what it has.
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from attn_ext.core.machine import cpu_model
from attn_ext.core.version import __version__
from attn_ext.measure.ceilings import Ceilings

FORMAT = 1  # of the JSON file; see docs/guide/benchmarks.md


@dataclass
class Row:
    """One peer on one case.  Times in milliseconds; error is the largest of the worst output."""

    shape: str
    dtype: str
    causal: bool
    direction: str
    device: str
    peer: str
    state: str  # ok, inaccurate, wrong (then it was not timed)
    error: float
    allowed: float
    median_ms: float | None = None
    best_ms: float | None = None
    samples: int = 0
    tflops: float | None = None
    gb_s: float | None = None
    peak_mib: float | None = None
    share: float | None = None  # of the ceiling: least possible time / median
    bound: str | None = None  # compute or memory: which ceiling
    ratio: float | None = None  # this peer's median / attn_ext's: above 1, attn_ext is faster

    @property
    def case(self) -> str:
        """Shape, dtype, mask and direction"""
        mask = "causal" if self.causal else "full"
        return f"{self.shape} {self.dtype} {mask} {self.direction}"


def machine(device: str = "cpu") -> dict:
    """Device, versions, threads and the command that runs"""
    try:
        from attn_ext import _C

        isa = _C.isa()
    except ImportError:
        isa = None
    found = {
        "cpu": cpu_model(),
        "isa": isa,
        "threads": torch.get_num_threads(),
        "attn_ext": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found


def rounded(value, digits: int = 5):
    """A float to so many significant digits; anything else as it is"""
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


@dataclass
class Report:
    """All results of a run.  `save_to`: files that are written after each `add`."""

    title: str
    machine: dict = field(default_factory=machine)
    ceilings: Ceilings | None = None
    rows: list[Row] = field(default_factory=list)
    skipped: list[dict] = field(default_factory=list)  # {"case", "peer", "reason"}
    save_to: list[Path] = field(default_factory=list)
    complete: bool = False

    def add(self, rows: list[Row], skipped: list[dict]) -> None:
        """Take the results of a case, and write"""
        self.rows += rows
        self.skipped += skipped
        self.save()

    def save(self) -> None:
        """Write every file of `save_to`, each by renaming a finished one into place"""
        for path in self.save_to:
            write = {".json": self.to_json, ".csv": self.to_csv, ".md": self.to_markdown}
            temporary = path.with_name(path.name + ".part")
            temporary.write_text(write[path.suffix]())
            os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> Report:
        """A report from its JSON file, to go on with; ValueError for a file of another format"""
        data = json.loads(path.read_text())
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"{path} is not a result file of format {FORMAT}")
        roofs = Ceilings(**data["ceilings"]) if data["ceilings"] else None
        rows = [Row(**row) for row in data["rows"]]
        return cls(data["title"], data["machine"], roofs, rows, data["skipped"])

    def as_dict(self) -> dict:
        """What the JSON file holds"""
        return {
            "format": FORMAT,
            "title": self.title,
            "complete": self.complete,
            "machine": self.machine,
            "ceilings": self.ceilings.as_dict() if self.ceilings else None,
            "rows": [{k: rounded(v) for k, v in asdict(row).items()} for row in self.rows],
            "skipped": self.skipped,
        }

    def to_json(self) -> str:
        """JSON text"""
        return json.dumps(self.as_dict(), indent=1) + "\n"

    def to_csv(self) -> str:
        """One line a row"""
        text = io.StringIO()
        rows = self.as_dict()["rows"]
        writer = csv.DictWriter(text, list(Row.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def to_markdown(self) -> str:
        """A table of cases by peers, and the reasons of what was left out"""
        lines = [f"# {self.title}", "", ", ".join(f"{k}: {v}" for k, v in self.machine.items())]
        if self.ceilings:
            lines += ["", f"Ceilings: {ceilings_line(self.ceilings)}"]
        lines += ["", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in self.rows]
        if self.skipped:
            lines += ["", "Left out:", ""]
            lines += [f"- {line}" for line in self.skipped_lines()]
        return "\n".join(lines) + "\n"

    def skipped_lines(self) -> list[str]:
        """One line for each peer and reason, with the number of cases"""
        counts: dict[tuple[str, str], int] = {}
        for skip in self.skipped:
            key = (skip["peer"], skip["reason"])
            counts[key] = counts.get(key, 0) + 1
        return [f"{p}: {r} ({n} case{'s' * (n > 1)})" for (p, r), n in counts.items()]

    def best_other(self, ours: str = "attn_ext") -> dict[str, Row]:
        """The fastest other peer of each case"""
        best: dict[str, Row] = {}
        for row in self.rows:
            if row.peer.startswith(ours) or row.median_ms is None:
                continue
            if row.case not in best or row.median_ms < best[row.case].median_ms:
                best[row.case] = row
        return best


def ceilings_line(c: Ceilings) -> str:
    """The ceilings in words"""
    exp = f", {c.exp:.0f} Gexp/s" if c.exp else ""
    return f"fp32 {c.fp32:.0f} GFLOP/s, 16-bit {c.half:.0f} GFLOP/s, read {c.read:.0f} GB/s{exp}"


COLUMNS = (
    "case", "peer", "ms", "best", "ratio", "TFLOP/s", "GB/s", "of ceiling", "peak MiB", "error",
    "check",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    """A row as the tables print it"""

    def number(value, form):
        return "-" if value is None else format(value, form)

    return [
        row.case,
        row.peer,
        number(row.median_ms, ".3f"),
        number(row.best_ms, ".3f"),
        number(row.ratio, ".2f"),
        number(row.tflops, ".3f"),
        number(row.gb_s, ".1f"),
        "-" if row.share is None else f"{row.share:.0%} {row.bound}",
        number(row.peak_mib, ".1f"),
        f"{row.error:.1e}",
        row.state if row.state == "ok" else f"{row.state} (allowed {row.allowed:.1e})",
    ]
