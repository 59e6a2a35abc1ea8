"""generate() of transformers on pages (`paged_cache`): the tokens of the dynamic and of the static
cache, with beams, drafts and padding.
"""

import pytest
import torch
from closeness import assert_same
from model_checks import ATTENTION, padding, spread, text, transformers

import attn_ext
from attn_ext.integrations.transformers import paged_cache

SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=90, max_position_embeddings=128, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, attn_implementation=ATTENTION,
)  # fmt: skip
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": 6},
    "Gemma2": {"sliding_window": 6, "attn_logit_softcapping": 2.0, "head_dim": 8,
               "query_pre_attn_scalar": 8},
    "GptOss": {"sliding_window": 6, "head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2,
               "layer_types": ["sliding_attention", "full_attention"],
               "experts_implementation": "eager"},
}  # fmt: skip
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "samples of beams": {"num_beams": 2, "do_sample": True},
    "drafts looked up in the prompt": {"prompt_lookup_num_tokens": 3},
}


def decoder(family="Llama", seed=3, **options):
    """A decoder of `family` at random weights."""
    library = transformers()
    config = getattr(library, f"{family}Config")(**{**SIZES, **FAMILIES[family], **options})
    torch.manual_seed(seed)
    return spread(getattr(library, f"{family}ForCausalLM")(config)).eval()


def generated(model, ids, **options):
    """The tokens of 12 steps."""
    torch.manual_seed(5)
    return model.generate(ids, max_new_tokens=12, min_new_tokens=12, **options)


@pytest.fixture
def on_pages_only(monkeypatch):
    """An error where keys are gathered."""

    def refuse(self):
        raise AssertionError("attention to a gathered copy")

    monkeypatch.setattr(attn_ext.KVCache, "gathered", refuse)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_other_caches(family, way, on_pages_only):
    """A window, softcap or sink lost on the way to the pages; beams that write into each other's;
    drafts that stay after they were rejected; a cache that grows and forgets."""
    model, ids = decoder(family), text()[:1]
    options = WAYS[way]
    cache = paged_cache(model.config, page_size=4)
    tokens = generated(model, ids, past_key_values=cache, **options)
    assert_same(tokens, generated(model, ids, **options))
    if way in ("greedy", "beams"):
        static = generated(
            model, ids, cache_implementation="static", disable_compile=True, **options
        )
        assert_same(tokens, static)
    assert cache.get_seq_length() >= ids.shape[1] + 11


@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_padded_prompts(way, on_pages_only):
    """Padding on the left that a step on pages attends to."""
    model, ids, mask = decoder(), text(), padding(2, 19, left=True)
    cache = paged_cache(model.config, page_size=4)
    more = {"attention_mask": mask, **WAYS[way]}
    assert_same(generated(model, ids, past_key_values=cache, **more), generated(model, ids, **more))


def test_a_draft_model():
    """Assisted generation, whose rejected drafts are cropped."""
    model, draft, ids = decoder(), decoder(seed=4, num_hidden_layers=1), text()[:1]
    cache = paged_cache(model.config)
    tokens = generated(model, ids, past_key_values=cache, assistant_model=draft)
    assert_same(tokens, generated(model, ids))


def test_beams_share_their_prompt():
    """Beams that take a prompt's memory each."""
    model, ids = decoder(), text()[:1]
    cache = paged_cache(model.config, page_size=4, max_length=64)
    generated(model, ids, past_key_values=cache, num_beams=4)
    pages = cache.layers[0].cache
    taken = len(pages.k_pages) - pages.free_pages
    assert taken < 4 * -(-cache.get_seq_length() // 4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_with_another_attention(attention):
    """An attention function that is not ours, and sees only the new keys."""
    model, ids = decoder(), text()
    model.set_attn_implementation(attention)
    cache = paged_cache(model.config)
    assert_same(generated(model, ids, past_key_values=cache), generated(model, ids))


def test_rows_lie_as_they_say():
    """A reshape, as Bloom's attention has it, that torch makes a view of what it takes for
    contiguous."""
    cache = paged_cache(decoder().config)
    k, v = torch.randn(2, 2, 2, 9, 8)
    cache.update(k[:, :, :5], v[:, :, :5], 0)
    keys, values = cache.update(k[:, :, 5:], v[:, :, 5:], 0)
    assert_same(keys.reshape(4, 9, 8), k.reshape(4, 9, 8))
    assert_same(values.reshape(4, -1), v.reshape(4, -1))


def test_a_batch_that_changes():
    """Sequences that are repeated or chosen between two calls of the model."""
    model, ids = decoder(), text()
    cache, dynamic = paged_cache(model.config), transformers().DynamicCache(config=model.config)
    with torch.no_grad():
        for one in (cache, dynamic):
            model(ids, past_key_values=one)
            one.batch_repeat_interleave(2)
            one.batch_select_indices(torch.tensor([3, 0, 2]))
            one.crop(-2)
        got, want = (
            model(ids[:1, :3].expand(3, -1), past_key_values=x).logits.argmax(-1)
            for x in (cache, dynamic)
        )
    assert_same(got, want)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.get_max_length() == -1


def test_what_is_refused():
    """A model whose state is no keys and values, and gradients through pages, without a word."""
    config = decoder().config
    config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(NotImplementedError, match="got linear_attention: use"):
        paged_cache(config)
    with pytest.raises(ValueError, match="page_size must be at least 1, got 0"):
        paged_cache(config, page_size=0)
    model = decoder()
    with pytest.raises(NotImplementedError, match=r"KVCache\.append is not differentiable"):
        model(text(), past_key_values=paged_cache(model.config))
