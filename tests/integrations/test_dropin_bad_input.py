"""Bad arguments of the drop-ins: an error of the right type that names the argument, never a wrong
number, an internal error of a helper, or silence.
"""

import sys
import types

import numpy as np
import pytest
import torch

import attn_ext
from attn_ext import nn as family
from attn_ext.integrations import diffusers, transformers, xformers
from attn_ext.integrations import flash_attn as fa
from attn_ext.integrations.flash_attn import bert_padding as padding
from attn_ext.integrations.flash_attn import modules as modules
from attn_ext.integrations.flash_attn import rotary
from attn_ext.integrations.xformers import bias as biases

B, S, H, D = 2, 4, 4, 8


def normal(*shape, **options):
    return torch.randn(*shape, **options)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def defaults(function, **base):
    """`function` with base arguments, each of which a case may replace."""
    return lambda **given: function(**{**base, **given})


X = normal(B, S, H, D)
CU = ints(0, 3, 7)
kvcache = defaults(
    lambda **given: fa.flash_attn_with_kvcache(
        normal(B, 1, H, D), normal(B, 8, H, D), normal(B, 8, H, D), **given
    ),
    cache_seqlens=ints(3, 5),
)
NEW = dict(k=normal(B, 1, H, D), v=normal(B, 1, H, D))
TABLES = dict(rotary_cos=normal(8, 2), rotary_sin=normal(8, 2))
rotate = defaults(rotary.apply_rotary_emb, x=X, cos=normal(8, 2), sin=normal(8, 2))
dense = defaults(fa.flash_attn_func, q=X, k=X, v=X)
pages = defaults(
    fa.flash_attn_varlen_func, q=normal(7, H, D), k=normal(4, 2, H, D), v=normal(4, 2, H, D),
    cu_seqlens_q=CU, cu_seqlens_k=CU, max_seqlen_q=4, max_seqlen_k=4,
    block_table=ints((0, 1), (2, 3)),
)  # fmt: skip
unpad = defaults(
    padding.unpad_input, hidden_states=normal(B, S, D), attention_mask=ints((1,) * S, (1,) * S)
)
concatenated = defaults(
    padding.unpad_input_for_concatenated_sequences, hidden_states=normal(B, S, D)
)
pad = defaults(
    padding.pad_input,
    hidden_states=normal(3, D),
    indices=torch.tensor([0, 2, 5]),
    batch=B,
    seqlen=S,
)
mea = defaults(xformers.memory_efficient_attention, query=X, key=X, value=X)
merge = defaults(
    xformers.merge_attentions, attn_split=normal(2, B, S, H, D), lse_split=normal(2, B, H, S)
)
back = defaults(
    xformers.memory_efficient_attention_backward,
    grad=X,
    output=X,
    lse=None,
    query=X,
    key=X,
    value=X,
)
served = defaults(diffusers.attention_backend, query=X, key=X, value=X)
layer = defaults(
    transformers.attention_forward, module=types.SimpleNamespace(is_causal=True, training=True),
    query=X.transpose(1, 2), key=X.transpose(1, 2), value=X.transpose(1, 2), attention_mask=None,
)  # fmt: skip
sdpa = defaults(attn_ext.scaled_dot_product_attention, query=X, key=X, value=X)
mha = defaults(family.MultiheadAttention, embed_dim=8, num_heads=2)
X8 = normal(S, B, 8)
attend = defaults(
    lambda query, **given: family.MultiheadAttention(8, 2)(query, X8, X8, **given), query=X8
)
pool = defaults(lambda **given: family.AttentionPooling(8, 2)(**given), x=normal(B, S, 8))

BAD = {
    # a first valid position past what the cache holds made every weight 0, without a word
    "leftpad_beyond_length": (kvcache, dict(cache_leftpad=ints(4, 0)), ValueError,
        "cache_leftpad must be at most cache_seqlens, got 4 for 3 at 0"),
    "leftpad_beyond_cache": (kvcache, dict(cache_leftpad=ints(0, 9)), ValueError,
        "cache_leftpad must be between 0 and 8, got 9 at 1"),
    "leftpad_negative": (kvcache, dict(cache_leftpad=ints(0, -1)), ValueError,
        "cache_leftpad must be between 0 and 8, got -1 at 1"),
    "leftpad_int": (kvcache, dict(cache_leftpad=1), TypeError, "cache_leftpad must be a torch"),
    "leftpad_float": (kvcache, dict(cache_leftpad=normal(B)), ValueError, "cache_leftpad must be"),
    "leftpad_shape": (kvcache, dict(cache_leftpad=ints(0)), ValueError, "cache_leftpad must be"),
    "seqlens_int64_wrap": (kvcache, dict(cache_seqlens=torch.tensor([2**32 + 1, 1])), ValueError,
        "cache_seqlens must be between 0 and 8, got 4294967297"),
    "batch_idx_int": (kvcache, dict(cache_batch_idx=0), TypeError, "cache_batch_idx must be"),
    "batch_idx_beyond": (kvcache, dict(cache_batch_idx=ints(0, 2)), ValueError,
        "cache_batch_idx must be between 0 and 1, got 2"),
    "table_int": (kvcache, dict(block_table=3), TypeError, "block_table must be a torch"),
    "table_rank": (kvcache, dict(block_table=ints(0, 1)), ValueError, "block_table must have 2"),
    "table_rows": (kvcache, dict(block_table=ints((0, 1))), ValueError, "block_table must have"),
    "sin_alone": (kvcache, dict(rotary_sin=normal(8, 2)), ValueError, "rotary_cos must be given"),
    "rotary_complex": (kvcache, {**NEW, **TABLES, "rotary_cos": normal(8, 2) * 1j}, TypeError,
        "rotary_cos must be floating"),
    "rotary_new_batch": (kvcache, {**NEW, **TABLES, "k": normal(1, 1, H, D)}, ValueError, "k must"),
    "return_lse_word": (kvcache, dict(return_softmax_lse="no"), TypeError, "return_softmax_lse"),
    "deterministic_word": (dense, dict(deterministic="no"), TypeError, "deterministic must"),
    "probs_tensor": (dense, dict(return_attn_probs=normal(2)), TypeError, "return_attn_probs must"),
    "scale_list": (dense, dict(softmax_scale=[1]), TypeError, "scale must be a number, got list"),
    "window_huge": (dense, dict(window_size=(2**70, 0)), ValueError, "window_size must be at most"),
    "qkv_dtype": (fa.flash_attn_qkvpacked_func, dict(qkv=normal(B, S, 3, H, D) > 0), TypeError,
        "qkv must be float16"),
    "kv_heads": (fa.flash_attn_kvpacked_func, dict(q=X, kv=normal(B, S, 2, 3, D)), ValueError,
        "kv's heads"),
    "kv_batch": (fa.flash_attn_kvpacked_func, dict(q=X, kv=normal(1, S, 2, H, D)), ValueError,
        "kv must have q's batch size"),
    "pages_v_fewer": (pages, dict(v=normal(3, 2, H, D)), ValueError, "v must have k's first three"),
    "pages_no_bounds": (pages, dict(cu_seqlens_k=CU[:0]), ValueError, "cu_seqlens_k must have"),
    "module_dropout": (modules.FlashSelfAttention, dict(attention_dropout=None), TypeError,
        "attention_dropout must"),
    # helpers
    "unpad_list": (unpad, dict(hidden_states=[1.0]), TypeError, "hidden_states must be"),
    "unpad_mask_shape": (unpad, dict(attention_mask=ints((1, 0), (1, 1))), ValueError,
        "attention_mask must have hidden_states' shape"),
    "lengths_too_long": (concatenated, dict(attention_mask_in_length=ints((3, 2, 0, 0), (1,) * S)),
        ValueError, "attention_mask_in_length must hold lengths that add up to at most 4"),
    "lengths_negative": (concatenated, dict(attention_mask_in_length=ints((3, -2, 0, 0), (1,) * S)),
        ValueError, "attention_mask_in_length must hold lengths of at least 0"),
    "pad_rows": (pad, dict(hidden_states=normal(2, D)), ValueError, "hidden_states must have"),
    "pad_negative": (pad, dict(indices=torch.tensor([0, 2, -1])), ValueError, "indices must be"),
    "pad_float": (pad, dict(indices=normal(3)), ValueError, "indices must be int64"),
    "pad_seqlen": (pad, dict(seqlen=2.5), TypeError, "seqlen must be an int"),
    "rotate_int": (rotate, dict(x=X.long()), TypeError, "x must be floating"),
    "rotate_offset": (rotate, dict(seqlen_offsets=-1), ValueError, "seqlen_offsets must be"),
    "rotate_offsets": (rotate, dict(seqlen_offsets=ints(0, -1)), ValueError, "seqlen_offsets must"),
    "rotate_nan_offset": (rotate, dict(seqlen_offsets=float("nan")), TypeError, "seqlen_offsets"),
    "rotate_cos": (rotate, dict(cos=None), TypeError, "cos must be a torch.Tensor"),
    "rotate_bounds": (rotate, dict(x=normal(7, H, D), cu_seqlens=ints(0, 9)), ValueError,
        "cu_seqlens must end"),
    "rotate_no_bounds": (rotate, dict(x=normal(7, H, D), cu_seqlens=CU[:0]), ValueError,
        "cu_seqlens must have"),
    "rotary_base": (rotary.RotaryEmbedding, dict(dim=4, base=0.0), ValueError,
        "base must be above"),
    # xformers
    "mea_dtype": (mea, dict(key=X.half()), TypeError, "key must have query's dtype"),
    "mea_output_dtype": (mea, dict(output_dtype="half"), TypeError, "output_dtype must"),
    "mea_output_int": (mea, dict(output_dtype=torch.int32), TypeError, "output_dtype must"),
    "mea_bias": (mea, dict(attn_bias=normal(B, 3, S, S)), ValueError, "attn_bias must be broad"),
    "merge_parts": (merge, dict(lse_split=normal(1, B, H, S)), ValueError, "lse_split must have"),
    "merge_heads": (merge, dict(lse_split=normal(2, B, 1, S)), ValueError, "lse_split must hold"),
    "merge_int": (merge, dict(lse_split=torch.zeros(2, B, H, S).long()), TypeError, "lse_split"),
    "merge_none": (merge, dict(attn_split=[]), ValueError, "attn_split must hold at least one"),
    "grad_shape": (back, dict(grad=normal(B, S, H, 1)), ValueError, "grad must have the shape"),
    "grad_none": (back, dict(grad=None), TypeError, "grad must be a torch.Tensor"),
    "seqlen_int": (biases.BlockDiagonalMask.from_seqlens, dict(q_seqlen=3), TypeError, "q_seqlen"),
    "seqlen_bool": (biases.BlockDiagonalMask.from_seqlens, dict(q_seqlen=[True]), ValueError,
        "q_seqlen must hold ints"),
    # diffusers, transformers, torch
    "df_query": (served, dict(query=None), TypeError, "query must be a torch.Tensor"),
    "df_mask": (served, dict(attn_mask=torch.ones(B, 1, S, 3) > 0), ValueError, "attn_mask must"),
    "df_mask_int": (served, dict(attn_mask=torch.ones(B, 1, S, S).int()), TypeError, "attn_mask"),
    "df_causal": (served, dict(is_causal="no"), TypeError, "is_causal must be a bool"),
    "tf_mask_int": (layer, dict(attention_mask=torch.ones(B, 1, S, S).long()), TypeError,
        "attention_mask must be bool or floating"),
    "tf_mask_shape": (layer, dict(attention_mask=torch.ones(B, 1, S, 3) > 0), ValueError,
        "attention_mask must be broadcastable"),
    "tf_window": (layer, dict(sliding_window=-1), ValueError, "sliding_window must be"),
    "tf_scaling": (layer, dict(scaling="1"), TypeError, "scaling must be a number"),
    "tf_dropout": (layer, dict(dropout=2.0), ValueError, "dropout must be between 0 and 1"),
    "tf_sinks": (layer, dict(s_aux=normal(3)), ValueError, "s_aux must hold a logit for each"),
    "tf_row_sinks": (layer, dict(sinks=normal(B, H, S)), ValueError, "sinks must have shape"),
    "tf_indices": (layer, dict(indices=torch.full((B, S, 2), 9)), ValueError, "indices must be"),
    "sdpa_dropout_none": (sdpa, dict(dropout_p=None), TypeError, "dropout_p must be a number"),
    "sdpa_dropout_dict": (sdpa, dict(dropout_p={}), TypeError, "dropout_p must be a number"),
    "replace_backend": (attn_ext.replace_sdpa, dict(backend=["cpu"]), TypeError, "backend must be"),
    # modules
    "mha_dropout": (mha, dict(dropout=float("nan")), ValueError, "dropout must be between"),
    "mha_heads": (mha, dict(num_heads=3), ValueError, "embed_dim must be a multiple of num_heads"),
    "mha_kdim": (mha, dict(kdim=-1), ValueError, "kdim must be at least 1"),
    "mha_query_dtype": (attend, dict(query=X8.double()), TypeError, "query must have the module's"),
    "mha_rows": (attend, dict(weights_rows=[7]), ValueError, "weights_rows must be below 4"),
    "mha_weights": (attend, dict(need_weights="no"), TypeError, "need_weights must be a bool"),
    "pool_length": (pool, dict(lengths=ints(2, 5)), ValueError, "lengths must be between 0 and 4"),
    "pool_negative": (pool, dict(lengths=ints(2, -1)), ValueError, "lengths must be between 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_argument(name):
    """Silence, another argument's name, or an AttributeError from within."""
    call, options, error, match = BAD[name]
    with pytest.raises(error, match=match):
        call(**options)


NESTED = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(2, 8)])


@pytest.mark.parametrize("name", ["causal", "deterministic", "return_attn_probs", "window_size"])
def test_tensors_of_other_layouts_for_switches_and_windows(name):
    """An internal error of torch, which asks a nested tensor for its shape, or a sparse or
    quantized one for its numbers."""
    quantized = torch.quantize_per_tensor(torch.randn(2), 0.1, 0, torch.qint8)
    for wrong in (NESTED, torch.zeros(2).to_sparse(), quantized):
        with pytest.raises(TypeError, match=f"^{name} must be "):
            dense(**{name: wrong})


def test_merged_parts_that_are_nested():
    """The same of attn_split and lse_split."""
    for name in ("attn_split", "lse_split"):
        parts = dict(attn_split=[X, X], lse_split=[normal(B, H, S)] * 2)
        with pytest.raises(TypeError, match=f"^{name} must be a dense"):
            xformers.merge_attentions(**{**parts, name: NESTED})


def test_leftpad_up_to_the_length():
    """The rule cutting off what flash-attn allows: a pad up to the new keys."""
    first = ints(3, 0)
    out = kvcache(cache_leftpad=first, causal=True)
    assert torch.equal(out[0], torch.zeros_like(out[0])) and not torch.equal(out[1], out[0])
    v = normal(B, 1, H, D)
    alone = kvcache(k=normal(B, 1, H, D), v=v, cache_leftpad=first, causal=True)
    torch.testing.assert_close(alone[0], v[0])


@pytest.mark.parametrize("side", [2**31, 2**33, sys.maxsize])
def test_window_beyond_any_distance(side):
    """A side added to a position in 64 bits: sys.maxsize wrapped around and hid keys."""
    q = normal(1, 2, 40, D, requires_grad=True)
    plain = attn_ext.attention(q, q, q)
    out = attn_ext.attention(q, q, q, window=(side, side))
    assert torch.equal(out, plain)
    grads = [torch.autograd.grad(x.sum(), q)[0] for x in (out, plain)]
    assert torch.equal(*grads)
    packed = attn_ext.attention_varlen(
        *[q[0].transpose(0, 1).detach()] * 3, ints(0, 30, 40), ints(0, 30, 40), window=(side, side)
    )
    expected = attn_ext.attention(*[q[:, :, :30]] * 3)[0].transpose(0, 1)
    torch.testing.assert_close(packed[:30], expected)


def test_unpad_counts_nonzero_tokens():
    """A mask of other numbers than 0 and 1, whose sum is no number of tokens."""
    rows, mask = normal(B, S, D), torch.tensor([[2, 0, -1, 0], [1, 1, 1, 7]])
    packed, indices, bounds, longest, used = padding.unpad_input(rows, mask)
    assert indices.tolist() == [0, 2, 4, 5, 6, 7] and bounds.tolist() == [0, 2, 6]
    assert (longest, used.tolist(), packed.shape[0]) == (4, [2, 4], 6)


def test_numbers_of_numpy_and_tensors():
    """A longest length or a scale that transformers hands over as a tensor, refused by its type."""
    rows, one = normal(7, H, D), np.float32(0.5)
    plain = fa.flash_attn_varlen_func(
        rows, rows, rows, CU, CU, 4, 4, softmax_scale=0.5, causal=True
    )
    given = fa.flash_attn_varlen_func(
        rows, rows, rows, CU, CU, torch.tensor(4, dtype=torch.int32), np.int64(4),
        softmax_scale=one, causal=True, window_size=(np.int64(-1), torch.tensor(-1)),
    )  # fmt: skip
    assert torch.equal(plain, given)


def test_module_takes_numbers_of_numpy():
    """What torch.nn.MultiheadAttention accepts refused as no int, float or bool."""
    module = family.MultiheadAttention(
        np.int64(8), np.int32(2), dropout=np.float32(0.0), batch_first=np.bool_(True)
    )
    assert module.batch_first is True and type(module.dropout) is float
    x = normal(B, S, 8)
    out, weights = module(x, x, x, need_weights=torch.tensor(False))
    assert out.shape == x.shape and weights is None
