"""The table that `attn-ext tune` measured here: which kernels are the fastest for a call.

`attn_ext.measure.tuning` writes it; "auto" and `attn_ext.explain` read it.  It holds for one
device, the versions and the kernels that it was measured with: another one's table is left unread,
and `state` says why.  Without a table everything goes by the fixed order.

An engine is a name: a backend ("triton", "torch"), an instruction set of the CPU ("cpu:avx2"), or
the kernels of csrc/cuda for Hopper ("cuda:sm90").
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.util
import json
import math
import os
import warnings
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from attn_ext.backends.jit import sources
from attn_ext.core.machine import cache_folder, cpu_model
from attn_ext.core.problem import Problem
from attn_ext.core.version import __version__

FORMAT = 1
# Families that no hardware had run when they were written: each serves once it is in `verified`.
HOPPER = "cuda:sm90"
SECOND = "triton:second"  # Triton's second derivatives
TRITON = "attn_ext.triton_kernels"
ADVICE = "attn-ext tune measures it again"


class Row(NamedTuple):
    """What one class of calls took: seconds of each engine whose results were right."""

    dtype: str  # "bfloat16"
    grad: bool  # forward and backward, or the forward alone
    causal: bool
    heads: int  # of queries, in the whole batch
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    seconds: dict[str, float]

    def __str__(self) -> str:
        shape = f"{self.heads} heads, {self.seqlen_q} x {self.seqlen_k}, D = {self.head_dim}"
        kind = "forward and backward" if self.grad else "forward"
        return f"{self.dtype} {'causal ' if self.causal else ''}{kind} of {shape}"


class Table(NamedTuple):
    """The rows of one device, and the families that `attn-ext verify` has passed there."""

    rows: tuple[Row, ...] = ()
    verified: tuple[str, ...] = ()
    date: str = ""
    complete: bool = False


def path(device: str, index: int = 0) -> Path:
    """The file of a device's table."""
    name = hashlib.sha256(device_name(device, index).encode()).hexdigest()[:16]
    return cache_folder() / f"tuned_{name}.json"


@functools.cache
def device_name(device: str, index: int = 0) -> str:
    """What a table belongs to: the GPU, or the CPU with its instruction sets, which virtual
    machines hide beneath one name."""
    if device == "cuda":
        return torch.cuda.get_device_name(index)
    sets = ", ".join(_native().supported_isas()) if _native() else "none"
    return f"{cpu_model()} ({os.cpu_count()} cores; {sets})"


def _native():
    """attn_ext._C, or None where it is not built."""
    try:
        from attn_ext import _C
    except ImportError:
        return None
    return _C


def versions(device: str) -> dict[str, str]:
    """What else a measurement depends on."""
    found = {"attn_ext": __version__, "torch": torch.__version__}
    if device == "cuda":
        try:
            found["triton"] = metadata.version("triton")
        except metadata.PackageNotFoundError:
            found["triton"] = "none"
    return found


@functools.cache
def kernels(device: str) -> str:
    """A digest of the kernels for a device, as they are installed."""
    built = importlib.util.find_spec("attn_ext._C")
    files = [] if built is None else [Path(built.origin)]
    if device == "cuda":
        files += sorted((sources.root() / "cuda").rglob("*.cuh"))
        files += sorted(Path(importlib.util.find_spec(TRITON).origin).parent.rglob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def content(device: str, index: int, table: Table) -> dict:
    """The file of a table."""
    return {
        "format": FORMAT, "device": device_name(device, index), "versions": versions(device),
        "kernels": kernels(device), "date": table.date, "complete": table.complete,
        "verified": list(table.verified), "rows": [row._asdict() for row in table.rows],
    }  # fmt: skip


def read(text: str, device: str, index: int = 0) -> Table:
    """A table from its file's text; ValueError with the reason where it does not hold here."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("is no JSON") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError("is of another format")
    if data.get("device") != device_name(device, index):
        raise ValueError(f"was measured on {data.get('device')}")
    told = data.get("versions")
    for name, version in versions(device).items():
        measured = told.get(name) if isinstance(told, dict) else None
        if measured != version:
            raise ValueError(f"was measured with {name} {measured}, and here is {version}")
    if data.get("kernels") != kernels(device):
        raise ValueError("was measured with other kernels of attn_ext")
    try:
        rows = tuple(_row(row) for row in data["rows"])
        verified = tuple(map(str, data["verified"]))
        return Table(rows, verified, str(data["date"]), bool(data["complete"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"has a bad row ({type(error).__name__}: {error})") from None


def dtype_of(name) -> torch.dtype | None:
    """torch's dtype of that name; None where it is none."""
    found = getattr(torch, name, None) if isinstance(name, str) else None
    return found if isinstance(found, torch.dtype) else None


def _row(data: dict) -> Row:
    row = Row(**data)
    sizes = (row.heads, row.seqlen_q, row.seqlen_k, row.head_dim)
    if dtype_of(row.dtype) is None or not all(type(n) is int and n > 0 for n in sizes):
        raise ValueError(f"sizes {sizes}, dtype {row.dtype!r}")
    for name, seconds in row.seconds.items():
        if not 0 < seconds < math.inf:
            raise ValueError(f"{name} takes {seconds} s")
    return row._replace(grad=bool(row.grad), causal=bool(row.causal))


@functools.cache
def load(device: str, index: int = 0) -> tuple[Table, str]:
    """(table, why there is none: "" where it was read)"""
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        return Table(), f"no table for {device}"
    file = path(device, index)
    try:
        text = file.read_text()
    except FileNotFoundError:
        return Table(), "nothing was measured here (attn-ext tune)"
    except (OSError, UnicodeDecodeError) as error:
        why = f"cannot be read ({type(error).__name__})"
    else:
        try:
            return read(text, device, index), ""
        except ValueError as error:
            why = str(error)
    warnings.warn(f"attn_ext: {file} {why}: it is ignored; {ADVICE}", RuntimeWarning, stacklevel=2)
    return Table(), f"{file.name} {why}"


def forget() -> None:
    """Read the tables again at the next call."""
    load.cache_clear()
    row_of.cache_clear()
    hopper.cache_clear()


def _comparable(problem: Problem) -> bool:
    return problem.score == "dot" and problem.normalizer == "softmax" and not problem.map


def _distance(row: Row, problem: Problem) -> float:
    """How far a problem's sizes are from a row's, in doublings."""
    sizes = (
        (row.seqlen_q, problem.seqlen_q), (row.seqlen_k, problem.seqlen_k),
        (row.head_dim, problem.head_dim),
        (row.heads, problem.batch * problem.heads_q),
    )  # fmt: skip
    weights = (1.0, 1.0, 1.0, 0.25)  # heads only add work of the same kind
    terms = (abs(math.log2(a / max(b, 1))) for a, b in sizes)
    return sum(w * t for w, t in zip(weights, terms, strict=True))


@functools.lru_cache(maxsize=4096)
def row_of(problem: Problem) -> Row | None:
    """The measured row that is nearest to a problem; None where nothing like it was measured."""
    if not _comparable(problem):
        return None
    table, _ = load(problem.device, problem.device_index)
    near = [
        row for row in table.rows
        if dtype_of(row.dtype) == problem.dtype and row.grad == problem.grad
        and row.causal == problem.causal
    ]  # fmt: skip
    return min(near, key=lambda row: _distance(row, problem), default=None)


def fastest(problem: Problem, able: Iterable[str]) -> str | None:
    """The fastest engine of the backends `able`; None where the table does not say."""
    able = set(able)
    row = row_of(problem)
    if row is None:
        return None
    engines = {e: s for e, s in row.seconds.items() if e.partition(":")[0] in able}
    return min(engines, key=engines.__getitem__, default=None)


def isa(problem: Problem) -> str:
    """The instruction set whose kernels are the fastest for a problem on the CPU; "" where the
    table does not say."""
    engine = fastest(problem, ("cpu",)) or ""
    return engine.partition(":")[2]


@functools.cache
def hopper(index: int) -> bool:
    """Whether the kernels for Hopper serve on a GPU: `attn-ext verify` has passed for them there,
    and as far as they were measured beside those for sm_80 they are not slower in the mean."""
    table, _ = load("cuda", index)
    pairs = [(row.seconds.get("cuda:sm90"), row.seconds.get("cuda")) for row in table.rows]
    ratios = [math.log(own / other) for own, other in pairs if own and other]
    return verified(HOPPER, index) and sum(ratios) <= 0


def verified(family: str, index: int) -> bool:
    """Whether `attn-ext verify` has passed for a family of kernels on a GPU."""
    return family in load("cuda", index)[0].verified


def state(device: str, index: int = 0) -> str:
    """What `doctor` and `explain` say of a device's table."""
    table, why = load(device, index)
    if why:
        return why
    rest = "" if table.complete else ", not complete"
    return f"{len(table.rows)} classes of calls measured {_age(table.date)}{rest}"


def _age(date: str) -> str:
    try:
        days = (datetime.date.today() - datetime.date.fromisoformat(date)).days
    except ValueError:
        return f"on {date or 'an unknown day'}"
    return f"on {date}, {days} days ago"
