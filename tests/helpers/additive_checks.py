"""Additive attention under the tolerance rule: what its tests on each backend share."""

import torch

from attn_ext.ops import additive
from attn_ext.testing import (
    assert_close_to_reference,
    cancellation,
    poisoned_memory,
    random_call,
)


def arguments(call, w, backend):
    """The operator's flat arguments of a call."""
    return (
        call.q, call.k, call.v, w, call.mask, call.bias, call.rng_state, call.cu_seqlens_q,
        call.cu_seqlens_k, call.seqlens_k, call.max_seqlen_q, call.max_seqlen_k, call.dropout_p,
        call.align, call.window_left, call.window_right, backend,
    )  # fmt: skip


def results(call, w, dout, dlse, backend, dtype):
    """out, lse, dq, dk, dv, dw, dbias with every float input in `dtype`."""
    call = call.__class__(**{n: getattr(call, n) for n in call.__slots__})
    call.q, call.k, call.v = (x.to(dtype) for x in (call.q, call.k, call.v))
    w = w.to(torch.promote_types(dtype, torch.float32))
    flat = arguments(call, w, backend)
    with poisoned_memory():
        out, lse = additive.forward(*flat)
        grads = additive.backward(
            dout.to(dtype), dlse.to(w.dtype), out, lse, *flat, call.bias is not None
        )
    return out, lse, *grads


def check(options, dtype, backend="cpu", spread=1.0):
    """A call of random_call's `options` under the tolerance rule."""
    call = random_call(3, dtype=dtype, **options)
    call.q, call.k = call.q * spread, call.k * spread
    check_call(call, dtype, backend, options)


def check_call(call, dtype, backend, label=""):
    """One call under the tolerance rule."""
    heads, dim = call.q.shape[-3 if call.cu_seqlens_q is None else -2], call.q.shape[-1]
    generator = torch.Generator().manual_seed(1)
    w, dout = (
        torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)
        for shape in ((heads, dim), (*call.q.shape[:-1], call.v.shape[-1]))
    )
    shape = (heads, call.q.shape[0]) if call.cu_seqlens_q is not None else call.q.shape[:3]
    dlse = torch.randn(shape, generator=generator)
    got = results(call, w, dout, dlse, backend, dtype)
    truth = results(call, w, dout, dlse, "reference", torch.float64)
    naive = results(call, w, dout, dlse, "reference", dtype)
    names = ("out", "lse", "dq", "dk", "dv", "dw", "dbias")
    w_largest = w.abs().max().item()
    for name, x, want, plain in zip(names, got, truth, naive, strict=True):
        if call.seqlens_k is not None:  # the unused part of the cache is NaN
            want, plain = (torch.where(torch.isnan(t), 0.0, t) for t in (want, plain))
        kind = "grad" if name.startswith("d") else "out"
        # dS cancels as in dot-product attention; tanh' w is at most w
        call.scale = 1.0
        rounding = 0.0
        if name == "dbias" and call.bias is not None:
            rounding = cancellation(call, dout, got[0], "bias")
        elif kind == "grad" and name not in ("dv", "dbias"):
            finite = call.k[torch.isfinite(call.k)]
            largest = finite.abs().max().item() if finite.numel() else 1.0
            rounding = cancellation(call, dout, got[0], "q") / max(largest, 1e-9)
            rounding *= w_largest * call.q.shape[-2] ** 0.5
        assert_close_to_reference(x, want, plain, kind, f"{label}: {name}", dtype, rounding)
