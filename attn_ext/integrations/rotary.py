"""Rotary position embedding with flash-attn's arguments (arXiv 2104.09864), in eager torch.

x [B, S, H, D], cos and sin [S_ro, rotary_dim / 2]; the first rotary_dim elements are rotated.
"""

from __future__ import annotations

import torch


def rotate(x, cos, sin, positions, interleaved: bool):
    """x [B, S, H, D] rotated by rows `positions` [B or 1, S] of cos and sin, in float32."""
    half = cos.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (t[positions].unsqueeze(2).to(wide) for t in (cos, sin))  # [B or 1, S, 1, half]
    turned, rest = x[..., : 2 * half].to(wide), x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def check(name: str, cos, sin, head_dim: int, last: int) -> None:
    """ValueError unless cos and sin fit a head of `head_dim` and hold position `last`."""
    if cos.dim() != 2 or cos.shape != sin.shape:
        raise ValueError(
            f"{name}_cos and {name}_sin must have one shape [S, rotary_dim / 2], "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if 2 * cos.shape[1] > head_dim:
        raise ValueError(
            f"{name}_cos must have at most head_dim / 2 = {head_dim // 2} columns, "
            f"got {cos.shape[1]}"
        )
    if last >= cos.shape[0]:
        raise ValueError(f"{name}_cos must have at least {last + 1} rows, got {cos.shape[0]}")


def apply_rotary_emb(
    x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None,
    max_seqlen=None,
):  # fmt: skip
    """flash_attn.layers.rotary.apply_rotary_emb: rotate x [B, S, H, D] ([total, H, D] with
    cu_seqlens int32 [B + 1]) by position + seqlen_offsets (an int or a tensor [B]).

    Returns the rotated tensor, x itself where inplace.
    """
    device = x.device
    offsets = torch.as_tensor(seqlen_offsets, device=device).long().reshape(-1)  # [1] or [B]
    if cu_seqlens is None:
        positions = offsets[:, None] + torch.arange(x.shape[1], device=device)
        out = x
    else:
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        shift = offsets.expand(lengths.shape[0]) - starts
        row_shift = torch.repeat_interleave(shift, lengths)
        positions = (torch.arange(row_shift.shape[0], device=device) + row_shift)[None]
        out = x[None, : row_shift.shape[0]]
    last = int(positions.max()) if positions.numel() else -1
    check("rotary", cos, sin, x.shape[-1], last)
    out = rotate(out, cos, sin, positions, interleaved)
    if cu_seqlens is not None:
        out = torch.cat((out[0], x[out.shape[1] :]))
    return x.copy_(out) if inplace else out
