"""Rotary position embedding with flash-attn's arguments (arXiv 2104.09864), in eager torch.

x [B, S, H, D], cos and sin [S_ro, rotary_dim / 2]; the first rotary_dim elements are rotated.
"""

from __future__ import annotations

import torch

from attn_ext.core import validate, values


def rotate(x, cos, sin, positions, interleaved: bool):
    """x [B, S, H, D] rotated by rows `positions` [B or 1, S] of cos and sin, in float32."""
    return _turned(x, cos[positions], sin[positions], interleaved)


def _turned(x, cos, sin, interleaved: bool):
    """x [B, S, H, D], cos and sin of its positions [B or 1, S, half]."""
    half = cos.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (t.unsqueeze(2).to(wide) for t in (cos, sin))
    turned, rest = x[..., : 2 * half].to(wide), x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def check(cos_name: str, cos, sin_name: str, sin, x, positions) -> None:
    """TypeError or ValueError unless cos and sin fit x and hold `positions`."""
    for name, table in ((cos_name, cos), (sin_name, sin)):
        validate.tensor(name, table)
        validate.floating(name, table)
        if table.device != x.device:
            raise ValueError(f"{name} must be on device {x.device}, got {table.device}")
    if cos.dim() != 2 or cos.shape != sin.shape:
        raise ValueError(
            f"{cos_name} and {sin_name} must have one shape [S, rotary_dim / 2], "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if 2 * cos.shape[1] > x.shape[-1]:
        raise ValueError(
            f"{cos_name} must have at most head_dim / 2 = {x.shape[-1] // 2} columns, "
            f"got {cos.shape[1]}"
        )
    last = _last(positions)
    if last >= cos.shape[0]:
        raise ValueError(f"{cos_name} must have at least {last + 1} rows, got {cos.shape[0]}")


def _rotatable(name: str, x, *ranks: int) -> None:
    """TypeError or ValueError unless x is a floating tensor with one of these ranks."""
    validate.tensor(name, x)
    validate.floating(name, x)
    if x.dim() not in ranks:
        wanted = " or ".join(map(str, ranks))
        raise ValueError(f"{name} must have {wanted} dimensions, got shape {tuple(x.shape)}")


def _views(whole, kind: str, heads_q: int | None) -> list:
    """The tensors [B, S, H, D] within `whole` that are rotated: all of it, or queries and keys."""
    if kind == "rows":  # packed [total, H, D]
        return [whole[None]]
    if kind == "kv":
        return [whole[:, :, 0]]
    if kind == "x":
        return [whole]
    if whole.dim() == 5:
        return [whole[:, :, 0], whole[:, :, 1]]
    heads_k = (whole.shape[2] - heads_q) // 2
    return [whole[:, :, :heads_q], whole[:, :, heads_q : heads_q + heads_k]]


class _InPlace(torch.autograd.Function):
    """Rotates views of a tensor, also of a leaf; backward turns the gradient the other way."""

    @staticmethod
    def forward(ctx, whole, positions, interleaved, kind, heads_q, *tables):
        ctx.save_for_backward(positions, *tables)
        ctx.options = (interleaved, kind, heads_q)
        _InPlace.turn(whole, positions, *ctx.options, *tables)
        return whole

    @staticmethod
    def turn(whole, positions, interleaved, kind, heads_q, *tables, sign=1):
        """tables: cos and sin of each view."""
        views = _views(whole, kind, heads_q)
        for view, cos, sin in zip(views, tables[::2], tables[1::2], strict=True):
            rows = positions.shape[1]
            view = view[:, :rows]
            view.copy_(rotate(view, cos, sign * sin, positions, interleaved))

    @staticmethod
    def backward(ctx, dwhole):
        positions, *tables = ctx.saved_tensors
        dwhole = dwhole.clone()
        _InPlace.turn(dwhole, positions, *ctx.options, *tables, sign=-1)
        return dwhole, *(None,) * (4 + len(tables))


def _in_place(whole, *options):
    """`whole` rotated in place; the Function only where a gradient is to be turned back."""
    if torch.is_grad_enabled() and whole.requires_grad:
        return _InPlace.apply(whole, *options)
    _InPlace.turn(whole, *options)
    return whole


def _offsets(seqlen_offsets, batch: int, device):
    """int64 [1 or batch]; a negative one is a ValueError where reading it is free (CPU)."""
    if isinstance(seqlen_offsets, torch.Tensor):
        kind = seqlen_offsets.dtype
        if kind not in (torch.int32, torch.int64) or seqlen_offsets.numel() not in (1, batch):
            raise ValueError(
                f"seqlen_offsets must be an int or an integer tensor [{batch}], got {kind} "
                f"{tuple(seqlen_offsets.shape)}"
            )
        if seqlen_offsets.device != device:
            raise ValueError(
                f"seqlen_offsets must be on device {device}, got {seqlen_offsets.device}"
            )
        offsets = seqlen_offsets.long().reshape(-1)
        if device.type == "cpu" and len(offsets) and int(offsets.min()) < 0:
            raise ValueError(f"seqlen_offsets must be at least 0, got {int(offsets.min())}")
        return offsets
    seqlen_offsets = validate.integer("seqlen_offsets", seqlen_offsets)
    return torch.full((1,), seqlen_offsets, dtype=torch.int64, device=device)


def _positions(x, seqlen_offsets):
    """int64 [1 or B, S] of x [B, S, ...]"""
    offsets = _offsets(seqlen_offsets, x.shape[0], x.device)
    return offsets[:, None] + torch.arange(x.shape[1], device=x.device)


def _last(positions) -> int:
    """The largest position; -1 where there is none, or none that can be read."""
    return int(positions.max()) if positions.numel() and not positions.is_meta else -1


def apply_rotary_emb(
    x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None,
    max_seqlen=None,
) -> torch.Tensor:  # fmt: skip
    """flash_attn.layers.rotary.apply_rotary_emb: rotate x [B, S, H, D] ([total, H, D] with
    cu_seqlens int32 [B + 1]) by position + seqlen_offsets (an int or a tensor [B]).

    Returns the rotated tensor; where inplace, x itself, which may be a leaf that requires a
    gradient.
    """
    _rotatable("x", x, 4 if cu_seqlens is None else 3)
    interleaved = validate.switch("interleaved", interleaved)
    if cu_seqlens is None:
        positions = _positions(x, seqlen_offsets)
        kind, out = "x", x
    else:
        validate.index_tensor("cu_seqlens", cu_seqlens, x.device, 1)
        if cu_seqlens.device.type == "cpu":
            values.cumulative("cu_seqlens", cu_seqlens, x.shape[0])
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        offsets = _offsets(seqlen_offsets, lengths.shape[0], x.device)
        shift = offsets.expand(lengths.shape[0]) - starts
        row_shift = torch.repeat_interleave(shift, lengths)
        positions = (torch.arange(row_shift.shape[0], device=x.device) + row_shift)[None]
        kind, out = "rows", x[None, : row_shift.shape[0]]
    check("cos", cos, "sin", sin, x, positions)
    if validate.switch("inplace", inplace):
        return _in_place(x, positions, interleaved, kind, None, cos, sin)
    out = rotate(out, cos, sin, positions, interleaved)
    return out if cu_seqlens is None else torch.cat((out[0], x[out.shape[1] :]))


def apply_rotary_emb_torch(x, cos, sin, interleaved=False):
    """x [B, S, H, D] rotated by cos and sin [S, rotary_dim / 2], or [B, S, rotary_dim / 2]."""
    _rotatable("x", x, 4)
    for name, table in (("cos", cos), ("sin", sin)):
        _rotatable(name, table, 2, 3)
        if table.dim() == 3 and table.shape[:2] != x.shape[:2]:
            raise ValueError(
                f"{name} must have x's {tuple(x.shape[:2])} rows, got shape {tuple(table.shape)}"
            )
    interleaved = validate.switch("interleaved", interleaved)
    last = torch.tensor(x.shape[1] - 1, dtype=torch.int64, device="cpu")
    check("cos", cos.flatten(0, -2), "sin", sin.flatten(0, -2), x, last)
    cos, sin = (t if t.dim() == 3 else t[None, : x.shape[1]] for t in (cos, sin))
    return _turned(x, cos, sin, interleaved)


def apply_rotary_emb_qkv_(
    qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, seqlen_offsets=0, num_heads_q=None
):
    """Rotate the queries and keys of qkv [B, S, 3, H, D], or [B, S, Hq + 2 Hk, D] with
    num_heads_q = Hq, in place; the keys by cos_k and sin_k where they are given.  Returns qkv.
    """
    _rotatable("qkv", qkv, 4, 5)
    interleaved = validate.switch("interleaved", interleaved)
    if num_heads_q is not None:
        num_heads_q = validate.integer("num_heads_q", num_heads_q, 1)
    if qkv.dim() == 5 and qkv.shape[2] == 3:
        pass
    elif (
        qkv.dim() != 4
        or num_heads_q is None
        or num_heads_q >= qkv.shape[2]
        or (qkv.shape[2] - num_heads_q) % 2
    ):
        raise ValueError(
            "qkv must have shape [B, S, 3, H, D], or [B, S, num_heads_q + 2 Hk, D] with "
            f"num_heads_q, got {tuple(qkv.shape)} and num_heads_q {num_heads_q}"
        )
    positions = _positions(qkv, seqlen_offsets)
    tables = (cos, sin, cos if cos_k is None else cos_k, sin if sin_k is None else sin_k)
    check("cos", cos, "sin", sin, qkv, positions)
    if cos_k is not None or sin_k is not None:
        check("cos_k", tables[2], "sin_k", tables[3], qkv, positions)
    return _in_place(qkv, positions, interleaved, "qkv", num_heads_q, *tables)


def apply_rotary_emb_kv_(kv, cos, sin, interleaved=False, seqlen_offsets=0):
    """Rotate the keys of kv [B, S, 2, H, D] in place.  Returns kv."""
    _rotatable("kv", kv, 5)
    interleaved = validate.switch("interleaved", interleaved)
    if kv.shape[2] != 2:
        raise ValueError(f"kv must have shape [B, S, 2, H, D], got {tuple(kv.shape)}")
    positions = _positions(kv, seqlen_offsets)
    check("cos", cos, "sin", sin, kv, positions)
    return _in_place(kv, positions, interleaved, "kv", None, cos, sin)


class RotaryEmbedding(torch.nn.Module):
    """flash_attn.layers.rotary.RotaryEmbedding: rotates queries and keys in place, with tables of
    cos and sin that grow with the positions seen.

    dim: elements of a head that are rotated; angles are position * base^(-2 i / dim).
    scale_base: XPos (arXiv 2212.10554), queries times and keys by a factor of the position.
    """

    def __init__(self, dim, base=10000.0, interleaved=False, scale_base=None, device=None) -> None:
        super().__init__()
        dim = validate.integer("dim", dim, 1)
        for name, value in (("base", base), ("scale_base", scale_base)):
            if (name == "base" or value is not None) and validate.number(name, value) <= 0:
                raise ValueError(f"{name} must be above 0, got {value!r}")
        self.dim, self.base = dim, float(base)
        self.interleaved, self.scale_base = interleaved, scale_base
        even = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
        scale = None if scale_base is None else (even + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached = self._sin_cached = self._cos_k_cached = self._sin_k_cached = None

    def _compute_inv_freq(self, device=None):
        even = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        return self.base ** -(even / self.dim)

    def _update_cos_sin_cache(self, seqlen, device=None, dtype=None):
        """Make the tables hold positions below `seqlen`, in float32 and then rounded to dtype."""
        cos = self._cos_cached
        if (
            cos is not None
            and seqlen <= self._seq_len_cached
            and (cos.device, cos.dtype) == (device, dtype)
            and not (self.training and cos.is_inference())
        ):
            return
        self._seq_len_cached = seqlen
        own = self.inv_freq  # rounded where the model was converted to half precision
        freqs = own if own.dtype == torch.float32 else self._compute_inv_freq(device)
        position = torch.arange(seqlen, device=device, dtype=torch.float32)
        angles = torch.outer(position, freqs.to(device))
        cos, sin = torch.cos(angles), torch.sin(angles)
        if self.scale is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        power = (position - seqlen // 2) / self.scale_base
        factor = self.scale.to(device, torch.float32) ** power[:, None]
        self._cos_cached, self._sin_cached = (cos * factor).to(dtype), (sin * factor).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / factor).to(dtype), (sin / factor).to(dtype)

    def forward(self, qkv, kv=None, seqlen_offset=0, max_seqlen=None, num_heads_q=None):
        """qkv as `apply_rotary_emb_qkv_` takes it, rotated in place; with kv [B, S, 2, H, D] qkv is
        the queries [B, S, H, D] and the result (queries, kv).  seqlen_offset: an int, or a tensor
        [B] together with max_seqlen, the number of positions that the tables shall hold.
        """
        _rotatable("qkv", qkv, *((4, 5) if kv is None else (4,)))
        if max_seqlen is not None:
            max_seqlen = validate.integer("max_seqlen", max_seqlen)
        if isinstance(seqlen_offset, int):
            seqlen_offset = validate.integer("seqlen_offset", seqlen_offset)
        if max_seqlen is None and not isinstance(seqlen_offset, int):
            validate.tensor("seqlen_offset", seqlen_offset)
            max_seqlen = qkv.shape[1] + _last(seqlen_offset)
        length = qkv.shape[1] + seqlen_offset if max_seqlen is None else max_seqlen
        self._update_cos_sin_cache(length, device=qkv.device, dtype=qkv.dtype)
        tables = (self._cos_cached, self._sin_cached)
        keys = tables if self.scale is None else (self._cos_k_cached, self._sin_k_cached)
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, *tables, *keys, self.interleaved, seqlen_offset, num_heads_q
            )
        q = apply_rotary_emb(qkv, *tables, self.interleaved, True, seqlen_offset)
        return q, apply_rotary_emb_kv_(kv, *keys, self.interleaved, seqlen_offset)
