"""Additive attention (Bahdanau, Cho and Bengio, arXiv 1409.0473) in O(N) memory:

    s_ij = w . tanh(q_i + k_j [+ b]);   P = softmax(s);   O = P V

q and k are the *projected* queries and keys, Wq x and Wk y (`attn_ext.nn.AdditiveAttention` holds
the projections).  The [Sq, Sk, D] tensor of tanh never exists.  The operators `attn_ext::additive`
and `attn_ext::additive_backward` work as those in `attn_ext.ops`.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch

from attn_ext import api, ops, reference, validate
from attn_ext.problem import Call, empty_like_layout

BACKENDS = ("triton", "cpu", "reference")
_FIELDS = (
    "Tensor q, Tensor k, Tensor v, Tensor w, Tensor? mask, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, Tensor? lengths, SymInt max_seqlen_q, SymInt max_seqlen_k, int align, "
    "SymInt window_left, SymInt window_right, str backend"
)
_TENSORS = 8


def additive_attention(
    q, k, v, w, *, b=None, causal=False, window=(None, None), mask=None, lengths=None,
    return_lse=False, backend="auto",
):  # fmt: skip
    """softmax(w . tanh(q_i + k_j + b)) v in O(N) memory, differentiable in q, k, v, w, b and
    through LSE.

    q [B, Hq, Sq, D] and k [B, Hk, Sk, D] are projected already (Wq x, Wk y); v [B, Hk, Sk, Dv];
    Hq is a multiple of Hk.  w [D] or [Hq, D]; b alike, or None.  There is no scale.
    causal, window, mask: as `attn_ext.attention`.  lengths: int32 [B], the used keys of each batch
    element.  backend: "auto", "cpu", "triton" or "reference".
    Returns out [B, Hq, Sq, Dv], with return_lse also lse [B, Hq, Sq].  A row that sees no key: out
    0, lse -inf, gradients 0.  Errors: as `attn_ext.attention`.
    """
    q, k, v, w = _prepared(q, k, v, w, b)
    left, right = validate.window_pair(window)
    canonical = validate.dense(
        q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device,
        causal, left, right, 0.0, 0.0, None, False, backend,
    )  # fmt: skip
    batch, heads, seqlen_q, dim = q.shape
    if mask is not None:
        mask = validate.scores("mask", mask, True, q.device, batch, heads, seqlen_q, k.shape[2])
    if lengths is not None:
        validate.index_tensor("lengths", lengths, q.device, 1)
        if lengths.shape[0] != batch:
            raise ValueError(f"lengths must have {batch} entries, got {lengths.shape[0]}")
        lengths = lengths.contiguous()
    w = _weights(w, heads, dim, q)
    args = (q, k, v, w, mask, None, None, lengths, seqlen_q, k.shape[2], *canonical, backend)
    return _result(args, return_lse)


def additive_attention_varlen(
    q, k, v, w, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, *, b=None,
    causal=False, window=(None, None), mask=None, return_lse=False, backend="auto",
):  # fmt: skip
    """`additive_attention` over packed sequences: q [total_q, Hq, D], k [total_k, Hk, D],
    v [total_k, Hk, Dv] and cu_seqlens as in `attn_ext.attention_varlen`.
    """
    q, k, v, w = _prepared(q, k, v, w, b)
    left, right = validate.window_pair(window)
    canonical = validate.varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, causal, left, right, 0.0, 0.0, None, False, backend
    )
    longest_q = api._longest("max_seqlen_q", max_seqlen_q, cu_seqlens_q, q.shape[0])
    longest_k = api._longest("max_seqlen_k", max_seqlen_k, cu_seqlens_k, k.shape[0])
    if causal is True:
        api._equal_lengths(cu_seqlens_q, cu_seqlens_k)
    batch, heads = cu_seqlens_q.shape[0] - 1, q.shape[1]
    if mask is not None:
        mask = validate.scores("mask", mask, True, q.device, batch, heads, longest_q, longest_k)
    w = _weights(w, heads, q.shape[2], q)
    cu = (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous())
    args = (q, k, v, w, mask, *cu, None, longest_q, longest_k, *canonical, backend)
    return _result(args, return_lse)


def _prepared(q, k, v, w, b) -> tuple:
    """Tensors in autocast's dtype, b added to q."""
    for name, value in (("q", q), ("k", k), ("v", v), ("w", w)):
        validate.tensor(name, value)
    q, k, v, w = api.autocast(q, k, v, w)
    if b is None:
        return q, k, v, w
    validate.tensor("b", b)
    heads, dim = q.shape[1] if q.dim() > 2 else 0, q.shape[-1]
    _vector("b", b, heads, dim, q.device)
    if b.dim() == 2 and q.dim() == 4:
        b = b.unsqueeze(1)
    return q + b.to(q.dtype), k, v, w


def _vector(name: str, value, heads: int, dim: int, device) -> None:
    if value.dtype not in validate.FLOATING:
        raise TypeError(f"{name} must be floating, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{name} must be on q's device {device}, got {value.device}")
    if tuple(value.shape) not in ((dim,), (heads, dim)):
        raise ValueError(
            f"{name} must have shape {(dim,)} or {(heads, dim)}, got {tuple(value.shape)}"
        )


def _weights(w, heads: int, dim: int, q) -> torch.Tensor:
    """w [Hq, D] in the statistics' dtype."""
    _vector("w", w, heads, dim, q.device)
    return w.to(torch.promote_types(q.dtype, torch.float32)).expand(heads, dim).contiguous()


def _result(args: tuple, return_lse: bool):
    if torch.autograd.forward_ad._current_level >= 0:
        for x in args[:4]:
            if torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
                raise NotImplementedError(ops.FORWARD_AD)
    out, lse = torch.ops.attn_ext.additive(*args)
    return (out, lse) if return_lse else out


def _call(args: tuple) -> Call:
    """The call without its w: scale 1, everything else of softmax attention off."""
    q, k, v, _, mask, cu_q, cu_k, lengths, longest_q, longest_k, align, left, right, _ = args
    return Call(
        q=q, k=k, v=v, mask=mask, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, seqlens_k=lengths,
        max_seqlen_q=longest_q, max_seqlen_k=longest_k, scale=1.0, align=align, window_left=left,
        window_right=right,
    )  # fmt: skip


def unsupported(name: str, call: Call) -> list[str]:
    """Why backend `name` cannot serve additive attention of `call`."""
    if name == "reference":
        return []
    if name == "cpu":
        from attn_ext.backends import cpu

        missing = cpu.available()
        device = call.q.device.type
        return [missing] if missing else [] if device == "cpu" else [f"needs the cpu, got {device}"]
    if importlib.util.find_spec("attn_ext.triton_kernels.additive") is None:
        return ["the triton kernel of additive attention is not part of this version"]
    return importlib.import_module("attn_ext.triton_kernels.additive").unsupported(call)


def select(name: str, call: Call) -> str:
    """The backend that serves `call`; NotImplementedError with the reasons where there is none."""
    if name == "auto":
        return next(n for n in BACKENDS if not unsupported(n, call))
    if name not in BACKENDS:
        names = ", ".join(map(repr, BACKENDS))
        raise ValueError(f"backend must be 'auto' or one of {names}, got {name!r}")
    why = unsupported(name, call)
    if why:
        raise NotImplementedError(f"backend {name!r} cannot serve this call: {'; '.join(why)}")
    return name


def _forward(*args):
    call, w = _call(args), args[3]
    name = select(args[-1], call)
    validate.values(call)
    if name == "cpu":
        from attn_ext.backends import cpu

        return cpu.family_forward(call, w.contiguous())
    if name == "triton":
        from attn_ext.triton_kernels import additive as kernels

        return kernels.forward(call, w)
    out, lse, _, _ = reference.attend(call, w)
    return _conform(out, empty_like_layout(call.q, call.v.shape[-1])), lse.contiguous()


def _backward(dout, dlse, out, lse, *args):
    call, w = _call(args), args[3]
    name = select(args[-1], call)
    if name == "cpu":
        from attn_ext.backends import cpu

        needs = (True, True, True, False)
        dq, dk, dv, _, dw = cpu.family_backward(call, w.contiguous(), dout, out, lse, dlse, needs)
        return dq, dk, dv, dw
    if name == "triton":
        from attn_ext.triton_kernels import additive as kernels

        return kernels.backward(call, w, dout, out, lse, dlse)
    return _reference_backward(call, w, dout, dlse)


def _reference_backward(call: Call, w, dout, dlse) -> tuple:
    leaves = [x.detach().requires_grad_() for x in (call.q, call.k, call.v, w)]
    with reference.recording():
        call.q, call.k, call.v = leaves[:3]
        outputs = reference.attend(call, leaves[3])[:2]
    seeds = (dout, torch.zeros_like(outputs[1]) if dlse is None else dlse.to(outputs[1].dtype))
    pairs = [(o, g) for o, g in zip(outputs, seeds, strict=True) if o.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(x) for x in leaves)
    outs, grads = zip(*pairs, strict=True)
    found = torch.autograd.grad(outs, leaves, grads, allow_unused=True)
    return tuple(
        torch.zeros_like(x) if g is None else _conform(g, empty_like_layout(x, x.shape[-1]))
        for x, g in zip(leaves, found, strict=True)
    )


def _conform(tensor, promised):
    return tensor if tensor.stride() == promised.stride() else promised.copy_(tensor)


def _outputs(args: tuple) -> tuple:
    q, v = args[0], args[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    shape = (q.shape[1], q.shape[0]) if args[5] is not None else q.shape[:3]
    return empty_like_layout(q, v.shape[-1]), q.new_empty(shape, dtype=dtype)


_tags = tuple(ops._TAGS)
ops.lib.define(f"additive({_FIELDS}) -> (Tensor out, Tensor lse)", tags=_tags)
ops.lib.define(
    f"additive_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {_FIELDS}) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dw)",
    tags=_tags,
)
for _device in ("CPU", "CUDA"):
    ops.lib.impl("additive", _forward, _device)
    ops.lib.impl("additive_backward", _backward, _device)


@torch.library.register_fake("attn_ext::additive", lib=ops.lib)
def _fake(*args):
    return _outputs(args)


@torch.library.register_fake("attn_ext::additive_backward", lib=ops.lib)
def _backward_fake(dout, dlse, out, lse, *args):
    return (
        *(empty_like_layout(x, x.shape[-1]) for x in args[:3]),
        args[3].new_empty(args[3].shape),
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:_TENSORS], *output)
    ctx.rest = inputs[_TENSORS:]
    ctx.set_materialize_grads(False)


def _autograd(ctx, dout, dlse):
    *tensors, out, lse = ctx.saved_tensors
    grads: list = [None] * (_TENSORS + len(ctx.rest))
    if dout is None and dlse is None:
        return tuple(grads)
    dout = torch.zeros_like(out) if dout is None else dout
    found = torch.ops.attn_ext.additive_backward(dout, dlse, out, lse, *tensors, *ctx.rest)
    for index in range(4):
        if ctx.needs_input_grad[index]:
            grads[index] = found[index]
    return tuple(grads)


torch.library.register_autograd(
    "attn_ext::additive", _autograd, setup_context=_setup_context, lib=ops.lib
)
torch.library.register_autograd("attn_ext::additive_backward", ops._no_double_backward, lib=ops.lib)
