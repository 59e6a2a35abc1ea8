"""From a `Call` to the CUDA kernels' flat structs, and back: all of the cuda backend but the choice
of device.

`Kernels(module)` works over any module with the interface of csrc/cuda/bindings.h: attn_ext._C.cuda
on a GPU, attn_ext._emulated (tests only) with the same kernels on CPU tensors.
"""

from __future__ import annotations

import contextlib
import os

import torch

from attn_ext.backends import sums, tuned
from attn_ext.backends.native import canonical, fields, point
from attn_ext.core.layout import NO_SCORES, empty_like_layout, memory_order, rows, strides
from attn_ext.core.plans import Plans
from attn_ext.core.problem import Problem
from attn_ext.core.schema import TENSORS, Call, Grads, Needs, lse_shape

DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}  # DType of csrc/params.h
FRAMES = True
MAX_HEAD_DIM = 256
MAX_LENGTH = 2**30  # positions are int32 in the kernels


def unsupported(problem: Problem) -> list[str]:
    """Why the kernels cannot serve `problem`, the device apart."""
    why = []
    if problem.dtype not in DTYPES:
        names = ", ".join(map(str, DTYPES))
        why.append(f"dtype must be one of {names}, got {problem.dtype}")
    for name in ("head_dim", "head_dim_v"):
        if getattr(problem, name) > MAX_HEAD_DIM:
            why.append(f"{name} must be at most {MAX_HEAD_DIM}, got {getattr(problem, name)}")
    for name in ("seqlen_q", "seqlen_k"):
        if getattr(problem, name) >= MAX_LENGTH:
            why.append(f"{name} must be below 2^30, got {getattr(problem, name)}")
    if problem.grad and problem.kind == "decode":
        why.append("decode has no backward; use attention_varlen to train")
    return why


def _gradient_strides(x: torch.Tensor | None) -> tuple[int, int, int, int]:
    """As `score_strides`, and 0 where the bias has one element: the kernel sums that dimension."""
    if x is None:
        return NO_SCORES
    return tuple(0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True))


def _is_plain(call: Call) -> bool:
    """Dense, not empty, no side input, no statistics, rows in place."""
    return (
        all(x is None for x in call[3:TENSORS]) and call.dropout_p == 0 and not call.need_stats
        and call.q.device == call.k.device == call.v.device
        and call.q.stride(-1) == 1 and call.k.stride(-1) == 1 and call.v.stride(-1) == 1
        and not (call.q.is_neg() or call.k.is_neg() or call.v.is_neg())
        and call.q.shape[:3].numel() > 0
    )  # fmt: skip


def plan_key(call: Call) -> tuple | None:
    """What the plan of a plain call is remembered by; None for other calls."""
    if not _is_plain(call):
        return None
    # with their alignment, by which a kernel is chosen that needs scratch, or another
    looks = [(x.shape, x.stride(), x.data_ptr() % 16 == 0) for x in (call.q, call.k, call.v)]
    return (*looks, call.q.dtype, call.q.device, call[TENSORS:])


class Kernels:
    """Forward and backward over one native module, on tensors of one device type."""

    def __init__(self, module, device_type: str):
        self.module, self.device_type = module, device_type
        # Hopper's own kernels: on request, or (None) where they were verified on the GPU itself.
        asked = os.environ.get("ATTN_EXT_CUDA_SM90", "")
        self.sm90: bool | None = asked != "0" if asked else None
        self._devices: dict[int, tuple[int, bool]] = {}  # multiprocessors; is a Hopper GPU
        self._plans: Plans[tuple] = Plans()  # what a plain dense call needs, by shapes, strides

    def _target(self, device: torch.device) -> tuple[int, int, int, bool]:
        """(device index, current stream, multiprocessors, whether sm_90 kernels may serve)"""
        index, stream = 0, 0
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            stream = torch.cuda.current_stream(index).cuda_stream
        if index not in self._devices:
            hopper = self.module.sm90_problem(index) == ""
            self._devices[index] = (self.module.multiprocessors(index), hopper)
        multiprocessors, hopper = self._devices[index]
        if hopper:
            known = device.type == "cuda" and tuned.hopper(index)
            hopper = known if self.sm90 is None else self.sm90
        return index, stream, multiprocessors, hopper

    @staticmethod
    def _on(device: torch.device):
        """The tensors' device is the current one: torch comes back from it without making a CUDA
        context on the device that was current before, which cudaSetDevice would."""
        if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
            return contextlib.nullcontext()
        return torch.cuda.device(device)

    @staticmethod
    def _canonical(call: Call) -> dict:
        """The inputs as the kernels take them."""
        tensors = canonical(call, torch.float32, DTYPES)
        for name, total in (("cu_seqlens_q", call.q.shape[0]), ("cu_seqlens_k", call.k.shape[0])):
            if tensors[name] is None:
                continue
            # Not read back: what is not true must stay in the tensor, and must not fall, or a CTA
            # of a deterministic backward would wait for a tile that no CTA has.
            starts = tensors[name].clamp(0, min(total, 2**31 - 1))
            tensors[name] = starts.cummax(0).values
        return tensors

    def _native(self, call: Call, t: dict, out: torch.Tensor, lse: torch.Tensor, part=False):
        """The native call: sizes, strides, scalars and the addresses of the inputs."""
        counted = call.cu_seqlens_q is not None or call.block_table is not None
        native = self.module.Call(**fields(call, t, out, lse, DTYPES))
        if part:
            native.set_part()
        if counted:
            native.set_rows(t["q"].shape[0], t["k"].shape[0])
        point(native, o=out, lse=lse, **t)
        return native

    def _plain_forward(self, call: Call, key: tuple):
        """Forward of a dense call without side inputs: all but the addresses is remembered, which
        is most of the time of a small call."""
        q, k, v = call.q, call.k, call.v
        target = self._target(q.device)
        key = (*key, target[2:])
        plan = self._plans.get(key)
        if plan is None:
            out = empty_like_layout(q, v.shape[-1])
            lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
            native = self._native(call, self._canonical(call), out, lse)
            scratch = native.forward_workspace(*target[2:])
            plan = self._plans.keep(key, (native, scratch, out.shape, memory_order(q)))
        native, scratch, shape, order = plan
        out = torch.empty_permuted(shape, order, dtype=q.dtype, device=q.device)
        lse = torch.empty(shape[:3], dtype=torch.float32, device=q.device)
        work = torch.empty(scratch, dtype=torch.float32, device=q.device) if scratch else None
        with self._on(q.device):
            native.plain_forward(
                q.data_ptr(),
                k.data_ptr(),
                v.data_ptr(),
                out.data_ptr(),
                lse.data_ptr(),
                0 if work is None else work.data_ptr(),
                *target,
            )
        return out, lse, None, None

    def forward(self, call: Call):
        """O, LSE and, when `call.need_stats`, the largest logit and the entropy of each row."""
        key = plan_key(call)
        if key is not None:
            return self._plain_forward(call, key)
        return self._forward(call)

    def forward_partial(self, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        """(O, sums) of these keys alone, in float32 (`attn_ext.ops.parts`).  The call has no
        sink."""
        return sums.forward(call, *self._forward(call._replace(need_stats=False), True)[:2])

    def _forward(self, call: Call, part: bool = False):
        t = self._canonical(call)
        varlen = call.cu_seqlens_q is not None
        q = call.q
        out = empty_like_layout(q, call.v.shape[-1], torch.float32 if part else q.dtype)
        lse = torch.empty(lse_shape(call), dtype=torch.float32, device=q.device)
        stats = [torch.empty_like(lse), torch.empty_like(lse)] if call.need_stats else [None, None]
        if varlen:  # rows that belong to no sequence are empty rows
            out.zero_()
            for x, value in ((lse, float("-inf")), (stats[0], float("-inf")), (stats[1], 0.0)):
                if x is not None:
                    x.fill_(value)
        if lse.numel() == 0:
            return out, lse, *stats
        target = self._target(q.device)
        native = self._native(call, t, out, lse, part)
        if call.need_stats:
            point(native, max_logit=stats[0], entropy=stats[1])
        floats = native.forward_workspace(*target[2:])
        scratch = torch.empty(floats, dtype=torch.float32, device=q.device) if floats else None
        address = 0 if scratch is None else scratch.data_ptr()
        with self._on(q.device):
            native.forward(address, *target)
        return out, lse, *stats

    def launches(
        self, call: Call, backward: bool, device: tuple[int, bool, int], part=False,
        needs=(True, True, True),
    ):  # fmt: skip
        """(kernel, threads, bytes of shared memory) of each launch that a call would make on a
        device: its multiprocessors, whether Hopper's kernels serve, its shared memory a CTA.
        needs: of q, k and v."""
        q = call.q
        out = empty_like_layout(q, call.v.shape[-1])
        lse = torch.empty(lse_shape(call), dtype=torch.float32, device=q.device)
        native = self._native(call, self._canonical(call), out, lse, part)
        if call.need_stats:
            point(native, max_logit=lse, entropy=lse)
        if backward:
            varlen, bias = call.cu_seqlens_q is not None, call.bias
            grads = [strides(x, varlen) for x in (out, q, call.k, call.v)]
            native.set_gradients(*grads, _gradient_strides(bias), call.deterministic)
            sink = None if part else call.sink
            wanted = (
                x if need else None for x, need in zip((q, call.k, call.v), needs, strict=False)
            )
            dq, dk, dv = wanted
            point(native, dout=out, dq=dq, dk=dk, dv=dv, dbias=bias, dsink=sink)
        return native.launches(backward, *device)

    def backward(self, call: Call, dout, out, lse, dlse, needs: Needs) -> Grads:
        """The gradients; None where `needs` says so.  That of the bias has its own shape and
        dtype."""
        grads = self._backward(call, dout, out, lse, dlse, needs)
        dbias = None if grads.bias is None else grads.bias.to(call.bias.dtype)
        return grads._replace(bias=dbias)

    def backward_partial(self, call: Call, dout, delta, sums_of_rows, needs: Needs) -> Grads:
        """What these keys add to the gradients of q, k, v and the bias, in float32; delta and the
        sums are those of whole rows."""
        needs = needs._replace(sink=False, w=False)  # no part has them
        return sums.backward(
            call, dout, delta, sums_of_rows, needs,
            lambda lse: self._backward(call, dout, None, lse, delta, needs),
        )  # fmt: skip

    def _backward(self, call: Call, dout, out, lse, dlse, needs: Needs) -> Grads:
        """The gradients, that of the bias in float32.  out: None for a part, whose dlse is the
        delta of whole rows."""
        part = out is None
        t = self._canonical(call)
        varlen = call.cu_seqlens_q is not None
        dout = rows(dout.to(call.q.dtype))
        out = dout if part else rows(out)  # of a part the kernels read none
        lse = lse.resolve_neg().contiguous()
        dlse = None if dlse is None else dlse.float().resolve_neg().contiguous()
        grads = []
        for x, need in zip((call.q, call.k, call.v), needs, strict=False):
            dtype = torch.float32 if part else x.dtype
            g = empty_like_layout(x, x.shape[-1], dtype) if need else None
            # Rows without a task: beyond the sequences of a varlen call, or with no queries or no
            # keys at all.
            if need and (varlen or call.max_seqlen_q == 0 or call.max_seqlen_k == 0):
                g.zero_()
            grads.append(g)
        dq, dk, dv = grads
        f32 = {"dtype": torch.float32, "device": call.q.device}
        dbias = torch.zeros(call.bias.shape, **f32) if needs.bias else None
        dsink = torch.zeros(call.sink.shape, **f32) if needs.sink else None
        if call.q.numel() and call.k.numel() and call.v.numel():
            native = self._native(call, t, out, lse, part)
            none = (0, 0, 0)
            native.set_gradients(
                strides(dout, varlen),
                *(none if g is None else strides(g, varlen) for g in grads),
                _gradient_strides(dbias),
                call.deterministic,
            )
            point(native, dout=dout, dlse=dlse, dq=dq, dk=dk, dv=dv, dbias=dbias, dsink=dsink)
            target = self._target(call.q.device)
            scratch = torch.empty(native.backward_workspace(target[3], target[0]), **f32)
            with self._on(call.q.device):
                native.backward(scratch.data_ptr(), *target)
        return Grads(dq, dk, dv, dbias, dsink)
