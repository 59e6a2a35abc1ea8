"""Runs the public API on CPU tensors in float32 under a default device and dtype and saves what it
gave: python default_device_worker.py DEVICE DTYPE FILE.

Inputs and modules are made before the defaults are set, so every result must be what it is without.
"""

import sys
import tempfile

import torch
from torch.nn import functional as F

import attn_ext
from attn_ext import inspect, nn, testing
from attn_ext.integrations import diffusers, flash_attn, transformers
from attn_ext.integrations import xformers as xf
from attn_ext.integrations.flash_attn import bert_padding, rotary
from attn_ext.integrations.xformers import bias as xformers_bias

torch.manual_seed(5)
Q, K, V = (torch.randn(2, h, 9, 8) for h in (4, 2, 2))
MASK = torch.rand(2, 1, 9, 9) < 0.8
BIASES = torch.randn(4, 9, 9), torch.randn(1, 1, 1, 1)
SINK, SLOPES, W = torch.randn(4), torch.rand(4), torch.randn(4, 8)
CU = torch.tensor([0, 4, 9], dtype=torch.int32)
LENGTHS = torch.tensor([5, 7], dtype=torch.int32)
TABLE = torch.tensor([[0, 2, 4], [5, 1, 3]], dtype=torch.int32)
PAGES = torch.randn(6, 2, 4, 8)
NEW = torch.randn(2, 2, 1, 8)
PACKED = torch.randn(9, 4, 8)
LAST = tuple(x.transpose(1, 2) for x in (Q, K, V))  # [B, S, H, D]
COS, SIN = torch.rand(9, 4).cos(), torch.rand(9, 4).sin()
X = torch.randn(2, 9, 16)
PADDED = torch.arange(9) < torch.tensor([[9], [5]])
OWN = nn.MultiheadAttention(16, 2, batch_first=True, bias=True, add_bias_kv=True)
ADDITIVE = nn.AdditiveAttention(16, 16, 8)
POOLING = [nn.AttentionPooling(16, 2, 3, score=score) for score in ("dot", "additive")]
CROSS = nn.CrossModalAttention(16, 16, 16, 2)
HIERARCHY = nn.HierarchicalAttention(16, 2)
ROTARY = rotary.RotaryEmbedding(8)
ENCODER = torch.nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
found = {}


def keep(name, results):
    """Save tensors, and what is named in tuples of them, by name."""
    if isinstance(results, torch.Tensor):
        found[name] = results.detach()
    elif isinstance(results, (tuple, list)):
        for index, result in enumerate(results):
            keep(f"{name} {index}", result)


def both(name, function, *inputs, **options):
    """Save results of the function, and the gradients of its inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    results = function(*leaves, **options)
    keep(name, results)
    out = results if isinstance(results, torch.Tensor) else results[0]
    keep(f"{name}, gradient", torch.autograd.grad(out.square().sum(), leaves, allow_unused=True))


def core():
    """attn_ext's own functions."""
    for causal in (False, True):
        both("attention", attn_ext.attention, Q, K, V, causal=causal)
        keep("again", attn_ext.attention(Q, K, V, causal=causal))  # the remembered way
    options = dict(causal=True, window=(5, 0), mask=MASK, softcap=3.0, alibi_slopes=SLOPES)

    def with_sides(q, k, v, bias, sink):
        return attn_ext.attention(
            q, k, v, bias=bias, sink=sink, return_lse=True, return_stats=True, **options
        )

    for bias in BIASES:
        both(f"sides {bias.dim()}", with_sides, Q, K, V, bias, SINK)
    both("sigmoid", attn_ext.attention, Q, K, V, normalizer="sigmoid")
    both("dropout", attn_ext.attention, Q, K, V, dropout_p=0.3)
    for backend in ("cpu", "reference"):
        both(backend, attn_ext.attention, Q, K, V, mask=MASK, dropout_p=0.2, backend=backend)
    keep("halves", attn_ext.attention(Q.half(), K.half(), V.half(), mask=MASK))
    kv = PACKED[:, :2]
    both("varlen", lambda q, k: attn_ext.attention_varlen(q, k, k, CU, CU, causal=True), PACKED, kv)
    keep("decode", attn_ext.attention_decode(Q[:, :, :1], K, V, LENGTHS, return_lse=True))
    caches = PAGES.clone(), PAGES.clone()
    keep("paged", attn_ext.attention_decode(
        Q[:, :, :2], *caches, LENGTHS, block_table=TABLE, k_new=NEW, v_new=NEW,
        causal=True))  # fmt: skip
    keep("appended", caches)
    both("additive", attn_ext.additive_attention, Q, K, V, W, mask=MASK)
    both("additive lengths", attn_ext.additive_attention, Q, K, V, W, lengths=LENGTHS)
    both("additive varlen", lambda q, w: attn_ext.additive_attention_varlen(
        q, q, q, w, CU, CU), PACKED, W)  # fmt: skip
    str(attn_ext.explain(Q, K, V))


def torchs():
    """torch's functions, and modules that end in them."""
    sdpa = attn_ext.scaled_dot_product_attention
    both("sdpa", sdpa, Q, K, V, enable_gqa=True)
    both("sdpa mask", lambda q, m: sdpa(q, q, q, m), Q, BIASES[0])
    both("sdpa bool", lambda q: sdpa(q, q, q, MASK, 0.1), Q)
    with attn_ext.replace_sdpa():
        both("replaced", lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), Q)
        both("encoder", ENCODER, X, src_key_padding_mask=~PADDED)
    both("own", OWN, X, X, X, key_padding_mask=~PADDED, weights_rows=[1, 3])
    both("weights", OWN, X, X, X)
    both("additive module", ADDITIVE, X, X, lengths=LENGTHS)
    keep("additive weights", ADDITIVE.weights(X, X))
    for index, module in enumerate(POOLING):
        both(f"pooling {index}", module, X, lengths=LENGTHS)
        both(f"packed {index}", module, X.flatten(0, 1)[:9], cu_seqlens=CU)
    both("cross", CROSS, X, X)
    both("hierarchy", HIERARCHY, X.flatten(0, 1)[:9], cu_words=CU,
         cu_sentences=torch.tensor([0, 2], dtype=torch.int32, device="cpu"))  # fmt: skip
    converted = nn.convert(torch.nn.Sequential(torch.nn.MultiheadAttention(
        16, 2, device="cpu", dtype=torch.float32)))  # fmt: skip
    nn.revert(converted)


def looks():
    """attn_ext.inspect"""
    options = dict(causal=True, softcap=2.0, mask=MASK, bias=BIASES[0], sink=SINK,
                   alibi_slopes=SLOPES)  # fmt: skip
    both("row stats", lambda q, k, sink: inspect.row_stats(q, k, **{**options, "sink": sink}),
         Q, K, SINK)  # fmt: skip
    for backend in ("cpu", "reference"):
        for given in (options, {"window": (3, 1)}):
            keep(f"top k {backend}", inspect.top_k(Q, K, 3, backend=backend, **given))
            keep(f"mass {backend}", inspect.column_mass(Q, K, backend=backend, **given))
            keep(f"map {backend}", inspect.pooled_map(Q, K, (4, 3), backend=backend, **given))
    keep("weights", inspect.weights(Q, K, rows=[0, -1], cols=slice(2, 7), **options))
    keep("rollout", inspect.rollout([(Q, K), (Q, K)], causal=True))
    keep("rollout rows", inspect.rollout([(Q, K), (Q, K)], rows=[1]))
    with inspect.record(OWN) as seen:
        OWN(X, X, X, need_weights=False)
        attn_ext.attention(Q, K, V, **options)
        attn_ext.attention(Q, K, V, normalizer="sigmoid")
        attn_ext.attention_varlen(PACKED, PACKED, PACKED, CU, CU)
        attn_ext.additive_attention(Q, K, V, W)
    for call in seen.calls:
        keep(f"recorded {call.index} {call.sequence}", [
            getattr(call, n) for n in (*inspect.recording.STATISTICS[:4], "top_weights",
                                       "top_keys", "pooled_map")])  # fmt: skip
    found["summary"] = seen.summary()
    with tempfile.TemporaryDirectory() as folder:
        seen.save(f"{folder}/seen.pt")
        _, page = inspect.look(f"{folder}/seen.pt", folder)
        found["page"] = page.read_text()


def others():
    """The functions of other libraries."""
    both("flash", flash_attn.flash_attn_func, *LAST, causal=True, alibi_slopes=SLOPES)
    both("flash dropout", flash_attn.flash_attn_func, *LAST, dropout_p=0.2, return_attn_probs=True)
    both("flash varlen", lambda q: flash_attn.flash_attn_varlen_func(q, q, q, CU, CU, 5, 5), PACKED)
    packed = torch.stack([LAST[0]] * 3, 2)
    both("flash qkv", flash_attn.flash_attn_qkvpacked_func, packed)
    caches = K.transpose(1, 2).clone(), V.transpose(1, 2).clone()
    keep("flash cache", flash_attn.flash_attn_with_kvcache(
        LAST[0][:, :1], *caches, k=NEW.transpose(1, 2), v=NEW.transpose(1, 2), rotary_cos=COS,
        rotary_sin=SIN, cache_seqlens=3, causal=True))  # fmt: skip
    keep("flash lengths", flash_attn.flash_attn_with_kvcache(
        LAST[0][:, :1], *caches, cache_seqlens=LENGTHS, cache_leftpad=LENGTHS // 2))  # fmt: skip
    both("rotary", rotary.apply_rotary_emb, LAST[0], COS, SIN, seqlen_offsets=0)
    both("rotary torch", rotary.apply_rotary_emb_torch, LAST[0], COS, SIN)
    both("rotary module", lambda q: ROTARY(torch.stack([q] * 3, 2)), LAST[0])
    keep("unpadded", bert_padding.unpad_input(X, PADDED))
    for kind in (xformers_bias.LowerTriangularMask(), None, BIASES[0][None].expand(2, 4, 9, 9)):
        q, k, v = (x.repeat_interleave(4 // x.shape[2], 2) for x in LAST)
        both(f"xformers {type(kind)}", xf.memory_efficient_attention, q, k, v, attn_bias=kind)
    blocks = xformers_bias.BlockDiagonalMask.from_seqlens([4, 5])
    keep("starts", blocks.q_seqinfo.seqstart)
    keep("written out", blocks.make_causal().materialize((9, 9)))
    padded = xformers_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        [1, 1], 9, [5, 7])  # fmt: skip
    keep("padded", [padded.k_seqinfo.seqlen, padded.k_seqinfo.seqstart])
    for name, kind in (("blocks", blocks), ("causal blocks", blocks.make_causal())):
        both(name, lambda q, kind=kind: xf.memory_efficient_attention(q, q, q, attn_bias=kind),
             PACKED[None])  # fmt: skip
    module = torch.nn.Module()
    both("transformers", lambda q, k: transformers.attention_forward(module, q, k, k, MASK)[0],
         Q, K)  # fmt: skip
    both("transformers sinks", lambda q: transformers.attention_forward(
        module, q, q, q, None, s_aux=SINK, is_causal=True)[0], Q)  # fmt: skip
    both("diffusers", lambda q: diffusers.attention_backend(q, q, q), LAST[0])


def measured():
    """profile, and what verify and bench are made of."""
    with attn_ext.profile(quiet=True, replay=False) as profile:
        attn_ext.attention(Q, K, V)
    assert profile.result is not None
    call = testing.random_call(3, mask=True, alibi=True, sink=True, dropout_p=0.2)
    testing.check_call(call)
    keep("random call", [call.q, call.mask, call.alibi_slopes, call.rng_state])
    from attn_ext.measure import cases

    keep("inputs", cases.make("1,2,8,8").inputs())


def main(device: str, dtype: str, path: str) -> None:
    if device != "none":
        torch.set_default_device(device)
        torch.set_default_dtype(getattr(torch, dtype))
    for part in (core, torchs, looks, others, measured):
        torch.manual_seed(7)
        part()
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    torch.save(found, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
