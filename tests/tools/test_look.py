"""inspect.look: every number of the page and the picture against the N x N way, tokens, what is
left out, and the page in a browser.
"""

import importlib
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from closeness import ONE_SUM, PAGE, PAGE_ROW, assert_close

import attn_ext
from attn_ext import inspect
from attn_ext.cli.main import main

pictures = importlib.import_module("attn_ext.inspect.look")  # the name is the function's
BROWSER = next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None
)
in_a_browser = pytest.mark.skipif(
    BROWSER is None, reason="no headless Chromium: apt-get install chromium"
)
TOKENS = ["the", "<!--<script>", "</script>", "sat", "$\\frac{$"]  # not LaTeX, not HTML


def recorded(length=41, **options):
    """A recording of a softmax call with a mask, a sink and shared keys, of an additive and a
    sigmoid one, and of two packed sequences; with their P in float64 [B, Hq, Sq, Sk].
    """
    q, k = torch.randn(2, 4, length, 8), torch.randn(2, 2, length, 8)
    mask, sink, w = torch.rand(2, 4, length, length) < 0.9, torch.randn(4), torch.randn(4, 8)
    mask[:, 1, 3], mask[1, :, 5] = False, False  # no key for a head of query 3, for query 5
    cu = torch.tensor([0, length, length + 3], dtype=torch.int32)
    packed = torch.randn(length + 3, 2, 8)
    with inspect.record(**options) as seen:
        attn_ext.attention(q, k, k, causal=True, mask=mask, sink=sink)
        attn_ext.additive_attention(q, k, k, w)
        attn_ext.attention(q, k, k, normalizer="sigmoid", sigmoid_bias=-2.0)
        attn_ext.attention_varlen(packed, packed, packed, cu, cu)
    q, keys, w = q.double(), k.repeat_interleave(2, 1).double(), w.double()
    dots = q @ keys.transpose(-1, -2) / 8**0.5
    lower = mask & torch.ones(length, length, dtype=torch.bool).tril()
    column = sink.double()[:, None, None].expand(2, 4, length, 1)
    masked = torch.cat((dots.masked_fill(~lower, -torch.inf), column), -1)
    sums = (torch.tanh(q.unsqueeze(3) + keys.unsqueeze(2)) * w[:, None, None]).sum(-1)
    truths = [masked.softmax(-1)[..., :-1], sums.softmax(-1), torch.sigmoid(dots - 2)]
    for part in (packed[:length], packed[length:]):
        x = part.double().transpose(0, 1)[None]
        truths.append((x @ x.transpose(-1, -2) / 8**0.5).softmax(-1))
    seen_keys = [lower, *(torch.ones_like(p, dtype=torch.bool) for p in truths[1:])]
    return seen, truths, seen_keys


def data_of(path) -> dict:
    return json.loads(re.search(r"const data = (.*);\n", path.read_text(encoding="utf-8"))[1])


def check_row(row, p, there, listed):
    """A row of the page against its weights p [Sk] and the keys that it sees."""
    pairs, more, rest = row
    want = p.topk(min(listed, len(p)))
    shown = [w for _, w in pairs]
    assert shown == sorted(shown, reverse=True) and len({j for j, _ in pairs}) == len(pairs)
    padded = F.pad(torch.tensor(shown), (0, len(want.values) - len(shown)))
    assert_close(padded, want.values.float(), PAGE)
    for j, w in pairs:
        assert there[j]
        assert_close(w, float(p[j]), PAGE)
    assert len(pairs) + more == int(there.sum())
    assert_close(sum(shown) + rest, float(p.sum()), PAGE_ROW)  # the row is whole


def test_every_number_of_the_page(tmp_path):
    """A mean over heads that is made of lists which end at 16 keys, keys left out in silence, a
    sink's share, heads or examples mixed up: for each row of each call.
    """
    seen, truths, there = recorded(length=21)
    _, path = inspect.look(seen, tmp_path)
    layers = data_of(path)["layers"]
    assert [layer["name"] for layer in layers] == [
        "0", "1 (additive)", "2 (sigmoid)", "3 [0]", "3 [1]"
    ]  # fmt: skip
    for layer, p, keys in zip(layers, truths, there, strict=True):
        assert len(layer["queries"]) == p.shape[2] and len(layer["keys"]) == p.shape[3]
        for b in range(len(p)):
            for i in range(p.shape[2]):
                check_row(layer["mean"][b][i], p[b, :, i].mean(0), keys[b, :, i].any(0), 16)
                for h in range(p.shape[1]):
                    check_row(layer["heads"][b][h][i], p[b, h, i], keys[b, h, i], 16)


def test_rows_of_nan_and_of_no_key(tmp_path):
    """A page that is no JSON, or shows 0 % where there is no number."""
    q = torch.randn(1, 1, 4, 8)
    q[:, :, 2] = torch.nan
    with inspect.record() as seen:
        attn_ext.attention(q, torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8),
                           mask=torch.tensor([True, False, True, True])[:, None])  # fmt: skip
    _, path = inspect.look(seen, tmp_path)
    rows = data_of(path)["layers"][0]["mean"][0]
    assert rows[1] == [[], 0, 0.0] and rows[2] == [[], 4, None]
    assert "nan" in seen.summary()


def test_every_map_of_the_picture(monkeypatch, tmp_path):
    """Positions of pooled cells, a mean that is not said, examples and calls left out unsaid."""
    seen, truths, _ = recorded(pooled=7)
    drawn, said = pictures.panels_of(seen.calls, [("q", "k")] * 5)
    for (_, image, _), p in zip(drawn, truths, strict=True):
        want = F.adaptive_avg_pool2d(p[:1], tuple(image.shape))[0].mean(0)
        assert_close(image, want.float(), ONE_SUM)
    assert [name for name, *_ in drawn][:2] == [
        "0, mean of 4 heads",
        "1 (additive), mean of 4 heads",
    ]
    assert said == ", example 0 of 2"
    monkeypatch.setattr(pictures, "MAX_PANELS", 3)
    assert pictures.panels_of(seen.calls, [("q", "k")] * 5)[1].endswith("; 2 calls more not shown")
    drawn, said = pictures.panels_of(seen.calls[:1], [("q", "k")])
    assert [name for name, *_ in drawn] == ["head 0", "head 1", "head 2"]
    assert torch.equal(drawn[2][1], seen.calls[0].pooled_map[0, 2])
    assert said == ", example 0 of 2; 1 head more not shown"
    figures = []
    monkeypatch.setattr("matplotlib.pyplot.close", figures.append)
    inspect.look(seen.calls[:1], tmp_path, title="$\\frac{$")
    axis = figures[0].axes[0]
    assert axis.images[0].get_extent() == [-0.5, 40.5, 40.5, -0.5]  # positions, not cells
    assert figures[0].get_suptitle().startswith("$\\frac{$: mean weight of each cell, example 0")


def test_tokens(tmp_path):
    """A number of tokens that does not fit, in silence; queries named as other keys."""
    q, k = torch.randn(1, 2, 2, 8), torch.randn(1, 2, 5, 8)
    with inspect.record() as seen:
        attn_ext.attention(q, k, k)
        attn_ext.attention(q, k, k, causal="bottom_right")
        attn_ext.attention(k, k, k)
    words = ["a", "b", "c", "d", "e"]

    def labels(index, **options):
        layer = data_of(inspect.look(seen.calls[index : index + 1], tmp_path, **options)[1])
        return layer["layers"][0]["queries"], layer["layers"][0]["keys"]

    assert labels(0) == (["0", "1"], ["0", "1", "2", "3", "4"])
    assert labels(1) == (["3", "4"], ["0", "1", "2", "3", "4"])
    assert labels(0, tokens=words) == (["0", "1"], words)
    assert labels(1, tokens=words) == (["d", "e"], words)
    assert labels(2, tokens=tuple(words)) == (words, words)
    assert labels(0, tokens=words, query_tokens=["x", "y"]) == (["x", "y"], words)

    class Encoding:  # transformers' BatchEncoding has a method, tokenizers' Encoding a list
        def tokens(self):
            return words

    assert labels(2, tokens=Encoding())[1] == words
    (tmp_path / "words.json").write_text(json.dumps(words))
    assert labels(2, tokens=tmp_path / "words.json")[1] == words
    (tmp_path / "words.json").write_text("no json")
    for options, error, message in (
        ({"tokens": words[:4]}, ValueError,
         "tokens must be as many as the 5 keys of call '2', got 4:"),
        ({"query_tokens": ["x"]}, ValueError, "query_tokens must be as many as the 5 queries"),
        ({"tokens": "abcde"}, TypeError, "tokens must be a list of strings, .* got str 'abcde'"),
        ({"tokens": 5}, TypeError, "tokens must be a list of strings, .* got int 5"),
        ({"tokens": {"a": 1}}, TypeError, "tokens must be a list of strings"),
        ({"tokens": tmp_path / "words.json"}, ValueError, "tokens must be a JSON file of a list"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            labels(2, **options)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: inspect.look([], p), ValueError, "must hold a call, got none: run the model in"),
        (lambda p: inspect.look(inspect.record(), p), ValueError, "must hold a call, got none"),
        (lambda p: inspect.look(None, p), TypeError, "records must be an attn_ext.inspect.record"),
        (lambda p: inspect.look([3], p), TypeError, "records must be .* got list"),
        (lambda p: inspect.look([inspect.CallRecord("", 0, None, (1,) * 6)], p), ValueError,
         "records must hold a call with the statistics top_k and pooled_map, got 1 without"),
        (lambda p: inspect.look([], 3), TypeError, "out must be the path of a folder, got int 3"),
        (lambda p: inspect.look([], p, title=3), TypeError, "title must be a str, got int 3"),
        (lambda p: inspect.load(3), TypeError, "path must be the path of a file, got int 3"),
    ],
)  # fmt: skip
def test_bad_input(make, error, message, tmp_path):
    """A traceback from the depth instead of argument, rule and value."""
    with pytest.raises(error, match=message):
        make(tmp_path)


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


def test_files(page):
    """Tokens that break out of the page; an empty picture; something loaded from elsewhere."""
    _, picture, path = page
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 5000
    text = path.read_text(encoding="utf-8")
    assert "a &lt;test&gt;" in text and text.count("</script>") == text.count("<script>") == 1
    assert "<!--" not in text
    assert not re.search(r"(src|href)=|https?://", text)  # self-contained
    assert data_of(path)["layers"][0]["keys"] == TOKENS


def shown(path, token: int, place: str) -> tuple[dict, str, str]:
    """What the page shows at `place` when one points at a token: weights by key, the words, all."""
    watch = "<script>window.onerror = e => { document.title = 'failed: ' + e; };</script>"
    hover = f"""<script>document.querySelector('#queries span[data-i="{token}"]').dispatchEvent(
      new MouseEvent("mouseenter"));</script>"""
    pointed = path.with_name("pointed.html")
    text = path.read_text("utf-8").replace("</head>", watch + "</head>")
    pointed.write_text(text.replace("</body>", hover + "</body>"), "utf-8")
    url = f"{pointed.as_uri()}#{place}"
    command = [BROWSER, "--no-sandbox", "--headless", "--disable-gpu", "--dump-dom", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "<title>failed: " not in done.stdout
    keys = re.search(r'<div id="keys">(.*?)</div>', done.stdout, re.S)[1]
    weights = {}
    for span in re.findall(r"<span [^>]*>", keys):
        if found := re.search(r'data-w="([\d.e-]+)"', span):
            weights[int(re.search(r'data-i="(\d+)"', span)[1])] = float(found[1])
    words = re.search(r'<p id="detail"[^>]*>(.*?)</p>', done.stdout, re.S)[1]
    return weights, words, done.stdout


@in_a_browser
def test_page_in_a_browser(page):
    """A page whose script fails: no tokens, or no weights when one points at a token."""
    seen, _, path = page
    weights, words, _ = shown(path, 3, "layer=0&head=1&example=0")
    best = zip(seen.calls[0].top_keys[0, 1, 3], seen.calls[0].top_weights[0, 1, 3], strict=True)
    want = {int(j): float(w) for j, w in best if j >= 0 and w >= 5e-6}
    assert weights == pytest.approx(want, abs=1e-5)
    assert words.startswith("sat (3)  →  ")


@in_a_browser
def test_a_mean_in_a_browser(tmp_path):
    """The first thing that is shown: 41 keys, of which the page lists 16, in the mean's order."""
    seen, truths, there = recorded()
    _, path = inspect.look(seen, tmp_path)
    for place, p, keys in (
        ("", truths[0][0], there[0][0]),
        ("layer=3&x=1&head=9", truths[3][0], None),
    ):
        weights, words, _ = shown(path, 40, place)
        mean = p[:, 40].mean(0)
        keys = torch.ones(41, dtype=torch.bool) if keys is None else keys[:, 40].any(0)
        best = mean.topk(16)
        assert weights == pytest.approx(
            dict(zip(best.indices.tolist(), best.values.tolist(), strict=True)), abs=2e-5
        )
        listed = re.findall(r"(\d+) \((\d+)\) ([\d.]+) %", words.split("→")[1])
        assert [int(j) for j, _, _ in listed] == best.indices.tolist()
        assert [w for *_, w in listed] == [f"{100 * w:.1f}" for w in best.values.tolist()]
        more, rest = re.search(r"and (\d+) keys more, ([\d.]+) %", words).groups()
        assert int(more) == int(keys.sum()) - 16
        assert abs(float(rest) - 100 * float(mean.sum() - best.values.sum())) < 0.06
        none = re.search(r"to no key ([\d.]+) %", words)
        assert abs((float(none[1]) if none else 0.0) - 100 * (1 - float(mean.sum()))) < 0.06


@in_a_browser
@pytest.mark.parametrize("place", ["layer=9&head=7&example=-4&token=99", "layer=x&head=&token=NaN"])
def test_a_link_to_what_is_not_there(page, place):
    """A page that stays empty because its address names a layer that it has not."""
    weights, words, whole = shown(page[2], 0, place)
    assert (
        weights and words.startswith("the (0)") and "undefined" not in whole.split("</script>")[1]
    )


@in_a_browser
def test_sigmoid_in_a_browser(tmp_path):
    """Percentages of weights that do not sum to 1; tokens of white space that nobody sees."""
    seen, truths, _ = recorded(length=6)
    tokens = ["", " ", "\n", "\t", "a b", "x"]
    _, path = inspect.look(seen.calls[2:3], tmp_path, tokens=tokens)
    _, words, whole = shown(path, 4, "")
    best = truths[2][0, :, 4].mean(0).topk(6)
    visible = ["∅", "␣", "⏎", "⇥", "a b", "x"]
    assert words == "a b (4)  →  " + " · ".join(
        f"{visible[j]} ({j}) {w:.4f}" for w, j in zip(*(x.tolist() for x in best), strict=True)
    )
    assert "Sigmoid weights need not sum to 1" in whole


def test_look_command(page, tmp_path, capsys):
    """A command that fails on what record.save wrote; a traceback for another file; tokens that do
    not fit, in silence."""
    words = tmp_path / "words.json"
    words.write_text('["a", "b c", "d", "e", "f"]')
    seen, more = str(tmp_path / "seen.pt"), tmp_path / "more"
    for tokens, second in (("a b c d e", "b"), (str(words), "b c")):
        assert main(["look", seen, "--tokens", tokens, "--out", str(more)]) == 0
        assert data_of(more / "attention.html")["layers"][0]["keys"][1] == second
    for tokens, message in (
        ("a b", "tokens must be as many as the 5 keys of call '0', got 2"),
        ("none.json", "No such file or directory: 'none.json'"),
    ):
        assert main(["look", seen, "--tokens", tokens, "--out", str(more)]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    (tmp_path / "other.pt").write_text("no record")
    command = [sys.executable, "-m", "attn_ext.cli", "look", str(tmp_path / "other.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "FILE must be written by" in done.stderr
