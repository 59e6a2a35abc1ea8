"""Logits of some rows of an attention call, tile by tile: S [b, h, rows, cols] in float32 (float64
for float64 inputs), never the whole Sq x Sk.

`Tile` names a block of batch elements, heads and queries; `scores` gives its logits over the keys
that its window reaches.  A tile holds at most about BUDGET elements, or one row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from attn_ext.core import logit, reference, schema, validate
from attn_ext.core.problem import FAR_LSE
from attn_ext.core.schema import GRADIENTS, Call, given
from attn_ext.functional import common, dense
from attn_ext.ops import execute

BUDGET = 1 << 21  # elements of a tile: 8 MiB of float32
SIDES = ("mask", "bias", "alibi_slopes", "sink")  # tensors among the options


@dataclass(slots=True)
class Tile:
    """Batch elements b, query heads h (whole groups) and queries of one tile, keys c0 to c1."""

    b: slice
    h: slice
    rows: torch.Tensor  # int64 [r], positions of the queries
    c0: int
    c1: int


def holds_values(x: torch.Tensor) -> bool:
    """Whether a kernel can read x: no meta tensor, none of a transform of torch.func, and of no
    class that answers operations itself (fake tensors, DTensor).
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        x = x.detach()  # grad and jvp wrap all that is computed within them, of plain tensors, too
    return not (
        x.is_meta
        or torch._C._functorch.is_functorch_wrapped_tensor(x)
        or type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    )


def has_values(name: str, x: torch.Tensor) -> None:
    """ValueError unless a kernel can read x."""
    if not holds_values(x):
        kind = "a meta tensor" if x.is_meta else f"a {type(x).__name__} of a transform or a trace"
        raise ValueError(f"{name} must hold values, which attn_ext.inspect reads, got {kind}")


def call_of(q, k, **options) -> Call:
    """The canonical dense `Call` of q, k and the options of `attn_ext.attention`; v is a column
    of k, for what needs no values.
    """
    given = {"q": q, "k": k, **{n: options.get(n) for n in SIDES if options.get(n) is not None}}
    for name, value in given.items():
        validate.tensor(name, value)
        has_values(name, value)
    if torch.jit.is_tracing():  # the trace would hold the results' memory, and not what fills it
        raise NotImplementedError("attn_ext.inspect cannot be recorded by torch.jit.trace")
    call = dense.dense_call(q, k, k[..., :1] if k.dim() else k, **options)
    scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
    # ints of any size become floats; what is looked at has no gradients
    return call._replace(
        scale=float(scale), softcap=float(call.softcap), grad=False, bias_grad=False
    )  # fmt: skip


def detached(call: Call) -> Call:
    """The call without autograd and, on the CPU, in float32 at least, so that halves lose nothing
    more (the GPU's kernels take their products as they are, and sum in float32).
    """
    dtype = statistics_dtype(call) if call.q.device.type == "cpu" else call.q.dtype
    values = {name: x.detach().to(dtype) for name, x in given(call).items()}
    if call.w is not None:  # stays in the statistics' dtype
        values["w"] = call.w.detach()
    return call._replace(**values, grad=False, bias_grad=False, backend="auto")


def in_float32(call: Call) -> Call:
    """The call with its tensors in float32 at least."""
    dtype = statistics_dtype(call)
    return call._replace(**{name: x.to(dtype) for name, x in given(call).items()})


def exactly(product, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """product(a, b) in their own dtype, which autocast would lower."""
    device = a.device.type
    if not common.autocasting(device):
        return product(a, b)
    with torch.autocast(device, enabled=False):
        return product(a, b)


def statistics_dtype(call: Call) -> torch.dtype:
    """float32, or float64 for float64 inputs."""
    return schema.statistics_dtype(call.q.dtype)


def forward(call: Call) -> tuple:
    """(out, lse, max_logit, entropy) by the best backend."""
    return execute.forward(call)


def transposed_product(call: Call, dout: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """P^T dout summed over the heads of a group, [B, Hk, Sk, n], by the best backend's backward.

    dout [B, Hq, Sq, n]: the gradient of V is this very product, so it costs O(N) memory.
    """
    width = dout.shape[-1]
    values = call.k.new_zeros(1).expand(*call.k.shape[:3], 1).expand(-1, -1, -1, width)
    call = call._replace(v=values.contiguous(), dropout_p=0.0, need_stats=False, backend="auto")
    needs = [name == "v" for name in GRADIENTS]
    return execute.backward(dout, None, torch.zeros_like(dout), lse, call, needs).v


def tiles(call: Call, rows: torch.Tensor | None = None) -> Iterator[Tile]:
    """Tiles that cover the given queries (all if None)."""
    batch, heads, seqlen_q, _ = call.q.shape
    heads_k, seqlen_k = call.k.shape[1], call.k.shape[2]
    group = heads // heads_k
    rows = torch.arange(seqlen_q, device=call.q.device) if rows is None else rows
    row_block = min(max(BUDGET // max(group * seqlen_k, 1), 1), max(len(rows), 1))
    unit = group * row_block * max(seqlen_k, 1)
    head_block = min(max(BUDGET // unit, 1), heads_k)
    batch_block = min(max(BUDGET // (unit * heads_k), 1), max(batch, 1))
    for b in range(0, batch, batch_block):
        for hk in range(0, heads_k, head_block):
            for first in range(0, len(rows), row_block):
                part = rows[first : first + row_block]
                h = slice(hk * group, min(hk + head_block, heads_k) * group)
                yield Tile(slice(b, b + batch_block), h, part, *key_range(call, part))


def key_range(call: Call, rows: torch.Tensor) -> tuple[int, int]:
    """The keys from c0 to c1 that the window lets any of these queries see."""
    seqlen_k = call.k.shape[2]
    if len(rows) == 0:
        return 0, 0
    if call.window_left < 0 and call.window_right < 0:
        return 0, seqlen_k
    return logit.key_range(call, int(rows.min()), int(rows.max()), call.q.shape[2], seqlen_k)


def part(scores: torch.Tensor | None, tile: Tile) -> torch.Tensor | None:
    """The tile of a mask or bias [B or 1, Hq or 1, Sq or 1, Sk or 1]; broadcast dimensions stay."""
    return logit.part(scores, tile.b, tile.h, tile.rows, slice(tile.c0, tile.c1))


def pairs_of(call: Call, tile: Tile) -> logit.Pairs:
    """The tile's queries and keys."""
    cols = torch.arange(tile.c0, tile.c1, device=call.q.device)
    return logit.Pairs(tile.rows, cols, call.q.shape[2], call.k.shape[2], tile.b, tile.h)


def additive(q: torch.Tensor, k: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """sum_d w_d tanh(q_id + k_jd), a column d at a time; q [b, g, n, r, D], k [b, g, 1, c, D],
    w [g, n, D].
    """
    s = q.new_zeros(*q.shape[:4], k.shape[3])
    for d in range(q.shape[-1]):
        t = torch.tanh(q[..., d, None] + k[..., d].unsqueeze(-2))
        s += w[..., d, None, None] * t
    return s


def scores(call: Call, tile: Tile, slope: bool = False):
    """S [b, h, r, c1 - c0] with -inf where a pair is excluded; with `slope` also d s / d (scale
    q.k), the derivative of softcap (None where there is none).
    """
    dtype = statistics_dtype(call)
    group = call.q.shape[1] // call.k.shape[1]
    q = call.q[tile.b, tile.h][:, :, tile.rows].to(dtype)
    hk = slice(tile.h.start // group, tile.h.stop // group)
    k = call.k[tile.b, hk, tile.c0 : tile.c1].to(dtype)
    q, k = q.unflatten(1, (-1, group)), k.unsqueeze(2)
    if call.w is None:
        s = exactly(torch.matmul, q, k.transpose(-1, -2))
    else:
        s = additive(q, k, call.w[tile.h].to(dtype).unflatten(0, (-1, group)))
    pairs, (mask, bias) = pairs_of(call, tile), (part(x, tile) for x in (call.mask, call.bias))
    s, found = logit.with_derivatives(call, s.flatten(1, 2), pairs, bias)
    s = torch.where(logit.seen(call, pairs, mask, bias), s, -torch.inf)
    return (s, found.slope) if slope else s


def row_lse(call: Call, tile: Tile, s: torch.Tensor) -> torch.Tensor:
    """LSE [b, h, r] of a tile's logits, the sink included; -inf for rows that see no key."""
    lse = torch.logsumexp(s, dim=-1)
    if call.sink is None:
        return lse
    sink = call.sink[tile.h].to(s.dtype)[None, :, None]
    return torch.where(lse == -torch.inf, lse, torch.logaddexp(lse, sink))


def row_probabilities(call: Call, tile: Tile, s: torch.Tensor) -> torch.Tensor:
    """P [b, h, r, c] of a tile that holds all keys of its rows.  It needs no LSE, which loses the
    number of keys beside logits of finfo.min, as additive masks have them.
    """
    weighed = s
    if call.sink is not None:
        sink = call.sink[tile.h].to(s.dtype)[None, :, None, None]
        weighed = torch.cat((s, sink.expand(*s.shape[:3], 1)), dim=-1)
    p = torch.softmax(weighed, dim=-1)[..., : s.shape[-1]]
    return torch.where(s == -torch.inf, 0.0, p)


def probabilities(s: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """P = exp(S - LSE) [b, h, r, c]; 0 at excluded pairs, also of rows that are empty or NaN."""
    p = torch.exp(s - lse.unsqueeze(-1))
    return torch.where(s == -torch.inf, 0.0, p)


def too_large(lse: torch.Tensor) -> torch.Tensor:
    """Where LSE is so large that exp(S - LSE) is not P: its last bit alone is then worth more than
    the sum's digits that are shown, as in rows whose whole mask is -1e9 or finfo.min.
    """
    return lse.isfinite() & (lse.abs() > FAR_LSE)


def add_to_keys(total: torch.Tensor, ds: torch.Tensor, call: Call, tile: Tile) -> None:
    """total [B, Hk, Sk, D] += scale * dS^T Q, summed over each group; pairs with dS = 0 add
    nothing, even where Q is NaN.
    """
    group = call.q.shape[1] // call.k.shape[1]
    q = call.q[tile.b, tile.h][:, :, tile.rows].to(ds.dtype).unflatten(1, (-1, group))
    ds = ds.unflatten(1, (-1, group)).transpose(-1, -2)
    hk = slice(tile.h.start // group, tile.h.stop // group)
    total[tile.b, hk, tile.c0 : tile.c1] += (
        exactly(reference.safe_matmul, ds, q).sum(2) * call.scale
    )


def times_keys(ds: torch.Tensor, call: Call, tile: Tile) -> torch.Tensor:
    """scale * dS K [b, h, r, D]"""
    group = call.q.shape[1] // call.k.shape[1]
    hk = slice(tile.h.start // group, tile.h.stop // group)
    k = call.k[tile.b, hk, tile.c0 : tile.c1].to(ds.dtype).unsqueeze(2)
    k = k.expand(-1, -1, group, -1, -1)
    product = exactly(reference.safe_matmul, ds.unflatten(1, (-1, group)), k)
    return product.flatten(1, 2) * call.scale


def add_to_bias(total: torch.Tensor, ds: torch.Tensor, tile: Tile) -> None:
    """total (the bias' shape) += dS, summed over the bias' broadcast dimensions."""
    broadcast = [d for d in range(4) if total.shape[d] == 1]
    if broadcast:
        ds = ds.sum(broadcast, keepdim=True)
    b = tile.b if total.shape[0] != 1 else slice(None)
    h = tile.h if total.shape[1] != 1 else slice(None)
    c = slice(tile.c0, tile.c1) if total.shape[3] != 1 else slice(None)
    view = total[b, h, :, c]
    view.index_add_(2, tile.rows if total.shape[2] != 1 else tile.rows.new_zeros(1), ds)
