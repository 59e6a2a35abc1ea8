"""inspect.look: every number that the page holds and the picture shows against the N x N way,
tokens, what is left out.  What a browser makes of the page: test_look_page.py.
"""

import json
import re
import subprocess
import sys

import numpy
import pytest
import torch
import torch.nn.functional as F
from closeness import ONE_SUM, assert_close
from look_pages import element, index_of, lists_of, names_of, recorded

import attn_ext
from attn_ext import inspect
from attn_ext.cli.main import main
from attn_ext.inspect import picture
from attn_ext.inspect.look import page_of
from attn_ext.inspect.tokens import readable, texts

TOKENS = ["the", "<!--<script>", "</script>", "sat", "$\\frac{$"]  # not LaTeX, not HTML


def check_row(weights, keys, total, seen, p, there):
    """A row of the page against its weights p [Sk] and the keys that it sees."""
    shown = min(len(weights), int(seen))
    assert seen == int(there.sum()) and len(set(keys[:shown].tolist())) == shown
    assert_close(torch.tensor(weights[:shown]), p.topk(shown).values.float(), ONE_SUM)
    for j, w in zip(keys[:shown].tolist(), weights.tolist(), strict=False):
        assert there[j]
        assert_close(w, float(p[j]), ONE_SUM)
    assert_close(float(total), float(p.sum()), ONE_SUM)


def test_every_number_of_the_page(tmp_path):
    """A mean over heads that is made of lists which end at 16 keys, a sink's share, heads or
    examples mixed up: for each row of each call.
    """
    seen, truths, there = recorded(length=21)
    path = tmp_path / "page.html"
    seen.page().save(path)
    layers = index_of(path)["layers"]
    assert [layer["name"] for layer in layers] == [
        "call 0", "call 1 (additive)", "call 2 (sigmoid)", "call 3 [0]", "call 3 [1]"
    ]  # fmt: skip
    for number, (p, seen_keys) in enumerate(zip(truths, there, strict=True)):
        assert (layers[number]["seqlenQ"], layers[number]["seqlenK"]) == p.shape[2:]
        p = torch.cat((p, p.mean(1, keepdim=True)), 1)
        seen_keys = torch.cat((seen_keys, seen_keys.any(1, keepdim=True)), 1)
        lists = lists_of(path, number)
        for place in numpy.ndindex(*p.shape[:3]):
            check_row(*(x[place] for x in lists), p[place], seen_keys[place])


def test_rows_of_nan_and_of_no_key(tmp_path):
    """A page that is no JSON, or shows 0 % where there is no number."""
    q = torch.randn(1, 1, 4, 8)
    q[:, :, 2] = torch.nan
    with inspect.record() as seen:
        attn_ext.attention(q, torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8),
                           mask=torch.tensor([True, False, True, True])[:, None])  # fmt: skip
    _, path = inspect.look(seen, tmp_path)
    _, _, total, there = lists_of(path, 0)
    assert there[0, 1].tolist() == [4, 0, 4, 4]
    assert total[0, 1, 1] == 0 and numpy.isnan(total[0, 1, 2])
    assert "nan" in seen.summary()


def test_more_keys_than_16_bits_name(tmp_path):
    """Key 65,536 that is shown as key 0."""
    q, k = torch.randn(1, 1, 1, 8), torch.zeros(1, 1, 65537, 8)
    k[0, 0, -1] = 100 * q[0, 0, 0]
    with inspect.record(top_k=2) as seen:
        attn_ext.attention(q, k, k)
    path = tmp_path / "page.html"
    seen.page().save(path)
    assert lists_of(path, 0)[1][0, 0, 0, 0] == 65536


def test_size_of_a_page(tmp_path):
    """A page of 4,096 tokens, 6 layers and 8 heads that no browser opens: 40 MB at most."""
    shape, rows = (1, 8, 8, 4096, 4096, 64), torch.rand(1, 8, 4096)
    lists = {"top_weights": torch.rand(1, 8, 4096, 16), "mean_top_weights": rows[0, :1, :, None]}
    lists["mean_top_weights"] = torch.rand(1, 4096, 16)
    lists |= {"top_keys": torch.randint(4096, (1, 8, 4096, 16)), "weight_sum": rows}
    lists |= {"mean_top_keys": torch.randint(4096, (1, 4096, 16)), "keys_seen": rows.long()}
    lists |= {"keys_seen_by_any": rows[:, 0].long(), "pooled_map": torch.rand(1, 8, 64, 64)}
    calls = [inspect.CallRecord(f"layers.{i}", i, None, shape, **lists) for i in range(6)]
    shown = page_of(calls, tokens=[f" token{i}" for i in range(4096)])
    assert len(shown.html.encode()) < 40e6


def test_every_map_of_the_picture(monkeypatch, tmp_path):
    """Positions of pooled cells, a mean that is not said, examples and calls left out unsaid,
    colours that are not by row."""
    seen, truths, _ = recorded(pooled=7)
    drawn, said = picture.panels_of(seen.calls, ["labels"] * 5)
    for (_, image, _), p in zip(drawn, truths, strict=True):
        want = F.adaptive_avg_pool2d(p[:1], tuple(image.shape))[0].mean(0).float()
        assert_close(image, want, ONE_SUM)
        by_row = want / want.amax(-1, keepdim=True)
        assert_close(picture.coloured(image, "row"), by_row, ONE_SUM)
        assert_close(picture.coloured(image, "linear"), want, ONE_SUM)
    assert [name for name, *_ in drawn][:2] == [
        "call 0\nmean over 4 heads",
        "call 1 (additive)\nmean over 4 heads",
    ]
    assert said == ", example 0 of 2"
    monkeypatch.setattr(picture, "MAX_PANELS", 3)
    assert picture.panels_of(seen.calls, ["labels"] * 5)[1].endswith("; 2 calls more not shown")
    drawn, said = picture.panels_of(seen.calls[:1], ["labels"])
    assert [name for name, *_ in drawn] == ["head 0", "head 1", "head 2"]
    assert torch.equal(drawn[2][1], seen.calls[0].pooled_map[0, 2])
    assert said == ", example 0 of 2; 1 head more not shown"
    figures = []
    monkeypatch.setattr("matplotlib.pyplot.close", figures.append)
    for colours, limits in (("row", (0, 1)), ("log", (1e-4, 1)), ("linear", None)):
        inspect.look(seen.calls[:1], tmp_path, title="$\\frac{$", colours=colours)
        axis = figures[-1].axes[0]
        assert axis.images[0].get_extent() == [-0.5, 40.5, 40.5, -0.5]  # positions, not cells
        assert axis.get_xlabel() == "key position" and axis.get_ylabel() == "query position"
        shown = picture.coloured(drawn[0][1], colours)
        tiny = torch.finfo(torch.float32).tiny
        got = torch.from_numpy(numpy.array(axis.images[0].get_array()))
        assert_close(got, shown.clamp_min(tiny if colours == "log" else 0), ONE_SUM)
        assert axis.images[0].colorbar is not None
        if limits is not None:
            assert axis.images[0].get_clim() == limits
        title = figures[-1].get_suptitle()
        assert title.startswith(f"$\\frac{{$\n{picture.SAID[colours]}, example 0 of 2")


def test_a_picture_without_matplotlib(monkeypatch, tmp_path):
    """No page, where only the picture needs a library that is not there."""
    seen, *_ = recorded(length=6)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="the picture of look needs matplotlib: pip install"):
        inspect.look(seen, tmp_path)
    assert index_of(tmp_path / "attention.html")["layers"]


def three_calls():
    q, k = torch.randn(1, 2, 2, 8), torch.randn(1, 2, 5, 8)
    with inspect.record() as seen:
        attn_ext.attention(q, k, k)
        attn_ext.attention(q, k, k, causal="bottom_right")
        attn_ext.attention(k, k, k)
        attn_ext.attention(*(torch.cat((k, k)),) * 3)
    return seen


def test_tokens(tmp_path):
    """A number of tokens that does not fit, in silence; queries named as other keys; one text for
    the examples of a batch."""
    seen = three_calls()
    words = ["a", "b", "c", "d", "e"]

    def labels(index, example=0, **options):
        page_of(seen.calls[index : index + 1], **options).save(tmp_path / "page.html")
        return names_of(tmp_path / "page.html", 0, example)

    assert labels(0) == (["0", "1"], ["0", "1", "2", "3", "4"])
    assert labels(1) == (["3", "4"], ["0", "1", "2", "3", "4"])
    assert labels(0, tokens=words) == (["0", "1"], words)
    assert labels(1, tokens=words) == (["d", "e"], words)
    assert labels(2, tokens=tuple(words)) == (words, words)
    assert labels(0, tokens=words, query_tokens=["x", "y"]) == (["x", "y"], words)
    assert labels(3, 1, tokens=words)[1] == words
    assert labels(3, 1, tokens=[words, words[::-1]])[1] == words[::-1]
    (tmp_path / "words.json").write_text(json.dumps(words))
    assert labels(2, tokens=tmp_path / "words.json")[1] == words
    (tmp_path / "words.json").write_text("no json")
    for options, error, message in (
        ({"tokens": words[:4]}, ValueError,
         "tokens must be as many as the 5 keys of call '2', got 4:"),
        ({"query_tokens": ["x"]}, ValueError, "query_tokens must be as many as the 5 queries"),
        ({"tokens": [words, words]}, ValueError, "one for each of the 1 examples of call '2', got"),
        ({"tokens": "abcde"}, TypeError, "tokens must be a list of strings, .* got str 'abcde'"),
        ({"tokens": 5}, TypeError, "tokens must be a list of strings, .* got int 5"),
        ({"tokens": {"a": 1}}, TypeError, "tokens must be a list of strings"),
        ({"tokens": [None] * 5}, TypeError, "tokens must be a list of strings"),
        ({"tokens": [1, 2, 3, 4, 5]}, TypeError, "tokens holds ids: give their tokenizer="),
        ({"tokens": [1, 2, 3, 4, 5], "tokenizer": 3}, TypeError, "tokenizer must have convert_ids"),
        ({"tokens": tmp_path / "words.json"}, ValueError, "tokens must be a JSON file of a list"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            labels(2, **options)


def test_tokens_of_tokenizers():
    """Signs of vocabularies in place of spaces and line breaks, one text for a whole batch."""
    pytest.importorskip("tokenizers", reason="comes with transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    signs = ["def", "\u0120f", "()", ":", "\u010a", "\u0120\u0120\u0120", "\u00c3", "\u00a9", "!"]
    bytewise = Tokenizer(models.WordLevel({t: i for i, t in enumerate(signs)}, "!"))
    bytewise.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bytewise.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=bytewise, pad_token="!")
    want = ["def", " f", "()", ":", "\n", "   ", "\\xc3", "\\xa9", "!"]
    ids = list(range(9))
    for given in (ids, [ids], torch.tensor(ids), torch.tensor([ids]), {"input_ids": [ids]}):
        for tokenizer in (fast, bytewise):
            assert texts("tokens", given, tokenizer) == [want]
    batch = fast(["def \u0120f ()", "!"], padding=True)
    assert texts("tokens", batch) == [["def", " f", "()"], ["!", "!", "!"]]
    assert texts("tokens", bytewise.encode("def \u010a \u0120f")) == [["def", "\n", " f"]]
    assert texts("tokens", [1, 2], "ab c".__getitem__) == [["b", " "]]
    assert readable(["\u2581the", "<0x0A>", "<0xE2>", "##ing"]) == [" the", "\n", "\\xe2", "##ing"]


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
        (lambda p: inspect.look([], p, colours="all"), ValueError,
         "colours must be one of 'row', 'log', 'linear', got 'all'"),
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
    assert "a &lt;test&gt;" in text
    assert text.count("</script>") == len(re.findall("<script[ >]", text)) == 2 * 2 + 2
    assert "<!--" not in text and "<" not in element(text, "index")
    assert not re.search(r"(src|href)=|https?://|@import|url\(", text)  # self-contained
    assert names_of(path) == (TOKENS, TOKENS)
    assert len(index_of(path)["texts"]) == 1  # equal texts are there once


def test_lone_surrogates(tmp_path):
    """Tokens that cannot be encoded, in place of a page."""
    seen = three_calls()
    inspect.look(seen.calls[2:3], tmp_path, tokens=["a", "\ud800", "c", "d", "e"])
    assert names_of(tmp_path / "attention.html")[1][1] == "?"


def test_in_a_notebook(page):
    """An output cell that breaks the notebook, or saves a hundred megabytes in it."""
    seen, *_ = page
    shown = seen._repr_html_()
    assert shown.startswith('<iframe srcdoc="&lt;!doctype html&gt;') and shown.count("<") == 2
    assert seen.page(tokens=TOKENS)._repr_html_().count(" sandbox=") == 1
    looking = sys.modules["attn_ext.inspect.look"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(looking, "MOST_IN_A_NOTEBOOK", 1000)
        assert "write it by attn_ext.inspect.look" in seen._repr_html_()
    with inspect.record(statistics=["entropy"]) as few:
        attn_ext.attention(*(torch.randn(1, 1, 3, 8),) * 3)
    assert few._repr_html_().startswith("<pre>call")


def test_labels_of_heads_that_are_flagged(tmp_path):
    """A flag of another head, or none."""
    q = torch.zeros(1, 2, 6, 8)
    q[:, 1] = 20.0
    k = torch.zeros(1, 2, 6, 8)
    k[:, 1, 4] = 1.0
    with inspect.record(ablate={0: [0]}) as seen:
        attn_ext.attention(q, k, k)
    seen.page().save(tmp_path / "page.html")
    flags = index_of(tmp_path / "page.html")["layers"][0]["flags"]
    assert flags["0"] == "ablated: its output was set to 0"
    assert flags["1"].startswith("collapsed") and "key 4 has 100 % of the head" in flags["1"]


def test_look_command(page, tmp_path, capsys):
    """A command that fails on what record.save wrote; a traceback for another file; tokens that do
    not fit, in silence."""
    words = tmp_path / "words.json"
    words.write_text('["a", "b c", "d", "e", "f"]')
    seen, more = str(tmp_path / "seen.pt"), tmp_path / "more"
    for tokens, second in (("a b c d e", "b"), (str(words), "b c")):
        assert main(["look", seen, "--tokens", tokens, "--out", str(more)]) == 0
        assert names_of(more / "attention.html")[1][1] == second
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
