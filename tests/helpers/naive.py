"""Attention written out, in the layout of flash-attn and xformers: q [B, Sq, H, D], k, v
[B, Sk, H, D], in the dtype of the inputs, which tests choose to be float64.
"""

import torch


def scores(q, k, scale=None):
    """The logits [B, H, Sq, Sk]."""
    return torch.einsum("bihd,bjhd->bhij", q, k) * (scale or q.shape[-1] ** -0.5)


def attend(s, v, hidden=None, keep=None):
    """(out, lse) of logits s, without the keys that are hidden; keep: those of dropout.  A row
    without keys gives 0, and an lse of -inf."""
    if hidden is not None:
        s = s.masked_fill(hidden, -torch.inf)
    lse = torch.logsumexp(s, dim=-1)
    p = torch.exp(s - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
    if keep is not None:
        p = torch.where(keep, p / keep.double().mean(), 0.0)
    return torch.einsum("bhij,bjhd->bihd", p, v), lse
