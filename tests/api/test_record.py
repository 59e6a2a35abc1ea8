"""inspect.record: what is seen, its numbers against the N x N way, flags."""

import pytest
import torch
import torch.nn.functional as F
from closeness import ONE_SUM, assert_close
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import attn_ext
from attn_ext import inspect


class Two(nn.Module):
    """Two layers, the second by torch's own function."""

    def __init__(self):
        super().__init__()
        self.first = attn_ext.nn.MultiheadAttention(16, 2, batch_first=True)
        self.second = nn.Linear(16, 48)

    def forward(self, x):
        x = x + self.first(x, x, x, need_weights=False)[0]
        q, k, v = self.second(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_every_call_is_seen():
    """Calls of replace_sdpa or of a module that are missed; wrong names; hooks left behind."""
    model, x = Two(), torch.randn(1, 10, 16)
    with inspect.record(model) as seen, attn_ext.replace_sdpa():
        model(x)
        attn_ext.attention(*(torch.randn(1, 2, 5, 8),) * 3)
    assert [c.name for c in seen.calls] == ["first", "", ""]
    assert [c.shape[3] for c in seen.calls] == [10, 10, 5]
    for call in seen.calls:
        assert call.entropy.shape == (1, 2, call.shape[3])
        torch.testing.assert_close(
            call.column_mass.sum(-1), torch.full((1, 2), call.shape[3] / 1.0)
        )
    assert "first" in seen.summary()
    model(x)
    assert len(seen.calls) == 3


def test_statistics_are_the_calls():
    """Statistics of other options than the call's."""
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    options = {"causal": True, "softcap": 2.0, "sink": torch.randn(4)}
    with inspect.record(statistics=("entropy", "top_k"), top_k=3) as seen:
        _, stats = attn_ext.attention(q, k, v, return_stats=True, **options)
    (call,) = seen.calls
    torch.testing.assert_close(call.entropy, stats.entropy)
    want = inspect.top_k(q, k, 3, **options)
    torch.testing.assert_close(call.top_weights, want.weights)
    assert call.column_mass is None and call.pooled_map is None


def test_varlen_and_decode():
    """Sequences of a packed call mixed up, unused cache rows that count as keys."""
    q = torch.randn(11, 2, 8)
    cu = torch.tensor([0, 4, 4, 11], dtype=torch.int32)
    with inspect.record() as seen:
        attn_ext.attention_varlen(q, q, q, cu, cu, causal=True)
        cache = torch.randn(2, 2, 16, 8)
        lengths = torch.tensor([5, 9], dtype=torch.int32)
        attn_ext.attention_decode(torch.randn(2, 2, 1, 8), cache, cache, lengths)
    assert [(c.sequence, c.shape[4]) for c in seen.calls] == [(0, 4), (2, 7), (0, 5), (1, 9)]
    part = q[4:].transpose(0, 1)[None]
    want = inspect.row_stats(part, part, causal=True).entropy
    torch.testing.assert_close(seen.calls[1].entropy, want)


def test_flags():
    """A collapsed head or a sink that is not named; healthy heads that are."""
    q = torch.randn(1, 3, 32, 8)
    k = torch.randn(1, 3, 32, 8)
    q[:, 1] = k[:, 1] = torch.eye(32)[:, :8] * 0
    q[:, 1, torch.arange(32), torch.arange(32) % 8] = 90.0
    k[:, 1, torch.arange(8), torch.arange(8)] = 90.0  # each query finds exactly one key
    q[:, 2], k[:, 2] = 1.0, 0.0
    k[:, 2, 5] = 2.0  # every query finds key 5
    with inspect.record() as seen:
        attn_ext.attention(q, k, k)
    (call,) = seen.calls
    assert call.collapsed == [1]
    assert [(h, j) for h, j, _ in call.sinks] == [(2, 5)]
    assert "head 1 collapsed" in seen.summary() and "key 5 has" in seen.summary()
    with inspect.record() as seen:
        attn_ext.attention(q, k, k, mask=torch.tensor(False))
    assert seen.calls[0].collapsed == [], "a head that sees no key has no entropy to lose"


def test_additive_and_sigmoid_calls():
    """Calls of the family that are not seen, or seen as softmax over dot products."""
    q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 12, 8)
    w = torch.randn(4, 8)
    with inspect.record(top_k=3, pooled=4) as seen:
        attn_ext.additive_attention(q, k, k, w, mask=torch.arange(12) < 10, dropout_p=0.3)
        attn_ext.attention(q, k, k, normalizer="sigmoid", sigmoid_bias=-1.0)
    additive, sigmoid = seen.calls
    assert (additive.kind, sigmoid.kind) == ("additive", "sigmoid")
    keys = k.repeat_interleave(2, dim=1)
    s = (torch.tanh(q.unsqueeze(3) + keys.unsqueeze(2)) * w[:, None, None]).sum(-1)
    s[..., 10:] = -torch.inf
    for call, p in (
        (additive, s.softmax(-1)),
        (sigmoid, torch.sigmoid(q @ keys.transpose(-1, -2) / 8**0.5 - 1)),
    ):
        share = p / p.sum(-1, keepdim=True)
        torch.testing.assert_close(call.entropy, torch.special.entr(share).sum(-1))
        torch.testing.assert_close(call.column_mass, p.sum(2))
        torch.testing.assert_close(call.top_weights, p.topk(3).values)
        torch.testing.assert_close(call.pooled_map, F.adaptive_avg_pool2d(p, (4, 4)))
    torch.testing.assert_close(additive.lse, s.logsumexp(-1))
    torch.testing.assert_close(additive.max_logit, s.amax(-1))
    assert "additive" in seen.summary() and "sigmoid" in seen.summary()


def test_packed_additive_calls_sequence_by_sequence():
    """`HierarchicalAttention`, whose levels are packed, is not seen, or by the whole buffer."""
    model = attn_ext.nn.AttentionPooling(8, 2, score="additive")
    cu = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    with inspect.record(model) as seen:
        model(torch.randn(12, 8), cu_seqlens=cu, max_seqlen=7)
    assert [(c.kind, c.sequence, c.shape[4]) for c in seen.calls] == [
        ("additive", 0, 5), ("additive", 2, 7)
    ]  # fmt: skip


@pytest.mark.parametrize("with_sink", [False, True])
def test_numbers_are_those_of_the_whole_matrix(with_sink):
    """Rows that see no key in a mean, a row of -1e9 whose weights are all 1, a sink's share
    that is added up wrongly: every number of a record, and of the line that summary prints.
    """
    q, k = torch.randn(2, 4, 9, 8) * 2, torch.randn(2, 2, 13, 8)
    mask = torch.rand(2, 1, 9, 13) < 0.7
    mask[:, :, 4] = False
    bias = torch.zeros(4, 9, 13)
    bias[:, 6] = -1e9
    sink = torch.randn(4) if with_sink else torch.full((4,), -torch.inf)
    with inspect.record(top_k=5, pooled=4, sink_share=0.1, collapse_entropy=1.6) as seen:
        attn_ext.attention(q, k, k, causal="bottom_right", mask=mask, bias=bias,
                           sink=sink if with_sink else None)  # fmt: skip
    (call,) = seen.calls
    there = mask & (torch.arange(13) <= torch.arange(9)[:, None] + 4)
    s = q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 8**0.5 + bias  # float32: -1e9 eats s
    s = s.masked_fill(~there, -torch.inf).double()
    p = torch.cat((s, sink.double()[:, None, None].expand(2, 4, 9, 1)), -1).softmax(-1)[..., :13]
    p = p.nan_to_num()  # rows of -inf alone
    at_keys = p.mean(1).gather(-1, call.mean_top_keys.clamp_min(0))
    for got, want in (
        (call.top_weights, p.topk(5).values),
        (call.mean_top_weights, p.mean(1).topk(5).values),
        (call.weight_sum, p.sum(-1)),
        (call.column_mass, p.sum(2)),
        (call.pooled_map, F.adaptive_avg_pool2d(p, 4)),
        (call.entropy, torch.special.entr(p).sum(-1)),
        (call.mean_top_weights, torch.where(call.mean_top_keys < 0, 0.0, at_keys)),
    ):
        assert_close(got, want.float(), ONE_SUM)
    counted = there.expand(2, 4, 9, 13)
    assert torch.equal(call.keys_seen, counted.sum(-1))
    assert torch.equal(call.keys_seen_by_any, counted.any(1).sum(-1))
    assert (call.mean_top_keys[:, 4] == -1).all() and call.first_query == 4
    entropy, rows = torch.special.entr(p).sum(-1), counted.any(-1)
    assert_close(call.mean_entropy, float(entropy[rows].mean()), ONE_SUM)
    means = [float(entropy[:, h, 1:][rows[:, h, 1:]].mean()) for h in range(4)]
    assert call.collapsed == [h for h in range(4) if means[h] < 1.6] != []
    shares = p.sum((0, 2)) / p.sum((0, 2, 3)).unsqueeze(-1)
    assert (
        [(h, j) for h, j, _ in call.sinks]
        == [(h, int(x.argmax())) for h, x in enumerate(shares) if x.max() > 0.1]
        != []
    )
    for h, j, share in call.sinks:
        assert_close(share, float(shares[h, j]), ONE_SUM)
    line = seen.summary().splitlines()[1]
    assert f"{float(entropy[rows].mean()):.3f}" in line and f"{float(s.max()):.2f}" in line


def test_calls_without_values_are_passed_over():
    """A kernel that is given the address of a fake tensor: the process ends."""
    q = torch.randn(1, 2, 5, 8)
    with inspect.record() as seen:
        torch.vmap(attn_ext.attention)(q[None], q[None], q[None])
        attn_ext.attention(*(q.to("meta"),) * 3)
        with FakeTensorMode() as mode:
            attn_ext.attention(*(mode.from_tensor(q),) * 3)
        assert attn_ext.attention(q, q, q).shape == q.shape
    assert len(seen.calls) == 1


def test_gradients_and_results_are_untouched():
    """A recording that changes what the model computes."""
    q = torch.randn(1, 2, 9, 8, requires_grad=True)
    plain = torch.autograd.grad(attn_ext.attention(q, q, q).square().sum(), q)[0]
    with inspect.record():
        seen = torch.autograd.grad(attn_ext.attention(q, q, q).square().sum(), q)[0]
    assert torch.equal(plain, seen)


def test_an_exception_leaves_no_hook():
    """Observers and hooks that stay after a failed forward pass."""
    model = Two()
    with pytest.raises(ValueError), inspect.record(model):
        model(torch.randn(1, 4, 5))
    assert not attn_ext.ops.route.observers
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: inspect.record(3), TypeError, "model must be a torch.nn.Module, got int"),
        (lambda: inspect.record(None, ("mass",)), ValueError, "statistics must be some of"),
        (lambda: inspect.record(None, top_k=0), ValueError, "top_k must be at least 1, got 0"),
        (lambda: inspect.record(None, "entropy"), TypeError, "statistics must be a list of names"),
        (lambda: inspect.record(None, 3), TypeError, "statistics must be a list of names, got 3"),
    ],
)
def test_bad_input(make, error, message):
    """A traceback from the depth instead of argument, rule and value."""
    with pytest.raises(error, match=message):
        make()
