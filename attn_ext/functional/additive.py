"""Additive attention (Bahdanau, Cho and Bengio, arXiv 1409.0473) in O(N) memory:

    s_ij = w . tanh(q_i + k_j [+ b]) [+ bias_ij];   P = softmax(s);   O = dropout(P) V

q and k are the *projected* queries and keys, Wq x and Wk y (`attn_ext.nn.AdditiveAttention` holds
the projections).  The [Sq, Sk, D] tensor of tanh never exists.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from attn_ext.core import validate
from attn_ext.core.schema import Call
from attn_ext.functional import common, varlen
from attn_ext.ops import route

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Unpack

    class AdditiveOptions(common.ScoreOptions, total=False):
        """The keywords of `additive_attention_varlen`."""

        b: Tensor | None
        causal: bool | Literal["top_left", "bottom_right"]
        dropout_p: float

    class AdditiveDenseOptions(AdditiveOptions, total=False):
        """Those of `additive_attention`."""

        lengths: Tensor | None


@overload
def additive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[AdditiveDenseOptions],
) -> Tensor: ...


@overload
def additive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    *,
    return_lse: Literal[True],
    **options: Unpack[AdditiveDenseOptions],
) -> tuple[Tensor, Tensor]: ...


@overload
def additive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    *,
    return_lse: bool,
    **options: Unpack[AdditiveDenseOptions],
) -> Any: ...


def additive_attention(
    q, k, v, w, *, b=None, causal=False, window=(None, None), mask=None, bias=None, dropout_p=0.0,
    lengths=None, return_lse=False, backend="auto",
):  # fmt: skip
    """dropout(softmax(w . tanh(q_i + k_j + b) + bias_ij)) v in O(N) memory, differentiable in q, k,
    v, w, b, bias and through LSE.

    q [B, Hq, Sq, D] and k [B, Hk, Sk, D] are projected already (Wq x, Wk y); v [B, Hk, Sk, Dv];
    Hq is a multiple of Hk.  w [D] or [Hq, D]; b alike, or None.  There is no scale.
    causal, window, mask, bias, dropout_p: as `attn_ext.attention` (the same bits of dropout for the
    same seed).  lengths: int32 [B], the used keys of each batch element; keys and values past them
    are not read.  backend: "auto", "cpu", "triton" or "reference".
    Returns out [B, Hq, Sq, Dv], with return_lse also lse [B, Hq, Sq].  A row that sees no key: out
    0, lse -inf, gradients 0.  Errors: as `attn_ext.attention`.
    """
    q, k, v, w, bias = _prepared(4, q, k, v, w, b, bias)
    validate.boolean("return_lse", return_lse)
    left, right = validate.window_pair(window)
    dropout_p = validate.number("dropout_p", dropout_p, 0.0, 1.0)
    canonical = validate.dense(
        q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device,
        causal, left, right, 0.0, dropout_p, None, False, backend,
    )  # fmt: skip
    batch, heads, seqlen_q, dim = q.shape
    mask, bias = common.scores(q, mask, bias, batch, heads, seqlen_q, k.shape[2])
    if lengths is not None:
        validate.index_tensor("lengths", lengths, q.device, 1)
        if lengths.shape[0] != batch:
            raise ValueError(f"lengths must have {batch} entries, got {lengths.shape[0]}")
        lengths = lengths.contiguous()
    w = _weights(w, heads, dim, q)
    sizes = {"seqlens_k": lengths, "max_seqlen_q": seqlen_q, "max_seqlen_k": k.shape[2]}
    call = _call(q, k, v, mask, bias, w, dropout_p, canonical, backend, **sizes)
    return common.result(call, return_lse, False)


@overload
def additive_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[AdditiveOptions],
) -> Tensor: ...


@overload
def additive_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    return_lse: Literal[True],
    **options: Unpack[AdditiveOptions],
) -> tuple[Tensor, Tensor]: ...


@overload
def additive_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    return_lse: bool,
    **options: Unpack[AdditiveOptions],
) -> Any: ...


def additive_attention_varlen(
    q, k, v, w, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, *, b=None,
    causal=False, window=(None, None), mask=None, bias=None, dropout_p=0.0, return_lse=False,
    backend="auto",
):  # fmt: skip
    """`additive_attention` over packed sequences: q [total_q, Hq, D], k [total_k, Hk, D],
    v [total_k, Hk, Dv] and cu_seqlens as in `attn_ext.attention_varlen`.
    """
    q, k, v, w, bias = _prepared(3, q, k, v, w, b, bias)
    validate.boolean("return_lse", return_lse)
    left, right = validate.window_pair(window)
    dropout_p = validate.number("dropout_p", dropout_p, 0.0, 1.0)
    canonical = validate.varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, causal, left, right, 0.0, dropout_p, None, False,
        backend,
    )  # fmt: skip
    longest_q, longest_k = varlen.longest_pair(
        q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, mask is bias is None
    )
    if causal is True:
        varlen.equal_lengths(cu_seqlens_q, cu_seqlens_k)
    batch, heads = cu_seqlens_q.shape[0] - 1, q.shape[1]
    mask, bias = common.scores(q, mask, bias, batch, heads, longest_q, longest_k)
    w = _weights(w, heads, q.shape[2], q)
    call = _call(
        q, k, v, mask, bias, w, dropout_p, canonical, backend,
        cu_seqlens_q=cu_seqlens_q.contiguous(), cu_seqlens_k=cu_seqlens_k.contiguous(),
        max_seqlen_q=longest_q, max_seqlen_k=longest_k,
    )  # fmt: skip
    return common.result(call, return_lse, False)


def _call(q, k, v, mask, bias, w, dropout_p, canonical, backend, **sizes) -> Call:
    """The canonical call: scale 1, everything that belongs to dot products alone off."""
    align, window_left, window_right = canonical
    return Call(
        q=q, k=k, v=v, mask=mask, bias=bias, w=w,
        rng_state=common.draw_rng_state(q) if dropout_p > 0 else None, scale=1.0,
        dropout_p=float(dropout_p), align=align, window_left=window_left,
        window_right=window_right, grad=route.wants_grad(q, k, v, bias, w),
        bias_grad=route.wants_grad(bias), backend=backend, **sizes,
    )  # fmt: skip


def _prepared(dims: int, q, k, v, w, b, bias) -> tuple:
    """Tensors in autocast's dtype, b added to q, which has `dims` dimensions."""
    for name, value in (("q", q), ("k", k), ("v", v), ("w", w)):
        validate.tensor(name, value)
    if bias is not None:
        validate.tensor("bias", bias)
    q, k, v, w, bias = common.autocast(q, k, v, w, bias)
    if b is None:
        return q, k, v, w, bias
    validate.tensor("b", b)
    # the sum would not show what q was
    validate.dimensions("q", q.shape, dims, "[B, H, S, D]" if dims == 4 else "[total, H, D]")
    validate.floating("q", q)
    _vector("b", b, q.shape[1], q.shape[-1], q.device)
    if b.dim() == 2 and dims == 4:
        b = b.unsqueeze(1)
    return q + b.to(q.dtype), k, v, w, bias


def _vector(name: str, value, heads: int, dim: int, device) -> None:
    validate.floating(name, value)
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
