"""The functions of flash-attn's own extension, `flash_attn_2_cuda` (flash_attn_interface names it
`flash_attn_gpu`), with its order of arguments; their meanings are those of `passes`.

`out`, and dq, dk and dv of a backward, are written in place where they are given.  A generator is
refused: dropout draws from torch's generator of the device.
"""

from __future__ import annotations

import torch

from attn_ext.core import validate
from attn_ext.integrations.flash_attn import functions, passes


def _no_generator(gen) -> None:
    if gen is not None:
        raise NotImplementedError(
            f"gen must be None: torch.manual_seed decides, got a {type(gen).__name__}"
        )


def _into(target, out: torch.Tensor) -> torch.Tensor:
    """`out`, in the tensor `target` where one is given."""
    if target is None:
        return out
    passes.like("out", target, out.shape, (out.dtype,), out.device)
    return target.copy_(out)


def fwd(
    q, k, v, out, alibi_slopes, p_dropout, softmax_scale, is_causal, window_size_left,
    window_size_right, softcap, return_softmax, gen=None,
) -> list:  # fmt: skip
    """[out, softmax_lse, S_dmask, rng_state] of `passes._flash_attn_forward`."""
    _no_generator(gen)
    found, *others = passes.forward(
        q, k, v, p_dropout, softmax_scale, is_causal, window_size_left, window_size_right, softcap,
        alibi_slopes, return_softmax,
    )  # fmt: skip
    return [_into(out, found), *others]


def varlen_fwd(
    q, k, v, out, cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table, alibi_slopes,
    max_seqlen_q, max_seqlen_k, p_dropout, softmax_scale, zero_tensors, is_causal,
    window_size_left, window_size_right, softcap, return_softmax, gen=None, num_splits=0,
) -> list:  # fmt: skip
    """[out, softmax_lse, S_dmask, rng_state] of `passes._flash_attn_varlen_forward`."""
    _no_generator(gen)
    found, *others = passes.varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, p_dropout, softmax_scale,
        is_causal, window_size_left, window_size_right, softcap, alibi_slopes, return_softmax,
        block_table, leftpad_k, seqused_k, zero_tensors, num_splits,
    )  # fmt: skip
    return [_into(out, found), *others]


def _targets(q, k, v, dq, dk, dv) -> tuple:
    for name, x in (("q", q), ("k", k), ("v", v)):
        validate.tensor(name, x)
    pairs = ((dq, q), (dk, k), (dv, v))
    return tuple(torch.empty_like(x) if grad is None else grad for grad, x in pairs)


def bwd(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, alibi_slopes, p_dropout, softmax_scale, is_causal,
    window_size_left, window_size_right, softcap, deterministic, gen=None, rng_state=None,
) -> list:  # fmt: skip
    """[dq, dk, dv, softmax_d] of `passes._flash_attn_backward`."""
    _no_generator(gen)
    grads = _targets(q, k, v, dq, dk, dv)
    softmax_d = passes.backward(
        dout, q, k, v, out, softmax_lse, *grads, p_dropout, softmax_scale, is_causal,
        window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state,
    )  # fmt: skip
    return [*grads, softmax_d]


def varlen_bwd(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, alibi_slopes,
    max_seqlen_q, max_seqlen_k, p_dropout, softmax_scale, zero_tensors, is_causal,
    window_size_left, window_size_right, softcap, deterministic, gen=None, rng_state=None,
) -> list:  # fmt: skip
    """[dq, dk, dv, softmax_d] of `passes._flash_attn_varlen_backward`."""
    _no_generator(gen)
    grads = _targets(q, k, v, dq, dk, dv)
    softmax_d = passes.varlen_backward(
        dout, q, k, v, out, softmax_lse, *grads, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, p_dropout, softmax_scale, is_causal, window_size_left, window_size_right,
        softcap, alibi_slopes, deterministic, rng_state, zero_tensors,
    )  # fmt: skip
    return [*grads, softmax_d]


def fwd_kvcache(
    q, kcache, vcache, k, v, seqlens_k, rotary_cos, rotary_sin, cache_batch_idx, leftpad_k,
    block_table, alibi_slopes, out, softmax_scale, is_causal, window_size_left, window_size_right,
    softcap, is_rotary_interleaved, num_splits,
) -> list:  # fmt: skip
    """[out, softmax_lse] of `functions.flash_attn_with_kvcache`."""
    found, lse = functions.flash_attn_with_kvcache(
        q, kcache, vcache, k, v, rotary_cos, rotary_sin, seqlens_k, cache_batch_idx, leftpad_k,
        block_table, softmax_scale, is_causal, (window_size_left, window_size_right), softcap,
        is_rotary_interleaved, alibi_slopes, num_splits, return_softmax_lse=True,
    )  # fmt: skip
    return [_into(out, found), lse]


FUNCTIONS = (fwd, varlen_fwd, bwd, varlen_bwd, fwd_kvcache)
