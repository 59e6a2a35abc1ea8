"""Each argument of each public function and drop-in replaced by values of every wrong kind.

Most are errors, some are meanings; none may be another library's raw error, an error that does not
name an argument, or a crash.
"""

import re
import types

import numpy as np
import pytest
import torch

import attn_ext
from attn_ext import nn
from attn_ext.integrations import diffusers, transformers, xformers
from attn_ext.integrations import flash_attn as fa
from attn_ext.integrations.flash_attn import passes as passes

B, S, H, D = 2, 4, 2, 8
LAYER = types.SimpleNamespace(is_causal=True, training=True)


def r(*shape):
    return torch.randn(shape)


def same(names: str, *shape) -> dict:
    """Random tensors of one shape, by name."""
    return {name: r(*shape) for name in names.split()}


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


def dots(rows: int, cols: int) -> dict:
    """The keywords of dot products."""
    return dict(
        window=(1, 1), mask=torch.ones(rows, cols) > 0, bias=r(rows, cols), softcap=1.0,
        alibi_slopes=r(H), sink=r(H), scale=1.0,
    )  # fmt: skip


def flash() -> dict:
    """The keywords of flash-attn's functions."""
    return dict(softmax_scale=1.0, causal=True, softcap=1.0, alibi_slopes=r(H))


def packed(longest: str = "max_seqlen") -> dict:
    """Two sequences of three and four tokens, queries and keys alike."""
    cu = i32(0, 3, 7)
    ends = dict(cu_seqlens_q=cu, cu_seqlens_k=cu)
    return ends | {f"{longest}_q": 4, f"{longest}_k": 4}


def good():
    """Name -> (function, a call of it that returns), fresh tensors each time."""
    pages = i32([0, 1], [2, 3])
    heads_first, heads_last, total = (B, H, S, D), (B, S, H, D), (7, H, D)
    lengths, queries = i32(3, 5), r(B, H, 1, D)
    attended, xf = same("query key value", *heads_first), same("query key value", *heads_last)
    return {
        "attention": (attn_ext.attention, same("q k v", *heads_first) | dots(S, S) | dict(
            causal=False, dropout_p=0.1, return_lse=True, return_stats=True, deterministic=False,
            normalizer="softmax", backend="auto")),
        "sdpa": (attn_ext.scaled_dot_product_attention, attended | dict(
            attn_mask=r(S, S), dropout_p=0.1, is_causal=True, scale=1.0, enable_gqa=True)),
        "varlen": (attn_ext.attention_varlen, same("q k v", *total) | packed() | dots(4, 4) | dict(
            causal=False, dropout_p=0.1, return_lse=True)),
        "decode": (attn_ext.attention_decode, dict(q=queries) | same("k_cache v_cache", B, H, 8, D)
            | same("k_new v_new", B, H, 1, D) | dots(1, 8) | dict(
            cache_seqlens=lengths, causal=True, window=(3, 0), num_splits=2, return_lse=True)),
        "paged": (attn_ext.attention_decode, dict(q=queries) | same("k_cache v_cache", 4, H, 4, D)
            | same("k_new v_new", B, H, 1, D) | dict(cache_seqlens=lengths, block_table=pages)),
        "additive": (attn_ext.additive_attention, same("q k v", *heads_first) | same("w b", D)
            | dict(causal=False, window=(1, 1), mask=torch.ones(S, S) > 0, bias=r(S, S),
                   dropout_p=0.1, lengths=i32(2, 4), return_lse=True)),
        "additive_varlen": (attn_ext.additive_attention_varlen,
            same("q k v", *total) | same("w b", D) | packed()),
        "flash": (fa.flash_attn_func, same("q k v", *heads_last) | flash() | dict(
            dropout_p=0.1, window_size=(1, 1), deterministic=False, return_attn_probs=True)),
        "flash_qkv": (fa.flash_attn_qkvpacked_func, dict(qkv=r(B, S, 3, H, D))),
        "flash_kv": (fa.flash_attn_kvpacked_func, dict(q=r(*heads_last), kv=r(B, S, 2, H, D))),
        "flash_varlen": (fa.flash_attn_varlen_func, dict(q=r(*total)) | same("k v", 4, 2, H, D)
            | packed() | flash() | dict(
            dropout_p=0.1, window_size=(1, 1), block_table=pages)),
        "flash_varlen_qkv": (fa.flash_attn_varlen_qkvpacked_func,
            dict(qkv=r(7, 3, H, D), cu_seqlens=i32(0, 3, 7), max_seqlen=4)),
        "flash_varlen_kv": (fa.flash_attn_varlen_kvpacked_func,
            dict(q=r(*total), kv=r(7, 2, H, D)) | packed()),
        "kvcache": (fa.flash_attn_with_kvcache, same("q k v", B, 1, H, D)
            | same("k_cache v_cache", B, 8, H, D) | same("rotary_cos rotary_sin", 8, 2) | flash()
            | dict(cache_seqlens=lengths, cache_batch_idx=i32(0, 1), cache_leftpad=i32(1, 2),
                   window_size=(3, 0), num_splits=1, return_softmax_lse=True)),
        "kvcache_paged": (fa.flash_attn_with_kvcache, same("q k v", B, 1, H, D)
            | same("k_cache v_cache", 4, 4, H, D)
            | dict(cache_seqlens=lengths, block_table=pages, cache_leftpad=i32(1, 2))),
        "pass_forward": (passes._flash_attn_forward, same("q k v", *heads_last) | flash() | dict(
            dropout_p=0.1, window_size_left=1, window_size_right=0, return_softmax=False)),
        "pass_backward": (passes._flash_attn_backward, same("dout q k v out dq dk dv", *heads_last)
            | dict(softmax_lse=r(B, H, S), dropout_p=0.1, softmax_scale=1.0, causal=True,
                   rng_state=torch.tensor([1, 2]))),
        "xformers": (xformers.memory_efficient_attention, xf | dict(
            attn_bias=r(B, H, S, S), p=0.1, scale=1.0, output_dtype=torch.float32)),
        "xformers_partial": (xformers.memory_efficient_attention_partial, xf),
        "xformers_back": (xformers.memory_efficient_attention_backward,
            same("grad output", *heads_last) | dict(lse=r(B, H, S)) | xf),
        "diffusers": (diffusers.attention_backend, xf | dict(
            attn_mask=r(B, 1, S, S), dropout_p=0.1, is_causal=True, scale=1.0, return_lse=True)),
        "transformers": (transformers.attention_forward, dict(module=LAYER) | attended | dict(
            attention_mask=r(B, 1, S, S), scaling=1.0, dropout=0.1, is_causal=True,
            position_bias=r(1, H, S, S), softcap=1.0, s_aux=r(H))),
        "transformers_window": (transformers.attention_forward, dict(module=LAYER) | attended
            | dict(attention_mask=None, sliding_window=2, sinks=r(B, H, S, 1),
                   indices=torch.zeros(B, S, 2, dtype=torch.int64))),
        "transformers_packed": (transformers.attention_forward, dict(module=LAYER)
            | same("query key value", 1, H, 7, D) | dict(
            attention_mask=None, cu_seq_lens_q=i32(0, 3, 7), cu_seq_lens_k=i32(0, 3, 7),
            max_length_q=4, max_length_k=4)),
        "mha": (lambda **k: nn.MultiheadAttention(8, 2)(**k), same("query key value", S, B, 8)
            | dict(key_padding_mask=torch.zeros(B, S) > 0, need_weights=True, attn_mask=r(S, S),
                   average_attn_weights=True, is_causal=False, weights_rows=[0])),
    }  # fmt: skip


# What an error may name in place of an argument: one whose shape, length or device is wrong only
# beside that of the argument.  Names that begin with the argument's count as well: flash-attn's k
# is the k_new of the function that serves it.
BESIDE = {
    "q": ("cu_seqlens_q", "cache_seqlens", "block_table", "b"), "qkv": ("cu_seqlens_q",),
    "kv": ("cu_seqlens_k",), "v": ("dout",), "k_cache": ("cache_batch_idx",), "v_cache": ("v_new",),
    "query": ("key", "attn_mask", "grad"), "value": ("grad",), "cu_seqlens_k": ("block_table",),
    "block_table": ("k", "k_cache", "cache_seqlens"), "max_seqlen_q": ("mask",),
    "max_seqlen_k": ("mask",),
}  # fmt: skip


def names(argument: str, message: str) -> bool:
    """Whether an error says what is wrong."""
    own = rf"\b{argument}(_\w+)?\b"
    return any(
        re.search(p, message) for p in (own, *(rf"\b{n}\b" for n in BESIDE.get(argument, ())))
    )


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
    """A raw error of torch or Python, or one that does not name what is wrong."""
    function, base = good()[name]
    function(**base)  # a call that fails by itself would hide all
    wrong = []
    for argument, given in base.items():
        if argument == "module":
            continue
        for bad in numbers() + (tensors(given) if isinstance(given, torch.Tensor) else []):
            try:
                function(**good()[name][1] | {argument: bad})
            except (ValueError, TypeError, NotImplementedError) as error:
                if not names(argument, str(error)):
                    wrong.append(f"{argument}={bad!r:.60}: {error}")
            except RuntimeError as error:  # flash-attn's type for too few pages
                assert str(error).startswith("block_table must have pages"), (argument, bad)
    assert not wrong, "\n".join(dict.fromkeys(wrong))
