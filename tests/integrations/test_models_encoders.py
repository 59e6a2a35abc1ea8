"""Encoders and encoder-decoders of transformers through attn_implementation="attn_ext", against
their own eager path: BERT, RoBERTa, ViT, CLIP, T5 (position bias), Whisper, Bart; and decoders with
other shapes of attention: GPT-2, OPT, DeepSeek-V3 (Dv != D); and Bloom, which never asks.
"""

import pytest
import torch
from closeness import assert_same
from model_checks import (
    check_generate,
    check_model,
    last_hidden,
    padding,
    spread,
    text,
    transformers,
    valid_rows,
)

BERT = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    vocab_size=90, max_position_embeddings=64, pad_token_id=0,
)  # fmt: skip
PICTURE = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    image_size=32, patch_size=8,
)  # fmt: skip


def model_of(name: str, config: str, factor: float = 4.0, **options):
    """The class `name` of transformers with random weights."""
    library = transformers()
    torch.manual_seed(3)
    return spread(getattr(library, name)(getattr(library, config)(**options)), factor)


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
@pytest.mark.parametrize("padded", [False, True])
def test_bert(family, padded, calls):
    """A bidirectional layer made causal, or padding that is attended to."""
    model = model_of(family + "Model", family + "Config", add_pooling_layer=False, **BERT)
    mask = padding(2, 19, left=False)
    inputs = {"input_ids": text(), **({"attention_mask": mask} if padded else {})}
    check_model(model, inputs, valid_rows(mask) if padded else last_hidden)
    assert calls.count == 2


def test_bert_as_a_decoder_with_cross_attention(calls):
    """Cross-attention made causal, or its padding lost."""
    options = dict(BERT, is_decoder=True, add_cross_attention=True)
    model = model_of("BertModel", "BertConfig", **options)
    mask = padding(2, 11, left=False)
    generator = torch.Generator().manual_seed(4)
    inputs = {
        "input_ids": text(),
        "encoder_hidden_states": torch.randn(2, 11, 32, generator=generator),
        "encoder_attention_mask": mask,
        "use_cache": False,
    }
    check_model(model, inputs, last_hidden)
    assert calls.count == 4


def pictures(size: int = 32, seed: int = 6) -> torch.Tensor:
    """Random pictures [2, 3, size, size]."""
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_vit(calls):
    """Attention between patches made causal (Sq > 1 and no mask)."""
    check_model(model_of("ViTModel", "ViTConfig", **PICTURE), {"pixel_values": pictures()},
                last_hidden)  # fmt: skip
    assert calls.count == 2


def test_clip(calls):
    """The causal text tower and the bidirectional vision tower taken for each other."""
    side = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = model_of(
        "CLIPModel", "CLIPConfig", projection_dim=16,
        text_config=dict(side, vocab_size=90, max_position_embeddings=32, eos_token_id=2),
        vision_config=dict(side, image_size=32, patch_size=8),
    )  # fmt: skip
    mask = padding(2, 19, left=False)
    inputs = {"input_ids": text(), "attention_mask": mask, "pixel_values": pictures()}
    check_model(model, inputs, lambda o: {"text": o.text_embeds, "image": o.image_embeds})
    assert calls.count == 4


T5 = dict(
    d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=90, dropout_rate=0.0,
    relative_attention_num_buckets=8, relative_attention_max_distance=16,
    decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
)  # fmt: skip


def test_t5(calls):
    """A position bias lost, scaled or without gradient; T5's scale of 1 made 1/sqrt(D)."""
    model = model_of("T5Model", "T5Config", **T5)
    mask = padding(2, 19, left=False)
    inputs = {
        "input_ids": text(), "attention_mask": mask, "decoder_input_ids": text(2, 9, seed=2),
        "use_cache": False,
    }  # fmt: skip
    check_model(model, inputs, last_hidden)
    assert calls.count == 6


def test_t5_generate(calls):
    """The bias of the last query's row only, while decoding."""
    model = model_of("T5ForConditionalGeneration", "T5Config", **T5)
    check_generate(model, {"input_ids": text(), "attention_mask": padding(2, 19, left=False)})
    assert calls.count > 10


WHISPER = dict(
    d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=90,
    num_mel_bins=8, max_source_positions=20, max_target_positions=40, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, suppress_tokens=None,
    begin_suppress_tokens=None,
)  # fmt: skip


def test_whisper(calls):
    """Encoder, decoder and cross-attention in one model: causal only where it should be."""
    model = model_of("WhisperModel", "WhisperConfig", factor=3.0, **WHISPER)
    sound = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(7))
    inputs = {
        "input_features": sound, "decoder_input_ids": text(2, 9), "use_cache": False,
    }  # fmt: skip
    check_model(model, inputs, last_hidden)
    assert calls.count == 6


def test_whisper_generate(calls):
    """The cross-attention cache of a decode step."""
    model = model_of("WhisperForConditionalGeneration", "WhisperConfig", factor=3.0, **WHISPER)
    sound = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(7))
    check_generate(model, {"input_features": sound})
    assert calls.count > 10


BART = dict(
    d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=90,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    decoder_start_token_id=2, forced_eos_token_id=None,
)  # fmt: skip


def test_bart(calls):
    """Padding of the source in cross-attention, and generate() with both caches."""
    mask = padding(2, 19, left=False)
    inputs = {"input_ids": text(), "attention_mask": mask}
    model = model_of("BartModel", "BartConfig", **BART)
    targets = {"decoder_input_ids": text(2, 9, seed=2), "use_cache": False}
    check_model(model, {**inputs, **targets}, last_hidden)
    assert calls.count == 6
    check_generate(model_of("BartForConditionalGeneration", "BartConfig", **BART), inputs)


DECODERS = {
    "GPT2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "OPT": dict(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                word_embed_proj_dim=32, max_position_embeddings=64),
    "DeepseekV3": dict(
        hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, n_group=2, topk_group=1,
        num_experts_per_tok=2, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=8, v_head_dim=6, first_k_dense_replace=1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", DECODERS)
def test_other_decoders(family, calls):
    """Values narrower than keys, scales of a model's own, fused projections, learned positions."""
    library = transformers()
    sizes = dict(vocab_size=90, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    sizes["experts_implementation"] = "eager"  # the grouped matmul has no float64 on CPU
    config = getattr(library, f"{family}Config")(**sizes, **DECODERS[family])
    torch.manual_seed(3)
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    model = spread(getattr(library, family + head)(config), 4.0)
    model.config.resid_pdrop = model.config.dropout = 0.0
    mask = padding(2, 19, left=True)
    inputs = {"input_ids": text(), "attention_mask": mask}
    check_model(model, inputs, lambda o: {"logits": o.logits[mask.bool()]})
    assert calls.count == 2
    check_generate(model, inputs, "eager")


def test_a_model_that_computes_attention_itself(calls):
    """Bloom adds its mask to the logits: a bool mask there would be wrong without a word."""
    from attn_ext.integrations import masks

    masks._warned.clear()
    library = transformers()
    states, mask = {}, padding(2, 19, left=True)
    for attention in ("eager", "attn_ext"):
        sizes = dict(vocab_size=90, hidden_size=32, n_layer=2, n_head=4)
        config = library.BloomConfig(**sizes, attn_implementation=attention)
        torch.manual_seed(3)
        model = spread(library.BloomModel(config), 4.0).eval()
        if attention == "attn_ext":
            with pytest.warns(UserWarning, match="BloomConfig: this model computes attention"):
                states[attention] = model(text(), attention_mask=mask).last_hidden_state
        else:
            states[attention] = model(text(), attention_mask=mask).last_hidden_state
    assert_same(states["attn_ext"], states["eager"])
    assert calls.count == 0
