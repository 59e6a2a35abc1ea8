"""The Triton backend (triton_kernels): every GPU that Triton reaches, and CPU tensors under
Triton's interpreter (`TRITON_INTERPRET=1`, set before Python imports triton).

Triton is imported when a call comes here, never with attn_ext.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os

import torch

from attn_ext.backends import sums
from attn_ext.core.problem import Problem
from attn_ext.core.schema import Call

MAX_HEAD_DIM = 256
NORMALIZERS = ("softmax", "sigmoid")
SCORES = ("dot", "additive")
FRAMES = True
MAPS = ("top_k", "mean_top_k", "column_mass", "pooled_map")  # of attn_ext.inspect
MAX_TOP_K = 64  # keys a query that its kernel keeps in registers
OLDEST = (3, 6)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_INTERPRET = (
    "set the environment variable TRITON_INTERPRET=1 before Python starts to run the kernels in "
    "Triton's interpreter on CPU tensors (slow, for tests)"
)


@functools.cache
def _installed() -> str:
    """ "" when a Triton that the kernels know is installed, else what to do."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; run `pip install triton` (Linux)"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""  # a build from source without metadata; taken at its word
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"triton must be {oldest} or newer, got {version}; run `pip install -U triton`"
    return ""


@functools.cache
def _interpreting() -> bool:
    """Whether kernels run in the interpreter.  Triton decides it when a kernel is defined, so the
    first answer stays."""
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("", "0", "false", "off", "no"):
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def available() -> str:
    """ "" when it can run here, else the reason and the remedy."""
    missing = _installed()
    if missing:
        return missing
    if torch.cuda.is_available() or _interpreting():
        return ""
    return f"torch sees no GPU; {_INTERPRET}"


def unsupported(problem: Problem) -> list[str]:
    """Every reason why this backend cannot serve `problem`."""
    why = []
    if problem.device == "cpu":
        if not _interpreting():
            why.append(f"tensors must be on a GPU, got cpu; {_INTERPRET}")
    elif problem.device != "cuda":
        why.append(f"tensors must be on a cuda or rocm device, got {problem.device}")
    elif _interpreting():
        why.append("TRITON_INTERPRET is set: the interpreter takes CPU tensors, got cuda")
    if problem.dtype not in _DTYPES:
        why.append(f"dtype must be one of {', '.join(map(str, _DTYPES))}, got {problem.dtype}")
    for name, dim in (("head_dim", problem.head_dim), ("head_dim of v", problem.head_dim_v)):
        if dim > MAX_HEAD_DIM:
            why.append(f"{name} must be at most {MAX_HEAD_DIM} on triton, got {dim}")
    if problem.grad and problem.kind == "decode" and problem.score == "dot":
        why.append("decode has no backward; use attention_varlen to train")
    if problem.map and (problem.score != "dot" or problem.normalizer != "softmax"):
        why.append("its inspect kernels know softmax over dot products only")
    if problem.top_k > MAX_TOP_K:
        why.append(f"n must be at most {MAX_TOP_K} on triton, got {problem.top_k}")
    if problem.normalizer == "sigmoid" and problem.kind == "decode":
        why.append("sigmoid weights have no decode kernel on triton")
    return why


def forward(call: Call):
    """O, LSE and, when `call.need_stats`, the largest logit and the entropy of each row."""
    from attn_ext.triton_kernels.launch import additive, attention

    return (attention if call.w is None else additive).forward(call)


def backward(call: Call, dout, out, lse, dlse, needs):
    """The gradients; None where `needs` says so.  That of the bias has its own shape and dtype."""
    from attn_ext.triton_kernels.launch import additive, backward

    launch = backward if call.w is None else additive
    return launch.backward(call, dout, out, lse, dlse, needs)


def backward_kernels(problem: Problem) -> str:
    """The kernels of a backward with the gradients of q, k and v; "" where all calls have the
    same."""
    from attn_ext.triton_kernels.launch import backward

    return backward.kernels_of(problem) if problem.score == "dot" else ""


def decode_int8(call: Call, k_factors, v_factors, dtype):
    """(O, LSE) in float32 of a paged decode call whose k and v are int8, with their factors; dtype:
    that of the queries before they were float32."""
    from attn_ext.triton_kernels.launch import decode_int8

    return decode_int8.forward(call, k_factors, v_factors, dtype)


def forward_partial(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """(O, sums) of these keys alone, in float32 (`attn_ext.ops.parts`).  The call has no sink."""
    from attn_ext.triton_kernels.launch import attention

    out, lse, *_ = attention.forward(call._replace(need_stats=False), partial=True)
    return sums.forward(call, out, lse)


def backward_partial(call: Call, dout, delta, sums_of_rows, needs):
    """What these keys add to the gradients of q, k, v and the bias, in float32; delta and the sums
    are those of whole rows."""
    from attn_ext.triton_kernels.launch import backward

    needs = needs._replace(sink=False, w=False)  # no part has them
    return sums.backward(
        call, dout, delta, sums_of_rows, needs,
        lambda lse: backward.backward(call, dout, None, lse, delta, needs),
    )  # fmt: skip


def inspect_top_k(call: Call, n: int, lse):
    """(weights, keys) [B, Hq, Sq, n] of a dense call."""
    from attn_ext.triton_kernels.launch import inspect

    return inspect.top_k(call, n, lse)


def inspect_mean_top_k(call: Call, n: int, lse):
    """(weights, keys, keys seen, keys seen by any head, sums of rows) of a dense call's mean over
    heads."""
    from attn_ext.triton_kernels.launch import inspect

    return inspect.mean_top_k(call, n, lse)


def inspect_column_mass(call: Call, lse):
    """sum_i P_ij [B, Hq, Sk] of a dense call."""
    from attn_ext.triton_kernels.launch import inspect

    return inspect.column_mass(call, lse)


def inspect_pooled_map(call: Call, rows: int, cols: int, lse):
    """P averaged down to [B, Hq, rows, cols] of a dense call."""
    from attn_ext.triton_kernels.launch import inspect

    return inspect.pooled_map(call, rows, cols, lse)
