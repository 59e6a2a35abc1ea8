"""The maps of `attn_ext.inspect.kernels` in torch, over tiles of rows: the kernels' reference,
and what serves where there is none.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch

from attn_ext.core.schema import Call
from attn_ext.inspect import logits


def _tiles(call: Call, lse):
    """(tile, its rows, logits, weights P) of each tile."""
    for tile in logits.tiles(call):
        s = logits.scores(call, tile)
        rows = slice(int(tile.rows[0]), int(tile.rows[-1]) + 1)
        part = None if lse is None else lse[tile.b, tile.h, rows]
        yield tile, rows, s, weights_of(call, tile, s, part)


def weights_of(call: Call, tile: logits.Tile, s: torch.Tensor, lse=None) -> torch.Tensor:
    """P of logits s, which hold all keys of their rows: exp(s - LSE), or a softmax of the rows
    whose LSE is not given or too large to hold their sum; or sigmoid(s + sigmoid_bias).
    """
    if call.normalizer == "softmax":
        if lse is None:
            return logits.row_probabilities(call, tile, s)
        large = logits.too_large(lse)
        p = logits.probabilities(s, lse)
        if not bool(large.any()):
            return p
        return torch.where(large.unsqueeze(-1), logits.row_probabilities(call, tile, s), p)
    bias = call.sigmoid_bias
    return torch.sigmoid(s + (-math.log(max(call.k.shape[2], 1)) if bias is None else bias))


def row_stats(call: Call) -> tuple:
    """(LSE, largest logit, entropy) of the rows, [B, Hq, Sq]."""
    shape, dtype = call.q.shape[:3], logits.statistics_dtype(call)
    lse = torch.full(shape, -torch.inf, dtype=dtype, device=call.q.device)
    largest, entropy = lse.clone(), torch.zeros_like(lse)
    for tile in logits.tiles(call):
        s = logits.scores(call, tile)
        if s.shape[-1] == 0:
            continue
        rows = slice(int(tile.rows[0]), int(tile.rows[-1]) + 1)
        at = (tile.b, tile.h, rows)
        if call.normalizer == "sigmoid":
            p = weights_of(call, tile, s)
            total = p.sum(-1, keepdim=True)
            lse[at] = total.squeeze(-1).log()
            p = p / total.masked_fill(total == 0, 1.0)  # weights that are all 0
        else:
            lse[at] = logits.row_lse(call, tile, s)
            p = logits.row_probabilities(call, tile, s)
        largest[at] = s.amax(-1)
        seen = (s != -torch.inf).any(-1)
        entropy[at] = torch.where(seen, torch.special.entr(p).sum(-1), 0.0)
    return lse, largest, entropy


def top_k(call: Call, n: int, lse) -> tuple:
    """(weights, keys) [B, Hq, Sq, n]."""
    shape = (*call.q.shape[:3], n)
    weights = torch.zeros(shape, dtype=logits.statistics_dtype(call), device=call.q.device)
    keys = torch.full(shape, -1, dtype=torch.int64, device=call.q.device)
    for tile, rows, s, p in _tiles(call, lse):
        m = min(n, s.shape[-1])
        best, index = s.topk(m, dim=-1)
        there = best != -torch.inf
        weights[tile.b, tile.h, rows, :m] = torch.where(there, p.gather(-1, index), 0.0)
        keys[tile.b, tile.h, rows, :m] = torch.where(there, index + tile.c0, -1)
    return weights, keys


class MeanTopK(NamedTuple):
    """The top keys of the mean over heads, and what each row holds in all."""

    weights: torch.Tensor  # [B, Sq, n] of the mean, largest first; 0 where there are fewer keys
    keys: torch.Tensor  # int64 [B, Sq, n]; -1 there
    seen: torch.Tensor  # int64 [B, Hq, Sq]: keys that the row sees
    seen_by_any: torch.Tensor  # int64 [B, Sq]: keys that some head sees
    total: torch.Tensor  # [B, Hq, Sq]: sum_j P_ij, less than 1 where a sink takes some


def mean_top_k(call: Call, n: int) -> MeanTopK:
    """The n largest of (sum_h P_hij) / Hq of each query.  Heads are added up before any key is
    dropped: a tile holds whole rows of all heads, so at least Hq x Sk logits.
    """
    batch, heads, seqlen_q = call.q.shape[:3]
    device, dtype = call.q.device, logits.statistics_dtype(call)
    weights = torch.zeros(batch, seqlen_q, n, dtype=dtype, device=device)
    keys = torch.full((batch, seqlen_q, n), -1, dtype=torch.int64, device=device)
    seen = torch.zeros(batch, heads, seqlen_q, dtype=torch.int64, device=device)
    seen_by_any = torch.zeros(batch, seqlen_q, dtype=torch.int64, device=device)
    total = torch.zeros(batch, heads, seqlen_q, dtype=dtype, device=device)
    positions = torch.arange(seqlen_q, device=device)
    row_block = min(max(logits.BUDGET // max(heads * call.k.shape[2], 1), 1), max(seqlen_q, 1))
    batch_block = max(logits.BUDGET // max(heads * row_block * call.k.shape[2], 1), 1)
    for b, first in itertools.product(range(0, batch, batch_block), range(0, seqlen_q, row_block)):
        rows = positions[first : first + row_block]
        part, at = slice(b, b + batch_block), slice(first, first + row_block)
        tile = logits.Tile(part, slice(0, heads), rows, *logits.key_range(call, rows))
        s = logits.scores(call, tile)
        p, there = weights_of(call, tile, s), s != -torch.inf
        total[part, :, at], seen[part, :, at] = p.sum(-1), there.sum(-1)
        seen_by_any[part, at] = there.any(1).sum(-1)
        best, index = torch.where(there.any(1), p.mean(1), -torch.inf).topk(
            min(n, s.shape[-1]), dim=-1
        )
        found = best != -torch.inf
        weights[part, at, : best.shape[-1]] = torch.where(found, best, 0.0)
        keys[part, at, : best.shape[-1]] = torch.where(found, index + tile.c0, -1)
    return MeanTopK(weights, keys, seen, seen_by_any, total)


def column_mass(call: Call, lse) -> torch.Tensor:
    """sum_i P_ij, [B, Hq, Sk]."""
    shape = (*call.q.shape[:2], call.k.shape[2])
    mass = torch.zeros(shape, dtype=logits.statistics_dtype(call), device=call.q.device)
    for tile, _, _, p in _tiles(call, lse):
        mass[tile.b, tile.h, tile.c0 : tile.c1] += p.sum(2)
    return mass


def pooled_map(call: Call, rows: int, cols: int, lse) -> torch.Tensor:
    """P averaged down to [B, Hq, rows, cols]: first across, [B, Hq, Sq, cols], then down."""
    pool, seqlen_k = torch.nn.functional.adaptive_avg_pool2d, call.k.shape[2]
    shape = (*call.q.shape[:3], cols)
    across = torch.zeros(shape, dtype=logits.statistics_dtype(call), device=call.q.device)
    for tile, part, _, p in _tiles(call, lse):
        full = torch.nn.functional.pad(p, (tile.c0, seqlen_k - tile.c1))
        across[tile.b, tile.h, part] = pool(full, (p.shape[2], cols))
    return pool(across, (rows, cols))
