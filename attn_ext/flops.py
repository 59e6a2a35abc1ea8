"""FLOP formulas for torch.utils.flop_counter, as it counts torch's own attention: matmuls only,
masks not subtracted.  q [B, Hq, Sq, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv]; varlen by its longest
sequences.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from attn_ext import ops  # noqa: F401  defines the operators


def _matmul_pair(fields) -> tuple[int, int]:
    """(Q K^T, P V) in FLOPs: 2 * B * Hq * Sq * Sk * D, and the same with Dv."""
    q, v, cu_seqlens_q = fields[0], fields[2], fields[8]
    batch = q[0] if cu_seqlens_q is None else cu_seqlens_q[0] - 1
    scores = 2 * batch * q[1] * fields[12] * fields[13]
    return scores * q[-1], scores * v[-1]


@register_flop_formula(torch.ops.attn_ext.forward)
def _forward_flops(*fields, out_shape=None, **unused) -> int:
    return sum(_matmul_pair(fields))


@register_flop_formula(torch.ops.attn_ext.backward)
def _backward_flops(dout, dlse, out, lse, *fields, out_shape=None, **unused) -> int:
    # S = Q K^T again, dQ and dK of D columns; dP and dV of Dv columns
    scores, values = _matmul_pair(fields)
    return 3 * scores + 2 * values
