"""inspect.record and inspect.look: what is seen, flags, the files, and the page in a browser."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

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
    assert not attn_ext.ops.observers
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


TOKENS = ["the", "<!--<script>", "</script>", "sat", "$\\frac{$"]  # not LaTeX, not HTML


@pytest.fixture
def page(tmp_path):
    """The files of a small recording, by way of record.save."""
    with inspect.record() as seen:
        q = torch.randn(2, 2, 5, 8) * 2
        attn_ext.attention(q, q, q, causal=True)
        attn_ext.attention(q, q.flip(2), q)
    seen.save(tmp_path / "seen.pt")
    picture, page = inspect.look(tmp_path / "seen.pt", tmp_path, tokens=TOKENS, title="a <test>")
    return seen, picture, page


def test_look(page):
    """Weights that are not the call's; tokens that break out of the page; an empty picture."""
    seen, picture, path = page
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 5000
    text = path.read_text(encoding="utf-8")
    assert "a &lt;test&gt;" in text and text.count("</script>") == text.count("<script>") == 1
    assert "<!--" not in text
    assert not re.search(r"(src|href)=|https?://", text)  # self-contained
    data = json.loads(re.search(r"const data = (.*);\n", text)[1])
    layer = data["layers"][0]
    assert layer["keys"] == TOKENS and len(layer["heads"]) == 2
    row = dict(layer["heads"][1][0][3])  # example 1, head 0, query 3
    want = seen.calls[0]
    for key, weight in zip(want.top_keys[1, 0, 3], want.top_weights[1, 0, 3], strict=True):
        if key >= 0:
            assert abs(row[int(key)] - float(weight)) < 1e-5


BROWSER = next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None
)


@pytest.mark.skipif(BROWSER is None, reason="no headless Chromium: apt-get install chromium")
def test_page_in_a_browser(page):
    """A page whose script fails: no tokens, or no weights when one points at a token."""
    seen, _, path = page
    hover = """<script>document.querySelector('#queries span[data-i="3"]').dispatchEvent(
      new MouseEvent("mouseenter"));</script>"""
    path.write_text(path.read_text().replace("</body>", hover + "</body>"))
    url = path.as_uri() + "#layer=0&head=1&example=0"
    command = [BROWSER, "--no-sandbox", "--headless", "--disable-gpu", "--dump-dom", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    keys = re.search(r'<div id="keys">(.*?)</div>', done.stdout, re.S)[1]
    shown = [float(w) for w in re.findall(r'data-w="([\d.]+)"', keys)]
    p = inspect.TopK(seen.calls[0].top_weights, seen.calls[0].top_keys)
    want = torch.zeros(5)
    want[p.keys[0, 1, 3].clamp_min(0)] += p.weights[0, 1, 3]
    torch.testing.assert_close(torch.tensor(shown), want, atol=1e-4, rtol=0)
    assert "sat  →  " in done.stdout


def test_look_command(page, tmp_path):
    """A command that fails on what record.save wrote; a traceback for another file."""
    command = [sys.executable, "-m", "attn_ext.cli", "look"]
    given = [str(tmp_path / "seen.pt"), "--tokens", "a b c d e", "--out", str(tmp_path / "more")]
    done = subprocess.run([*command, *given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"keys": ["a", "b"' in (tmp_path / "more" / "attention.html").read_text()
    (tmp_path / "other.pt").write_text("no record")
    done = subprocess.run([*command, str(tmp_path / "other.pt")], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "FILE must be written by" in done.stderr


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: inspect.record(3), TypeError, "model must be a torch.nn.Module, got int"),
        (lambda p: inspect.record(None, ("mass",)), ValueError, "statistics must be some of"),
        (lambda p: inspect.record(None, top_k=0), ValueError, "top_k must be at least 1, got 0"),
        (lambda p: inspect.look([], p), ValueError, "records must hold a call with"),
    ],
)
def test_bad_input(make, error, message, tmp_path):
    """A traceback from the depth instead of argument, rule and value."""
    with pytest.raises(error, match=message):
        make(tmp_path)
