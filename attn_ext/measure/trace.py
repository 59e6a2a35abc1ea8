"""Reads a Chrome trace that torch.profiler wrote (with shapes), and finds the attention in it.

An operator of `OPERATORS` is an attention call; its time is its own on a CPU, and on a GPU that of
the kernels which it, or what it called, launched.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
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


_T = "torch "
_RIGHT = INDEX["window_right"]  # 0 there: causal
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
        _T + "efficient", "torch-efficient", "bwd", 1, 11),
    "aten::_scaled_dot_product_cudnn_attention": Operator(
        _T + "cuDNN", "torch-cudnn", "fwd", 0, 6),
    "aten::_scaled_dot_product_cudnn_attention_backward": Operator(
        _T + "cuDNN", "torch-cudnn", "bwd", 1, 14),
    "aten::_scaled_dot_product_attention_math": Operator(_T + "math", "torch-math", "fwd", 0, 5),
    "flash_attn::_flash_attn_forward": Operator("flash-attn", "flash-attn", "fwd", 0, 5, "bshd"),
    "flash_attn::_flash_attn_backward": Operator("flash-attn", "flash-attn", "bwd", 1, 11, "bshd"),
    "attn_ext::forward": Operator("attn_ext", "attn_ext", "fwd", 0, _RIGHT),
    "attn_ext::backward": Operator(
        "attn_ext", "attn_ext", "bwd", 4, _RIGHT + 4),
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
    """What a trace tells.  Seconds: of the wall, of all operators (GPU: kernels), of attention"""

    wall: float
    device: str
    busy: float
    groups: list[Group] = field(default_factory=list)
    written_out: dict[str, float] = field(default_factory=dict)  # softmax over [.., S, S]: seconds

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


def _read(event: dict, device: str) -> Group:
    operator = OPERATORS[event["name"]]
    args = event.get("args", {})
    sizes, text = _shape(args.get("Input Dims", []), operator)
    kinds = args.get("Input type", [])
    dtype = DTYPES.get(kinds[operator.q] if operator.q < len(kinds) else "", "")
    concrete = args.get("Concrete Inputs", [])
    value = concrete[operator.causal] if operator.causal < len(concrete) else ""
    causal = value == "0" if operator.backend == "attn_ext" else value == "True"
    note = ""
    if sizes and causal and sizes[3] != sizes[4] and operator.backend != "attn_ext":
        sizes, note = None, "causal from the top left with unequal lengths"
    case = None
    if sizes and dtype:
        case = Case(*sizes, dtype, causal, operator.direction, device)
    name = case.name.rsplit(" ", 1)[0] if case else f"{text} {dtype}"
    return Group(case, name, operator.backend, operator.peer, operator.direction, note=note)


def analyze(events: list[dict], wall: float) -> Profile:
    """The attention in a trace whose recording took `wall` seconds"""
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
    groups: dict[tuple, Group] = {}
    written: dict[str, float] = defaultdict(float)
    busy = 0.0
    for line in threads.values():
        line.sort(key=lambda e: (e["ts"], -e["dur"]))
        top_end = attention_end = -1.0
        current: Group | None = None
        for e in line:
            end = e["ts"] + e["dur"]
            if e["ts"] >= top_end:
                top_end = end
                busy += e["dur"] / 1e6
            launched = kernels.get(e.get("args", {}).get("External id"), 0.0)
            if e["ts"] < attention_end:  # within an attention operator
                current.seconds += launched
                continue
            if e["name"] in OPERATORS:
                attention_end = end
                found = _read(e, device)
                key = (found.shape, found.backend, found.direction)
                current = groups.setdefault(key, found)
                current.calls += 1
                current.seconds += launched if device == "cuda" else e["dur"] / 1e6
            elif e["name"] == "aten::_softmax":
                dims = (e.get("args", {}).get("Input Dims") or [[]])[0]
                if len(dims) >= 3 and dims[-1] == dims[-2] >= 8:
                    seconds = launched if device == "cuda" else e["dur"] / 1e6
                    written["x".join(map(str, dims))] += seconds
    ordered = sorted(groups.values(), key=lambda group: -group.seconds)
    return Profile(wall, device, gpu_busy or busy, ordered, dict(written))
