"""The C++ SIMD backend (csrc/cpu): every feature, forward and backward, on the best instruction
set of the machine.

This module checks what a pointer means before it leaves Python: dtype, device, strides.
`attn_ext.functional.dense` has validated the rest.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
import os
import sys
import warnings
from pathlib import Path

import torch

from attn_ext.backends import tuned
from attn_ext.backends.looks import looks
from attn_ext.backends.native import canonical, fields, point
from attn_ext.core.layout import (
    empty_like_layout,
    four,
    prototype,
    rows,
    score_strides,
    strides,
)
from attn_ext.core.plans import Plans
from attn_ext.core.problem import Problem
from attn_ext.core.schema import (
    INDEX,
    TENSORS,
    Call,
    Grads,
    Needs,
    call_of,
    lse_shape,
    statistics_dtype,
)

try:
    from attn_ext import _C
except ImportError as error:
    _C = None
    if importlib.util.find_spec("attn_ext._C") is None:
        _WHY = (
            f"attn_ext._C is not built in {Path(__file__).parents[2]}: run `pip install -e .` "
            "in the source tree, or leave that folder, which hides an installed attn_ext"
        )
    else:
        _WHY = f"attn_ext._C does not load ({error}): install attn_ext again for this Python"


def _torch_openmp() -> int:
    """The address of GOMP_parallel in the OpenMP runtime that torch has loaded; 0 without one, or
    where it may be the runtime of a parent process whose threads are not here."""
    maps = Path("/proc/self/maps")
    if not maps.exists() or "backend: OpenMP" not in torch.__config__.parallel_info():
        return 0
    if _forked():
        return 0
    loaded = {line.split()[-1] for line in maps.read_text().splitlines() if "omp" in line}
    runtimes = [p for p in loaded if Path(p).name.startswith(("libgomp", "libiomp5"))]
    runtimes.sort(key=lambda p: (str(Path(torch.__file__).parent) not in p, p))  # torch's own first
    for path in runtimes:
        try:
            function = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0


def _forked() -> bool:
    """Whether this process is a copy of its parent, made by fork without exec.

    If the parent has used OpenMP, a parallel region here would wait for its threads for ever, and
    nothing tells whether it has.  The processes of multiprocessing's fork server are no copies of
    one that has computed, and give their main module that name.
    """
    if sys.modules["__main__"].__name__ == "__mp_main__":
        return False
    flags = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[6]
    return bool(int(flags) & 0x40)  # PF_FORKNOEXEC of Linux


# When attn_ext is imported, not at the first call: a child of fork() must find the handlers that
# take its parent's threads out of use, whether or not the parent has called us.
if _C is not None:
    _C.use_openmp(_torch_openmp())

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
NORMALIZERS = ("softmax", "sigmoid")
SCORES = ("dot", "additive")
AMX = "avx512_amx"
AGREEMENT = 2**-6  # of the largest element: two roundings to bfloat16
FRAMES = True  # serves shards of larger calls
MAPS = ("row_stats", "top_k", "column_mass", "pooled_map", "mean_top_k")  # of attn_ext.inspect


def available() -> str:
    """ "" when the extension is there, else why not."""
    return _WHY if _C is None else ""


def unsupported(problem: Problem) -> list[str]:
    """Every reason why this backend cannot serve `problem`."""
    why = []
    if problem.device != "cpu":
        why.append(f"tensors must be on the cpu, got {problem.device}")
    if problem.dtype not in DTYPES:
        why.append(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {problem.dtype}")
    if problem.grad and problem.kind == "decode" and problem.score == "dot":
        why.append("decode has no backward; use attention_varlen to train")
    return why


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def canonical_inputs(call: Call) -> dict:
    """The inputs as the kernels take them."""
    return canonical(call, statistics_dtype(call.q.dtype), DTYPES)


def _isa(call: Call) -> str:
    """Whose kernels shall serve the call where none is forced: the fastest that were measured here,
    or "" for the best that there are."""
    measured = bool(tuned.load("cpu", 0)[0].rows)
    rounds = call.q.dtype == torch.bfloat16  # what AMX's tiles multiply
    if not (measured or rounds) or _C.isa_forced():
        return ""
    fastest = tuned.isa(Problem.of(call)) if measured else ""
    if fastest in _C.supported_isas():
        return fastest
    return AMX if rounds and amx_is_right() else ""


@functools.cache
def amx_is_right() -> bool:
    """Whether this machine has AMX and its kernels agree with those of AVX-512 on a small call,
    forward and backward; a warning where they do not."""
    if AMX not in _C.supported_isas():
        return False
    why = disagreement(AMX, "avx512_bf16")
    if why:
        warnings.warn(
            f"attn_ext leaves the kernels for {AMX} out on this machine: {why}.  Please report it.",
            RuntimeWarning, stacklevel=2,
        )  # fmt: skip
    return not why


def disagreement(first: str, second: str) -> str:
    """How the kernels of two instruction sets differ on one bfloat16 call with more than a tile of
    queries and of keys; "" where they do not.  Milliseconds."""
    shape = (1, 2, 150, 72)
    # not by chance: vmap may forbid that at whatever call is the first
    numbers = torch.arange(math.prod(shape), dtype=torch.float32, device="cpu").view(shape)
    q, k, v, dout = ((numbers * step).sin().bfloat16() for step in (0.7, 1.3, 2.9, 3.7))
    call = Call(q, k, v, scale=0.125, window_right=0, max_seqlen_q=150, max_seqlen_k=150)
    try:
        one, other = (_results(call, dout, isa) for isa in (first, second))
    except ValueError as error:  # Linux refuses the tiles to this process
        return str(error)
    for name, a, b in zip(("out", "dq", "dk", "dv"), one, other, strict=True):
        a, b = a.float(), b.float()
        most = AGREEMENT * b.abs().max()
        if not (a - b).abs().max() <= most:  # NaN too
            return f"{name} differs from that of {second} by {(a - b).abs().max().item():.2g}"
    return ""


def _results(call: Call, dout: torch.Tensor, isa: str) -> list[torch.Tensor]:
    """O and the gradients of q, k and v by the kernels of one instruction set."""
    t, threads = canonical_inputs(call), 1
    out = torch.empty_like(call.q)
    lse = torch.empty(lse_shape(call), dtype=torch.float32, device="cpu")
    native = _C.Call(**fields(call, t, out, lse, DTYPES))
    native.set_isa(isa)
    point(native, q=call.q, k=call.k, v=call.v, o=out, lse=lse, dout=dout)
    native.forward(threads)
    grads = [torch.empty_like(x) for x in (call.q, call.k, call.v)]
    set_gradients(native, call, dout, grads, None)
    point(native, **dict(zip(("dq", "dk", "dv"), grads, strict=True)))
    native.backward(threads)
    return [out, *grads]


def native_call(call: Call, t: dict, out, lse, dw=None, partial: bool = False, given=None):
    """The native call: sizes, strides, scalars and the addresses of the inputs; given: (delta,
    base, rest) of whole rows for the backward of a part."""
    native = _C.Call(**fields(call, t, out, lse, DTYPES))
    native.set_isa(_isa(call))
    w, sigmoid = t["w"], call.normalizer == "sigmoid"
    if sigmoid or partial or w is not None:
        delta, base, rest = given or (None, None, None)
        native.set_options(
            sigmoid=sigmoid, sigmoid_bias=call.sigmoid_bias, w=_address(w), dw=_address(dw),
            partial=partial, delta=_address(delta), base=_address(base), rest=_address(rest),
        )  # fmt: skip
    point(native, **{name: x for name, x in t.items() if name != "w"})
    return native


_plans: Plans[Plan] = Plans()
PLANNED = INDEX["bias"] + 1  # a plan's call may have the tensors up to it: q, k, v, mask, bias


class Plan:
    """All but the addresses of a dense call, forward and backward: most of the time of a small one.

    The call has q, k, v, mask and bias, nothing else, and none is empty.  `forward` and `backward`
    are for tensors that look (`attn_ext.backends.looks`) as the call's do; mask and bias may lack
    leading dimensions of size 1.
    """

    def __init__(self, call: Call):
        q, v = call.q, call.v
        out = empty_like_layout(q, v.shape[-1])
        lse = torch.empty(lse_shape(call), dtype=statistics_dtype(q.dtype), device="cpu")
        self.native = native_call(call, canonical_inputs(call), out, lse)
        self.out, self.lse = prototype(out), prototype(lse)
        self.scalars = call[TENSORS:]
        self.backwards: Plans[tuple] = Plans()  # by the tensors' looks and by `needs`

    def forward(self, q, k, v, mask, bias, lse) -> torch.Tensor:
        """O; LSE goes into `lse`, a tensor like self.lse, where it is wanted."""
        out = torch.empty_like(self.out)
        _C.dense_forward(self.native, torch.get_num_threads(), q, k, v, mask, bias, out, lse)
        return out

    def backward(self, q, k, v, mask, bias, out, lse, dout, needs) -> tuple:
        """(dq, dk, dv, None, dbias, None), the gradients of q, k, v, mask, bias and of what is no
        tensor; dout is of q's dtype and out's shape."""
        dout = rows(dout)
        key = (looks(q, k, v, mask, bias, out, lse, dout), needs)
        known = self.backwards.get(key)
        if known is None:
            known = self._backward_of(q, k, v, mask, bias, out, lse, dout, needs)
            if key[0] is not None:
                self.backwards.keep(key, known)
        return self._run(known, q, k, v, mask, bias, out, lse, dout)

    def backward_again(self, q, k, v, mask, bias, out, lse, dout, needs) -> tuple | None:
        """`backward` where tensors that look the same went that way; else None, with nothing done
        and nothing of the tensors assumed."""
        seen = looks(q, k, v, mask, bias, out, lse, dout)
        known = self.backwards.get((seen, needs))
        return None if known is None else self._run(known, q, k, v, mask, bias, out, lse, dout)

    def _run(self, known, q, k, v, mask, bias, out, lse, dout) -> tuple:
        native, dq, dk, dv, sums = known
        dq = dq if dq is None else torch.empty_like(dq)
        dk = dk if dk is None else torch.empty_like(dk)
        dv = dv if dv is None else torch.empty_like(dv)
        sums = sums if sums is None else torch.zeros_like(sums)
        _C.dense_backward(
            native, torch.get_num_threads(),
            q, k, v, mask, bias, out, lse, dout, dq, dk, dv, sums,
        )  # fmt: skip
        return dq, dk, dv, None, None if sums is None else bias_gradient(bias, sums), None

    def _backward_of(self, q, k, v, mask, bias, out, lse, dout, needs) -> tuple:
        """The native call of a backward, and prototypes of what it writes."""
        call = call_of(self.scalars, q=q, k=k, v=v, mask=four(mask), bias=four(bias))
        *of_rows, of_bias = needs  # q, k, v, bias
        grads = [
            empty_like_layout(x, x.shape[-1]) if need else None
            for x, need in zip((q, k, v), of_rows, strict=True)
        ]
        sums = bias_sums(call, self.lse.dtype) if of_bias else None
        native = native_call(call, canonical_inputs(call), out, lse)
        set_gradients(native, call, dout, grads, sums)
        made = [x if x is None else prototype(x) for x in (*grads, sums)]
        return (native, *made)


def forget() -> None:
    """Drop every plan."""
    _plans.clear()


def plan_key(call: Call) -> tuple | None:
    """What a plan is remembered by; None where the call has other inputs, or what a plan cannot
    hold: statistics, dropout, rows that must be copied, empty tensors."""
    seen = looks(call.q, call.k, call.v, call.mask, call.bias)
    return None if seen is None or not _may_be_planned(call) else (seen, call[TENSORS:])


def plan_of(call: Call) -> Plan | None:
    """The plan of a call, remembered; None where it has none."""
    key = plan_key(call)
    if key is None:
        return None
    return _plans.get(key) or _plans.keep(key, Plan(call))


def _may_be_planned(call: Call) -> bool:
    return (
        all(x is None for x in call[PLANNED:TENSORS])
        and call.dropout_p == 0 and not call.need_stats and call.normalizer == "softmax"
        and call.q.stride(-1) == 1 and call.k.stride(-1) == 1 and call.v.stride(-1) == 1
        and 0 not in call.q.shape and 0 not in call.k.shape
    )  # fmt: skip


def forward(call: Call):
    """O, LSE and, when `call.need_stats`, the largest logit and the entropy of each row."""
    plan = plan_of(call)
    if plan is not None:
        lse = torch.empty_like(plan.lse)
        return plan.forward(call.q, call.k, call.v, call.mask, call.bias, lse), lse, None, None
    t = canonical_inputs(call)
    out = empty_like_layout(call.q, call.v.shape[-1])
    lse = call.q.new_empty(lse_shape(call), dtype=statistics_dtype(call.q.dtype))
    stats = [torch.empty_like(lse), torch.empty_like(lse)] if call.need_stats else [None, None]
    if call.cu_seqlens_q is not None:  # rows that belong to no sequence are empty rows
        out.zero_()
        for x, value in ((lse, float("-inf")), (stats[0], float("-inf")), (stats[1], 0.0)):
            if x is not None:
                x.fill_(value)
    if call.normalizer == "sigmoid":  # has no LSE
        lse.zero_()
    if out.numel() or lse.numel():
        native = native_call(call, t, out, lse)
        point(native, o=out, lse=lse, max_logit=stats[0], entropy=stats[1])
        native.forward(torch.get_num_threads())
    return out, lse, *stats


def bias_sums(call: Call, dtype) -> torch.Tensor:
    """Zeros that the kernels add dS to: of the bias' shape, but a row for each query where one
    element takes a whole head, whose millions of terms one float32 sum would not hold."""
    shape = list(call.bias.shape)
    if shape[2:] == [1, 1]:
        shape[2] = min(call.max_seqlen_q, call.q.shape[-2 if call.cu_seqlens_q is None else 0])
    return torch.zeros(shape, dtype=dtype, device="cpu")


def bias_gradient(bias: torch.Tensor, sums: torch.Tensor | None) -> torch.Tensor | None:
    """The gradient of the bias, in its shape and dtype."""
    if sums is None:
        return None
    if sums.shape[2:] != bias.shape[-2:]:
        sums = sums.sum(2, keepdim=True)
    sums = sums if sums.dim() == bias.dim() else sums.view(bias.shape)
    return sums if sums.dtype == bias.dtype else sums.to(bias.dtype)


def set_gradients(native, call: Call, dout, grads, dbias) -> None:
    """How dout and the gradients of q, k, v and the bias lie in memory."""
    varlen, of = call.cu_seqlens_q is not None, Problem.of(call)
    native.set_gradients(
        strides(dout, varlen),
        *((0, 0, 0) if g is None else strides(g, varlen) for g in grads),
        score_strides(dbias, (of.batch, of.heads_q, of.seqlen_q, of.seqlen_k)),
        call.deterministic,
    )


def backward(call: Call, dout, out, lse, dlse, needs: Needs) -> Grads:
    """The gradients; None where `needs` says so.  That of the bias has its own shape and dtype."""
    plan = None
    if dlse is None and dout.dtype == call.q.dtype and lse.is_contiguous() and not lse.is_neg():
        plan = plan_of(call)
    if plan is not None:
        inputs = (call.q, call.k, call.v, call.mask, call.bias)
        wanted = (needs.q, needs.k, needs.v, needs.bias)
        dq, dk, dv, _, dbias, _ = plan.backward(*inputs, rows(out), lse, dout, wanted)
        return Grads(dq, dk, dv, dbias)
    t, statistics = canonical_inputs(call), statistics_dtype(call.q.dtype)
    dout, out = rows(dout.to(call.q.dtype)), rows(out)
    lse = lse.resolve_neg().contiguous()
    if call.normalizer == "sigmoid":  # LSE is 0, whatever the weights are
        dlse = None
    dlse = None if dlse is None else dlse.to(statistics).resolve_neg().contiguous()
    # Rows without a task: beyond the sequences of a ragged call, or with no queries or no keys.
    ragged = call.cu_seqlens_q is not None or call.seqlens_k is not None
    blank = ragged or call.max_seqlen_q == 0 or call.max_seqlen_k == 0
    grads = [
        empty_like_layout(x, x.shape[-1]) if need else None
        for x, need in zip((call.q, call.k, call.v), needs, strict=False)
    ]
    for g in grads if blank else ():
        if g is not None:
            g.zero_()
    dbias = bias_sums(call, statistics) if needs.bias else None
    dsink = torch.zeros_like(t["sink"]) if needs.sink else None
    dw = None if t["w"] is None else torch.zeros_like(t["w"])
    if call.q.numel() and call.k.numel() and call.v.numel():
        native = native_call(call, t, out, lse, dw)
        set_gradients(native, call, dout, grads, dbias)
        dq, dk, dv = grads
        point(native, o=out, lse=lse, dout=dout, dlse=dlse)
        point(native, dq=dq, dk=dk, dv=dv, dbias=dbias, dsink=dsink)
        native.backward(torch.get_num_threads())
    dw = None if dw is None else dw.to(call.w.dtype)
    return Grads(*grads, bias_gradient(call.bias, dbias), dsink, dw)


def forward_partial(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """(O, sums) of these keys alone, as `attn_ext.ops.parts` has them.  The call has no sink."""
    t, statistics = canonical_inputs(call), statistics_dtype(call.q.dtype)
    out = empty_like_layout(call.q, call.v.shape[-1], statistics)
    base, rest = (call.q.new_empty(lse_shape(call), dtype=statistics) for _ in range(2))
    if call.cu_seqlens_q is not None:  # rows that belong to no sequence are empty rows
        out.zero_()
        base.fill_(float("-inf"))
        rest.zero_()
    if out.numel() or base.numel():
        native = native_call(call, t, out, rest, partial=True)
        point(native, o=out, max_logit=base, lse=rest)
        native.forward(torch.get_num_threads())
    return out, torch.stack([base, rest], -1)


def backward_partial(call: Call, dout, delta, sums, needs: Needs) -> Grads:
    """What these keys add to the gradients of q, k, v and the bias, in the statistics' dtype;
    delta = rowsum(dO * O) - dLSE and sums are those of whole rows."""
    t, statistics = canonical_inputs(call), statistics_dtype(call.q.dtype)
    dout = rows(dout.to(call.q.dtype))
    sums = sums.to(statistics).resolve_neg()
    of_rows = (delta.to(statistics).resolve_neg(), sums[..., 0], sums[..., 1], sums.sum(-1))
    *given, lse = (x.contiguous() for x in of_rows)
    grads = [
        empty_like_layout(x, x.shape[-1], statistics) if need else None
        for x, need in zip((call.q, call.k, call.v), needs, strict=False)
    ]
    ragged = call.cu_seqlens_q is not None
    for g in grads if ragged or call.max_seqlen_q == 0 or call.max_seqlen_k == 0 else ():
        if g is not None:
            g.zero_()
    dbias = bias_sums(call, statistics) if needs.bias else None
    if call.q.numel() and call.k.numel() and call.v.numel():
        native = native_call(call, t, dout, lse, partial=True, given=given)
        set_gradients(native, call, dout, grads, dbias)
        dq, dk, dv = grads
        point(native, lse=lse, dout=dout, dq=dq, dk=dk, dv=dv, dbias=dbias)
        native.backward(torch.get_num_threads())
    if dbias is not None and dbias.shape[2:] != call.bias.shape[2:]:
        dbias = dbias.sum(2, keepdim=True)
    return Grads(*grads, dbias)


ROW_STATS, TOP_K, COLUMN_MASS, POOLED_MAP, MEAN_TOP_K = range(5)  # Map::What


def inspect(call: Call, what: int, lse, out, entropy=None, keys=None, sizes=(0, 0, 0)) -> None:
    """A map of a dense call, by csrc/cpu: fills `out` (and `entropy`, `keys`); all contiguous, in
    the statistics' dtype (keys: int64).  lse is read, and written for ROW_STATS; sizes are
    (n, rows, cols)."""
    t = canonical_inputs(call)
    if not out.numel():
        return
    native = native_call(call, t, call.q, lse)
    point(native, lse=lse)
    native.inspect(
        torch.get_num_threads(), what, sizes, _address(out), _address(entropy), _address(keys)
    )
