"""The maps of `attn_ext.inspect.kernels` in torch, over tiles of rows: the kernels' reference,
and what serves where there is none.
"""

from __future__ import annotations

import math

import torch

from attn_ext.inspect import logits
from attn_ext.problem import Call


def _tiles(call: Call, lse, w):
    """(tile, its rows, logits, weights P) of each tile."""
    for tile in logits.tiles(call):
        s = logits.scores(call, tile, w=w)
        rows = slice(int(tile.rows[0]), int(tile.rows[-1]) + 1)
        yield tile, rows, s, weights_of(call, s, None if lse is None else lse[tile.b, tile.h, rows])


def weights_of(call: Call, s: torch.Tensor, lse) -> torch.Tensor:
    """P of logits s: exp(s - LSE), or sigmoid(s + sigmoid_bias)."""
    if call.normalizer == "softmax":
        return logits.probabilities(s, lse)
    bias = call.sigmoid_bias
    return torch.sigmoid(s + (-math.log(max(call.k.shape[2], 1)) if bias is None else bias))


def row_stats(call: Call, w=None) -> tuple:
    """(LSE, largest logit, entropy) of the rows, [B, Hq, Sq]."""
    shape, dtype = call.q.shape[:3], logits.statistics_dtype(call)
    lse = torch.full(shape, -torch.inf, dtype=dtype, device=call.q.device)
    largest, entropy = lse.clone(), torch.zeros_like(lse)
    for tile in logits.tiles(call):
        s = logits.scores(call, tile, w=w)
        if s.shape[-1] == 0:
            continue
        rows = slice(int(tile.rows[0]), int(tile.rows[-1]) + 1)
        at = (tile.b, tile.h, rows)
        if call.normalizer == "sigmoid":
            p = weights_of(call, s, None)
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


def top_k(call: Call, n: int, lse, w=None) -> tuple:
    """(weights, keys) [B, Hq, Sq, n]."""
    shape = (*call.q.shape[:3], n)
    weights = torch.zeros(shape, dtype=logits.statistics_dtype(call), device=call.q.device)
    keys = torch.full(shape, -1, dtype=torch.int64, device=call.q.device)
    for tile, rows, s, p in _tiles(call, lse, w):
        m = min(n, s.shape[-1])
        best, index = s.topk(m, dim=-1)
        there = best != -torch.inf
        weights[tile.b, tile.h, rows, :m] = torch.where(there, p.gather(-1, index), 0.0)
        keys[tile.b, tile.h, rows, :m] = torch.where(there, index + tile.c0, -1)
    return weights, keys


def column_mass(call: Call, lse, w=None) -> torch.Tensor:
    """sum_i P_ij, [B, Hq, Sk]."""
    shape = (*call.q.shape[:2], call.k.shape[2])
    mass = torch.zeros(shape, dtype=logits.statistics_dtype(call), device=call.q.device)
    for tile, _, _, p in _tiles(call, lse, w):
        mass[tile.b, tile.h, tile.c0 : tile.c1] += p.sum(2)
    return mass


def pooled_map(call: Call, rows: int, cols: int, lse, w=None) -> torch.Tensor:
    """P averaged down to [B, Hq, rows, cols]: first across, [B, Hq, Sq, cols], then down."""
    pool, seqlen_k = torch.nn.functional.adaptive_avg_pool2d, call.k.shape[2]
    shape = (*call.q.shape[:3], cols)
    across = torch.zeros(shape, dtype=logits.statistics_dtype(call), device=call.q.device)
    for tile, part, _, p in _tiles(call, lse, w):
        full = torch.nn.functional.pad(p, (tile.c0, seqlen_k - tile.c1))
        across[tile.b, tile.h, part] = pool(full, (p.shape[2], cols))
    return pool(across, (rows, cols))
