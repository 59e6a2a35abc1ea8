"""Reads a Chrome trace that torch.profiler wrote (with shapes), and finds the attention in it.

An operator of `OPERATORS` is an attention call; its time is its own on a CPU, and on a GPU that of
the kernels which it, or what it called, launched.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

from attn_ext.core.schema import INDEX
from attn_ext.measure.cases import Case

DTYPES = {
    "float": "fp32", "c10::BFloat16": "bf16", "c10::Half": "fp16", "double": "fp64",
}  # fmt: skip


@dataclass(frozen=True)
class Operator:
    """How to read one operator's inputs: where q is (k and v follow), and where is_causal is"""

    backend: str  # as the report names it
    peer: str  # which peer of peers.PEERS replays it
    direction: str
    q: int
    causal: int
    layout: str = "bhsd"
    dropout: int | None = None  # where dropout_p is, if not before is_causal


_T = "torch "
_RIGHT = INDEX["window_right"]  # 0 there: causal
_DROPOUT = INDEX["dropout_p"]
MATH = "aten::_scaled_dot_product_attention_math"  # many operators, forward and backward
OPERATORS = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": Operator(
        _T + "flash (CPU)", "torch", "fwd", 0, 4),
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": Operator(
        _T + "flash (CPU)", "torch", "bwd", 1, 7),
    "aten::_scaled_dot_product_flash_attention": Operator(_T + "flash", "torch-flash", "fwd", 0, 4),
    "aten::_scaled_dot_product_flash_attention_backward": Operator(
        _T + "flash", "torch-flash", "bwd", 1, 11),
    "aten::_scaled_dot_product_efficient_attention": Operator(
        _T + "efficient", "torch-efficient", "fwd", 0, 6),
    "aten::_scaled_dot_product_efficient_attention_backward": Operator(
        _T + "efficient", "torch-efficient", "bwd", 1, 11, dropout=9),
    "aten::_scaled_dot_product_cudnn_attention": Operator(
        _T + "cuDNN", "torch-cudnn", "fwd", 0, 6),
    "aten::_scaled_dot_product_cudnn_attention_backward": Operator(
        _T + "cuDNN", "torch-cudnn", "bwd", 1, 14),
    MATH: Operator(_T + "math", "torch-math", "fwd", 0, 5),
    "flash_attn::_flash_attn_forward": Operator("flash-attn", "flash-attn", "fwd", 0, 5, "bshd"),
    "flash_attn::_flash_attn_backward": Operator("flash-attn", "flash-attn", "bwd", 1, 11, "bshd"),
    "attn_ext::forward": Operator("attn_ext", "attn_ext", "fwd", 0, _RIGHT, dropout=_DROPOUT),
    "attn_ext::backward": Operator(
        "attn_ext", "attn_ext", "bwd", 4, _RIGHT + 4, dropout=_DROPOUT + 4),
}  # fmt: skip


@dataclass
class Group:
    """All calls of one shape, dtype, direction and backend"""

    case: Case | None  # None: a shape that cannot be told (varlen, other layouts)
    shape: str
    backend: str
    peer: str
    direction: str
    calls: int = 0
    seconds: float = 0.0
    note: str = ""
    share_of_ceiling: float | None = None
    replayed_ms: float | None = None  # the same backend, on random data
    ours_ms: float | None = None  # attn_ext on the same
    saves_seconds: float | None = None

    @property
    def mean_ms(self) -> float:
        """Milliseconds a call"""
        return self.seconds / self.calls * 1e3


@dataclass
class Profile:
    """What a trace tells.  Seconds: of the wall, of all operators (GPU: kernels), of attention;
    those of the steps that are counted, where the optimizer marks steps.
    """

    wall: float
    device: str
    busy: float
    groups: list[Group] = field(default_factory=list)
    written_out: dict[str, float] = field(default_factory=dict)  # softmax over [.., S, S]: seconds
    steps: int = 0  # that are counted; 0: no step of an optimizer was seen
    skipped: int = 0  # before these
    compiled: bool = False  # whether code of torch.compile ran

    @property
    def attention(self) -> float:
        """Seconds in attention"""
        return sum(group.seconds for group in self.groups)


def load(path: Path) -> list[dict]:
    """The complete events of a trace file"""
    data = json.loads(Path(path).read_text())
    return [e for e in data["traceEvents"] if e.get("ph") == "X"]


def _shape(dims, operator: Operator) -> tuple[tuple | None, str]:
    """((B, Hq, Hk, Sq, Sk, D) or None, text) of an operator's recorded inputs"""
    q, k, v = (dims[operator.q + i] if operator.q + i < len(dims) else [] for i in range(3))
    text = " ".join("x".join(map(str, x)) for x in (q, k, v))
    if not all(len(x) == 4 for x in (q, k, v)):
        return None, text
    if operator.layout == "bshd":
        q, k, v = ([x[0], x[2], x[1], x[3]] for x in (q, k, v))
    sizes = (q[0], q[1], k[1], q[2], k[2], q[3])
    usable = q[3] == k[3] == v[3] and min(sizes) > 0 and sizes[1] % sizes[2] == 0
    return (sizes if usable else None), text


def _concrete(args: dict, index: int) -> str:
    concrete = args.get("Concrete Inputs", [])
    return concrete[index] if 0 <= index < len(concrete) else ""


def _read(event: dict, device: str) -> Group:
    operator = OPERATORS[event["name"]]
    args = event.get("args", {})
    sizes, text = _shape(args.get("Input Dims", []), operator)
    kinds = args.get("Input type", [])
    dtype = DTYPES.get(kinds[operator.q] if operator.q < len(kinds) else "", "")
    value = _concrete(args, operator.causal)
    causal = value == "0" if operator.backend == "attn_ext" else value == "True"
    at = operator.causal - 1 if operator.dropout is None else operator.dropout
    dropout = 0.0 if operator.backend == "flash-attn" else float(_concrete(args, at) or 0.0)
    note = ""
    if sizes and causal and sizes[3] != sizes[4] and operator.backend != "attn_ext":
        sizes, note = None, "causal from the top left with unequal lengths"
    case = None
    if sizes and dtype:
        case = Case(*sizes, dtype, causal, operator.direction, device, dropout)
    name = case.name.rsplit(" ", 1)[0] if case else f"{text} {dtype}"
    return Group(case, name, operator.backend, operator.peer, operator.direction, note=note)


STEP = "Optimizer.step#"  # how torch.optim names its steps in a trace
SLOW = 1.5  # times the median: a step that still warms up


def _steps(events: list[dict], skip: int | None) -> tuple[float, float, int, int]:
    """(start, end, steps, skipped) of what is counted, times as in the trace.

    skip: how many of the first steps are left out; None: the first one, and those after it that
    are slow (compilation, first allocations), where there are three steps or more.
    """
    begun = [e["ts"] for e in events if e.get("cat") == "cpu_op"]
    ended = [e["ts"] + e["dur"] for e in events]
    start, end = min(begun, default=0.0), max(ended, default=0.0)
    ends = sorted(
        e["ts"] + e["dur"]
        for e in events
        if e.get("cat") == "user_annotation" and e["name"].startswith(STEP)
    )
    if skip is not None and skip >= max(1, len(ends)):
        raise ValueError(
            f"skip_steps must be less than the {len(ends)} steps of an optimizer that were "
            f"recorded, got {skip}"
        )
    if skip is None:
        skip = _warm_up(ends) if len(ends) > 2 else 0
    if not ends:
        return start, end, 0, 0
    return (ends[skip - 1] if skip else start), ends[-1], len(ends) - skip, skip


def _warm_up(ends: list[float]) -> int:
    lasted = [b - a for a, b in itertools.pairwise(ends)]  # of all but the first step
    slow = SLOW * statistics.median(lasted)
    return 1 + next(i for i, seconds in enumerate(lasted) if seconds <= slow)


class _Reader:
    """Goes through the events of each thread, and adds up."""

    def __init__(self, device: str, kernels: dict):
        self.device, self.kernels = device, kernels
        self.groups: dict[tuple, Group] = {}
        self.written: dict[str, float] = defaultdict(float)
        self.busy = 0.0
        self.numbers: dict[int, int] = {}  # sequence number of an operator: the math call it is of
        self.math: list[Group] = []  # the backward of each math call

    def group(self, found: Group) -> Group:
        """The group of all calls like `found`."""
        key = (found.shape, found.backend, found.direction)
        return self.groups.setdefault(key, found)

    def seconds(self, event: dict) -> float:
        """Of an operator: its own on a CPU, of the kernels that it launched itself on a GPU."""
        if self.device == "cuda":
            return self.kernels.get(event.get("args", {}).get("External id"), 0.0)
        return event["dur"] / 1e6

    def forward(self, line: list[dict]) -> None:
        """The attention operators of one thread's events, in their order."""
        top_end = attention_end = -1.0
        current: Group | None = None
        for e in line:
            end = e["ts"] + e["dur"]
            if e["ts"] >= top_end:
                top_end = end
                self.busy += e["dur"] / 1e6
            if e["ts"] < attention_end:  # within an attention operator
                current.seconds += self.seconds(e) if self.device == "cuda" else 0.0
                if current.peer == "torch-math":
                    self._remember(e)
            elif e["name"] in OPERATORS:
                attention_end = end
                found = _read(e, self.device)
                current = self.group(found)
                current.calls += 1
                current.seconds += self.seconds(e)
                if e["name"] == MATH:
                    case = found.case and replace(found.case, direction="bwd")
                    self.math.append(
                        Group(case, found.shape, found.backend, found.peer, "bwd", note=found.note)
                    )
            elif e["name"] == "aten::_softmax":
                dims = (e.get("args", {}).get("Input Dims") or [[]])[0]
                if len(dims) >= 3 and dims[-1] == dims[-2] >= 8:
                    self.written["x".join(map(str, dims))] += self.seconds(e)

    def _remember(self, event: dict) -> None:
        args = event.get("args", {})
        if "Sequence number" in args and not args.get("Fwd thread id"):
            self.numbers[args["Sequence number"]] = len(self.math) - 1

    def backward(self, line: list[dict]) -> None:
        """Of torch's math attention: autograd says which operator of a forward each step of a
        backward belongs to, by its sequence number.
        """
        node_end, current, seen = -1.0, None, set()
        for e in line:
            args = e.get("args", {})
            if e["ts"] < node_end:
                current.seconds += self.seconds(e) if self.device == "cuda" else 0.0
            elif e["name"].startswith(NODE) and args.get("Fwd thread id"):
                call = self.numbers.get(args.get("Sequence number"))
                if call is None:
                    continue
                current, node_end = self.group(self.math[call]), e["ts"] + e["dur"]
                current.seconds += self.seconds(e)
                current.calls += call not in seen
                seen.add(call)


NODE = "autograd::engine::evaluate_function: "


def analyze(events: list[dict], wall: float | None = None, skip: int | None = None) -> Profile:
    """The attention in a trace.  wall: seconds that the recording took, None: as the trace says;
    skip: see `_steps`.
    """
    start, end, steps, skipped = _steps(events, skip)
    if steps or wall is None:
        events = [e for e in events if start <= e["ts"] < end]
        wall = (end - start) / 1e6
    kernels = defaultdict(float)  # external id -> seconds
    gpu_busy = 0.0
    for e in events:
        if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            gpu_busy += e["dur"] / 1e6
            kernels[e.get("args", {}).get("External id")] += e["dur"] / 1e6
    device = "cuda" if gpu_busy else "cpu"
    threads = defaultdict(list)
    for e in events:
        if e.get("cat") == "cpu_op":
            threads[e["tid"]].append(e)
    reader = _Reader(device, kernels)
    for line in threads.values():
        line.sort(key=lambda e: (e["ts"], -e["dur"]))
        reader.forward(line)
    for line in threads.values():
        reader.backward(line)
    ordered = sorted(reader.groups.values(), key=lambda group: -group.seconds)
    busy, written = gpu_busy or reader.busy, dict(reader.written)
    compiled = any(e["name"].startswith("Torch-Compiled Region") for e in events)
    return Profile(wall, device, busy, ordered, written, steps, skipped, compiled)
