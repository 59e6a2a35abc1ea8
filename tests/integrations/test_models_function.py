"""The attention and mask functions that transformers gets, without a model: each argument against a
plain float64 formula, and masks that are descriptions against the tensors they stand for.
"""

import inspect
import itertools
import subprocess
import sys
import types

import pytest
import torch
from model_checks import naive_forward, transformers

from attn_ext.integrations.masks import LazyMask, describe, mask_function
from attn_ext.integrations.transformers import attention_forward, register


def normal(*shape, seed=0):
    """Normally distributed numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv(seqlen_q=9, seqlen_k=9, batch=2, heads=4, heads_k=2, dim=8, dim_v=6):
    """q [B, 4, Sq, 8], k [B, 2, Sk, 8], v [B, 2, Sk, 6]"""
    return (
        normal(batch, heads, seqlen_q, dim, seed=1),
        normal(batch, heads_k, seqlen_k, dim, seed=2),
        normal(batch, heads_k, seqlen_k, dim_v, seed=3),
    )


def layer(is_causal=True, training=False):
    """What a layer of a model tells the attention function."""
    return types.SimpleNamespace(is_causal=is_causal, training=training, layer_idx=0)


def band(seqlen_q, seqlen_k, left=None, right=None):
    """bool [Sq, Sk], aligned bottom-right."""
    distance = torch.arange(seqlen_k) - torch.arange(seqlen_q)[:, None] - (seqlen_k - seqlen_q)
    keep = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    keep = keep if left is None else keep & (distance >= -left)
    return keep if right is None else keep & (distance <= right)


def agree(arguments: dict, mask=None, seqlen_q=9, seqlen_k=9, module=None, **wanted):
    """attention_forward(**arguments) against the naive formula with `mask` and `wanted`."""
    q, k, v = qkv(seqlen_q, seqlen_k)
    out, weights = attention_forward(module or layer(), q, k, v, **arguments)
    if mask is None:
        mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    want, _ = naive_forward(layer(), q, k, v, mask, **wanted)
    assert weights is None and out.is_contiguous() and out.shape == (2, seqlen_q, 4, 6)
    torch.testing.assert_close(out, want)


def test_causal_rule():
    """is_causal of the call wins over the module's; one query sees all; a mask says it all."""
    causal = band(9, 9, right=0)
    agree({"attention_mask": None}, causal)
    agree({"attention_mask": None}, None, module=layer(is_causal=False))
    agree({"attention_mask": None, "is_causal": False}, None)
    agree({"attention_mask": None, "is_causal": True}, causal, module=layer(is_causal=False))
    agree({"attention_mask": None}, causal, module=types.SimpleNamespace())
    agree({"attention_mask": None}, None, seqlen_q=1)
    mask = normal(2, 1, 9, 9) > -0.5
    mask[..., 0] = True
    agree({"attention_mask": mask, "is_causal": True}, mask)


def test_prefill_of_a_static_cache_is_top_left():
    """Free space behind the keys attended to, or a position bias that does not fit any more."""
    causal = torch.ones(5, 12, dtype=torch.bool).tril()
    bias = normal(1, 4, 5, 12)
    agree({"attention_mask": None}, causal, 5, 12)
    agree({"attention_mask": None, "position_bias": bias}, causal, 5, 12, position_bias=bias)


def test_sliding_window():
    """A window that does not count the query itself; one that is applied beside a mask."""
    window = {"sliding_window": 4}
    agree({"attention_mask": None, **window}, band(9, 9, 3, 0))
    agree({"attention_mask": None, "is_causal": False, **window}, band(9, 9, 3, 3))
    agree({"attention_mask": None, **window}, band(1, 9, 3), seqlen_q=1)
    everything = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    agree({"attention_mask": everything, **window}, everything)


def test_scores():
    """Scale, softcap, sinks and both kinds of bias, alone and together."""
    sinks, bias, added = normal(4), normal(1, 4, 9, 9), normal(2, 1, 9, 9, seed=5)
    causal = band(9, 9, right=0)
    agree({"attention_mask": None, "scaling": 0.7}, causal, scaling=0.7)
    agree({"attention_mask": None, "softcap": 1.5}, causal, softcap=1.5)
    agree({"attention_mask": None, "s_aux": sinks}, causal, s_aux=sinks)
    agree({"attention_mask": None, "position_bias": bias}, causal, position_bias=bias)
    agree({"attention_mask": added}, None, position_bias=added)
    agree({"attention_mask": added, "position_bias": bias}, None, position_bias=bias + added)
    agree(
        {"attention_mask": causal[None, None], "softcap": 1.5, "s_aux": sinks, "scaling": 0.7,
         "position_bias": bias},
        causal, softcap=1.5, s_aux=sinks, scaling=0.7, position_bias=bias,
    )  # fmt: skip


def test_dropout_belongs_to_training():
    """Models that pass their dropout in evaluation too, as eager attention lets them."""
    agree({"attention_mask": None, "dropout": 0.5}, band(9, 9, right=0))
    q, k, v = qkv()
    training = layer(training=True)
    dropped, _ = attention_forward(training, q, k, v, None, dropout=0.5)
    kept, _ = attention_forward(training, q, k, v, None, dropout=0.0)
    assert not torch.equal(dropped, kept)


def test_sinks_of_each_query():
    """Inkling's sinks [B, H, Sq, 1], values and gradients."""
    q, k, v = (x.requires_grad_() for x in qkv())
    sinks = normal(2, 4, 9, 1, seed=7).requires_grad_()
    out, _ = attention_forward(layer(), q, k, v, None, sinks=sinks)
    keys, values = (x.repeat_interleave(2, dim=1) for x in (k, v))
    logits = (q @ keys.mT / 8**0.5).masked_fill(~band(9, 9, right=0), -torch.inf)
    weights = torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]
    want = (weights @ values).transpose(1, 2)
    torch.testing.assert_close(out, want)
    weight = normal(*out.shape, seed=9)
    inputs = (q, k, v, sinks)
    got = torch.autograd.grad((out * weight).sum(), inputs)
    torch.testing.assert_close(got, torch.autograd.grad((want * weight).sum(), inputs))


def test_chosen_keys():
    """Sparse layers (DeepSeek V3.2) that attend to all keys."""
    indices = torch.tensor([[0, 1, -1], [2, 1, 0]])[:, None].expand(2, 9, 3)
    keep = torch.zeros(2, 1, 9, 9, dtype=torch.bool)
    keep[0, ..., :2] = True
    keep[1, ..., :3] = True
    causal = band(9, 9, right=0)
    agree({"attention_mask": None, "indices": indices}, keep & causal)
    agree({"attention_mask": causal[None, None], "indices": indices}, keep & causal)
    q, k, v = qkv()
    with pytest.raises(NotImplementedError, match="block_indices"):
        attention_forward(layer(), q, k, v, None, block_indices=indices)


def test_rows_whose_additive_mask_is_all_minimum_stay_finite():
    """A row of finfo.min, as eager masks have them for padding, that becomes NaN."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q, k, v = (x.to(dtype).requires_grad_() for x in qkv())
        mask = torch.zeros(2, 1, 9, 9, dtype=dtype)
        mask[0, :, :4] = torch.finfo(dtype).min
        out, _ = attention_forward(layer(), q, k, v, mask)
        out.float().sum().backward()
        assert all(x.isfinite().all() for x in (out, q.grad, k.grad, v.grad))


def test_packed_sequences_with_a_mask_or_a_bias():
    """Bounds that are forgotten where the packed kernel cannot serve the call."""
    bounds = {"cu_seq_lens_q": torch.tensor([0, 4, 9, 11, 18], dtype=torch.int32)}
    ids = torch.tensor([0] * 4 + [1] * 5 + [2] * 2 + [3] * 7).view(2, 1, 9)
    same, causal = ids[..., :, None] == ids[..., None, :], band(9, 9, right=0)
    bias = normal(1, 4, 9, 9)
    agree({"attention_mask": None, **bounds}, same & causal)
    agree({"attention_mask": None, "is_causal": False, **bounds}, same)
    agree({"attention_mask": None, "sliding_window": 3, **bounds}, same & band(9, 9, 2, 0))
    mask = normal(2, 1, 9, 9, seed=4) > 0
    mask |= torch.eye(9, dtype=torch.bool)
    agree({"attention_mask": mask, **bounds}, same & mask)
    agree(
        {"attention_mask": None, "position_bias": bias, **bounds}, same & causal,
        position_bias=bias,
    )  # fmt: skip


# Kinds of masks, and the function of transformers with which its models ask for each.
CREATORS = {
    "causal": "create_causal_mask", "window": "create_sliding_window_causal_mask",
    "both sides": "create_bidirectional_mask",
    "window on both sides": "create_bidirectional_sliding_window_mask",
    "chunks": "create_chunked_causal_mask", "prefix": "create_causal_mask",
    "packed": "create_causal_mask", "packed window": "create_sliding_window_causal_mask",
}  # fmt: skip


def mask_arguments(kind, padded, offset):
    """Arguments with which transformers calls a mask interface: 2 sequences, 6 new tokens behind
    `offset` cached ones.  A registered interface sees them while transformers makes the mask.
    """
    library, seen = transformers(), {}
    masking = library.masking_utils
    library.AttentionMaskInterface.register("seen", lambda **arguments: seen.update(arguments))
    sizes = dict(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=9)
    config = library.LlamaConfig(**sizes, attn_implementation="seen")
    config.sliding_window = config.attention_chunk_size = 4
    if kind == "window on both sides":
        config.sliding_window = 2
    length = 6 + offset
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, : (3 if padded == "left" else 0)] = False
    mask[1, (length - 2 if padded == "right" else length) :] = False
    cache = library.DynamicCache() if offset else None
    if cache is not None:
        cache.update(torch.zeros(2, 2, offset, 8), torch.zeros(2, 2, offset, 8), 0)
    options = {}
    if kind == "prefix":
        options["or_mask_function"] = lambda b, h, q, kv: kv < 3
    if kind.startswith("packed"):
        options["position_ids"] = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 1]])
    creator = getattr(masking, CREATORS[kind])
    known = inspect.signature(creator).parameters
    options["cache" if "cache" in known else "past_key_values"] = cache  # 5.24 renamed it
    embeddings = torch.zeros(2, 6, 16)
    creator(config, embeddings, attention_mask=mask if padded else None, **options)
    skips = ("allow_is_causal_skip", "allow_is_bidirectional_skip")
    return {**seen, **{name: False for name in skips if name in seen}}


@pytest.mark.parametrize("kind", CREATORS)
def test_descriptions_mean_what_the_mask_means(kind):
    """A recognised mask function whose meaning is another one (also in a later transformers)."""
    sdpa_mask = transformers().masking_utils.sdpa_mask
    described = 0
    for padded, offset in itertools.product((None, "left", "right"), (0, 5)):
        if kind.startswith("packed") and (padded or offset):
            continue
        arguments = mask_arguments(kind, padded, offset)
        mask, true = mask_function(**arguments), sdpa_mask(**arguments)
        described += isinstance(mask, LazyMask)
        assert mask.shape == true.shape and torch.equal(mask & True, true)
        q, k, v = qkv(6, 6 + offset)
        out, _ = attention_forward(layer(), q, k, v, mask)
        want, _ = attention_forward(layer(), q, k, v, true)
        torch.testing.assert_close(out, want)
    unknown = kind in ("chunks", "prefix")
    assert described == 0 if unknown else described > 0


@pytest.mark.parametrize("kind", CREATORS)
def test_masks_of_transformers_that_give_positions(monkeypatch, kind):
    """transformers 4.57 and 5.0 pass cache_position, and neither q_length nor q_offset."""
    masking = transformers().masking_utils
    new = masking.sdpa_mask

    def old(batch_size, cache_position, kv_length, kv_offset=0, **rest):
        given = dict(q_length=len(cache_position), q_offset=cache_position[0])
        return new(batch_size, kv_length=kv_length, kv_offset=kv_offset, **given, **rest)

    monkeypatch.setattr(masking, "sdpa_mask", old)
    for padded, offset in ((None, 0), ("left", 5)):
        if kind.startswith("packed"):
            padded, offset = None, 0
        arguments = mask_arguments(kind, padded, offset)
        true = new(**arguments)
        length, first = arguments.pop("q_length"), arguments.pop("q_offset")
        positions = torch.arange(first, first + length)
        mask = mask_function(**arguments, cache_position=positions)
        assert isinstance(mask, LazyMask) == (kind not in ("chunks", "prefix"))
        assert mask.device == true.device and torch.equal(mask & True, true)
    gap = positions + (positions > first + 2)  # a description by lengths alone would be wrong
    assert not isinstance(mask_function(**arguments, cache_position=gap), LazyMask)


@pytest.mark.parametrize(
    "name",
    ["sliding_window_overlay", "sliding_window_bidirectional_overlay", "and_masks",
     "packed_sequence_mask_function", "remap_positions_for_packed_sequence"],
)  # fmt: skip
def test_a_version_whose_functions_close_over_other_names(name):
    """A KeyError in every forward of a model, where transformers renames a private variable."""

    def make(renamed):
        return lambda batch, head, q, kv: q - kv < renamed

    function = make(3)
    function.__module__, function.__qualname__ = "transformers.masking_utils", f"{name}.<locals>.x"
    assert describe(function) is None


def test_a_lazy_mask_is_a_tensor_to_everybody_else():
    """Slices, arithmetic, copies and printing that see no mask."""
    mask = mask_function(**mask_arguments("window", "left", 0))
    true = mask.dense()
    assert isinstance(mask, LazyMask) and mask.dtype == torch.bool and mask.shape == (2, 1, 6, 6)
    assert torch.equal(mask[:, :, :, :3], true[:, :, :, :3])
    assert torch.equal(torch.where(mask, 0.0, -1.0), torch.where(true, 0.0, -1.0))
    assert torch.equal(mask.expand(2, 4, 6, 6), true.expand(2, 4, 6, 6))
    assert torch.equal(mask.to(torch.float32), true.float()) and bool(mask.any())
    assert isinstance(mask.detach(), LazyMask) and "LazyMask" in repr(mask)
    spread = LazyMask((2, 1, 6, 6), mask.device, mask.structure, lambda: true[:1].expand_as(true))
    assert torch.equal(spread.reshape(-1), true[:1].expand_as(true).reshape(-1))


def test_bad_arguments():
    """Names that transformers reads a meaning into; masks that are not tensors."""
    transformers()
    for name in ("sdpa", "eager", "my_flash", "", "a/b"):
        with pytest.raises(ValueError, match="name must be new to transformers"):
            register(name)
    with pytest.raises(TypeError, match="name must be a str, got int 3"):
        register(3)
    q, k, v = qkv()
    with pytest.raises(TypeError, match=r"attention_mask must be a torch\.Tensor or None"):
        attention_forward(layer(), q, k, v, "causal")
    with pytest.raises(ValueError, match=r"mask must be broadcastable"):
        attention_forward(layer(), q, k, v, torch.ones(2, 1, 7, 9, dtype=torch.bool))


def test_integrations_are_found_after_a_plain_import():
    """`import attn_ext` alone, as the documents write it."""
    code = (
        "import sys, attn_ext; assert 'attn_ext.integrations.transformers' not in sys.modules\n"
        "for name in ('transformers', 'diffusers', 'flash_attn', 'xformers', 'sdpa'):\n"
        "    assert getattr(attn_ext.integrations, name).__name__.endswith(name)\n"
        "assert 'transformers' not in sys.modules and not hasattr(attn_ext.integrations, 'other')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
