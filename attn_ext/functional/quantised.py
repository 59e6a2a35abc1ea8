"""Keys and values kept as int8 with a factor a row and head, and attention to them.

    row = int8 row * factor,  factor = max |row| / 127

So no number is off by more than factor / 2, or 0.4 % of the largest of its row.  A row that holds
NaN or inf is NaN as a whole.  Queries and results are float32.  CPU only: no GPU kernel reads it.
"""

from __future__ import annotations

import torch

from attn_ext.backends import cpu_cache
from attn_ext.core import validate
from attn_ext.functional.decode import attention_decode, decode_call
from attn_ext.ops import execute, route

OPTIONS = frozenset(attention_decode.__kwdefaults__) - {"k_new", "v_new"}
GIVEN = (torch.float16, torch.bfloat16, torch.float32)
MOST = 127
# Factors that are normal numbers, and of which 127 are finite: rows of smaller and larger numbers
# (below 2**-120, or the very largest float) are kept in these steps
FACTORS = (torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max / 127.00002)


def check_device(dtype, device) -> None:
    """NotImplementedError for a cache of int8 elsewhere than on the CPU."""
    if dtype != torch.int8:
        return
    kind = torch.empty(0, dtype=dtype, device=device).device.type
    if kind != "cpu":
        raise NotImplementedError(
            f"device must be cpu for a cache of int8, which no kernel of another device reads, got "
            f"{kind}; take dtype=torch.bfloat16 there"
        )


def check_dtype(name: str, x) -> None:
    """TypeError for what a cache of int8 is not given."""
    if x.dtype not in GIVEN:
        raise TypeError(
            f"{name} must be float16, bfloat16 or float32 for a cache of int8, got {x.dtype}"
        )


def refuse_recorded(name: str) -> None:
    """NotImplementedError where torch records or transforms what runs: which lengths and pages are
    there is read on the way."""
    compiling = torch.compiler.is_compiling()
    if (
        compiling or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):  # fmt: skip
        raise NotImplementedError(
            f"{name} of a KVCache of int8 cannot be {'compiled' if compiling else 'transformed'}: "
            "call it from a function under torch.compiler.disable, or take dtype=torch.bfloat16"
        )


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 like x [..., D], and the factors, float32 [..., 1]."""
    x = x.detach().float()
    largest = x.abs().amax(-1, keepdim=True)
    factors = (largest / MOST).clamp(*FACTORS)
    factors = torch.where(torch.isfinite(largest), factors, torch.nan)
    whole = (x / factors).round_()
    return torch.where(torch.isnan(whole), 0, whole).to(torch.int8), factors


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
    for name in options:
        if name not in OPTIONS:
            raise TypeError(f"KVCache.attend() got an unexpected keyword argument {name!r}")
    # checked with caches of float32 that are one row
    stand_ins = [
        torch.empty(x.shape[-1:], dtype=torch.float32, device=x.device).expand(x.shape)
        for x in (k, v)
    ]
    paged = dict(block_table=block_table, backend=backend, **options)
    call = execute.prepared(decode_call(q, *stand_ins, held, **paged))
    if len(q) == 0:
        return attention_decode(q, *stand_ins, held, return_lse=return_lse, **paged)
    validate.values(call)
    # observers see calls of float32
    if route.is_plain(q, k, v) and not route.observers and execute.serves_on_cpu(call):
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
    count = max(1, -(-int(call.seqlens_k[b]) // k.shape[2]))
    pages = call.block_table[b, :count].long()
    capacity = count * k.shape[2]
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
