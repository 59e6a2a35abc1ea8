"""Decoders of transformers through attn_implementation="attn_ext", against their own eager and
sdpa paths: Llama (GQA, padded, packed), Mistral (window), Gemma 2 (softcap), gpt-oss (sinks),
Mixtral.
"""

import pytest
import torch
from closeness import FLOAT32, assert_close
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

SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=90, max_position_embeddings=128, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, attention_dropout=0.0,
)  # fmt: skip


def decoder(family: str, head: bool = True, **options):
    """A decoder of `family` at random weights: with a language-model head, or the bare model."""
    library = transformers()
    # the grouped matmul of experts has no float64 on CPU
    options = {**SIZES, "experts_implementation": "eager", **options}
    config = getattr(library, f"{family}Config")(**options)
    torch.manual_seed(3)
    return spread(getattr(library, family + ("ForCausalLM" if head else "Model"))(config))


FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": 6},
    "Gemma2": {
        "sliding_window": 6, "attn_logit_softcapping": 2.0, "head_dim": 8,
        "query_pre_attn_scalar": 8,
    },
    "GptOss": {
        "sliding_window": 6, "head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "Mixtral": {"sliding_window": None, "num_local_experts": 3, "num_experts_per_tok": 2},
}  # fmt: skip


def own_fast(family: str) -> str:
    """The library's own path to generate with: sdpa knows neither softcap nor sinks."""
    return "eager" if family in ("Gemma2", "GptOss") else "sdpa"


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_backward(family, calls):
    """A lost window, softcap, sink or scale; GQA heads in the wrong order; a gradient lost."""
    check_model(decoder(family, head=False, **FAMILIES[family]), {"input_ids": text()}, last_hidden)
    assert calls.count == 2  # each layer once: the eager runs do not come here


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("left", [True, False], ids=["left-padded", "right-padded"])
def test_padded(family, left, calls):
    """Padding that is attended to, or a window counted from the wrong end."""
    mask = padding(2, 19, left)
    inputs = {"input_ids": text(), "attention_mask": mask}
    check_model(decoder(family, head=False, **FAMILIES[family]), inputs, valid_rows(mask))
    assert calls.count == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family, calls):
    """A decode step that sees too many or too few keys of a dynamic cache; left padding."""
    model = decoder(family, **FAMILIES[family])
    inputs = {"input_ids": text(), "attention_mask": padding(2, 19, left=True)}
    check_generate(model, inputs, own_fast(family))
    assert calls.count >= 16


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2"])
def test_generate_with_a_static_cache(family, calls):
    """The free space of a static cache attended to."""
    model = decoder(family, **FAMILIES[family])
    check_generate(model, {"input_ids": text()}, own_fast(family), cache_implementation="static")
    assert calls.count >= 16


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(family, calls):
    """Sinks, masks or results in a dtype that the model does not go on with."""
    if family in ("Mixtral", "GptOss"):  # half a rounding sends a token to another expert
        model = decoder(family, head=False, **{**FAMILIES[family], "num_experts_per_tok": 3})
    else:
        model = decoder(family, head=False, **FAMILIES[family])
    mask = padding(2, 19, left=True)
    inputs = {"input_ids": text(), "attention_mask": mask}
    check_model(model.bfloat16(), inputs, valid_rows(mask), agree=0.3)
    assert calls.count == 2


def packed_inputs(lengths=(7, 1, 11)):
    """One row that holds several sequences, as DataCollatorWithFlattening makes it."""
    total = sum(lengths)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    inputs = {"input_ids": text(1, total), "position_ids": positions, "use_cache": False}
    extra = {
        "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }  # fmt: skip
    return inputs, extra


@pytest.mark.parametrize("bounds", ["cu_seq_lens", "position_ids"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "GptOss"])  # see the next test
def test_packed(family, bounds, calls):
    """Packed sequences that see each other, or lose their windows; O(N^2) masks where varlen
    serves.
    """
    inputs, extra = packed_inputs()
    extra = extra if bounds == "cu_seq_lens" else None
    check_model(decoder(family, head=False, **FAMILIES[family]), inputs, last_hidden, extra)
    assert (len(calls.varlen), len(calls.dense)) == (2, 0)


@pytest.mark.parametrize("family", ["Llama", "GptOss"])
def test_packed_equals_each_sequence_alone(family):
    """The same with another truth, each sequence on its own (transformers' gpt-oss takes no packing
    from position_ids, so its eager path lets packed sequences see each other).
    """
    model = decoder(family, head=False, **FAMILIES[family]).eval()
    model.set_attn_implementation("attn_ext")
    inputs, extra = packed_inputs()
    together = model(**inputs, **extra).last_hidden_state[0]
    alone = [
        model(input_ids=part).last_hidden_state[0]
        for part in inputs["input_ids"].split((7, 1, 11), dim=1)
    ]
    assert_close(together, torch.cat(alone), FLOAT32)


def test_masks_without_the_guard_arrive_as_none():
    """Why register() registers a mask function too: a name that only AttentionInterface knows gets
    no mask at all, and padding changes the result without a word.
    """
    from attn_ext.integrations.transformers import attention_forward, register

    library = transformers()
    model, mask = decoder("Llama", head=False).eval(), padding(2, 19, left=True)
    seen = {}

    def spy(name):
        def forward(module, query, key, value, attention_mask, **kwargs):
            seen[name] = attention_mask
            return attention_forward(module, query, key, value, attention_mask, **kwargs)

        return forward

    register("registered_kernel")
    for name in ("bare_kernel", "registered_kernel"):
        library.AttentionInterface.register(name, spy(name))
    states = {}
    for name in ("eager", "registered_kernel", "bare_kernel"):
        model.set_attn_implementation(name)
        output = model(input_ids=text(), attention_mask=mask, position_ids=torch.arange(19)[None])
        states[name] = output.last_hidden_state[mask.bool()]
    assert seen["bare_kernel"] is None and seen["registered_kernel"] is not None
    assert_close(states["registered_kernel"], states["eager"], FLOAT32)
    assert (states["bare_kernel"] - states["eager"]).abs().max() > 0.1


def test_a_window_is_passed_instead_of_a_mask(calls):
    """An [Sq, Sk] mask built where the kernel's window says the same."""
    model = decoder("Mistral", head=False, sliding_window=6).eval()
    model.set_attn_implementation("attn_ext")
    model(input_ids=text(), attention_mask=padding(2, 19, left=True))
    model(input_ids=text())
    for padded, call in zip((True, True, False, False), calls.dense, strict=True):
        assert call["window"] == (5, 0)
        assert (call["mask"].shape == (2, 1, 1, 19)) if padded else call["mask"] is None


def test_chunked_prefill(calls):
    """Several new tokens behind a filled cache: the diagonal must be aligned bottom-right."""
    for family in ("Llama", "Mistral"):
        model, ids = decoder(family, head=False, **FAMILIES[family]).eval(), text()
        model.set_attn_implementation("eager")
        whole = model(input_ids=ids).last_hidden_state
        model.set_attn_implementation("attn_ext")
        first = model(input_ids=ids[:, :8], use_cache=True)
        rest = model(input_ids=ids[:, 8:], past_key_values=first.past_key_values)
        parts = torch.cat([first.last_hidden_state, rest.last_hidden_state], dim=1)
        assert_close(parts, whole, FLOAT32)


def test_dropout_only_while_training(calls):
    """Dropout in evaluation, or none in training."""
    model = decoder("Llama", head=False, attention_dropout=0.5)
    model.set_attn_implementation("attn_ext")
    states = {}
    for train in (True, False):
        model.train(train)
        states[train] = [model(input_ids=text()).last_hidden_state for _ in range(2)]
    assert not torch.equal(*states[True]) and torch.equal(*states[False])
    assert [call["dropout_p"] for call in calls.dense] == [0.5] * 4 + [0.0] * 4


def test_training_lowers_the_loss():
    """Steps along wrong gradients."""
    model = decoder("Llama").train()
    model.set_attn_implementation("attn_ext")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = model(input_ids=text(), labels=text()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("whole", [True, False], ids=["model", "layers"])
def test_compile(whole, padded):
    """A graph break, or a mask that a compiled layer takes for something else."""
    if whole and torch.__version__ < (2, 7):
        pytest.skip("transformers' forward of a model reads co_varnames, unknown to dynamo of 2.6")
    model = decoder("Mistral", head=False, sliding_window=6).eval()
    model.set_attn_implementation("attn_ext")
    mask = padding(2, 19, left=True) if padded else torch.ones(2, 19, dtype=torch.int64)
    inputs = {"input_ids": text(), "attention_mask": mask if padded else None, "use_cache": False}
    want = model(**inputs).last_hidden_state
    torch.compiler.reset()
    compiled = {"backend": "aot_eager", "fullgraph": True}
    if whole:
        model = torch.compile(model, **compiled)
    else:
        for layer in model.layers:
            layer.forward = torch.compile(layer.forward, **compiled)
    got = model(**inputs).last_hidden_state
    assert_close(got[mask.bool()], want[mask.bool()], FLOAT32)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, calls):
    """A mask that does not survive the recomputation."""
    model, mask = decoder("Mistral", head=False, sliding_window=6), padding(2, 19, left=True)
    model.set_attn_implementation("attn_ext")
    grads = []
    for checkpoint in (False, True):
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        model.zero_grad()
        output = model(input_ids=text(), attention_mask=mask)
        output.last_hidden_state[mask.bool()].square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(grads[1], grads[0])
    assert all(call["window"] == (5, 0) for call in calls.dense) and calls.count == 6
