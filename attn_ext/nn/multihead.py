"""MultiheadAttention with torch's constructor, parameters, arguments and meanings.

    Q, K, V = x W^T + b, cut into heads [N, H, L, E / H];  out = concat(attention(Q, K, V)) W_o^T
Masks follow torch: True = ignore; float masks are added.  Returned weights are computed from Q, K
and the LSE of the attention call, for the rows asked for only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from attn_ext.core import reference, validate
from attn_ext.core.schema import Call
from attn_ext.functional import common, dense

if TYPE_CHECKING:
    from collections.abc import Sequence


class MultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention on attn_ext: the same constructor, state_dict and call.

    query [N, L, E] with batch_first, [L, N, E] without, [L, E] unbatched; key, value alike with S.
    attn_mask [L, S] or [N * num_heads, L, S], key_padding_mask [N, S]: bool (True = ignore) or
    floating (added, with gradient).  Returns (output in query's layout, weights or None): weights
    [N, L, S] averaged over heads, [N, num_heads, L, S] with average_attn_weights=False, with
    dropout applied in training as in torch.  ValueError and TypeError name a bad argument.

    `prefer`, an attribute: "fastest" (the default) lets torch's own flash attention compute a call
    without masks and dropout where `attn-ext tune` measured it to be faster; "attn_ext" does not.

    Differences: a row that sees no key gives 0 (torch: 0 without need_weights, NaN with), and
    `weights_rows` limits the returned weights to some queries.
    """

    prefer = "fastest"

    def __init__(
        self, embed_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True,
        add_bias_kv: bool = False, add_zero_attn: bool = False, kdim: int | None = None,
        vdim: int | None = None, batch_first: bool = False,
        device: torch.device | str | int | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        embed_dim = validate.width("embed_dim", embed_dim)
        num_heads = validate.width("num_heads", num_heads)
        kdim = None if kdim is None else validate.width("kdim", kdim)
        vdim = None if vdim is None else validate.width("vdim", vdim)
        if embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}"
            )
        dropout = validate.number("dropout", dropout, 0.0, 1.0)
        switches = dict(
            bias=bias, add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn, batch_first=batch_first
        )
        for name, value in switches.items():
            switches[name] = validate.switch(name, value)
        super().__init__(
            embed_dim, num_heads, dropout, kdim=kdim, vdim=vdim, device=device, dtype=dtype,
            **switches,
        )  # fmt: skip

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None, need_weights: bool = True,
        attn_mask: torch.Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False, *,
        weights_rows: slice | Sequence[int] | torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """weights_rows: indices (a slice, list or int64 tensor) of the queries whose weights are
        returned, all if None.  is_causal: a hint that attn_mask is the causal mask, as in torch.
        """
        weights = self._in_weights()  # once: a parametrization computes them at each look
        batched = self._check(query, key, value, weights[0])
        need_weights = validate.switch("need_weights", need_weights)
        average_attn_weights = validate.switch("average_attn_weights", average_attn_weights)
        is_causal = validate.switch("is_causal", is_causal)
        same = (query is key, key is value)
        query, key, value = (self._batch_of(x, batched) for x in (query, key, value))  # [N, L, E]
        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        batch, seqlen_q, _ = query.shape
        seqlen_k = key.shape[1]
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask must be given with the hint is_causal=True, got None")
        hinted = is_causal and key_padding_mask is None and not need_weights
        masks = []
        if attn_mask is not None and not hinted:
            masks.append(_scores(attn_mask, batch, self.num_heads, seqlen_q, seqlen_k))
        if key_padding_mask is not None:
            masks.append(_padding(key_padding_mask, batch, seqlen_k))
        for name, given in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
            if given is not None and given.device != query.device:
                raise ValueError(
                    f"{name} must be on query's device {query.device}, got {given.device}"
                )
        q, k, v = self._project(query, key, value, weights, *same)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        mask, bias = _merge(masks, k.shape[2] - seqlen_k)
        call = dense.dense_call(
            q, k, v, causal="top_left" if hinted else False, mask=mask, bias=bias,
            dropout_p=self.dropout if self.training else 0.0,
            backend=common.preferred(self.prefer),
        )  # fmt: skip
        out = common.result(call, False, False)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        shown = None
        if need_weights:
            _check_rows(weights_rows, seqlen_q)
            shown = _weights(call, weights_rows, average_attn_weights)
            shown = shown if batched else shown[0]
        if not batched:
            return out[0], shown
        return (out if self.batch_first else out.transpose(0, 1)), shown

    def _in_weights(self) -> tuple:
        """The weights of the input projections: one for all three, or one each."""
        if self._qkv_same_embed_dim:
            return (self.in_proj_weight,)
        return self.q_proj_weight, self.k_proj_weight, self.v_proj_weight

    def _check(self, query, key, value, weight) -> bool:
        """Check ranks and widths; whether the inputs are batched."""
        for name, x, width in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            validate.tensor(name, x)
            if x.dim() not in (2, 3) or x.dim() != query.dim():
                raise ValueError(
                    f"{name} must have 3 dimensions, or 2 when all are unbatched, "
                    f"got shape {tuple(x.shape)}"
                )
            if x.shape[-1] != width:
                raise ValueError(f"{name} must have a last dimension of {width}, got {x.shape[-1]}")
            validate.module_dtype(name, x, weight)
            if x.device != query.device:
                raise ValueError(f"{name} must be on query's device {query.device}, got {x.device}")
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"value must have key's leading sizes {tuple(key.shape[:-1])}, "
                f"got {tuple(value.shape[:-1])}"
            )
        axis = 0 if self.batch_first else 1
        if query.dim() == 3 and query.shape[axis] != key.shape[axis]:
            raise ValueError(
                f"key must have query's batch size {query.shape[axis]}, got {key.shape[axis]}"
            )
        return query.dim() == 3

    def _batch_of(self, x, batched: bool):
        """x as [N, L, E]."""
        if not batched:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _project(self, query, key, value, weights, query_is_key: bool, key_is_value: bool):
        """Q [N, L, E], K and V [N, S (+ 1), E]; one product for inputs that are one tensor."""
        bias = self.in_proj_bias
        if not self._qkv_same_embed_dim:
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            q, k, v = map(F.linear, (query, key, value), weights, biases)
        elif query_is_key and key_is_value:
            q, k, v = F.linear(query, weights[0], bias).chunk(3, dim=-1)
        else:
            size = self.embed_dim
            weights = weights[0].split((size, 2 * size))
            biases = (None, None) if bias is None else bias.split((size, 2 * size))
            q = F.linear(query, weights[0], biases[0])
            if key_is_value:
                k, v = F.linear(key, weights[1], biases[1]).chunk(2, dim=-1)
            else:
                b_k, b_v = (None, None) if bias is None else biases[1].chunk(2)
                w_k, w_v = weights[1].chunk(2)
                k, v = F.linear(key, w_k, b_k), F.linear(value, w_v, b_v)
        if self.bias_k is not None:
            k, v = (
                torch.cat((x, extra.to(x.dtype).expand(x.shape[0], 1, -1)), dim=1)
                for x, extra in ((k, self.bias_k), (v, self.bias_v))
            )
        return q, k, v


def _check_rows(rows, seqlen_q: int) -> None:
    """None, a slice, or the numbers of queries in a list or an int64 tensor."""
    if rows is None or isinstance(rows, slice):
        return
    if isinstance(rows, torch.Tensor):
        if rows.dtype != torch.int64 or rows.dim() != 1:
            raise TypeError(
                f"weights_rows must be int64 [R], got {rows.dtype} of shape {tuple(rows.shape)}"
            )
        if rows.device.type != "cpu" or torch.compiler.is_compiling():
            return
        rows = rows.tolist()
    if not isinstance(rows, (list, tuple)):
        raise TypeError(
            f"weights_rows must be a slice, a list or an int64 tensor, got {type(rows).__name__}"
        )
    for row in rows:
        validate.integer("weights_rows", row, -seqlen_q)
        if row >= seqlen_q:
            raise ValueError(f"weights_rows must be below {seqlen_q}, got {row}")


def _scores(attn_mask, batch: int, heads: int, seqlen_q: int, seqlen_k: int):
    """attn_mask [L, S] or [N * H, L, S] as 4 dimensions."""
    validate.tensor("attn_mask", attn_mask)
    shapes = {2: (seqlen_q, seqlen_k), 3: (batch * heads, seqlen_q, seqlen_k)}
    if tuple(attn_mask.shape) != shapes.get(attn_mask.dim()):
        raise ValueError(
            f"attn_mask must have shape {shapes[2]} or {shapes[3]}, got {tuple(attn_mask.shape)}"
        )
    if attn_mask.dim() == 2:
        return _kind("attn_mask", attn_mask)[None, None]
    return _kind("attn_mask", attn_mask).unflatten(0, (batch, heads))


def _padding(key_padding_mask, batch: int, seqlen_k: int):
    """key_padding_mask [N, S] as [N, 1, 1, S]."""
    validate.tensor("key_padding_mask", key_padding_mask)
    if tuple(key_padding_mask.shape) != (batch, seqlen_k):
        raise ValueError(
            f"key_padding_mask must have shape {(batch, seqlen_k)}, "
            f"got {tuple(key_padding_mask.shape)}"
        )
    return _kind("key_padding_mask", key_padding_mask)[:, None, None]


def _kind(name: str, mask):
    if mask.dtype != torch.bool and mask.dtype not in validate.FLOATING:
        raise TypeError(f"{name} must be bool or floating, got {mask.dtype}")
    return mask


def _merge(masks: list, extra: int) -> tuple:
    """(mask with True = attend, bias) of torch's masks, open at `extra` keys added at the end."""
    mask = bias = None
    for given in masks:
        given = F.pad(given, (0, extra)) if extra else given  # False and 0: attend
        if given.dtype == torch.bool:
            mask = ~given if mask is None else mask & ~given
        else:
            bias = given if bias is None else bias + given
    return mask, bias


def _weights(call: Call, rows, average: bool):
    """softmax(scale Q K^T + bias) of query rows `rows`: [N, R, S], or [N, H, R, S].

    Head by head where the average is asked for, so that memory is that of the result (without
    gradients).
    """
    q, heads = call.q, call.q.shape[1]
    if rows is None:
        rows = slice(None)
    q = q[:, :, rows]
    keep = None
    if call.dropout_p > 0:
        keep = _kept(call)[:, :, rows]
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5

    def of_head(h: int):
        s = (q[:, h].to(wide) * scale) @ call.k[:, h].to(wide).transpose(-1, -2)  # [N, R, S]
        for given, is_mask in ((call.bias, False), (call.mask, True)):
            if given is None:
                continue
            part = given[:, h if given.shape[1] > 1 else 0]
            part = part[:, rows] if part.shape[1] > 1 else part
            s = s.masked_fill(~part, -torch.inf) if is_mask else s + part.to(wide)
        # not exp(s - LSE): beside a mask of finfo.min over a whole row LSE loses the number of keys
        empty = (s == -torch.inf).all(-1, keepdim=True)  # rows that see no key give 0
        p = torch.softmax(s.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
        if keep is not None:
            factor = 1 / (1 - call.dropout_p) if call.dropout_p < 1 else 0.0
            p = torch.where(keep[:, h], p * factor, 0.0)
        return p.to(q.dtype)

    if average:
        total = of_head(0)
        for h in range(1, heads):
            total = total + of_head(h)
        return total / heads
    return torch.stack([of_head(h) for h in range(heads)], dim=1)


def _kept(call) -> torch.Tensor:
    """bool [N, H, L, S]: what dropout kept."""
    seed, offset = call.rng_state.tolist()
    batch, heads, seqlen_q, _ = call.q.shape
    return reference.dropout_keep_mask(
        seed, offset, batch, heads, seqlen_q, call.k.shape[2], call.dropout_p, call.q.device
    )
