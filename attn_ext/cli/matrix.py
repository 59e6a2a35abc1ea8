"""The conformance matrix: named checks, each a call that something once got wrong, or may.

A check's arguments are those of `attn_ext.testing.random_call`; `prepare` then changes what random
numbers do not give.  Its name says what it would catch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from attn_ext.core.schema import TOP_LEFT, Call

HALVES_AND_SINGLE = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Check:
    """One row of the matrix.  kind: "compare" with the truth, "repeat" (bitwise equal runs),
    "stream" (inputs made on another stream), "large" (offsets beyond 2^31 elements).
    """

    name: str
    group: str
    arguments: dict
    prepare: Callable[[Call], Call] | None = None
    kind: str = "compare"
    dtypes: tuple[str, ...] = HALVES_AND_SINGLE
    full_only: bool = False
    sweep: int = 0  # sequence length, in the plot of error against length
    extra: dict = field(default_factory=dict)


def _no_rows_in_thirds(call: Call) -> Call:
    """Every third query, and the whole of the last head, sees no key"""
    mask = call.mask.clone()
    mask[:, :, ::3] = False
    mask[:, -1] = False
    return call._replace(mask=mask)


def _nan_where_masked(call: Call) -> Call:
    """K and V are NaN and inf at the keys that the padding mask [B, 1, 1, Sk] excludes"""
    out = ~call.mask[:, :, 0, :, None].expand(-1, call.k.shape[1], -1, 1)
    k = call.k.masked_fill(out, torch.nan)
    return call._replace(k=k, v=call.v.masked_fill(out, torch.inf))


def _bias_of(value: float):
    def prepare(call: Call) -> Call:
        return call._replace(bias=call.bias + value)

    return prepare


def _opposed(call: Call) -> Call:
    """q and k point away from each other: every logit is far below 0, with no bias"""
    return call._replace(q=call.q.abs() * 8, k=-call.k.abs() * 8)


def _shared_keys(call: Call) -> Call:
    """K and V broadcast over the batch by a stride of 0"""
    k, v = (x[:1].expand(x.shape) for x in (call.k, call.v))
    return call._replace(k=k, v=v)


def _every_other_column(call: Call) -> Call:
    """The last dimension of q, k and v has stride 2"""

    def spread(x):
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
        wide[..., ::2] = x
        return wide[..., ::2]

    return call._replace(q=spread(call.q), k=spread(call.k), v=spread(call.v))


def _far_apart(call: Call) -> Call:
    """Batch elements of K and V lie more than 2^31 elements apart, of one untouched allocation"""
    gap = 2**31 + 64
    fields = {}
    for name in ("k", "v"):
        x = getattr(call, name)
        storage = torch.empty(gap + x[0].numel(), dtype=x.dtype, device=x.device)
        strides = (gap, *x[0].contiguous().stride())
        fields[name] = storage.as_strided(x.shape, strides).copy_(x)
    return call._replace(**fields)


def _checks() -> list[Check]:
    found: list[Check] = []

    def add(group, name, prepare=None, kind="compare", dtypes=HALVES_AND_SINGLE, full=False,
            sweep=0, **arguments):  # fmt: skip
        arguments = {"batch": 1, "seqlen_q": 67, "head_dim": 64, **arguments}
        found.append(Check(name, group, arguments, prepare, kind, dtypes, full, sweep))

    for length in (1, 16, 64, 128, 192, 256, 512):
        add("length", f"S = {length}", seqlen_q=length, sweep=length)
    for length in (1024, 2048, 4096):
        add("length", f"S = {length}", seqlen_q=length, sweep=length, full=True, heads_q=1)
    for length in (64, 192, 320):
        add("S % 128 == 64", f"S = {length} with a mask", seqlen_q=length, mask=True)
    add("S % 128 == 64", "S = 192, mask over keys, D = 128", seqlen_q=192, mask="bk", head_dim=128)
    add("S % 128 == 64", "S = 192 with a bias", seqlen_q=192, bias=True)
    add("S % 128 == 64", "Sq = 192, Sk = 64, causal", seqlen_q=192, seqlen_k=64, causal=True,
        align=TOP_LEFT)  # fmt: skip

    add("very negative LSE", "bias of -10000", _bias_of(-1e4), bias=True)
    add("very negative LSE", "opposed q and k", _opposed, dtypes=("fp32", "bf16"))
    add("very negative LSE", "bias of -10000, causal", _bias_of(-1e4), bias="hk", causal=True)
    add("very large logits", "bias of +10000", _bias_of(1e4), bias=True)

    add("empty rows", "fully masked rows and a head", _no_rows_in_thirds, mask=True)
    add("empty rows", "fully masked rows, S = 192", _no_rows_in_thirds, mask=True, seqlen_q=192)
    add("empty rows", "more queries than keys, bottom right", seqlen_q=70, seqlen_k=33,
        causal=True)  # fmt: skip
    add("empty rows", "no keys at all", seqlen_k=0)
    add("empty rows", "empty sequences in varlen", seqlens_q=(0, 5, 64, 0, 33),
        seqlens_k=(7, 0, 64, 0, 35))  # fmt: skip

    add("NaN in padding", "masked keys hold NaN and inf", _nan_where_masked, batch=2, mask="bk")
    add("NaN in padding", "the cache beyond its length is NaN", seqlen_q=1, seqlen_k=96,
        cache_seqlens=(0, 1, 64, 96))  # fmt: skip
    add("NaN in padding", "pages beyond the length are NaN", seqlen_q=3, seqlen_k=80,
        cache_seqlens=(3, 33, 80), page_size=16, causal=True)  # fmt: skip
    add("NaN in padding", "rows between the rows are NaN", layout="padded", causal=True)

    add("strides", "[B, S, H, D] in memory", layout="bshd", batch=2, causal=True)
    add("strides", "K and V broadcast over the batch", _shared_keys, batch=3)
    add("strides", "last dimension of stride 2", _every_other_column, causal=True)
    add("strides", "mask broadcast over heads and queries", mask="bk", batch=2)
    add("strides", "mask broadcast over the batch", mask="hqk", batch=2)

    add("mask", "causal", causal=True)
    add("mask", "causal, Sq < Sk, bottom right", seqlen_k=130, causal=True)
    add("mask", "causal, Sq < Sk, top left", seqlen_k=130, causal=True, align=TOP_LEFT)
    add("mask", "window", window=(20, 9))
    add("mask", "causal window across tiles", seqlen_q=200, window=(40, 0), causal=True)
    add("heads", "grouped heads", heads_q=6, heads_k=2, causal=True)
    add("heads", "one KV head", heads_q=4, heads_k=1)
    for dim, dim_v in ((1, 1), (17, 17), (80, 80), (96, 96), (128, 64), (256, 256)):
        add("head_dim", f"D = {dim}, Dv = {dim_v}", head_dim=dim, head_dim_v=dim_v, causal=True,
            seqlen_q=41)  # fmt: skip
    add("head_dim", "D = 128, S = 256", head_dim=128, seqlen_q=256, full=True)

    add("features", "bias with gradient over batch and queries", bias="hk", batch=2)
    add("features", "softcap", softcap=15.0, causal=True)
    add("features", "ALiBi", alibi=True, causal=True)
    add("features", "sink", sink=True, window=(16, 0))
    add("features", "dropout", dropout_p=0.3, causal=True)
    add("features", "row statistics", stats=True, causal=True)
    add("features", "everything at once", mask=True, bias="hqk", softcap=20.0, alibi=True,
        sink=True, dropout_p=0.2, window=(50, 20), heads_q=4, heads_k=2, stats=True)  # fmt: skip
    add("varlen", "packed sequences, causal", seqlens_q=(31, 64, 1, 70), causal=True)
    add("varlen", "packed, grouped heads, bias", seqlens_q=(33, 5), seqlens_k=(40, 9), bias=True,
        heads_q=4, heads_k=2)  # fmt: skip
    add("decode", "one query, long cache, grouped heads", seqlen_q=1, seqlen_k=700, heads_q=8,
        heads_k=2, head_dim=128)  # fmt: skip
    add("decode", "paged cache", seqlen_q=1, seqlen_k=300, heads_q=4, heads_k=2, page_size=64,
        cache_seqlens=(300, 129, 64))  # fmt: skip
    add("float64", "float64, causal", dtypes=("fp64",), causal=True)

    add("repeated runs", "forward and backward", kind="repeat", seqlen_q=300, heads_q=4, heads_k=2,
        causal=True, deterministic=True)  # fmt: skip
    add("repeated runs", "with bias, sink and dropout", kind="repeat", seqlen_q=130, bias="hk",
        sink=True, dropout_p=0.1, batch=2, deterministic=True)  # fmt: skip
    add("stream", "inputs made on a non-default stream", kind="stream", seqlen_q=256, causal=True,
        dtypes=("bf16",))  # fmt: skip
    add("large", "offsets beyond 2^31 elements", _far_apart, "large", ("bf16",), True, batch=2)
    for length in (129, 255, 257, 511, 1000):
        add("odd lengths", f"S = {length}, mask", seqlen_q=length, mask="hqk", full=True, heads_q=1)
    return found


CHECKS = _checks()


def selected(full: bool, only: str | None = None) -> list[Check]:
    """The checks of the quick or the full run; `only`: those whose group or name contains it"""
    checks = [c for c in CHECKS if full or not c.full_only]
    if only:
        words = only.lower()
        checks = [c for c in checks if words in c.group.lower() or words in c.name.lower()]
        if not checks:
            groups = ", ".join(dict.fromkeys(c.group for c in CHECKS))
            raise ValueError(f"--only matches no check, got {only!r}; groups are {groups}")
    return checks
