"""Shards of a call against the call itself, for every backend that serves parts of calls."""

import torch
from closeness import SHARDS, relative

from attn_ext.backends import reference
from attn_ext.backends.sums import of_lse
from attn_ext.core.schema import Call, Frame
from attn_ext.distributed import local
from attn_ext.ops import parts
from attn_ext.testing import needs_of, random_call, to_float64

FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (30, 4), "align": 0},
    "alibi": {"causal": True, "alibi": "b", "window": (40, -1)},
    "dropout": {"dropout_p": 0.4, "causal": True},
    "all": dict(
        softcap=3.0, alibi=True, bias="hk", mask=True, dropout_p=0.2, window=(50, 6), sink=True
    ),
}


def shard_of(call: Call, rows: slice, keys: slice) -> Call:
    """The call's queries and keys of these ranges, without its sink."""
    batch, _, seqlen_q, _ = call.q.shape
    frame = [Frame(b, 0, rows.start, keys.start, seqlen_q, call.k.shape[2]) for b in range(batch)]

    def scores(x):
        if x is None:
            return None
        x = x if x.shape[2] == 1 else x[:, :, rows]
        return x if x.shape[3] == 1 else x[..., keys]

    return call._replace(
        q=call.q[:, :, rows], k=call.k[:, :, keys], v=call.v[:, :, keys], mask=scores(call.mask),
        bias=scores(call.bias), sink=None, frame=torch.tensor(frame, dtype=torch.int32),
        max_seqlen_q=rows.stop - rows.start, max_seqlen_k=keys.stop - keys.start,
    )  # fmt: skip


def unframed(call: Call, keys: slice) -> Call:
    """The call's keys of this range, where nothing depends on positions."""
    more = {} if call.bias is None else {"bias": call.bias[..., keys]}
    return call._replace(
        k=call.k[:, :, keys], v=call.v[:, :, keys], sink=None,
        max_seqlen_k=keys.stop - keys.start, **more,
    )  # fmt: skip


def merged(call: Call, shards) -> tuple:
    """(O, sums) of the call's queries from shards of its keys."""
    out, sums = None, None
    for shard in shards:
        part, part_sums = parts.forward_partial(shard)
        if out is None:
            out = torch.zeros_like(part)
            sums = of_lse(torch.full_like(part_sums[..., 0], -torch.inf))
        parts.merge(out, sums, part, part_sums)
    if call.sink is not None:
        local.add_sink(out, sums, call.sink)
    return out, sums


def check_shards(
    backend: str, feature: str, whole: int, rows: slice, width: int, seen=3, heads=(4, 2),
    allowed: float = SHARDS[torch.float32], **options,
) -> None:  # fmt: skip
    """Forward and backward of the queries `rows` of a call of `whole` positions, by shards of
    `width` keys (of single keys: the last 40, beside the rest at once), of which the gradients of
    some `seen` are looked at.  heads: of q and of k, and as many batch elements as of k; allowed:
    the error of a result against float64, of its norm, twice that of sums over shards; options: of
    random_call."""
    call = random_call(
        batch=heads[1],
        heads_q=heads[0],
        heads_k=heads[1],
        seqlen_q=whole,
        seqlen_k=whole,
        **{**FEATURES[feature], **options},
    )._replace(backend=backend)
    first = 0 if width != 1 else whole - 40
    cuts = [slice(0, first)] * bool(first)
    cuts += [slice(i, min(i + width, whole)) for i in range(first, whole, width)]
    exact = to_float64(call)
    truth, truth_lse, *_ = reference.forward(exact)
    shards = [shard_of(call, rows, keys) for keys in cuts]
    out, sums = merged(call, shards)
    assert relative(out.double(), truth[:, :, rows]) <= allowed
    assert relative(sums.sum(-1).double(), truth_lse[:, :, rows]) <= allowed

    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(call.q.dtype)
    of_whole = torch.zeros_like(truth)
    of_whole[:, :, rows] = dout.double()
    needs = needs_of(call)
    want = reference.backward(exact, of_whole, truth, truth_lse, None, needs)
    delta, found = (dout * out).sum(-1), []
    for shard in shards:
        grads = parts.backward_partial(shard, dout, delta, sums, needs)
        assert all(x is None or x.dtype == torch.float32 for x in grads[:4])
        found.append(grads)
    for at in range(0, len(cuts), max(len(cuts) // seen, 1)):
        for name in ("k", "v"):
            whole_grad, got = getattr(want, name), getattr(found[at], name)
            off = (got.double() - whole_grad[:, :, cuts[at]]).norm()
            assert float(off) <= allowed * float(whole_grad.norm())
    dq = sum(grads.q for grads in found)
    assert relative(dq.double(), want.q[:, :, rows]) <= 2 * allowed
    if needs.bias:
        columns = [grads.bias for grads in found]
        dbias = torch.cat(columns, -1) if call.bias.shape[3] > 1 else sum(columns)
        expected = want.bias if call.bias.shape[2] == 1 else want.bias[:, :, rows]
        assert relative(dbias.double(), expected) <= 2 * allowed


def check_not_rounded(call: Call, allowed: float) -> None:
    """O, LSE, dQ, dK and dV of a call of bfloat16 as a part of a larger one, in float32."""
    out, sums = parts.forward_partial(call)
    wide = call._replace(**{n: getattr(call, n).float() for n in ("q", "k", "v")})
    want, want_sums = parts.forward_partial(wide)
    dout = torch.randn(out.shape).bfloat16()
    more = (torch.randn(sums.shape[:-1]), sums, needs_of(call))
    got, exact = (parts.backward_partial(c, dout, *more) for c in (call, wide))
    lses = sums.sum(-1), want_sums.sum(-1)
    for a, b in ((out, want), lses, *zip(got[:3], exact[:3], strict=True)):
        assert a.dtype == torch.float32
        assert relative(a, b) <= allowed
        assert not torch.equal(a, a.bfloat16().float())
