"""attn_ext as an implementation of torch's flash attention, by torch's own switch (torch 2.13):

    import attn_ext
    torch.nn.attention.activate_flash_attention_impl("attn_ext")
    ...
    torch.nn.attention.restore_flash_attention_impl()

Importing attn_ext offers it and activates nothing.  Active, the operators that torch itself calls
where it chooses flash attention run on attn_ext, in all threads: on a GPU those of
F.scaled_dot_product_attention and of torch.nn.attention.varlen, and the same on a CPU, where torch
has a flash kernel for F.scaled_dot_product_attention without dropout only, and none for varlen.
Which calls are flash attention stays torch's choice: masks, dropout on a CPU and others go to its
other kernels, which `attn_ext.replace_sdpa` takes over too.

The functions are kernels below autograd: torch differentiates, and calls the backwards here.
Layouts and strides of results are those that torch's meta kernels promise.  LSE is the natural
logarithm, [B, H, Sq], or [H, total_q] of packed sequences.
"""

from __future__ import annotations

import sys
import warnings

import torch

from attn_ext.core.layout import conform
from attn_ext.core.schema import GRADIENTS, Call
from attn_ext.functional import dense, varlen
from attn_ext.ops import execute, route

NAME = "attn_ext"
_QKV = tuple(name in ("q", "k", "v") for name in GRADIENTS)


class _Active:
    """torch's handle of an active implementation."""

    def __init__(self, library):
        self.library = library

    def remove(self) -> None:
        self.library._destroy()


def offer() -> None:
    """Tell torch of this implementation, if it has the registry (torch.nn.attention is loaded with
    torch there; where it is not, it would bring the compiler).
    """
    attention = sys.modules.get("torch.nn.attention")
    register = getattr(attention, "register_flash_attention_impl", None)
    if register is not None:
        register(NAME, register_fn=activate)


def activate() -> _Active:
    """Register the kernels; torch's registry calls this."""
    library = torch.library.Library("aten", "IMPL")
    devices = ("CPU", "CUDA") if torch.version.cuda or torch.version.hip else ("CPU",)
    with warnings.catch_warnings():  # that a kernel of torch is overridden, as was asked for
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for device in devices:
            for name, kernel in _KERNELS.items():
                library.impl(name, kernel, device, allow_override=True)
        for name, kernel in _CPU_KERNELS.items():
            library.impl(name, kernel, "CPU", allow_override=True)
    return _Active(library)


def _deterministic(query) -> bool:
    return query.device.type != "cpu" and torch.are_deterministic_algorithms_enabled()


def _dense_call(q, k, v, causal, dropout_p, scale, bias=None) -> Call:
    return dense.dense_call(
        q, k, v, causal=causal, bias=bias, dropout_p=dropout_p, scale=scale,
        deterministic=_deterministic(q),
    )  # fmt: skip


def _forward(call: Call):
    """(out, lse, rng_state as torch's flash attention has it: uint64 [2])."""
    out, lse = route.observed(call, execute.forward)[:2]
    rng = call.rng_state
    if rng is None:
        rng = torch.zeros(2, dtype=torch.int64, device=out.device)
    return out, lse, rng.view(torch.uint64)


def _backward(call: Call, dropout_p, rng_state, dout, out, lse) -> tuple:
    if dropout_p > 0:
        call = call._replace(rng_state=rng_state.view(torch.int64), dropout_p=dropout_p)
    # torch's ring attention over GPUs gives O and LSE of rows that have seen more keys: the kernels
    # of GPUs take LSE as it is given, where it is within 256 of 0.  Those of CPUs may divide a row
    # by its own sum, and are right for whole calls only: torch.distributed's context_parallel
    # refuses the flash attention of CPUs.  attn_ext.ops.parts would serve such rows there, but it
    # makes small calls slower and less exact.
    return execute.backward(dout, None, out, lse, call, _QKV)[:3]


def _no_debug_mask(wanted: bool) -> None:
    if wanted:
        raise NotImplementedError("return_debug_mask must be False, got True")


def _rest(query) -> tuple:
    """The two outputs that nothing reads."""
    return (
        torch.zeros((), dtype=torch.uint64, device=query.device),
        torch.empty(0, dtype=query.dtype, device=query.device),
    )


# aten::_scaled_dot_product_flash_attention: query [B, Hq, Sq, D], key and value [B, Hk, Sk, D].
# Its causal is aligned bottom-right: torch calls it with Sq = Sk, or for a lower-right CausalBias.


def sdpa_forward(
    query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None
):
    _no_debug_mask(return_debug_mask)
    args = _dense_call(query, key, value, "bottom_right" if is_causal else False, dropout_p, scale)
    out, lse, rng_state = _forward(args)
    lengths = (query.shape[2], key.shape[2])
    return (
        conform(out, torch.empty_like(query)), lse, None, None, *lengths, rng_state,
        *_rest(query),
    )  # fmt: skip


def sdpa_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p,
    is_causal, philox_seed, philox_offset, *, scale=None,
):  # fmt: skip
    args = _dense_call(query, key, value, "bottom_right" if is_causal else False, 0.0, scale)
    grads = _backward(args, dropout_p, philox_seed, grad_out, out, logsumexp)
    return _like((query, key, value), grads)


def _like(inputs, grads) -> tuple:
    return tuple(conform(g, torch.empty_like(x)) for g, x in zip(grads, inputs, strict=True))


# aten::_scaled_dot_product_flash_attention_for_cpu: the same with a floating attn_mask that needs
# no gradient, no dropout, and causal aligned top-left.


def _cpu_args(query, key, value, is_causal, attn_mask, scale) -> tuple:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(
            ~attn_mask, -torch.inf
        )
    return _dense_call(
        query, key, value, "top_left" if is_causal else False, 0.0, scale, attn_mask
    )  # fmt: skip


def cpu_forward(
    query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None
):  # fmt: skip
    if dropout_p > 0:
        raise RuntimeError(f"dropout_p must be 0 for torch's CPU flash attention, got {dropout_p}")
    out, lse, _ = _forward(_cpu_args(query, key, value, is_causal, attn_mask, scale))
    batch, heads, rows = lse.shape
    promised = lse.new_empty((batch, rows, heads)).transpose(1, 2)
    return conform(out, torch.empty_like(query)), conform(lse, promised)


def cpu_backward(
    grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, *, attn_mask=None, scale=None
):
    args = _cpu_args(query, key, value, is_causal, attn_mask, scale)
    grads = _backward(args, 0.0, None, grad_out, out, logsumexp.contiguous())
    return tuple(
        conform(
            g, torch.empty_permuted(x.shape, (0, 2, 1, 3), dtype=x.dtype, device=x.device)
        )
        for g, x in zip(grads, (query, key, value), strict=True)
    )  # fmt: skip


# aten::_flash_attention_forward: [B, S, H, D], or packed [total, H, D] with cum_seq_q; causal
# aligned bottom-right; a window of None or -1 is unbounded on that side.


def _window(left, right) -> tuple:
    return tuple(None if x is None or x < 0 else x for x in (left, right))


def _keys(key, value, cum_seq_k, seqused_k, block_table):
    """key and value packed [total_k, Hk, D] with cu_seqlens_k int32 [B + 1]; of pages
    [pages, page_size, Hk, D] with block_table int32 [B, max_pages], and the first seqused_k keys of
    each sequence only, where given.
    """
    if seqused_k is None and block_table is None:
        return key, value, cum_seq_k
    lengths = cum_seq_k.diff() if seqused_k is None else seqused_k
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    if block_table is not None:
        from attn_ext.integrations.flash_attn.functions import from_pages

        return *(from_pages(x, block_table, cu_seqlens) for x in (key, value)), cu_seqlens
    sequence = torch.repeat_interleave(
        torch.arange(len(lengths), device=key.device), lengths.long()
    )
    shift = cum_seq_k[:-1] - cu_seqlens[:-1]
    rows = torch.arange(len(sequence), device=key.device) + shift.long()[sequence]
    return key[rows], value[rows], cu_seqlens


def _flash_call(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, scale, window,
    alibi_slopes=None,
) -> Call:  # fmt: skip
    options = dict(
        causal="bottom_right" if is_causal else False, window=window, dropout_p=dropout_p,
        scale=scale, alibi_slopes=alibi_slopes, deterministic=_deterministic(query),
    )  # fmt: skip
    if cum_seq_q is None:
        return dense.dense_call(*(x.transpose(1, 2) for x in (query, key, value)), **options)
    return varlen.varlen_call(
        query, key, value, cum_seq_q, cum_seq_k, int(max_q), int(max_k), **options
    )  # fmt: skip


def flash_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
    return_debug_mask, *, scale=None, window_size_left=None, window_size_right=None,
    seqused_k=None, alibi_slopes=None, block_table=None, num_splits=None,
):  # fmt: skip
    _no_debug_mask(return_debug_mask)
    if cum_seq_q is None and not (seqused_k is None and block_table is None):
        raise NotImplementedError("seqused_k and block_table must come with cum_seq_q")
    key, value, cum_seq_k = _keys(key, value, cum_seq_k, seqused_k, block_table)
    out, lse, rng_state = _forward(
        _flash_call(
            query,
            key,
            value,
            cum_seq_q,
            cum_seq_k,
            max_q,
            max_k,
            dropout_p,
            is_causal,
            scale,
            _window(window_size_left, window_size_right),
            alibi_slopes,
        )
    )
    out = out if cum_seq_q is not None else out.transpose(1, 2)
    return conform(out, torch.empty_like(query)), lse, rng_state, *_rest(query)


def flash_forward_inplace(out, query, *rest, **options):
    result, lse, *_ = flash_forward(query, *rest, **options)
    out.copy_(result)
    return lse


def flash_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p,
    is_causal, rng_state, unused, *, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    window = _window(window_size_left, window_size_right)
    args = _flash_call(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, 0.0, is_causal, scale, window
    )  # fmt: skip
    dense = cum_seq_q is None
    if dense:
        grad_out, out = grad_out.transpose(1, 2), out.transpose(1, 2)
    grads = _backward(args, dropout_p, rng_state, grad_out, out, logsumexp)
    return _like((query, key, value), [g.transpose(1, 2) for g in grads] if dense else grads)


_KERNELS = {
    "_scaled_dot_product_flash_attention": sdpa_forward,
    "_scaled_dot_product_flash_attention_backward": sdpa_backward,
    "_flash_attention_forward": flash_forward,
    "_flash_attention_forward_no_dropout_inplace": flash_forward_inplace,
    "_flash_attention_backward": flash_backward,
}
_CPU_KERNELS = {
    "_scaled_dot_product_flash_attention_for_cpu": cpu_forward,
    "_scaled_dot_product_flash_attention_for_cpu_backward": cpu_backward,
}
