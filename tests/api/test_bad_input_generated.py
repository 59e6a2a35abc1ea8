"""Each argument of each public function and drop-in replaced by values of every wrong kind.

Most are errors, some are meanings; none may be another library's raw error, an error that does not
name an argument, or a crash.
"""

import types

import numpy as np
import pytest
import torch

import attn_ext
from attn_ext import nn as family
from attn_ext.integrations import diffusers, transformers, xformers
from attn_ext.integrations import flash_attn as fa
from attn_ext.integrations.flash_attn import passes as passes

B, S, H, D = 2, 4, 2, 8
LAYER = types.SimpleNamespace(is_causal=True, training=True)


def r(*shape):
    return torch.randn(shape)


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


def good():
    """Name -> (function, a call of it that returns), fresh tensors each time."""
    CU = i32(0, 3, 7)
    return {
        "attention": (
            attn_ext.attention,
            dict(
                q=r(B, H, S, D),
                k=r(B, H, S, D),
                v=r(B, H, S, D),
                causal=False,
                window=(1, 1),
                mask=torch.ones(S, S) > 0,
                bias=r(S, S),
                softcap=1.0,
                alibi_slopes=r(H),
                sink=r(H),
                dropout_p=0.1,
                scale=1.0,
                return_lse=True,
                return_stats=True,
                deterministic=False,
                normalizer="softmax",
                backend="auto",
            ),
        ),
        "sdpa": (
            attn_ext.scaled_dot_product_attention,
            dict(
                query=r(B, H, S, D),
                key=r(B, H, S, D),
                value=r(B, H, S, D),
                attn_mask=r(S, S),
                dropout_p=0.1,
                is_causal=True,
                scale=1.0,
                enable_gqa=True,
            ),
        ),
        "varlen": (
            attn_ext.attention_varlen,
            dict(
                q=r(7, H, D),
                k=r(7, H, D),
                v=r(7, H, D),
                cu_seqlens_q=CU,
                cu_seqlens_k=CU,
                max_seqlen_q=4,
                max_seqlen_k=4,
                causal=False,
                window=(1, 1),
                mask=torch.ones(4, 4) > 0,
                bias=r(4, 4),
                softcap=1.0,
                alibi_slopes=r(H),
                sink=r(H),
                dropout_p=0.1,
                scale=1.0,
                return_lse=True,
            ),
        ),
        "decode": (
            attn_ext.attention_decode,
            dict(
                q=r(B, H, 1, D),
                k_cache=r(B, H, 8, D),
                v_cache=r(B, H, 8, D),
                cache_seqlens=i32(3, 5),
                k_new=r(B, H, 1, D),
                v_new=r(B, H, 1, D),
                causal=True,
                window=(3, 0),
                mask=torch.ones(1, 8) > 0,
                bias=r(1, 8),
                softcap=1.0,
                alibi_slopes=r(H),
                sink=r(H),
                scale=1.0,
                num_splits=2,
                return_lse=True,
            ),
        ),
        "paged": (
            attn_ext.attention_decode,
            dict(
                q=r(B, H, 1, D),
                k_cache=r(4, H, 4, D),
                v_cache=r(4, H, 4, D),
                cache_seqlens=i32(3, 5),
                block_table=i32([0, 1], [2, 3]),
                k_new=r(B, H, 1, D),
                v_new=r(B, H, 1, D),
            ),
        ),
        "additive": (
            attn_ext.additive_attention,
            dict(
                q=r(B, H, S, D),
                k=r(B, H, S, D),
                v=r(B, H, S, D),
                w=r(D),
                b=r(D),
                causal=False,
                window=(1, 1),
                mask=torch.ones(S, S) > 0,
                bias=r(S, S),
                dropout_p=0.1,
                lengths=i32(2, 4),
                return_lse=True,
            ),
        ),
        "additive_varlen": (
            attn_ext.additive_attention_varlen,
            dict(
                q=r(7, H, D),
                k=r(7, H, D),
                v=r(7, H, D),
                w=r(D),
                cu_seqlens_q=CU,
                cu_seqlens_k=CU,
                max_seqlen_q=4,
                max_seqlen_k=4,
                b=r(D),
            ),
        ),
        "flash": (
            fa.flash_attn_func,
            dict(
                q=r(B, S, H, D),
                k=r(B, S, H, D),
                v=r(B, S, H, D),
                dropout_p=0.1,
                softmax_scale=1.0,
                causal=True,
                window_size=(1, 1),
                softcap=1.0,
                alibi_slopes=r(H),
                deterministic=False,
                return_attn_probs=True,
            ),
        ),
        "flash_qkv": (fa.flash_attn_qkvpacked_func, dict(qkv=r(B, S, 3, H, D))),
        "flash_kv": (fa.flash_attn_kvpacked_func, dict(q=r(B, S, H, D), kv=r(B, S, 2, H, D))),
        "flash_varlen": (
            fa.flash_attn_varlen_func,
            dict(
                q=r(7, H, D),
                k=r(4, 2, H, D),
                v=r(4, 2, H, D),
                cu_seqlens_q=CU,
                cu_seqlens_k=CU,
                max_seqlen_q=4,
                max_seqlen_k=4,
                dropout_p=0.1,
                softmax_scale=1.0,
                causal=True,
                window_size=(1, 1),
                softcap=1.0,
                alibi_slopes=r(H),
                block_table=i32([0, 1], [2, 3]),
            ),
        ),
        "flash_varlen_qkv": (
            fa.flash_attn_varlen_qkvpacked_func,
            dict(qkv=r(7, 3, H, D), cu_seqlens=CU, max_seqlen=4),
        ),
        "flash_varlen_kv": (
            fa.flash_attn_varlen_kvpacked_func,
            dict(
                q=r(7, H, D),
                kv=r(7, 2, H, D),
                cu_seqlens_q=CU,
                cu_seqlens_k=CU,
                max_seqlen_q=4,
                max_seqlen_k=4,
            ),
        ),
        "kvcache": (
            fa.flash_attn_with_kvcache,
            dict(
                q=r(B, 1, H, D),
                k_cache=r(B, 8, H, D),
                v_cache=r(B, 8, H, D),
                k=r(B, 1, H, D),
                v=r(B, 1, H, D),
                rotary_cos=r(8, 2),
                rotary_sin=r(8, 2),
                cache_seqlens=i32(3, 5),
                cache_batch_idx=i32(0, 1),
                cache_leftpad=i32(1, 2),
                softmax_scale=1.0,
                causal=True,
                window_size=(3, 0),
                softcap=1.0,
                alibi_slopes=r(H),
                num_splits=1,
                return_softmax_lse=True,
            ),
        ),
        "kvcache_paged": (
            fa.flash_attn_with_kvcache,
            dict(
                q=r(B, 1, H, D),
                k_cache=r(4, 4, H, D),
                v_cache=r(4, 4, H, D),
                k=r(B, 1, H, D),
                v=r(B, 1, H, D),
                cache_seqlens=i32(3, 5),
                block_table=i32([0, 1], [2, 3]),
                cache_leftpad=i32(1, 2),
            ),
        ),
        "pass_forward": (
            passes._flash_attn_forward,
            dict(
                q=r(B, S, H, D),
                k=r(B, S, H, D),
                v=r(B, S, H, D),
                dropout_p=0.1,
                softmax_scale=1.0,
                causal=True,
                window_size_left=1,
                window_size_right=0,
                softcap=1.0,
                alibi_slopes=r(H),
                return_softmax=False,
            ),
        ),
        "pass_backward": (
            passes._flash_attn_backward,
            dict(
                dout=r(B, S, H, D),
                q=r(B, S, H, D),
                k=r(B, S, H, D),
                v=r(B, S, H, D),
                out=r(B, S, H, D),
                softmax_lse=r(B, H, S),
                dq=r(B, S, H, D),
                dk=r(B, S, H, D),
                dv=r(B, S, H, D),
                dropout_p=0.1,
                softmax_scale=1.0,
                causal=True,
                rng_state=torch.tensor([1, 2]),
            ),
        ),
        "xformers": (
            xformers.memory_efficient_attention,
            dict(
                query=r(B, S, H, D),
                key=r(B, S, H, D),
                value=r(B, S, H, D),
                attn_bias=r(B, H, S, S),
                p=0.1,
                scale=1.0,
                output_dtype=torch.float32,
            ),
        ),
        "xformers_partial": (
            xformers.memory_efficient_attention_partial,
            dict(query=r(B, S, H, D), key=r(B, S, H, D), value=r(B, S, H, D)),
        ),
        "xformers_back": (
            xformers.memory_efficient_attention_backward,
            dict(
                grad=r(B, S, H, D),
                output=r(B, S, H, D),
                lse=r(B, H, S),
                query=r(B, S, H, D),
                key=r(B, S, H, D),
                value=r(B, S, H, D),
            ),
        ),
        "diffusers": (
            diffusers.attention_backend,
            dict(
                query=r(B, S, H, D),
                key=r(B, S, H, D),
                value=r(B, S, H, D),
                attn_mask=r(B, 1, S, S),
                dropout_p=0.1,
                is_causal=True,
                scale=1.0,
                return_lse=True,
            ),
        ),
        "transformers": (
            transformers.attention_forward,
            dict(
                module=LAYER,
                query=r(B, H, S, D),
                key=r(B, H, S, D),
                value=r(B, H, S, D),
                attention_mask=r(B, 1, S, S),
                scaling=1.0,
                dropout=0.1,
                is_causal=True,
                position_bias=r(1, H, S, S),
                softcap=1.0,
                s_aux=r(H),
            ),
        ),
        "transformers_window": (
            transformers.attention_forward,
            dict(
                module=LAYER,
                query=r(B, H, S, D),
                key=r(B, H, S, D),
                value=r(B, H, S, D),
                attention_mask=None,
                sliding_window=2,
                indices=torch.zeros(B, S, 2, dtype=torch.int64),
                sinks=r(B, H, S, 1),
            ),
        ),
        "transformers_packed": (
            transformers.attention_forward,
            dict(
                module=LAYER,
                query=r(1, H, 7, D),
                key=r(1, H, 7, D),
                value=r(1, H, 7, D),
                attention_mask=None,
                cu_seq_lens_q=CU,
                cu_seq_lens_k=CU,
                max_length_q=4,
                max_length_k=4,
            ),
        ),
        "mha": (
            lambda **k: family.MultiheadAttention(8, 2)(**k),
            dict(
                query=r(S, B, 8),
                key=r(S, B, 8),
                value=r(S, B, 8),
                key_padding_mask=torch.zeros(B, S) > 0,
                need_weights=True,
                attn_mask=r(S, S),
                average_attn_weights=True,
                is_causal=False,
                weights_rows=[0],
            ),
        ),
    }


def numbers():
    return [
        None, "word", b"x", -1, 2**40, 10**400, float("nan"), float("inf"), 1.5, True, 1j, [1],
        (1, 2, 3), {}, object(), np.zeros(2), np.float32("nan"), torch.float32, torch.ones(3),
        torch.tensor(-5), torch.ones((), device="meta"), torch.ones((), requires_grad=True),
    ]  # fmt: skip


def tensors(x):
    """Tensors that resemble a good one and differ in device, rank, shape, dtype, kind or values."""
    shapes = [x.to("meta"), x[None], x[0], x.flatten(), x.new_zeros(()), x[..., :-1], x[:0]]
    shapes += [torch.cat([x, x], -1), torch.cat([x, x], 0)]
    kinds = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.int8]
    kinds = [x.to(dtype) for dtype in kinds] + [x.to(torch.complex64), x.numpy(), x.tolist()]
    if x.dtype in (torch.int32, torch.int64):
        least = torch.full_like(x, -(2**31))
        return [*shapes, *kinds, x - 5, x + 100, -1 - x * 0, x.flip(-1), x + 2**30, least]
    if x.is_floating_point():
        kinds += [x.to_sparse(), x.to(torch.float8_e4m3fn), torch.nested.nested_tensor([x, x])]
        kinds += [torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)]
    return shapes + kinds


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", good())
def test_every_argument_of_every_wrong_kind(name):
    """A raw error of torch or Python, or one that names no argument of the function."""
    function, base = good()[name]
    function(**base)  # a call that fails by itself would hide all
    known = (*base, "enable_gqa")
    for argument, given in base.items():
        if argument == "module":
            continue
        for bad in numbers() + (tensors(given) if isinstance(given, torch.Tensor) else []):
            options = good()[name][1] | {argument: bad}
            try:
                function(**options)
            except (ValueError, TypeError, NotImplementedError) as error:
                named = any(word in str(error) for word in known)
                assert named, f"{argument}={bad!r}: {error}"
            except RuntimeError as error:  # flash-attn's type for too few pages
                assert str(error).startswith("block_table must have pages"), (argument, bad)
