"""The naive oracle: every feature of attention in eager torch, any device, any dtype including
float64.

    s = the logit of q_i . k_j, by core/logit.py     q [B, Hq, Sq, D], k [B, Hk, Sk, D]
    s = -inf                                         where mask, window or length excludes (i, j)
    LSE = ln(sum_j exp(s_ij) + exp(sink[h]))         P = exp(s - LSE)
    O = (P * keep / (1 - p)) V                       v [B, Hk, Sk, Dv]

or P = sigmoid(s + sigmoid_bias) without LSE; or sum_d w_d tanh(q_id + k_jd) in place of q_i . k_j.

It holds the whole Sq x Sk matrix and computes in the inputs' dtype as a plain torch user would, so
that on float64 copies it is the truth, and on the inputs themselves the error that an honest
implementation has (`attn_ext.testing`). Differentiable by autograd in q, k, v, bias and sink,
through `out` and `lse`, as often as one likes.  Varlen and decode loop over the sequences.
"""

from __future__ import annotations

import contextlib
import math

import torch
from torch._functorch.utils import enable_single_level_autograd_function

from attn_ext.core import logit
from attn_ext.core.schema import Call, Frame, is_decode

# Philox4x32-7 as in csrc/philox.h; tests/api/test_philox.py reads that file and compares.
PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
PHILOX_ROUNDS = 7
_WORD = 0xFFFFFFFF
_WORD64 = 0xFFFFFFFFFFFFFFFF


def attend(
    call: Call,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(out, lse, max_logit, entropy) of `call`; the last two are None unless `call.need_stats`.

    Dense and decode: out [B, Hq, Sq, Dv], the others [B, Hq, Sq].  Varlen: out [total_q, Hq, Dv],
    others [Hq, total_q]. LSE and statistics are float32, float64 for float64 inputs.  Rows that see
    no key: out 0, lse and max_logit -inf, entropy 0, and no gradient.  LSE of the sigmoid is 0.
    """
    if call.cu_seqlens_q is not None:
        return _varlen(call)
    if is_decode(call) or call.frame is not None:
        return _decode(call)
    out, lse, max_logit, entropy = _dense(call, call.q, call.k, call.v, call.mask, call.bias, 0)
    return (out, lse, max_logit, entropy) if call.need_stats else (out, lse, None, None)


_AUTOGRAD_KEYS = ("AutogradFunctionality", "AutogradCPU", "AutogradCUDA", "ADInplaceOrView")


@contextlib.contextmanager
def recording():
    """Autograd records within it, also inside an operator's kernel, where the dispatcher has
    switched autograd off: gradients would be silent zeros.
    """
    keys = [getattr(torch._C.DispatchKey, name) for name in _AUTOGRAD_KEYS]
    off = [key for key in keys if torch._C._dispatch_tls_is_dispatch_key_excluded(key)]
    for key in off:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for key in off:
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, True)


def dropout_keep_mask(
    seed: int,
    offset: int,
    batch: int,
    heads: int,
    seqlen_q: int,
    seqlen_k: int,
    p: float,
    device: torch.device | str = "cpu",
    first_batch: int = 0,
) -> torch.Tensor:
    """bool [B, H, Sq, Sk], True where dropout keeps P: word j % 4 of Philox4x32-7(j / 4, i, h, b)
    >= floor(p * 2^32).

    The key is splitmix64 of (seed, offset), h the query head, i and j positions within the
    sequence.  `first_batch` is the index of the first batch element.
    """
    b = range(first_batch, first_batch + batch)
    every = (b, range(heads), range(seqlen_q), range(seqlen_k))
    return keep_tile(philox_key(seed, offset), p, *every, device)


def keep_tile(
    key: tuple[int, int], p: float, b: range, h: range, i: range, j: range, device
) -> torch.Tensor:
    """`dropout_keep_mask` at some batch elements, heads, queries and keys, of a `philox_key`."""
    key0, key1 = key
    blocks = range(j.start // 4, (j.stop + 3) // 4)
    sizes = tuple(map(len, (b, h, i, blocks)))
    c3, c2, c1, c0 = (
        torch.arange(r.start, r.stop, device=device).view([-1 if d == dim else 1 for d in range(4)])
        for dim, r in enumerate((b, h, i, blocks))
    )
    for _ in range(PHILOX_ROUNDS):
        hi0, lo0 = _mul_words(PHILOX_M0, c0)
        hi1, lo1 = _mul_words(PHILOX_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ key0, lo1, hi0 ^ c3 ^ key1, lo0
        key0, key1 = (key0 + PHILOX_W0) & _WORD, (key1 + PHILOX_W1) & _WORD
    words = torch.stack([c.expand(sizes) for c in (c0, c1, c2, c3)], dim=-1)
    skipped = j.start - 4 * blocks.start
    words = words.flatten(3)[..., skipped : skipped + len(j)]
    return words >= int(p * 4294967296.0)


def philox_key(seed: int, offset: int) -> tuple[int, int]:
    """The two key words: splitmix64 of (seed, offset)."""
    z = ((seed & _WORD64) + 0x9E3779B97F4A7C15 * ((offset & _WORD64) + 1)) & _WORD64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD64
    z ^= z >> 31
    return z & _WORD, z >> 32


def _mul_words(m: int, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32-bit words of m * c; m is split into halves because int64 has no room for
    a 64-bit product.
    """
    low, high = c * (m & 0xFFFF), c * (m >> 16)
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def safe_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b where a zero of `a` also silences NaN and inf of `b`: sum_j a_ij b_jd over the j with
    a_ij != 0.

    a [..., M, N], b [..., N, D].  The finite part is one matmul; what non-finite elements add is
    found by counting.
    """
    finite = torch.isfinite(b)
    if bool(finite.all()):
        return a @ b
    count = torch.float64 if a.dtype == torch.float64 else torch.float32
    plus, minus = (a > 0).to(count), (a < 0).to(count)
    up, down = (b == torch.inf).to(count), (b == -torch.inf).to(count)
    is_nan = (plus + minus) @ torch.isnan(b).to(count) > 0
    is_up = plus @ up + minus @ down > 0
    is_down = plus @ down + minus @ up > 0
    out = a @ torch.where(finite, b, torch.zeros_like(b))
    for where, value in ((is_nan, torch.nan), (is_up, torch.inf), (is_down, -torch.inf)):
        out = torch.where(where, out + value, out)
    return out


def applied(function: type[torch.autograd.Function], *inputs):
    """function.apply, also of plain tensors while a transform of torch.func is at work on others,
    below which backends run: there torch refuses every Function without a setup_context.
    """
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    if torch._C._are_functorch_transforms_active() and not any(
        isinstance(x, torch.Tensor) and wrapped(x) for x in inputs
    ):
        with enable_single_level_autograd_function():
            return super(torch.autograd.Function, function).apply(*inputs)
    return function.apply(*inputs)


class _Scores(torch.autograd.Function):
    """S = Q K^T; in backward a pair with dS_ij = 0 adds nothing to dQ and dK, even where Q or K
    is NaN.
    """

    @staticmethod
    def forward(ctx, q, k):
        ctx.save_for_backward(q, k)
        return q @ k.transpose(-1, -2)

    @staticmethod
    def backward(ctx, ds):
        q, k = ctx.saved_tensors
        return safe_matmul(ds, k), safe_matmul(ds.transpose(-1, -2), q)


class _AdditiveScores(torch.autograd.Function):
    """S = sum_d w_d T_d of T [B, Hq, Sq, Sk, D] and w [Hq, D]; in backward a pair with dS_ij = 0
    adds nothing to dT and dw, even where w is infinite.
    """

    @staticmethod
    def forward(ctx, t, w):
        ctx.save_for_backward(t, w)
        return (t * w[:, None, None, :]).sum(-1)

    @staticmethod
    def backward(ctx, ds):
        t, w = ctx.saved_tensors
        ds, w = ds.unsqueeze(-1), w[:, None, None, :]
        counts, zero = ds != 0, ds.new_zeros(())
        # the factors are replaced, not the products, whose derivatives by dS are the factors
        dt = ds * torch.where(counts | w.isfinite(), w, zero)
        return dt, (ds * torch.where(counts | t.isfinite(), t, zero)).sum((0, 2, 3))


class _WeightedSum(torch.autograd.Function):
    """O = P V over the pairs with P_ij != 0; in backward the other pairs have dP_ij = 0 and add
    nothing to dV.
    """

    @staticmethod
    def forward(ctx, p, v):
        ctx.save_for_backward(p, v)
        return safe_matmul(p, v)

    @staticmethod
    def backward(ctx, dout):
        p, v = ctx.saved_tensors
        dp = dout @ v.transpose(-1, -2)
        dp = torch.where(p != 0, dp, torch.zeros_like(dp))
        return dp, safe_matmul(p.transpose(-1, -2), dout)


def _dense(call: Call, q, k, v, mask, bias, first_batch: int):
    """The core: q [B, Hq, Sq, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv], batch elements
    first_batch, first_batch + 1, ...
    """
    batch, heads_q, seqlen_q, _ = q.shape
    seqlen_k = k.shape[2]
    stat = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = heads_q // k.shape[1]
    k = k.repeat_interleave(group, dim=1)
    v = v.repeat_interleave(group, dim=1)

    # visible [B, Hq, Sq, Sk]: a bias of -inf excludes like the mask does
    part = slice(first_batch, first_batch + batch)
    frame = Frame.of(call, first_batch, seqlen_q, seqlen_k)
    pairs = logit.Pairs.all_of(seqlen_q, seqlen_k, q.device, part).within(frame)
    visible = logit.seen(call, pairs, mask, bias).expand(batch, heads_q, seqlen_q, seqlen_k)

    # S [B, Hq, Sq, Sk] in the inputs' dtype; excluded pairs are zeroed first, so that softcap's
    # tanh never sees their NaN
    products = applied(_Scores, q, k) if call.w is None else _additive(q, k, call.w, visible)
    products = torch.where(visible, products, torch.zeros_like(products))
    s = logit.of(call, products, pairs, bias).to(stat)
    # a logit of -inf, as of an infinite K, excludes too, and gets no gradient even in a row of NaN
    visible = visible & (s.detach() != -torch.inf)
    s = torch.where(visible, s, torch.full_like(s, -torch.inf))

    if call.normalizer == "sigmoid":
        shift = -math.log(max(frame.whole_k, 1)) if call.sigmoid_bias is None else call.sigmoid_bias
        p = torch.where(visible, torch.sigmoid(s + shift), torch.zeros_like(s))
        if call.dropout_p > 0:
            p = _dropout(call, p, frame)
        lse = s.new_zeros(batch, heads_q, seqlen_q)
        return applied(_WeightedSum, p.to(q.dtype), v), lse, None, None

    # m, LSE [B, Hq, Sq, 1]; empty rows compute with m = 0, l = 1, so that no -inf - -inf arises in
    # either direction
    empty = ~visible.any(dim=-1, keepdim=True)
    no_key = s.detach().new_full((batch, heads_q, seqlen_q, 1), -torch.inf)
    max_logit = torch.cat((s.detach(), no_key), dim=-1).amax(dim=-1, keepdim=True)
    m = max_logit
    max_logit = torch.where(max_logit < torch.inf, max_logit, torch.nan)  # as the whole row
    if call.sink is not None:
        sink = call.sink.to(stat).view(1, -1, 1, 1)
        m = torch.maximum(m, sink.detach())
    m = torch.where(empty, torch.zeros_like(m), m)
    row_sum = torch.exp(s - m).sum(dim=-1, keepdim=True)
    if call.sink is not None:
        # an empty row has m = 0, where the exponential of a large sink is inf, and 0 * inf NaN
        row_sum = row_sum + torch.exp(torch.where(empty, 0.0, sink - m))
    row_sum = torch.where(empty, torch.ones_like(row_sum), row_sum)
    lse = m + torch.log(row_sum)
    # not exp(s - lse): beside logits of finfo.min, as additive masks have them, LSE loses ln
    # row_sum.  A NaN row has exp(-inf - NaN) = NaN at its excluded keys; they must stay out of dV
    p = torch.where(visible, torch.exp(s - m) / row_sum, torch.zeros_like(s))
    lse = torch.where(empty, torch.full_like(lse, -torch.inf), lse)

    entropy = None
    if call.need_stats:
        # -sum P ln P with 0 ln 0 = 0
        log_p = torch.where(p != 0, s - m - torch.log(row_sum), torch.zeros_like(s)).detach()
        entropy = -(p.detach() * log_p).sum(dim=-1)

    if call.dropout_p > 0:
        p = _dropout(call, p, frame)
    out = applied(_WeightedSum, p.to(q.dtype), v)
    # a row of NaN is one whole, also where dropout leaves none of its pairs
    out = torch.where(lse.detach().isnan(), torch.nan, out)
    return out, lse.squeeze(-1), max_logit.squeeze(-1), entropy


def _additive(q, k, w, visible: torch.Tensor) -> torch.Tensor:
    """sum_d w_d tanh(q_id + k_jd) [B, Hq, Sq, Sk]; excluded pairs never see their NaN."""
    pre = q.unsqueeze(3) + k.unsqueeze(2)
    pre = torch.where(visible.unsqueeze(-1), pre, torch.zeros_like(pre))
    return applied(_AdditiveScores, torch.tanh(pre), w.to(q.dtype))


def _dropout(call: Call, p: torch.Tensor, frame: Frame) -> torch.Tensor:
    """P * keep / (1 - dropout_p)   [B, Hq, Sq, Sk]; 0 for dropout_p = 1."""
    if call.dropout_p >= 1:  # still a function of P: a row of NaN has a dQ of NaN
        return p.masked_fill(torch.ones_like(p, dtype=torch.bool), 0.0)
    firsts = frame[:4]
    every = (range(at, at + n) for at, n in zip(firsts, p.shape, strict=True))
    keep = keep_tile(philox_key(*call.rng_state.tolist()), call.dropout_p, *every, p.device)
    return torch.where(keep, p / (1 - call.dropout_p), torch.zeros_like(p))


def sequence_scores(scores: torch.Tensor | None, b: int, seqlen_q: int, seqlen_k: int):
    """Sequence b's part of a mask or bias [B or 1, Hq or 1, max_sq or 1, max_sk or 1];
    broadcast dimensions stay 1.
    """
    if scores is None:
        return None
    scores = scores[b : b + 1] if scores.shape[0] != 1 else scores
    scores = scores[:, :, :seqlen_q] if scores.shape[2] != 1 else scores
    return scores[..., :seqlen_k] if scores.shape[3] != 1 else scores


def _varlen(call: Call):
    """Each sequence by itself.  Rows that belong to no sequence are empty rows."""
    starts_q, starts_k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
    total_q, heads_q, _ = call.q.shape
    stat = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    parts = []
    for b in range(len(starts_q) - 1):
        rows, cols = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        q, k, v = (
            x[s].transpose(0, 1)[None] for x, s in ((call.q, rows), (call.k, cols), (call.v, cols))
        )
        mask, bias = (sequence_scores(x, b, q.shape[2], k.shape[2]) for x in (call.mask, call.bias))
        parts.append(_dense(call, q, k, v, mask, bias, b))
    rest = total_q - starts_q[-1]
    out = [o[0].transpose(0, 1) for o, *_ in parts]
    out.append(call.q.new_zeros(rest, heads_q, call.v.shape[-1]))
    rows = []
    for index, filler in ((1, -torch.inf), (2, -torch.inf), (3, 0.0)):
        if index > 1 and not call.need_stats:
            rows.append(None)
            continue
        tail = torch.full((heads_q, rest), filler, dtype=stat, device=call.q.device)
        rows.append(torch.cat([part[index][0] for part in parts] + [tail], dim=1))
    return torch.cat(out), *rows


def _decode(call: Call):
    """Each batch element with its frame and the used part of its cache, gathered from its pages
    where there is a block table.
    """
    batch, heads_q, seqlen_q, _ = call.q.shape
    lengths = [call.max_seqlen_k] * batch
    if call.seqlens_k is not None:
        lengths = call.seqlens_k.tolist()
    parts = []
    for b, length in enumerate(lengths):
        k, v = (cached_rows(call, x, b, length) for x in (call.k, call.v))
        mask, bias = (sequence_scores(x, b, seqlen_q, length) for x in (call.mask, call.bias))
        parts.append(_dense(call, call.q[b : b + 1], k, v, mask, bias, b))
    if not parts:
        empty = call.q.new_zeros(0, heads_q, seqlen_q, call.v.shape[-1])
        stat = empty[..., 0].to(torch.promote_types(call.q.dtype, torch.float32))
        return (empty, stat, stat, stat) if call.need_stats else (empty, stat, None, None)
    columns = list(zip(*parts, strict=True))[: 4 if call.need_stats else 2]
    joined = [torch.cat(column) for column in columns]
    return *joined, *([None] * (4 - len(joined)))


def cached_rows(call: Call, x: torch.Tensor, b: int, length: int) -> torch.Tensor:
    """[1, Hk, length, D] of sequence b, from x [B, Hk, Smax, D] or the pages x [pages, Hk,
    page_size, D].
    """
    if call.block_table is None:
        return x[b : b + 1, :, :length]
    page_size = x.shape[2]
    pages = call.block_table[b, : (length + page_size - 1) // page_size].long()
    return x[pages].transpose(0, 1).flatten(1, 2)[None, :, :length]
