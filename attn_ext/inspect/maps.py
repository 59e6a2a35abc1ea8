"""What attends to what, in O(N) memory: top_k, column_mass, weights, pooled_map, rollout.

top_k, column_mass and pooled_map have kernels of their own (`attn_ext.inspect.kernels`).  rollout
is made of products P^T x, the gradient of V in the attention kernels.  weights goes over tiles of
the chosen rows.  Nothing here is differentiable (`row_stats` is).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from attn_ext.core import validate
from attn_ext.core.schema import Call
from attn_ext.inspect import kernels, logits

if TYPE_CHECKING:
    from typing import Literal, TypeAlias, TypedDict

    from typing_extensions import Unpack

    class MapOptions(TypedDict, total=False):
        """The keywords of every function here."""

        causal: bool | Literal["top_left", "bottom_right"]
        window: Sequence[int | None] | None
        mask: torch.Tensor | None
        bias: torch.Tensor | None
        softcap: float
        alibi_slopes: torch.Tensor | None
        sink: torch.Tensor | None
        scale: float | None

    Positions: TypeAlias = slice | Sequence[int] | torch.Tensor | None

_OPTIONS = ("causal", "window", "mask", "bias", "softcap", "alibi_slopes", "sink", "scale")


class TopK(NamedTuple):
    """The most attended keys of each query, largest first."""

    weights: torch.Tensor  # [B, Hq, Sq, n] ([B, Sq, n] of a mean over heads); 0 where a row sees
    # fewer than n keys
    keys: torch.Tensor  # int64, of the same shape; -1 there


def _call(q, k, options) -> Call:
    if not isinstance(options, dict):
        raise TypeError(f"the options of a layer must be a dict, got {options!r:.80}")
    for name in options:
        if name not in _OPTIONS:
            raise TypeError(f"unknown option {name!r}, the options are {', '.join(_OPTIONS)}")
    return logits.detached(logits.call_of(q, k, **options))


def _lse(call: Call, lse) -> torch.Tensor:
    """The given LSE, checked, or that of a forward pass."""
    if lse is None:
        return logits.forward(call)[1]
    validate.tensor("lse", lse)
    validate.floating("lse", lse)
    logits.has_values("lse", lse)
    if lse.device != call.q.device:
        raise ValueError(f"lse must be on q's device {call.q.device}, got {lse.device}")
    if lse.shape != call.q.shape[:3]:
        want = tuple(call.q.shape[:3])
        raise ValueError(f"lse must have shape {want} [B, Hq, Sq], got {tuple(lse.shape)}")
    return lse.detach().to(logits.statistics_dtype(call)).contiguous()


@torch.no_grad()
def top_k(
    q: torch.Tensor, k: torch.Tensor, n: int, *, per_head: bool = True,
    lse: torch.Tensor | None = None, backend: str = "auto", **options: Unpack[MapOptions],
) -> TopK:  # fmt: skip
    """The n most attended keys of each query (all where n is larger than Sk) with their attention
    weights; with per_head=False those of the mean of the weights over the heads.

    q [B, Hq, Sq, D], k [B, Hk, Sk, D]; lse [B, Hq, Sq] saves a pass where it is known.  Options:
    causal, window, mask, bias, softcap, alibi_slopes, sink, scale as in `attn_ext.attention`.
    backend: "auto", "cpu", "triton" or "reference".
    """
    validate.integer("n", n, 1)
    validate.boolean("per_head", per_head)
    call = _call(q, k, options)
    n = min(n, call.k.shape[2])
    lse = _lse(call, lse)
    if per_head:
        return TopK(*kernels.top_k(call, n, lse, backend))
    return TopK(*kernels.mean_top_k(call, n, lse, backend)[:2])


@torch.no_grad()
def column_mass(
    q: torch.Tensor, k: torch.Tensor, *, per_head: bool = True, lse: torch.Tensor | None = None,
    backend: str = "auto", **options: Unpack[MapOptions],
) -> torch.Tensor:  # fmt: skip
    """How much attention each key receives: sum_i P_ij, [B, Hq, Sk], or summed over the heads
    [B, Sk].

    q [B, Hq, Sq, D], k [B, Hk, Sk, D].  All keys together receive 1 a query and head (less where a
    sink takes some).  lse, backend and options: as `top_k`.
    """
    validate.boolean("per_head", per_head)
    call = _call(q, k, options)
    mass = kernels.column_mass(call, _lse(call, lse), backend)
    return mass if per_head else mass.sum(1)


def _positions(name: str, chosen, size: int, device) -> torch.Tensor:
    """int64 positions of a slice, a sequence of ints or an int tensor; negative ones count from
    the end.
    """
    if chosen is None:
        return torch.arange(size, device=device)
    wrong_kind = f"{name} must be a slice or a list of positions, got {chosen!r:.80}"
    if isinstance(chosen, slice):
        try:
            return torch.arange(size, device=device)[chosen]
        except (TypeError, ValueError) as error:  # of a slice of no ints, or one that goes back
            raise type(error)(f"{wrong_kind}: {error}") from None
    try:
        index = torch.as_tensor(chosen, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(wrong_kind) from None
    if isinstance(chosen, (list, tuple)) and not chosen:  # torch makes floats of no positions
        index = index.to(torch.int64)
    if index.dim() != 1 or index.is_floating_point() or index.dtype == torch.bool:
        raise TypeError(wrong_kind)
    index = index.to(torch.int64)
    wrong = (index < -size) | (index >= size)
    if bool(wrong.any()):
        if size == 0:
            raise ValueError(f"{name} must be empty, since there are none, got {chosen!r:.80}")
        raise ValueError(
            f"{name} must be between {-size} and {size - 1}, got {int(index[wrong][0])}"
        )
    return torch.where(index < 0, index + size, index)


@torch.no_grad()
def weights(
    q: torch.Tensor, k: torch.Tensor, *, rows: Positions = None, cols: Positions = None,
    **options: Unpack[MapOptions],
) -> torch.Tensor:  # fmt: skip
    """The exact attention weights P of chosen queries (and keys): [B, Hq, rows, cols].

    rows, cols: a slice, or a list or tensor of positions (negative: from the end); None = all (the
    whole matrix, for both).  The LSE of the chosen rows is computed over all keys.  Options:
    as `top_k`.
    """
    call = _call(q, k, options)
    seqlen_q, seqlen_k, device = call.q.shape[2], call.k.shape[2], call.q.device
    rows = _positions("rows", rows, seqlen_q, device)
    cols = _positions("cols", cols, seqlen_k, device)
    shape = (*call.q.shape[:2], len(rows), len(cols))
    out = torch.zeros(shape, dtype=logits.statistics_dtype(call), device=device)
    order = torch.arange(len(rows), device=device)
    done = {}
    for tile in logits.tiles(call, rows):
        key = (tile.b.start, tile.h.start)
        first = done.get(key, 0)
        done[key] = first + len(tile.rows)
        s = logits.scores(call, tile)
        p = logits.row_probabilities(call, tile, s)
        reached = (cols >= tile.c0) & (cols < tile.c1)
        block = torch.zeros(*p.shape[:3], len(cols), dtype=p.dtype, device=device)
        block[..., reached] = p[..., cols[reached] - tile.c0]
        out[tile.b, tile.h, order[first : first + len(tile.rows)]] = block
    return out


@torch.no_grad()
def pooled_map(
    q: torch.Tensor, k: torch.Tensor, size: int | Sequence[int] = 256, *,
    lse: torch.Tensor | None = None, backend: str = "auto", **options: Unpack[MapOptions],
) -> torch.Tensor:  # fmt: skip
    """The N x N map of attention weights averaged down to `size` x `size`, [B, Hq, size, size].

    size: an int or (rows, cols); at most Sq and Sk (larger ones are cut to them).  Cell (r, c) is
    the mean of P over its block, as torch's adaptive_avg_pool2d cuts it.  lse, backend and options:
    as `top_k`.
    """
    pair = (size, size) if isinstance(size, int) else size
    if not isinstance(pair, (tuple, list)):
        raise TypeError(
            f"size must be an int or (rows, cols), got {type(size).__name__} {size!r:.80}"
        )
    if len(pair) != 2:
        raise ValueError(f"size must be an int or (rows, cols), got {size!r:.80}")
    for value in pair:
        validate.integer("size", value, 1)
    call = _call(q, k, options)
    return pooled_map_of(call, pair, _lse(call, lse), backend)


def pooled_map_of(call: Call, size, lse, backend="auto") -> torch.Tensor:
    """`pooled_map` of a canonical dense call."""
    seqlen_q, seqlen_k = call.q.shape[2], call.k.shape[2]
    rows, cols = min(size[0], max(seqlen_q, 1)), min(size[1], max(seqlen_k, 1))
    if call.q.numel() == 0 or call.k.numel() == 0:
        shape = (*call.q.shape[:2], rows, cols)
        return torch.zeros(shape, dtype=logits.statistics_dtype(call), device=call.q.device)
    return kernels.pooled_map(call, rows, cols, lse, backend)


@torch.no_grad()
def rollout(
    layers: Sequence, rows: Positions = None, *, residual: float = 0.5,
    **options: Unpack[MapOptions],
) -> torch.Tensor:  # fmt: skip
    """Attention rollout (arXiv 2005.00928): how much of each input position reaches the chosen
    outputs after all layers, as vector products, without any N x N matrix.

    layers: from the first to the last, each (q, k) or (q, k, dict of options) with q
    [B, Hq, S, D] and k [B, Hk, S, D]; `options` hold for all of them.  A layer mixes by
    A = residual * I + (1 - residual) * mean over heads of P.
    rows: output positions (a slice or a list): result [B, rows, S], each row summing to 1 where
    every query sees a key.  None: the mean over all positions, [B, S].
    """
    residual = validate.number("residual", residual, 0.0, 1.0)
    of_numbers = isinstance(layers, (torch.Tensor, str, bytes)) or hasattr(layers, "ndim")
    if of_numbers or not isinstance(layers, Iterable):
        kind = type(layers).__name__
        raise TypeError(f"layers must be a list of (q, k) or (q, k, options), got {kind}")
    layers = list(layers)
    if not layers:
        raise ValueError("layers must hold at least one (q, k), got none")
    calls = []
    for layer in layers:
        if not isinstance(layer, (tuple, list)) or len(layer) not in (2, 3):
            kind = type(layer).__name__
            raise TypeError(f"a layer must be (q, k) or (q, k, options), got a {kind}")
        own = layer[2] if len(layer) == 3 else {}
        call = _call(layer[0], layer[1], {**options, **own} if isinstance(own, dict) else own)
        calls.append(logits.in_float32(call))
    return rollout_of(calls, rows, residual)


def rollout_of(calls: Sequence[Call], rows, residual: float) -> torch.Tensor:
    """`rollout` of canonical dense calls."""
    last = calls[-1]
    batch, length = last.q.shape[0], last.q.shape[2]
    for index, call in enumerate(calls):
        if call.q.shape[2] != length or call.k.shape[2] != length or call.q.shape[0] != batch:
            raise ValueError(
                f"layer {index}: q and k must have the last layer's batch {batch} and length "
                f"{length}, got {tuple(call.q.shape)} and {tuple(call.k.shape)}"
            )
    if rows is None:
        x = last.q.new_full((batch, length, 1), 1 / max(length, 1))
    else:
        index = _positions("rows", rows, length, last.q.device)
        # [S, n]: a column is 1 at its row (one_hot refuses S = 0)
        x = (torch.arange(length, device=index.device)[:, None] == index).to(last.q.dtype)
        x = x.expand(batch, *x.shape)
    for call in reversed(calls):
        x = residual * x + (1 - residual) * _transposed_mean(call, x.to(call.q.dtype))
    return x[..., 0] if rows is None else x.transpose(1, 2)


def _transposed_mean(call: Call, x: torch.Tensor) -> torch.Tensor:
    """(mean over heads of P)^T x, x [B, S, n]; columns 64 at a time."""
    if x.shape[-1] == 0:  # no row was chosen
        return x
    heads, lse, parts = call.q.shape[1], logits.forward(call)[1], []
    for n in range(0, x.shape[-1], 64):
        dout = x[..., n : n + 64].unsqueeze(1).expand(-1, heads, -1, -1).contiguous() / heads
        parts.append(logits.transposed_product(call, dout, lse).sum(1))
    return torch.cat(parts, dim=-1)
