"""flash-attn's entry points of one pass, forward or backward, which other libraries import although
they are private (diffusers' context parallelism, ring-flash-attention, Transformer Engine): layouts
and meanings as in `attn_ext.integrations.flash_attn`.
"""

from __future__ import annotations

import torch

from attn_ext.core import validate, values
from attn_ext.core.schema import GRADIENTS, Call, Needs, statistics_dtype
from attn_ext.functional import dense, varlen
from attn_ext.integrations import checks
from attn_ext.integrations.flash_attn import functions
from attn_ext.ops import parts


def _options(
    softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic
) -> dict:
    named = (("window_size_left", window_size_left), ("window_size_right", window_size_right))
    left, right = (validate.integer(name, x, low=-(1 << 31)) for name, x in named)
    causal = validate.switch("causal", causal)
    return dict(
        scale=None if softmax_scale is None else validate.number("softmax_scale", softmax_scale),
        causal="bottom_right" if causal else False,
        window=(None if left < 0 else left, None if right < 0 or causal else right),
        softcap=softcap, alibi_slopes=alibi_slopes,
        deterministic=validate.switch("deterministic", deterministic),
    )  # fmt: skip


def _dense(q, k, v, options: tuple, **more) -> Call:
    """The call of q [B, Sq, H, D], k and v [B, Sk, Hk, D]."""
    checks.heads_last(q, k, v, ("q", "k", "v"))
    heads_first = (x.detach().transpose(1, 2) for x in (q, k, v))
    return dense.dense_call(*heads_first, **_options(*options), **more)


def _packed(q, k, v, lengths: tuple, options: tuple, **more) -> Call:
    """The call of packed q [total_q, H, D], k and v [total_k, Hk, D]; lengths: cu_seqlens_q,
    cu_seqlens_k, max_seqlen_q and max_seqlen_k."""
    checks.rows(q, k, v, ("q", "k", "v"))
    return varlen.varlen_call(
        *(x.detach() for x in (q, k, v)), *lengths, **_options(*options), **more
    )


def like(name: str, x, shape, dtypes, device) -> None:
    """TypeError or ValueError unless x is a tensor of that shape, device and one of the dtypes."""
    validate.tensor(name, x)
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {x.dtype}")
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} must be on q's device {device}, got {x.device}")


def _forward(call: Call, return_softmax: bool, turn) -> tuple:
    """(out, softmax_lse, S_dmask, rng_state); `turn` puts `out` into flash-attn's order."""
    out, lse, max_logit, _ = torch.ops.attn_ext.forward(*call)
    state = call.rng_state
    if state is None:
        state = torch.zeros(2, dtype=torch.int64, device=call.q.device)
    weights = call.q.new_empty((0,))
    if return_softmax:
        weights = functions.signed_weights(call, max_logit)
    return turn(out), functions.flash_lse(lse), weights, state


def _wants_weights(return_softmax, dropout_p) -> bool:
    wanted = validate.switch("return_softmax", return_softmax)
    if wanted and validate.number("dropout_p", dropout_p, 0.0, 1.0) == 0:
        raise ValueError("return_softmax must be False without dropout, got True")
    return wanted


def _flash_attn_forward(
    q, k, v, dropout_p, softmax_scale, causal, window_size_left=-1, window_size_right=-1,
    softcap=0.0, alibi_slopes=None, return_softmax=False,
) -> tuple:  # fmt: skip
    """(out [B, Sq, H, D], softmax_lse [B, H, Sq], S_dmask, rng_state int64 [2]) of q [B, Sq, H, D],
    k, v [B, Sk, Hk, D], without a graph.  S_dmask is empty unless return_softmax asks for it.
    """
    options = (
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, False,
    )  # fmt: skip
    wanted = _wants_weights(return_softmax, dropout_p)
    with torch.no_grad():
        call = _dense(q, k, v, options, dropout_p=dropout_p, need_stats=wanted)
        return _forward(call, wanted, lambda out: out.transpose(1, 2))


def _used(q, k, v, cu_seqlens_k, seqused_k, block_table) -> tuple:
    """k and v without the keys that are not used (of pages as they are), and the cu_seqlens_k of
    those that are."""
    validate.index_tensor("cu_seqlens_k", cu_seqlens_k, q.device, 1)
    if block_table is None and q.device.type == "cpu":
        values.cumulative("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    batch = max(cu_seqlens_k.shape[0] - 1, 0)
    used = functions.per_batch("seqused_k", seqused_k, batch, q.device).long()
    ends = torch.nn.functional.pad(used.cumsum(0), (1, 0))
    if block_table is None:
        if v.shape[0] != k.shape[0]:  # under autocast, where q, k and v are compared later
            raise ValueError(f"v must have k's {k.shape[0]} rows, got {v.shape[0]}")
        if q.device.type == "cpu" and bool((used > cu_seqlens_k.diff()).any()):
            raise ValueError(
                f"seqused_k must be at most the lengths of cu_seqlens_k, got {used.tolist()} for "
                f"{cu_seqlens_k.diff().tolist()}"
            )
        gaps = torch.repeat_interleave(cu_seqlens_k[:-1].long() - ends[:-1], used)
        rows = gaps + torch.arange(len(gaps), device=q.device)
        k, v = k[rows], v[rows]
    return k, v, ends.to(torch.int32)


def _flash_attn_varlen_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
    causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
    return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    num_splits=0,
) -> tuple:  # fmt: skip
    """`_flash_attn_forward` of packed q [total_q, H, D], k, v [total_k, Hk, D], or k, v in pages
    with a block_table; softmax_lse [H, total_q].  seqused_k int32 [B]: only so many of the keys of
    each sequence.  zero_tensors and num_splits change nothing.
    """
    if leftpad_k is not None:
        raise NotImplementedError(
            f"leftpad_k must be None here, got a {type(leftpad_k).__name__}: use "
            "flash_attn_with_kvcache"
        )
    for name, value in (("q", q), ("k", k), ("v", v)):
        validate.tensor(name, value)
    validate.switch("zero_tensors", zero_tensors)
    validate.integer("num_splits", num_splits)
    options = (
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, False,
    )  # fmt: skip
    wanted = _wants_weights(return_softmax, dropout_p)
    if block_table is None:
        checks.rows(q, k, v, ("q", "k", "v"))
    if seqused_k is not None:
        k, v, cu_seqlens_k = _used(q, k, v, cu_seqlens_k, seqused_k, block_table)
    if block_table is not None:
        k, v = functions.packed_of_pages(q, k, v, block_table, cu_seqlens_k)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    with torch.no_grad():
        call = _packed(q, k, v, lengths, options, dropout_p=dropout_p, need_stats=wanted)
        return _forward(call, wanted, lambda out: out)


def _backward(
    call: Call, q, dout, out, softmax_lse, targets, dropout_p, rng_state, turn
) -> torch.Tensor:
    """Write the gradients of `call` into targets (dq, dk, dv, each may be None), which are in
    flash-attn's order, as dout and out are: `turn` takes it to the call's and back.
    """
    call = call._replace(dropout_p=validate.number("dropout_p", dropout_p, 0.0, 1.0))
    if call.dropout_p > 0:
        like("rng_state", rng_state, (2,), (torch.int64,), q.device)
        call = call._replace(rng_state=rng_state)
    of_out = (*q.shape[:-1], call.v.shape[-1])
    rows = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    like("softmax_lse", softmax_lse, rows, (statistics_dtype(call.q.dtype),), q.device)
    for name, x in (("dout", dout), ("out", out)):
        like(name, x, of_out, (call.q.dtype,), q.device)
    shapes = (q.shape, turn(call.k).shape, turn(call.v).shape)
    for name, x, shape in zip(("dq", "dk", "dv"), targets, shapes, strict=True):
        if x is not None:
            like(name, x, shape, validate.FLOATING, q.device)
    lse = softmax_lse.masked_fill(softmax_lse == torch.inf, -torch.inf)
    wanted = dict(zip("qkv", targets, strict=True))
    needs = Needs(*(wanted.get(name) is not None for name in GRADIENTS))
    dout, out = turn(dout), turn(out)
    delta = parts.delta_of_rows(call, dout, out)
    results = parts.backward_of_rows(call, dout, out, lse, needs, delta)
    for grad, target in zip(results[:3], targets, strict=True):
        if target is not None:
            target.copy_(turn(grad))
    return delta


def _flash_attn_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
    window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
    deterministic=False, rng_state=None,
) -> torch.Tensor:  # fmt: skip
    """Write the gradients of a call of `_flash_attn_forward` into dq, dk and dv, each of which may
    be None; returns softmax_d [B, H, Sq], the row sums of dout * out.  out and softmax_lse may be
    those of rows that have seen more keys, as ring attention has it.
    """
    options = (
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        deterministic,
    )  # fmt: skip
    with torch.no_grad():
        call = _dense(q, k, v, options)
        return _backward(
            call, q, dout, out, softmax_lse, (dq, dk, dv), dropout_p, rng_state,
            lambda x: x.transpose(1, 2),
        )  # fmt: skip


def _flash_attn_varlen_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
    max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left=-1, window_size_right=-1,
    softcap=0.0, alibi_slopes=None, deterministic=False, rng_state=None, zero_tensors=False,
) -> torch.Tensor:  # fmt: skip
    """`_flash_attn_backward` of a call of `_flash_attn_varlen_forward`; softmax_d [H, total_q]."""
    validate.switch("zero_tensors", zero_tensors)
    options = (
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        deterministic,
    )  # fmt: skip
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    with torch.no_grad():
        call = _packed(q, k, v, lengths, options)
        return _backward(
            call, q, dout, out, softmax_lse, (dq, dk, dv), dropout_p, rng_state, lambda x: x
        )


forward, backward = _flash_attn_forward, _flash_attn_backward
varlen_forward, varlen_backward = _flash_attn_varlen_forward, _flash_attn_varlen_backward
# with the names of flash-attn 2.8's torch.library wrappers, which are the same functions
NAMES = {
    f"{prefix}{function.__name__}": function
    for function in (backward, forward, varlen_backward, varlen_forward)
    for prefix in ("", "_wrapped")
}
