"""Blocks that models are made of: additive attention with its projections, pooling by a learned
query, words -> sentences -> document, and two modalities that attend to each other.

x [N, S, E] throughout; masks are bool, True = attend, lengths int32 [N].  Packed sequences are
[total, E] with cu_seqlens int32 [N + 1] as in `attn_ext.attention_varlen`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from attn_ext.core import validate, values
from attn_ext.functional.additive import additive_attention, additive_attention_varlen
from attn_ext.functional.dense import attention
from attn_ext.functional.varlen import attention_varlen

if TYPE_CHECKING:
    from typing import Literal

    from torch import Tensor


def _sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        validate.width(name, value)


def _features(name: str, x, dims: int, width: int, weight=None) -> None:
    """ValueError unless x has `dims` dimensions and `width` features, TypeError unless it has the
    dtype of `weight`.
    """
    validate.tensor(name, x)
    if x.dim() != dims or x.shape[-1] != width:
        raise ValueError(
            f"{name} must have {dims} dimensions and {width} features, got shape {tuple(x.shape)}"
        )
    if weight is not None:
        validate.module_dtype(name, x, weight)


def _bounds(name: str, cu_seqlens, x, rows: int | None = None) -> None:
    """int32 [N + 1] of `rows` (x's) rows; the values where reading them is free (CPU)."""
    validate.index_tensor(name, cu_seqlens, x.device, 1)
    if cu_seqlens.shape[0] < 1:
        raise ValueError(f"{name} must have N + 1 entries, got 0")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        values.cumulative(name, cu_seqlens, x.shape[0] if rows is None else rows)


def _heads(embed_dim: int, num_heads: int) -> None:
    _sizes(embed_dim=embed_dim, num_heads=num_heads)
    if embed_dim % num_heads:
        raise ValueError(
            f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}"
        )


def _key_mask(mask, lengths, batch: int, length: int, device, name: str = "mask"):
    """[N, 1, 1, S] or None, of a mask [N, S] or lengths [N]."""
    if mask is not None and lengths is not None:
        raise ValueError("mask must be None where lengths are given, got both")
    if lengths is not None:
        validate.index_tensor("lengths", lengths, device, 1)
        if lengths.shape[0] != batch:
            raise ValueError(f"lengths must have {batch} entries, got {lengths.shape[0]}")
        if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
            values.lengths("lengths", lengths, length)
        mask = torch.arange(length, device=device) < lengths[:, None]
    if mask is None:
        return None
    validate.tensor(name, mask)
    if mask.dtype != torch.bool or tuple(mask.shape) != (batch, length):
        raise ValueError(
            f"{name} must be bool {(batch, length)}, got {mask.dtype} {tuple(mask.shape)}"
        )
    return mask[:, None, None, :]


class AdditiveAttention(nn.Module):
    """Bahdanau's attention: s_ij = w . tanh(Wq x_i + Wk y_j + b), out_i = sum_j softmax(s)_ij v_j.

    query_dim, key_dim: widths of x and y; hidden_dim: width of the tanh layer.  The values are y as
    they are (arXiv 1409.0473).  Memory is O(N): the [L, S, hidden_dim] tensor is never made.
    """

    def __init__(
        self, query_dim: int, key_dim: int, hidden_dim: int, bias: bool = True, dropout: float = 0.0
    ):
        super().__init__()
        _sizes(query_dim=query_dim, key_dim=key_dim, hidden_dim=hidden_dim)
        validate.boolean("bias", bias)
        self.dropout = validate.number("dropout", dropout, 0.0, 1.0)
        self.query_dim, self.key_dim, self.hidden_dim = query_dim, key_dim, hidden_dim
        self.query_proj = nn.Linear(query_dim, hidden_dim, bias=bias)
        self.key_proj = nn.Linear(key_dim, hidden_dim, bias=False)
        self.w = nn.Parameter(torch.empty(hidden_dim))
        nn.init.uniform_(self.w, -(hidden_dim**-0.5), hidden_dim**-0.5)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor | None = None, *,
        causal: bool | Literal["top_left", "bottom_right"] = False, mask: Tensor | None = None,
        bias: Tensor | None = None, lengths: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """query [N, L, query_dim], key [N, S, key_dim], value [N, S, Ev] (the key if None) ->
        [N, L, Ev].  mask: bool, bias: added to the scores, both broadcastable to [N, L, S];
        lengths: int32 [N], used keys.  Weights are dropped out in training mode.
        """
        value = key if value is None else value
        _features("query", query, 3, self.query_dim, self.query_proj.weight)
        _features("key", key, 3, self.key_dim, self.key_proj.weight)
        validate.tensor("value", value)
        _features("value", value, 3, value.shape[-1] if value.dim() else 1, self.w)
        for name, x in (("key", key), ("value", value)):
            if x.shape[0] != query.shape[0] or x.shape[1] != key.shape[1]:
                wanted = f"[{query.shape[0]}, {key.shape[1]}, E]"
                raise ValueError(f"{name} must have shape {wanted}, got {tuple(x.shape)}")
        for name, x in (("mask", mask), ("bias", bias)):
            if x is not None:
                validate.tensor(name, x)
        mask, bias = (x.unsqueeze(1) if x is not None and x.dim() == 3 else x for x in (mask, bias))
        q, k = self.query_proj(query).unsqueeze(1), self.key_proj(key).unsqueeze(1)
        out = additive_attention(
            q, k, value.unsqueeze(1), self.w, causal=causal, mask=mask, bias=bias,
            dropout_p=self.dropout if self.training else 0.0, lengths=lengths,
        )  # fmt: skip
        return out.squeeze(1)

    @torch.no_grad()
    def weights(self, query: Tensor, key: Tensor, **options) -> Tensor:
        """The weights [N, L, S] themselves: O(L * S) memory, for looking at a few queries."""
        _features("key", key, 3, self.key_dim, self.key_proj.weight)
        eye = torch.eye(key.shape[1], dtype=key.dtype, device=key.device)
        training = self.training
        try:
            self.training = False  # dropout is no part of what is looked at
            return self(query, key, eye.expand(key.shape[0], -1, -1), **options)
        finally:
            self.training = training


class AttentionPooling(nn.Module):
    """A sequence into one vector (or `num_queries` vectors) by learned queries.

    score "dot": scaled dot products, learned queries in num_heads heads, projections of keys,
    values and the output.  score "additive": weights w . tanh(Wk x_j + b) as in hierarchical
    attention networks (Yang et al., 2016), the values are x itself.
    """

    def __init__(
        self, embed_dim: int, num_heads: int = 1, num_queries: int = 1, score: str = "dot"
    ):
        super().__init__()
        _heads(embed_dim, num_heads)
        _sizes(num_queries=num_queries)
        if not isinstance(score, str):
            raise TypeError(f"score must be 'dot' or 'additive', got {score!r}")
        if score not in ("dot", "additive"):
            raise ValueError(f"score must be 'dot' or 'additive', got {score!r}")
        self.embed_dim, self.num_heads, self.num_queries = embed_dim, num_heads, num_queries
        self.score, width = score, embed_dim // num_heads
        self.query = nn.Parameter(torch.randn(num_queries, num_heads, width) * width**-0.5)
        self.key_proj = nn.Linear(embed_dim, embed_dim, bias=False)
        if score == "dot":
            self.value_proj = nn.Linear(embed_dim, embed_dim)
            self.out_proj = nn.Linear(embed_dim, embed_dim)
        else:
            self.w = nn.Parameter(torch.randn(num_heads, width) * width**-0.5)

    def keys(self, x: Tensor) -> Tensor:
        """[..., S, num_heads, width]: what the learned queries are compared with."""
        return self.key_proj(x).unflatten(-1, (self.num_heads, -1))

    def forward(
        self, x: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None, *,
        mask: Tensor | None = None, lengths: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """x [N, S, E] with mask [N, S] or lengths [N], or packed x [total, E] with cu_seqlens ->
        [N, E], [N, num_queries, E] where there are several.
        """
        if cu_seqlens is not None:
            if mask is not None or lengths is not None:
                raise ValueError("mask and lengths must be None with cu_seqlens, got one")
            out = self._packed(x, cu_seqlens, max_seqlen)
        else:
            out = self._dense(x, mask, lengths)
        if self.score == "dot":
            out = self.out_proj(out)
        return out.squeeze(1) if self.num_queries == 1 else out

    def _values(self, x):
        values = self.value_proj(x) if self.score == "dot" else x
        return values.unflatten(-1, (self.num_heads, -1))

    def _dense(self, x, mask, lengths):
        _features("x", x, 3, self.embed_dim, self.key_proj.weight)
        mask = _key_mask(mask, lengths, x.shape[0], x.shape[1], x.device)
        k, v = self.keys(x).transpose(1, 2), self._values(x).transpose(1, 2)
        q = self.query.to(k.dtype).transpose(0, 1).expand(x.shape[0], -1, -1, -1)
        if self.score == "dot":
            out = attention(q, k, v, mask=mask)
        else:
            out = additive_attention(q, k, v, self.w, mask=mask)
        return out.transpose(1, 2).flatten(2)

    def _packed(self, x, cu_seqlens, max_seqlen):
        _features("x", x, 2, self.embed_dim, self.key_proj.weight)
        _bounds("cu_seqlens", cu_seqlens, x)
        count, n = cu_seqlens.shape[0] - 1, self.num_queries
        k, v = self.keys(x), self._values(x)
        q = self.query.to(k.dtype).repeat(count, 1, 1)
        cu_q = torch.arange(count + 1, dtype=torch.int32, device=x.device) * n
        if self.score == "dot":
            out = attention_varlen(q, k, v, cu_q, cu_seqlens, n, max_seqlen)
        else:
            out = additive_attention_varlen(q, k, v, self.w, cu_q, cu_seqlens, n, max_seqlen)
        return out.flatten(1).unflatten(0, (count, n))


class _PackedBlock(nn.Module):
    """x + self-attention within each packed sequence."""

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(embed_dim)
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x, cu_seqlens):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        out = attention_varlen(q, k, v, cu_seqlens, cu_seqlens)
        return x + self.out_proj(out.flatten(1))


class HierarchicalAttention(nn.Module):
    """Words -> sentences -> document, nothing padded: on each level self-attention within the unit
    (encoder=True), then additive pooling of its members into one vector (Yang et al., 2016).
    """

    def __init__(self, embed_dim: int, num_heads: int = 1, encoder: bool = True):
        super().__init__()
        _heads(embed_dim, num_heads)
        validate.boolean("encoder", encoder)
        self.embed_dim = embed_dim
        self.word_encoder = _PackedBlock(embed_dim, num_heads) if encoder else None
        self.word_pooling = AttentionPooling(embed_dim, 1, score="additive")
        self.sentence_encoder = _PackedBlock(embed_dim, num_heads) if encoder else None
        self.sentence_pooling = AttentionPooling(embed_dim, 1, score="additive")

    def forward(
        self, words: Tensor, cu_words: Tensor, cu_sentences: Tensor, return_sentences: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """words [total_words, E]; cu_words int32 [sentences + 1]: where the sentences begin among
        the words; cu_sentences int32 [documents + 1]: where the documents begin among the
        sentences.  Returns [documents, E]; with return_sentences also [sentences, E].
        """
        _features("words", words, 2, self.embed_dim, self.word_pooling.key_proj.weight)
        _bounds("cu_words", cu_words, words)
        _bounds("cu_sentences", cu_sentences, words, rows=cu_words.shape[0] - 1)
        return_sentences = validate.switch("return_sentences", return_sentences)
        if self.word_encoder is not None:
            words = self.word_encoder(words, cu_words)
        sentences = self.word_pooling(words, cu_words)
        encoded = sentences
        if self.sentence_encoder is not None:
            encoded = self.sentence_encoder(sentences, cu_sentences)
        documents = self.sentence_pooling(encoded, cu_sentences)
        return (documents, sentences) if return_sentences else documents


class CrossModalAttention(nn.Module):
    """Two streams of different width attend to each other: a' = a + attention(a -> b),
    b' = b + attention(b -> a), each with norms and projections of its own.

    dim_a, dim_b: widths of the streams; embed_dim: inner width, cut into num_heads heads.
    """

    def __init__(self, dim_a: int, dim_b: int, embed_dim: int, num_heads: int = 1):
        super().__init__()
        _heads(embed_dim, num_heads)
        _sizes(dim_a=dim_a, dim_b=dim_b)
        self.dim_a, self.dim_b, self.num_heads = dim_a, dim_b, num_heads
        self.norm_a, self.norm_b = nn.LayerNorm(dim_a), nn.LayerNorm(dim_b)
        self.q_a, self.q_b = nn.Linear(dim_a, embed_dim), nn.Linear(dim_b, embed_dim)
        self.kv_a, self.kv_b = nn.Linear(dim_a, 2 * embed_dim), nn.Linear(dim_b, 2 * embed_dim)
        self.out_a, self.out_b = nn.Linear(embed_dim, dim_a), nn.Linear(embed_dim, dim_b)

    def forward(
        self, a: Tensor, b: Tensor, *, mask_a: Tensor | None = None, mask_b: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """a [N, La, dim_a], b [N, Lb, dim_b] -> the two of the same shapes.  mask_a [N, La],
        mask_b [N, Lb]: True where a position may be attended to.
        """
        _features("a", a, 3, self.dim_a, self.norm_a.weight)
        _features("b", b, 3, self.dim_b, self.norm_b.weight)
        if a.shape[0] != b.shape[0]:
            raise ValueError(f"b must have a's batch size {a.shape[0]}, got {b.shape[0]}")
        mask_a = _key_mask(mask_a, None, a.shape[0], a.shape[1], a.device, "mask_a")
        mask_b = _key_mask(mask_b, None, b.shape[0], b.shape[1], b.device, "mask_b")
        a_in, b_in = self.norm_a(a), self.norm_b(b)
        from_b = self._attend(self.q_a(a_in), self.kv_b(b_in), mask_b)
        from_a = self._attend(self.q_b(b_in), self.kv_a(a_in), mask_a)
        return a + self.out_a(from_b), b + self.out_b(from_a)

    def _attend(self, q, kv, mask):
        q = q.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = kv.unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return attention(q, k, v, mask=mask).transpose(1, 2).flatten(2)
