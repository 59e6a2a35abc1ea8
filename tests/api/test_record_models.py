"""inspect.record of whole models: Q and K that are kept, statistics for a loss, heads switched off,
tables, and what it says where nothing was seen.
"""

import csv
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from closeness import FLOAT32, ONE_SUM, assert_close, assert_same
from torch import nn

import attn_ext
from attn_ext import inspect


class Layer(nn.Module):
    def __init__(self, width=16, heads=2):
        super().__init__()
        self.into, self.out, self.heads = (
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
            heads,
        )

    def forward(self, x):
        q, k, v = self.into(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(out.transpose(1, 2).flatten(2))


def model(layers=2):
    torch.manual_seed(0)
    return nn.Sequential(*(Layer() for _ in range(layers)))


def run(net, x, **options):
    with inspect.record(net, **options) as seen, attn_ext.replace_sdpa():
        out = net(x)
    return seen, out


def by_hand(net, x, without=()):
    """(output, P [layers] [B, H, S, S]) by the N x N way; heads (layer, head) without output."""
    maps = []
    for at, layer in enumerate(net):
        q, k, v = layer.into(x).unflatten(-1, (3, layer.heads, -1)).permute(2, 0, 3, 1, 4)
        s = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(
            ~torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(), -torch.inf
        )
        maps.append(s.softmax(-1))
        out = maps[-1] @ v
        for _, head in (pair for pair in without if pair[0] == at):
            out = torch.where(torch.arange(layer.heads)[:, None, None] == head, 0.0, out)
        x = x + layer.out(out.transpose(1, 2).flatten(2))
    return x, maps


def test_kept_q_and_k_give_statistics_and_rollout():
    """Options of another call, layers in the wrong order, copies that are not the call's."""
    net, x = model(3), torch.randn(2, 7, 16)
    seen, _ = run(net, x, keep="qk")
    with torch.no_grad():
        _, maps = by_hand(net, x)
        for call, p in zip(seen.calls, maps, strict=True):
            q, k, options = call.layer
            entropy = inspect.row_stats(q, k, **options).entropy
            assert_close(entropy, torch.special.entr(p).sum(-1), FLOAT32)
        want = torch.eye(7).expand(2, 7, 7)
        for p in maps:
            want = (0.5 * torch.eye(7) + 0.5 * p.mean(1)) @ want
        assert_close(inspect.rollout(seen.layers(), rows=slice(None)), want, FLOAT32)


def test_gradients_with_respect_to_kept_q_and_k():
    """Detached copies, through which no gradient comes."""
    net, x = model(), torch.randn(1, 5, 16)
    seen, out = run(net, x, keep="qk")
    got = torch.autograd.grad(out.square().sum(), [c.q for c in seen.calls])
    want_q = []

    def keep(module, args, output):
        q, k, v = output.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        want_q.append(q)
        return torch.stack((q, k, v)).permute(1, 3, 0, 2, 4).flatten(2)

    hooks = [layer.into.register_forward_hook(keep) for layer in net]
    plain, _ = by_hand(net, x)
    for hook in hooks:
        hook.remove()
    for g, w in zip(got, torch.autograd.grad(plain.square().sum(), want_q), strict=True):
        assert_close(g, w, FLOAT32)


def test_gradients_with_respect_to_copies_that_a_call_made():
    """Kept tensors that the call did not compute with, where it copied q for its strides."""
    q, k, v = (torch.randn(1, 2, 8, 5, requires_grad=True) for _ in range(3))
    with inspect.record(keep="qk") as seen:
        out = attn_ext.attention(q.mT, k.mT, v.mT)
    got = torch.autograd.grad(out.square().sum(), (seen.calls[0].q, q), retain_graph=True)
    assert_same(got[0].mT, got[1])


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"causal": "top_left", "window": (3, None)},
        {"causal": "bottom_right", "window": (2, None)},
        {"window": (2, 1)},
        {"softcap": 2.0, "scale": 0.3, "sink": torch.tensor([0.5, -1.0, 0.0, 2.0])},
        {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0]), "mask": torch.rand(9, 9) < 0.8},
        {"bias": torch.randn(4, 9, 9)},
    ],
    ids=lambda o: ",".join(o),
)
def test_options_of_a_kept_call(options):
    """A window or an alignment that comes back as another one."""
    seqlen_q = 6 if "causal" in options and options["causal"] is not True else 9
    q, k = torch.randn(2, 4, seqlen_q, 8), torch.randn(2, 2, 9, 8)
    with inspect.record(keep="qk") as seen:
        _, want = attn_ext.attention(q, k, k, return_stats=True, **options)
    q2, k2, found = seen.calls[0].layer
    assert q2 is q and k2 is k
    got = inspect.row_stats(q2, k2, **found)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, ONE_SUM)


def test_statistics_for_a_loss():
    """Statistics whose graph is cut, or of other rows: their gradient by the N x N way."""
    net, x = model(), torch.randn(2, 6, 16)
    seen, _ = run(net, x, differentiable=True, statistics=("entropy", "max_logit"))
    loss = sum(c.entropy.mean() + 0.1 * c.max_logit.square().mean() for c in seen.calls)
    got = torch.autograd.grad(loss, [layer.into.weight for layer in net])
    want = 0.0
    y = x
    for layer in net:
        q, k, _ = layer.into(y).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        lower = torch.ones(6, 6, dtype=torch.bool).tril()
        s = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~lower, -torch.inf)
        want = want - s.softmax(-1).xlogy(s.softmax(-1).clamp_min(1e-30)).sum(-1).mean()
        want = want + 0.1 * s.amax(-1).square().mean()
        y = layer(y)
    assert_close(loss, want, FLOAT32)
    for g, w in zip(got, torch.autograd.grad(want, [m.into.weight for m in net]), strict=True):
        assert_close(g, w, FLOAT32)
    with torch.no_grad():
        assert not run(net, x, differentiable=True)[0].calls[0].entropy.requires_grad
    assert "0" in seen.summary()  # of tensors with a graph


def test_statistics_for_a_loss_of_packed_sequences():
    """A graph that ends at the cut of the packed buffer."""
    q = torch.randn(9, 2, 8, requires_grad=True)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    with inspect.record(differentiable=True) as seen:
        attn_ext.attention_varlen(q, q, q, cu, cu)
    (got,) = torch.autograd.grad(sum(c.lse.sum() for c in seen.calls), q)
    parts = [x.transpose(0, 1) for x in (q[:4], q[4:])]
    total = sum((x @ x.transpose(-1, -2) / 8**0.5).logsumexp(-1).sum() for x in parts)
    assert_close(got, torch.autograd.grad(total, q)[0], FLOAT32)


@pytest.mark.parametrize("ablate", [{"0": [1]}, {1: 0}, {"0": [0, 1], "1": [1]}], ids=str)
def test_ablation(ablate):
    """A head that still speaks, another one that is silent, another layer's, a wrong gradient."""
    net, x = model(), torch.randn(2, 5, 16)
    seen, out = run(net, x, ablate=ablate)
    pairs = [(int(at), h) for at, hs in ablate.items() for h in ([hs] if hs == 0 else hs)]
    want, _ = by_hand(net, x, pairs)
    assert_close(out, want, FLOAT32)
    weights = [p for layer in net for p in layer.parameters()]
    for g, w in zip(torch.autograd.grad(out.square().sum(), weights),
                    torch.autograd.grad(want.square().sum(), weights), strict=True):  # fmt: skip
        assert_close(g, w, FLOAT32)
    assert [(at, h) for at, c in enumerate(seen.calls) for h in c.ablated] == pairs
    assert f"head {pairs[0][1]} ablated" in seen.summary()
    assert_close(net(x), by_hand(net, x)[0], FLOAT32)  # nothing stays


def test_ablation_of_packed_sequences_and_lse():
    """Another dimension than the heads', and results beside O that change."""
    q, cu = torch.randn(9, 3, 8), torch.tensor([0, 4, 9], dtype=torch.int32)
    want, lse = attn_ext.attention_varlen(q, q, q, cu, cu, return_lse=True)
    with inspect.record(ablate={0: [2]}):
        got, same = attn_ext.attention_varlen(q, q, q, cu, cu, return_lse=True)
    assert torch.equal(got[:, :2], want[:, :2]) and torch.equal(same, lse)
    assert not got[:, 2].any()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: inspect.record(ablate=[3]), TypeError, "ablate must be a dict of heads"),
        (lambda: inspect.record(ablate={"0": [1]}), ValueError, "ablate needs a model to find '0'"),
        (lambda: inspect.record(model(), ablate={"7": [1]}), ValueError,
         "ablate must name modules of model, got '7'"),
        (lambda: inspect.record(ablate={1.5: [1]}), TypeError, "ablate must name modules or ind"),
        (lambda: inspect.record(ablate={0: "1"}), TypeError, "must give a list of heads for 0"),
        (lambda: inspect.record(ablate={0: [-1]}), ValueError, "a head of ablate must be at least"),
        (lambda: run(model(), torch.randn(1, 3, 16), ablate={"0": [2]}), ValueError,
         "ablate must name heads below the 2 of call 0 '0', got 2"),
        (lambda: run(model(), torch.randn(1, 3, 16), ablate={5: [0]}), RuntimeError,
         "of calls that are seen, got 5, and saw 2 calls: 0 0, 1 1"),
        (lambda: inspect.record(keep="v"), ValueError, "keep must be None or 'qk', got 'v'"),
        (lambda: inspect.record(differentiable=1), TypeError, "differentiable must be a bool"),
        (lambda: inspect.record(None, ["top_k"], differentiable=True), ValueError,
         "differentiable needs a statistic that has a gradient"),
        (lambda: run(model(), torch.randn(1, 3, 16))[0].layers(), ValueError,
         "call '0 0' must be recorded with keep='qk'"),
        (lambda: sigmoid(differentiable=True), NotImplementedError, "got call '0 .sigmoid.'"),
        (lambda: sigmoid(keep="qk").layers(), NotImplementedError, "use its q and k by themselves"),
        (lambda: run(model(), torch.randn(1, 3, 16))[0].to_csv("x", "rows"), ValueError,
         "what must be 'heads' or 'keys', got 'rows'"),
        (lambda: run(model(), torch.randn(1, 3, 16), statistics=["lse"])[0].to_csv("x", "keys"),
         ValueError, "what='keys' needs the statistic 'top_k'"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:replace_sdpa leaves")  # the error comes at the end of record
def test_bad_input(make, error, message):
    """A traceback from the depth instead of argument, rule and value."""
    with pytest.raises(error, match=message):
        make()


def sigmoid(**options):
    q = torch.randn(1, 2, 4, 8)
    with inspect.record(**options) as seen:
        attn_ext.attention(q, q, q, normalizer="sigmoid")
    return seen


def test_kept_tensors_in_a_file(tmp_path):
    """Tensors with a graph, which cannot be written; options that are lost."""
    net, x = model(), torch.randn(1, 5, 16)
    seen, _ = run(net, x, keep="qk", differentiable=True)
    seen.save(tmp_path / "seen.pt")
    for a, b in zip(inspect.load(tmp_path / "seen.pt"), seen.calls, strict=True):
        q, k, options = a.layer
        assert torch.equal(q, b.q) and torch.equal(k, b.k) and not q.requires_grad
        assert options == b.options and torch.equal(a.entropy, b.entropy)


def test_what_to_do_where_nothing_was_seen(tmp_path):
    """An empty table, and a person who does not know why."""
    net, x = model(), torch.randn(1, 5, 16)
    with inspect.record(net) as seen:
        net(x)  # without replace_sdpa
    assert "no call was seen: run the model in eager mode within `with" in seen.summary()
    with pytest.raises(
        ValueError, match=r"none: run the model in eager mode within .*replace_sdpa"
    ):
        inspect.look(seen, tmp_path)
    assert "replace_sdpa" in seen._repr_html_()
    with inspect.record(model()) as seen, attn_ext.replace_sdpa():
        net(x)
    assert [c.name for c in seen.calls] == ["", ""]
    assert "no module of the model that record was given ran, so calls" in seen.summary()
    compiled = torch.compile(net, backend="eager")
    with inspect.record(compiled) as seen:
        pass
    assert "no module of the model that record was given ran: call" in seen.why_nothing()
    assert "torch.compiler.set_stance('force_eager')" in seen.why_nothing()
    with inspect.record() as seen:
        attn_ext.attention(*(torch.randn(1, 2, 4, 8, device="meta"),) * 3)
    assert seen.why_nothing().startswith("1 calls were on tensors without values")


def test_tables(tmp_path, monkeypatch):
    """Rows of other heads, queries without keys, numbers that are not the matrix's."""
    net, x = model(), torch.randn(2, 5, 16)
    seen, _ = run(net, x, ablate={"1": [0]})
    frames = []
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=frames.append))
    seen.to_dataframe(), seen.to_dataframe("keys")
    with torch.no_grad():
        _, maps = by_hand(net, x)
    heads, keys = frames
    assert [(r["call"], r["example"], r["head"]) for r in heads] == [
        (c, b, h) for c in (0, 1) for b in (0, 1) for h in (0, 1)
    ]
    for row in heads:
        p = maps[row["call"]][row["example"], row["head"]]
        assert_close(row["mean_entropy"], float(torch.special.entr(p).sum(-1).mean()), FLOAT32)
        assert row["ablated"] == (row["name"] == "1" and row["head"] == 0)
    assert len(keys) == 2 * 2 * 2 * (1 + 2 + 3 + 4 + 5)
    for row in keys:
        p = maps[row["call"]][row["example"], row["head"], row["query"]]
        assert_close(row["weight"], float(p.sort(descending=True).values[row["rank"]]), ONE_SUM)
        assert_close(row["weight"], float(p[row["key"]]), ONE_SUM)
    for what, rows in (("heads", heads), ("keys", keys)):
        seen.to_csv(tmp_path / "table.csv", what)
        with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
            read = list(csv.DictReader(file))
        as_text = [{n: "" if v is None else str(v) for n, v in row.items()} for row in rows]
        assert read == as_text
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="to_dataframe needs pandas: pip install pandas, or"):
        seen.to_dataframe()
