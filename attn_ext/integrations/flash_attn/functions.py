"""flash-attn 2's functions on attn_ext: same signatures and meanings, on CPU and in float32 too.

q [B, S, H, D] (packed: [total, H, D]), causal and windows aligned bottom-right, a window side -1 is
unbounded.  LSE is the natural log, float32 [B, H, Sq] ([H, total_q]), +inf for a row that sees no
key (flash-attn's choice; `attn_ext.attention` gives -inf).
"""

from __future__ import annotations

from typing import Any

import torch

from attn_ext.core import logit, reference, validate, values
from attn_ext.core.schema import Call
from attn_ext.functional import common, decode, dense, varlen
from attn_ext.integrations import checks
from attn_ext.integrations.flash_attn import rotary
from attn_ext.ops import route


def _scale(softmax_scale):
    return None if softmax_scale is None else validate.number("softmax_scale", softmax_scale)


def _window(window_size, causal: bool) -> tuple:
    """flash-attn's (left, right) as attn_ext's: negative is unbounded; causal closes the right."""
    if isinstance(window_size, torch.Tensor):
        validate.tensor("window_size", window_size)
        window_size = window_size if window_size.is_meta else window_size.tolist()
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise ValueError(f"window_size must be a pair (left, right), got {window_size!r}")
    window_size = [validate.integer("window_size", x, low=-(1 << 31)) for x in window_size]
    left, right = (None if side < 0 else side for side in window_size)
    return left, None if causal else right


def _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic):
    causal = validate.switch("causal", causal)
    return dict(
        dropout_p=validate.number("dropout_p", dropout_p, 0.0, 1.0), scale=_scale(softmax_scale),
        causal="bottom_right" if causal else False, window=_window(window_size, causal),
        softcap=validate.number("softcap", softcap, 0.0), alibi_slopes=alibi_slopes,
        deterministic=validate.switch("deterministic", deterministic),
    )  # fmt: skip


def _rank(name: str, value, shape: str) -> None:
    validate.tensor(name, value)
    if value.dim() != shape.count(",") + 1:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")


def _packed(name: str, value, axis: int, count: int, shape: str):
    """The `count` tensors packed along `axis`."""
    _rank(name, value, shape)
    if value.shape[axis] != count:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    return value.unbind(axis)


def flash_lse(lse):
    """+inf where no key is seen, as flash-attn has it."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def _round_up(n: int) -> int:
    return (n + 127) // 128 * 128


def signed_weights(call: Call, max_logit):
    """S_dmask [B, H, round128(Sq), round128(Sk)]: exp(logit - row maximum), negative where dropped.

    For tests only, as in flash-attn: it holds the whole matrix.
    """
    varlen = call.cu_seqlens_q is not None
    if varlen:
        seqlens_q, seqlens_k = call.cu_seqlens_q.diff().tolist(), call.cu_seqlens_k.diff().tolist()
    else:
        batch = call.q.shape[0]
        seqlens_q, seqlens_k = [call.max_seqlen_q] * batch, [call.max_seqlen_k] * batch
    batch, heads = len(seqlens_q), call.q.shape[1]
    sizes = (batch, heads, _round_up(call.max_seqlen_q), _round_up(call.max_seqlen_k))
    result = call.q.new_zeros(sizes)
    seed, offset = call.rng_state.tolist()
    start_q = start_k = 0
    for b, (rows, cols) in enumerate(zip(seqlens_q, seqlens_k, strict=True)):
        if varlen:
            q = call.q[start_q : start_q + rows].transpose(0, 1)
            k = call.k[start_k : start_k + cols].transpose(0, 1)
            top = max_logit[:, start_q : start_q + rows]
        else:
            q, k, top = call.q[b], call.k[b], max_logit[b]
        start_q, start_k = start_q + rows, start_k + cols
        k = k.repeat_interleave(heads // k.shape[0], dim=0)
        pairs = logit.Pairs.all_of(rows, cols, q.device, slice(b, b + 1))
        s = logit.of(call, (q.float() @ k.float().transpose(1, 2))[None], pairs, None)[0]
        s = torch.exp(s - top.to(s.dtype)[..., None]) * logit.in_window(call, pairs)
        keep = reference.dropout_keep_mask(
            seed, offset, 1, heads, rows, cols, call.dropout_p, s.device, b
        )[0]
        s = torch.where(top[..., None] == -torch.inf, 0.0, torch.where(keep, s, -s))
        result[b, :, :rows, :cols] = s
    return result


def _run(call: Call, return_attn_probs: bool, layout):
    """The outputs of a call; `layout` puts `out` into flash-attn's order."""
    if not return_attn_probs:
        return layout(common.result(call, False, False))
    out, lse, stats = common.result(call, True, True)
    weights = call.q.new_empty((0,))
    if call.dropout_p > 0:
        with torch.no_grad():
            weights = signed_weights(call, stats.max_logit)
    return layout(out), flash_lse(lse), weights


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
) -> Any:  # fmt: skip
    """Attention of q [B, Sq, H, D] to k, v [B, Sk, Hk, D]; H a multiple of Hk.

    Returns out [B, Sq, H, D]; with return_attn_probs (out, softmax_lse float32 [B, H, Sq], S_dmask:
    exp(logit - row maximum) padded to multiples of 128 and negative where dropped, empty without
    dropout).  causal and window_size (left, right; -1 unbounded) are aligned bottom-right;
    alibi_slopes [H] or [B, H] float32.  ValueError and TypeError name a bad argument.
    """
    for name, value in (("q", q), ("k", k), ("v", v)):
        _rank(name, value, "[B, S, H, D]")
    options = _options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic
    )
    return_attn_probs = validate.switch("return_attn_probs", return_attn_probs)
    call = dense.dense_call(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        need_stats=return_attn_probs, **options,
    )  # fmt: skip
    return _run(call, return_attn_probs, lambda out: out.transpose(1, 2))


def flash_attn_qkvpacked_func(
    qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
) -> Any:  # fmt: skip
    """`flash_attn_func` of qkv [B, S, 3, H, D]."""
    q, k, v = _packed("qkv", qkv, 2, 3, "[B, S, 3, H, D]")
    checks.heads_last(q, k, v, ("qkv", "qkv", "qkv"))
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
) -> Any:  # fmt: skip
    """`flash_attn_func` of q [B, Sq, H, D] and kv [B, Sk, 2, Hk, D]."""
    k, v = _packed("kv", kv, 2, 2, "[B, Sk, 2, Hk, D]")
    checks.heads_last(q, k, v, ("q", "kv", "kv"))
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def from_pages(pages, block_table, cu_seqlens_k):
    """pages [num_blocks, page_size, Hk, D] -> packed [total_k, Hk, D] of the listed lengths."""
    lengths = cu_seqlens_k.diff().long()
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=pages.device), lengths)
    position = torch.arange(len(sequence), device=pages.device) - cu_seqlens_k.long()[sequence]
    page_size = pages.shape[1]
    if len(sequence) and int(position.max()) >= block_table.shape[1] * page_size:
        raise ValueError(
            f"block_table must have pages for {int(position.max()) + 1} keys, "
            f"got {block_table.shape[1]} of {page_size}"
        )
    page = block_table.long()[sequence, position // page_size]
    if len(page) and not 0 <= int(page.min()) <= int(page.max()) < pages.shape[0]:
        raise ValueError(
            f"block_table must hold pages between 0 and {pages.shape[0] - 1}, "
            f"got {int(page.min())} to {int(page.max())}"
        )
    return pages[page, position % page_size]


def packed_of_pages(q, k, v, block_table, cu_seqlens_k) -> tuple:
    """k and v [num_blocks, page_size, Hk, D], checked, as packed [total_k, Hk, D]."""
    validate.index_tensor("block_table", block_table, q.device, 2)
    validate.index_tensor("cu_seqlens_k", cu_seqlens_k, q.device, 1)
    for name, value in (("k", k), ("v", v)):
        _rank(name, value, "[num_blocks, page_size, Hk, D] with a block_table")
        if value.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {value.device}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"v must have k's first three sizes {tuple(k.shape[:3])}, got {tuple(v.shape[:3])}"
        )
    if cu_seqlens_k.shape[0] < 1:
        raise ValueError("cu_seqlens_k must have batch + 1 entries, got 0")
    if block_table.shape[0] != cu_seqlens_k.shape[0] - 1:
        raise ValueError(
            f"block_table must have {cu_seqlens_k.shape[0] - 1} rows, got {block_table.shape[0]}"
        )
    if cu_seqlens_k.device.type == "cpu":
        values.cumulative("cu_seqlens_k", cu_seqlens_k, 1 << 31)  # pages are checked below
    return tuple(from_pages(x, block_table, cu_seqlens_k) for x in (k, v))


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
) -> Any:  # fmt: skip
    """Attention of packed sequences: q [total_q, H, D], k, v [total_k, Hk, D], cu_seqlens int32
    [B + 1].

    With block_table int32 [B, max_pages]: k, v [num_blocks, page_size, Hk, D], of any page size.
    Returns out [total_q, H, D]; with return_attn_probs also softmax_lse [H, total_q] and S_dmask.
    """
    _rank("q", q, "[total_q, H, D]")
    if block_table is not None:
        k, v = packed_of_pages(q, k, v, block_table, cu_seqlens_k)
    options = _options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic
    )
    return_attn_probs = validate.switch("return_attn_probs", return_attn_probs)
    call = varlen.varlen_call(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        need_stats=return_attn_probs, **options,
    )  # fmt: skip
    return _run(call, return_attn_probs, lambda out: out)


def flash_attn_varlen_qkvpacked_func(
    qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
    return_attn_probs=False,
) -> Any:  # fmt: skip
    """`flash_attn_varlen_func` of qkv [total, 3, H, D]."""
    q, k, v = _packed("qkv", qkv, 1, 3, "[total, 3, H, D]")
    checks.rows(q, k, v, ("qkv", "qkv", "qkv"))
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen,
        max_seqlen, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
) -> Any:  # fmt: skip
    """`flash_attn_varlen_func` of q [total_q, H, D] and kv [total_k, 2, Hk, D]."""
    k, v = _packed("kv", kv, 1, 2, "[total_k, 2, Hk, D]")
    checks.rows(q, k, v, ("q", "kv", "kv"))
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k,
        max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def per_batch(name: str, value, batch: int, device, low: int = 0, high: int = (1 << 31) - 1):
    """An integer tensor [B] as int32 [B], its values within [low, high] where reading them costs no
    device sync (CPU); on a GPU they are the caller's promise, as the lengths are.
    """
    validate.tensor(name, value)
    if value.dtype not in (torch.int32, torch.int64) or tuple(value.shape) != (batch,):
        raise ValueError(
            f"{name} must be int32 of shape ({batch},), got {value.dtype} {tuple(value.shape)}"
        )
    if value.device != device:
        raise ValueError(f"{name} must be on q's device {device}, got {value.device}")
    if _readable(value):
        for index, entry in enumerate(value.tolist()):
            if not low <= entry <= high:
                raise ValueError(f"{name} must be between {low} and {high}, got {entry} at {index}")
    return value.to(torch.int32)


def _readable(value) -> bool:
    """Whether the elements may be looked at: on CPU, and not while a graph is traced."""
    known = value.device.type == "cpu" and not torch.compiler.is_compiling()
    return known and route.is_plain(value, value, value)


def _lengths(value, batch: int, device, capacity: int, added: int):
    """cache_seqlens, an int or a tensor [B], as int32 [B]."""
    high = capacity - added
    value = validate.plain_number("cache_seqlens", value)
    if isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value <= high:
            raise ValueError(
                f"cache_seqlens must be between 0 and {high} (capacity {capacity}, {added} new "
                f"rows), got {value}"
            )
        return torch.full((batch,), value, dtype=torch.int32, device=device)
    return per_batch("cache_seqlens", value, batch, device, high=high)


def _leftpad(value, batch: int, device, capacity: int, cache_seqlens):
    """bool [B, 1, 1, capacity]: from cache_leftpad [B] on, which is at most what is in the cache
    before new rows are appended.
    """
    first = per_batch("cache_leftpad", value, batch, device, high=capacity)
    if cache_seqlens is not None and _readable(first):
        pairs = zip(first.tolist(), cache_seqlens.tolist(), strict=True)
        for index, (left, used) in enumerate(pairs):
            if left > used:
                raise ValueError(
                    f"cache_leftpad must be at most cache_seqlens, got {left} for {used} at {index}"
                )
    return torch.arange(capacity, device=device) >= first[:, None, None, None]


def _enough_pages(block_table, cache_seqlens, added: int, page_size: int) -> None:
    """RuntimeError, flash-attn's type for this one, where lengths on the CPU need more pages."""
    if not cache_seqlens.numel() or not _readable(cache_seqlens):
        return
    needed = int(cache_seqlens.max()) + added
    if needed > block_table.shape[1] * page_size:
        raise RuntimeError(
            f"block_table must have pages for cache_seqlens' {needed} keys, got "
            f"{block_table.shape[1]} of {page_size}"
        )


def _paged_capacity(block_table, batch: int, device, k_cache) -> int:
    """Keys that the pages of a sequence hold."""
    if block_table is None:
        return k_cache.shape[1]
    validate.index_tensor("block_table", block_table, device, 2)
    if block_table.shape[0] != batch:
        raise ValueError(f"block_table must have {batch} rows, got {block_table.shape[0]}")
    return block_table.shape[1] * k_cache.shape[1]


def _rotated(q, k, cos, sin, seqlens, interleaved: bool, moving: bool):
    """q and k rotated at the positions that they take in the cache; all queries at the first new
    position where neither causal nor a window tells them apart (`moving` False).
    """
    starts = seqlens.long()[:, None]
    steps = torch.arange(q.shape[1], device=q.device)
    q_at = starts + (steps if moving else torch.zeros_like(steps))
    k_at = starts + torch.arange(k.shape[1], device=q.device)
    for positions in (q_at, k_at):
        rotary.check("rotary_cos", cos, "rotary_sin", sin, q, positions)
    return (
        rotary.rotate(q, cos, sin, q_at, interleaved),
        rotary.rotate(k, cos, sin, k_at, interleaved),
    )


@torch.no_grad()
def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,
    return_softmax_lse=False,
) -> Any:  # fmt: skip
    """Attention of new queries q [B, Sq, H, D] to a KV cache, after appending k and v to it in
    place.  Not differentiable.

    k_cache, v_cache [B_cache, S_cache, Hk, D], or [num_blocks, page_size, Hk, D] with block_table
    int32 [B, max_pages] (any page size).  k, v [B, Snew, Hk, D]: written at cache_seqlens[b].
    cache_seqlens: an int or int32 [B], the lengths before appending.  cache_batch_idx int32 [B]:
    rows of the cache.  cache_leftpad int32 [B]: the first valid position, at most cache_seqlens[b].
    rotary_cos, rotary_sin [S, rotary_dim / 2] rotate k at cache_seqlens + i, and q there too if
    causal or windowed, else all of q at cache_seqlens.  num_splits is a hint.  Lengths, rows and
    pages out of range are errors on CPU and the caller's promise on a GPU, where reading them
    would wait for the device.
    Returns out [B, Sq, H, D]; with return_softmax_lse also softmax_lse float32 [B, H, Sq].
    """
    for name, value in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        _rank(name, value, "[B, S, H, D]")
    for name, value in (("k", k), ("v", v)):
        if value is not None:
            _rank(name, value, "[B, Snew, Hk, D]")
    causal = validate.switch("causal", causal)
    rotary_interleaved = validate.switch("rotary_interleaved", rotary_interleaved)
    return_softmax_lse = validate.switch("return_softmax_lse", return_softmax_lse)
    batch, device = q.shape[0], q.device
    window = _window(window_size, causal)
    capacity = _paged_capacity(block_table, batch, device, k_cache)
    if cache_seqlens is not None:
        added = 0 if k is None else k.shape[1]
        room = capacity if block_table is None else 1 << 30  # pages: an error type of their own
        cache_seqlens = _lengths(cache_seqlens, batch, device, room, added)
        if block_table is not None:
            _enough_pages(block_table, cache_seqlens, added, k_cache.shape[1])
    elif k is not None:
        raise ValueError("cache_seqlens must be given with k and v, got None")
    if rotary_cos is None and rotary_sin is not None:
        raise ValueError("rotary_cos must be given with rotary_sin, got None")
    if rotary_cos is not None:
        if k is None or v is None or rotary_sin is None:
            raise ValueError("rotary_cos needs k, v and rotary_sin, got None for one of them")
        checks.heads_last(q, k, v, ("q", "k", "v"))
        moving = causal or window != (None, None)
        q, k = _rotated(q, k, rotary_cos, rotary_sin, cache_seqlens, rotary_interleaved, moving)
    keys, values = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    if cache_batch_idx is not None:
        if block_table is not None:
            raise ValueError("cache_batch_idx must be None with a block_table")
        # a row of the cache is a page as long as the cache: no copy
        high = k_cache.shape[0] - 1
        block_table = per_batch("cache_batch_idx", cache_batch_idx, batch, device, high=high)
        block_table = block_table[:, None]
        if cache_seqlens is None:
            cache_seqlens = _lengths(capacity, batch, device, capacity, 0)
    mask = None
    if cache_leftpad is not None:
        mask = _leftpad(cache_leftpad, batch, device, capacity, cache_seqlens)
    result = decode.attention_decode(
        q.transpose(1, 2), keys, values, cache_seqlens,
        k_new=None if k is None else k.transpose(1, 2),
        v_new=None if v is None else v.transpose(1, 2),
        block_table=block_table, causal=causal, window=window, mask=mask, softcap=softcap,
        alibi_slopes=alibi_slopes, scale=_scale(softmax_scale), num_splits=num_splits,
        return_lse=return_softmax_lse,
    )  # fmt: skip
    if return_softmax_lse:
        return result[0].transpose(1, 2), flash_lse(result[1])
    return result.transpose(1, 2)


def get_block_size_n(device, head_dim, is_dropout, is_causal) -> int:
    """Keys in a block of S_dmask: here the row maximum is the whole row's, so one block."""
    return 1 << 30
