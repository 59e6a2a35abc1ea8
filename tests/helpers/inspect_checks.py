"""The kernels of attn_ext.inspect against the N x N way: what their tests on each backend share."""

from functools import partial

import torch
import torch.nn.functional as F
from closeness import assert_same

from attn_ext.core import reference
from attn_ext.inspect import kernels, logits
from attn_ext.testing import assert_close_to_reference, poisoned_memory, random_call, to_float64

# name -> random_call's options: what each would catch
CASES = {
    "one of everything": {"seqlen_q": 1, "head_dim": 1},
    "odd sizes: every tail": {"seqlen_q": 141, "seqlen_k": 131, "head_dim": 7},
    "several tiles each way": {"seqlen_q": 300, "seqlen_k": 200, "batch": 1, "heads_q": 1},
    "one query, many keys": {"seqlen_q": 1, "seqlen_k": 300},
    "grouped heads, causal": {"heads_q": 4, "heads_k": 2, "seqlen_q": 70, "causal": True},
    "window": {"seqlen_q": 150, "seqlen_k": 190, "window": (20, 9)},
    "empty rows": {"seqlen_q": 60, "seqlen_k": 50, "window": (3, 2), "align": 0},
    "mask and bias": {"seqlen_q": 40, "seqlen_k": 90, "mask": "bhqk", "bias": "hq"},
    "softcap, alibi": {"seqlen_q": 33, "seqlen_k": 40, "softcap": 1.5, "alibi": "b"},
    "sink": {"seqlen_q": 33, "seqlen_k": 40, "sink": True, "causal": True},
    "padded storage": {"seqlen_q": 33, "layout": "padded", "mask": "qk"},
}


def matrix(call):
    """P [B, Hq, Sq, Sk] in float64: with V = identity the reference's output is P itself."""
    call = to_float64(call)
    eye = torch.eye(call.k.shape[2], dtype=torch.float64)
    call = call._replace(v=eye.expand(*call.k.shape[:2], *eye.shape))
    call = call._replace(need_stats=call.normalizer == "softmax")
    out, lse, largest, entropy = reference.attend(call)
    if call.normalizer == "sigmoid":
        total = out.sum(-1)
        share = out / total.unsqueeze(-1)
        lse, entropy = total.log(), torch.special.entr(share).nan_to_num().sum(-1)
        largest = None
    return out, (lse, largest, entropy)


def close(got, want, name, dtype):
    """The tolerance rule, with the float64 truth itself as the naive result."""
    assert_close_to_reference(got, want, want.to(got.dtype), name=name, dtype=dtype)


def check(options, backend, dtype=torch.float32, family="dot", change=None, few=False):
    """Row statistics, top-k, column mass and pooled map of one call on `backend`; `few` sizes of
    them for kernels that are interpreted.
    """
    call = random_call(3, dtype=dtype, **options)
    if change is not None:
        change(call)
    wide = torch.promote_types(dtype, torch.float32)
    if family == "additive":
        call = call._replace(w=torch.randn(call.q.shape[1], call.q.shape[-1], dtype=wide))
    if family == "sigmoid":
        call = call._replace(normalizer="sigmoid")
    p, truths = matrix(call)
    call = call._replace(v=call.k[..., :1].contiguous())
    lse = truths[0].to(wide)
    with poisoned_memory():
        if not few and call.sink is None:
            found = kernels.row_stats(call, backend)
            for name, got, want in zip(("lse", "max", "entropy"), found, truths, strict=True):
                if want is not None:
                    close(got, want, name, wide)
        close(kernels.column_mass(call, lse, backend), p.sum(2), "mass", wide)
        seqlen_q, seqlen_k = p.shape[2:]
        sizes = ((7, 3), (1, 1), (64, 50), (seqlen_q, seqlen_k))
        for rows, cols in ((7, 3), (20, 33)) if few else sizes:
            rows, cols = min(rows, seqlen_q), min(cols, seqlen_k)
            got = kernels.pooled_map(call, rows, cols, lse, backend)
            close(got, F.adaptive_avg_pool2d(p, (rows, cols)), f"map {rows} x {cols}", wide)
        for n in (3, 40) if few else (1, 5, 40):
            weights, keys = kernels.top_k(call, n, lse, backend)
            most = min(n, seqlen_k)
            want = F.pad(p.topk(most, dim=-1).values, (0, n - most))
            close(weights, want, f"weights {n}", wide)
            there = torch.where(keys >= 0, p.gather(-1, keys.clamp_min(0)), 0.0)
            close(there.to(wide), want, f"keys {n}", wide)
            assert ((keys == -1) | (weights > 0) | (there < 1e-30)).all()
            same = keys.sort(-1).values.diff(dim=-1) == 0
            assert not (same & (keys.sort(-1).values[..., 1:] >= 0)).any(), "a key twice"
        check_mean(call, p, lse, backend, wide, most=(1, 7, 40) if few else (1, 7, 300))


def check_mean(call, p, lse, backend, dtype, named=False, most=(1, 7, 300)):
    """The top keys of the mean over heads, and what is counted beside them; the names of what is
    wrong instead of an error if `named`.  most: how many keys are asked for.
    """
    wrong = []
    for name, compare in mean_comparisons(call, p, lse, backend, dtype, most):
        try:
            compare()
        except AssertionError:
            if not named:
                raise
            wrong.append(name)
    return wrong


def mean_comparisons(call, p, lse, backend, dtype, numbers):
    """(what, a function that compares it) of the top keys of the mean over heads."""
    there = torch.zeros(p.shape, dtype=torch.bool)
    for tile in logits.tiles(call._replace(v=call.k)):
        s = logits.scores(call, tile)
        there[tile.b, tile.h, tile.rows, tile.c0 : tile.c1] = s != -torch.inf
    for n in numbers:
        found = kernels.mean_top_k(call, n, lse, backend)
        most = min(n, p.shape[3])
        want = F.pad(p.mean(1).topk(most, dim=-1).values, (0, n - most))
        yield "weights", partial(close, found.weights, want, f"mean weights {n}", dtype)
        at = torch.where(found.keys >= 0, p.mean(1).gather(-1, found.keys.clamp_min(0)), 0.0)
        yield "keys", partial(close, at.to(dtype), want, f"mean keys {n}", dtype)
        yield "keys", partial(check_distinct, found.keys, there, n)
    yield "seen", partial(assert_same, found.seen, there.sum(-1))
    yield "any", partial(assert_same, found.seen_by_any, there.any(1).sum(-1))
    yield "totals", partial(close, found.total, p.sum(-1), "sums of rows", dtype)


def check_distinct(keys, there, n):
    """As many keys as any head sees, up to n, each once."""
    assert_same((keys >= 0).sum(-1), there.any(1).sum(-1).clamp_max(n))
    ordered = keys.sort(-1).values
    assert not ((ordered.diff(dim=-1) == 0) & (ordered[..., 1:] >= 0)).any(), "a key twice"
