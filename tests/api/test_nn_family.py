"""attn_ext.nn's additive, pooling, hierarchical and cross-modal modules against their formulas."""

import copy
import pickle

import pytest
import torch
from torch import nn

import attn_ext
from attn_ext.nn import (
    AdditiveAttention,
    AttentionPooling,
    CrossModalAttention,
    HierarchicalAttention,
)


def test_additive_attention():
    """Projections swapped, a bias that is lost, values that are not the keys."""
    module = AdditiveAttention(6, 10, 7).double()
    query, key = torch.randn(2, 5, 6).double(), torch.randn(2, 9, 10).double()
    pre = module.query_proj(query)[:, :, None] + module.key_proj(key)[:, None]
    weights = (torch.tanh(pre) * module.w).sum(-1).softmax(-1)
    torch.testing.assert_close(module(query, key), weights @ key)
    torch.testing.assert_close(module.weights(query, key), weights)
    lengths = torch.tensor([9, 4], dtype=torch.int32)
    cut = module(query, key, lengths=lengths)
    torch.testing.assert_close(cut[1:], module(query[1:], key[1:, :4]))
    mask = (torch.arange(9) < lengths[:, None])[:, None]
    torch.testing.assert_close(module(query, key, mask=mask), cut)
    bias = torch.where(mask, 0.0, -torch.inf).double()
    torch.testing.assert_close(module(query, key, bias=bias), cut)


def test_dropout_of_additive_attention():
    """Dropout outside training, none within it, or in the weights that one looks at."""
    module, x = AdditiveAttention(6, 6, 7, dropout=0.5), torch.randn(2, 9, 6)
    assert not torch.equal(module(x, x), module(x, x))
    torch.testing.assert_close(module.weights(x, x).sum(-1), torch.ones(2, 9))
    assert module.training
    plain = module.eval()(x, x)
    torch.testing.assert_close(plain, module.weights(x, x) @ x)


@pytest.mark.parametrize("score", ["dot", "additive"])
def test_pooling(score):
    """Padded keys that are seen; packed and padded sequences that differ."""
    module = AttentionPooling(8, 2, num_queries=3, score=score).double()
    x = torch.randn(2, 7, 8).double()
    lengths = torch.tensor([7, 4], dtype=torch.int32)
    padded = module(x, lengths=lengths)
    assert padded.shape == (2, 3, 8)
    torch.testing.assert_close(padded[1], module(x[1:, :4])[0])
    mask = torch.arange(7) < lengths[:, None]
    torch.testing.assert_close(module(x, mask=mask), padded)
    packed = module(torch.cat([x[0], x[1, :4]]), torch.tensor([0, 7, 11], dtype=torch.int32))
    torch.testing.assert_close(packed, padded)


def test_pooling_formulas():
    """Heads mixed up, a scale that is missing."""
    x = torch.randn(1, 5, 8).double()
    dot = AttentionPooling(8, 2).double()
    k = dot.key_proj(x).view(5, 2, 4)
    v = dot.value_proj(x).view(5, 2, 4)
    weights = (torch.einsum("hd,shd->hs", dot.query[0], k) / 2).softmax(-1)
    want = dot.out_proj(torch.einsum("hs,shd->hd", weights, v).flatten())
    torch.testing.assert_close(dot(x)[0], want)
    additive = AttentionPooling(8, score="additive").double()
    pre = torch.tanh(additive.key_proj(x[0]) + additive.query[0, 0])
    torch.testing.assert_close(additive(x)[0], (pre @ additive.w[0]).softmax(0) @ x[0])


@pytest.mark.parametrize("encoder", [True, False])
def test_hierarchical(encoder):
    """A word that reaches another sentence's or document's vector; gradients that stop."""
    module = HierarchicalAttention(8, 2, encoder)
    words = torch.randn(20, 8, requires_grad=True)
    cu_words = torch.tensor([0, 5, 6, 13, 20], dtype=torch.int32)
    cu_sentences = torch.tensor([0, 3, 4], dtype=torch.int32)
    documents, sentences = module(words, cu_words, cu_sentences, return_sentences=True)
    assert documents.shape == (2, 8) and sentences.shape == (4, 8)
    (grad,) = torch.autograd.grad(documents[0].sum(), words, retain_graph=True)
    assert (grad[:13].abs().sum(-1) > 0).all() and (grad[13:] == 0).all()
    (grad,) = torch.autograd.grad(sentences[1].sum(), words)
    assert (grad.abs().sum(-1) > 0).nonzero().flatten().tolist() == [5]
    alone = module(words[13:], torch.tensor([0, 7]).int(), torch.tensor([0, 1]).int())
    torch.testing.assert_close(alone[0], documents[1])


def test_cross_modal():
    """Streams swapped, masks applied to the wrong stream, widths assumed equal."""
    module = CrossModalAttention(6, 10, 8, 2)
    a, b = torch.randn(2, 5, 6), torch.randn(2, 9, 10)
    new_a, new_b = module(a, b)
    assert new_a.shape == a.shape and new_b.shape == b.shape
    mask_b = torch.ones(2, 9, dtype=torch.bool)
    mask_b[:, 4:] = False
    masked_a, masked_b = module(a, b, mask_b=mask_b)
    torch.testing.assert_close(masked_a, module(a, b[:, :4])[0])
    torch.testing.assert_close(masked_b, new_b)
    q = module.q_a(module.norm_a(a)).view(2, 5, 2, 4).transpose(1, 2)
    k, v = module.kv_b(module.norm_b(b)).view(2, 9, 2, 2, 4).permute(2, 0, 3, 1, 4)
    out = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(new_a, a + module.out_a(out))


def test_modules_copy_and_pickle():
    """State that is not in the state_dict."""
    x = torch.randn(1, 4, 8)
    for module in (AttentionPooling(8, 2), AttentionPooling(8, score="additive")):
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(twin(x), module(x))


def test_autocast():
    """A parameter in float32 against keys in bfloat16."""
    x = torch.randn(1, 4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for module in (AttentionPooling(8, 2), AttentionPooling(8, score="additive")):
            assert torch.isfinite(module(x)).all()
        assert torch.isfinite(AdditiveAttention(8, 8, 4)(x, x)).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda x: AttentionPooling(8, 3),
            "embed_dim must be a multiple of num_heads, got 8 and 3",
        ),
        (
            lambda x: AdditiveAttention(4, 8, 4, dropout=2.0),
            "dropout must be between 0 and 1, got 2.0",
        ),
        (lambda x: AttentionPooling(1 << 62), "embed_dim must be at most 536870912, got 46116860"),
        (lambda x: AdditiveAttention(4, 1 << 40, 4), "key_dim must be at most 536870912, got 109"),
        (lambda x: CrossModalAttention(8, 8, 1 << 31), "embed_dim must be at most 536870912, got"),
        (
            lambda x: attn_ext.nn.MultiheadAttention(1 << 62, 1),
            "embed_dim must be at most 536870912, got 4611686018427387904",
        ),
        (lambda x: AttentionPooling(8, score="cosine"), "score must be 'dot' or 'additive'"),
        (lambda x: AttentionPooling(8)(x[0]), "x must have 3 dimensions and 8 features"),
        (lambda x: AttentionPooling(8)(x, mask=x > 0), "mask must be bool"),
        (lambda x: AdditiveAttention(4, 8, 4)(x, x), "query must have 3 dimensions and 4 features"),
        (lambda x: CrossModalAttention(8, 8, 8)(x, x[:1]), "b must have a's batch size 2, got 1"),
        (lambda x: HierarchicalAttention(8)(x, None, None), "words must have 2 dimensions"),
    ],
)
def test_bad_input(make, message):
    """A traceback from the depth of torch instead of argument, rule and value."""
    with pytest.raises(ValueError, match=message):
        make(torch.randn(2, 5, 8))


def test_names():
    """A module that `attn_ext.nn` does not offer."""
    for name in attn_ext.nn.__all__:
        assert hasattr(attn_ext.nn, name)
