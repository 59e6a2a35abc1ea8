"""Keys and values kept as int8 with a factor a row and head, and attention to them.

    row = int8 row * factor,  factor = max |row| / 127

So no number is off by more than factor / 2, or 0.4 % of the largest of its row.  A row that holds
NaN or inf is NaN as a whole.  Queries and results are float32.
"""

from __future__ import annotations

import torch

from attn_ext.backends import cpu_cache
from attn_ext.core import validate
from attn_ext.functional.decode import attention_decode, decode_call
from attn_ext.ops import execute, route

GIVEN = (torch.float16, torch.bfloat16, torch.float32)
MOST = 127


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 like x [..., D], and the factors, float32 [..., 1]."""
    x = x.detach().float()
    factors = x.abs().amax(-1, keepdim=True) / MOST
    whole = (x / factors).round_()
    kept = torch.where(torch.isfinite(whole), whole, 0).to(torch.int8)  # of factor 0, NaN or inf
    return kept, torch.where(torch.isfinite(factors), factors, torch.nan)


def dequantise(kept: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """The rows in float32."""
    return kept.float() * factors


def decode(
    q, k, v, held, k_factors, v_factors, *, block_table, return_lse=False, backend="auto", **options
):
    """`attention_decode` with pages of int8 and their factors [pages, Hk, page_size, 1].

    The cpu backend's kernel for few queries reads them as they are; for all other calls the pages
    of one sequence at a time become float32.
    """
    # checked with caches of float32 that take no memory
    stand_ins = (q.new_empty(()).expand(x.shape) for x in (k, v))
    call = decode_call(
        q, *stand_ins, held, block_table=block_table, backend=backend, **options
    )  # fmt: skip
    call = execute.prepared(call)
    if q.device.type == "cpu":
        validate.values(call)
    if route.is_plain(q, k, v) and execute.serves_on_cpu(call):
        found = cpu_cache.of_int8(call._replace(k=k, v=v), k_factors, v_factors)
        if found is not None:
            return found if return_lse else found[0]
    options |= dict(return_lse=True, backend=backend)
    outs, lses = zip(
        *(_of_sequence(b, call, k, v, k_factors, v_factors, options) for b in range(len(q))),
        strict=True,
    )
    out, lse = torch.cat(outs), torch.cat(lses)
    return (out, lse) if return_lse else out


def _of_sequence(b: int, call, k, v, k_factors, v_factors, options):
    """(out, lse) of sequence b alone."""
    pages = call.block_table[b].long()
    if call.q.device.type == "cpu":  # page numbers beyond its length mean nothing
        pages = pages[: max(1, -(-int(call.seqlens_k[b]) // k.shape[2]))]
    capacity = len(pages) * k.shape[2]
    pages = pages.clamp(0, len(k) - 1)
    rows = [
        dequantise(x[pages], factors[pages]).transpose(0, 1).flatten(1, 2)[None]
        for x, factors in ((k, k_factors), (v, v_factors))
    ]
    told = dict(options)
    for name, dims in (("mask", 4), ("bias", 4), ("alibi_slopes", 2)):
        x = getattr(call, name)
        if x is None:
            continue
        x = x[b : b + 1] if x.dim() == dims and x.shape[0] > 1 else x
        told[name] = x[..., :capacity] if dims == 4 and x.shape[-1] > 1 else x
    return attention_decode(call.q[b : b + 1], *rows, call.seqlens_k[b : b + 1], **told)
