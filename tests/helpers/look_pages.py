"""Pages of `attn_ext.inspect.look`: recordings with their P by the N x N way, what a file holds,
and what a headless browser shows.
"""

import base64
import json
import re
import shutil
import subprocess

import numpy
import pytest
import torch

import attn_ext
from attn_ext import inspect

BROWSER = next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None
)
in_a_browser = pytest.mark.skipif(
    BROWSER is None, reason="no headless Chromium: apt-get install chromium"
)


def recorded(length=41, **options):
    """A recording of a softmax call with a mask, a sink and shared keys, of an additive and a
    sigmoid one, and of two packed sequences; with their P in float64 [B, Hq, Sq, Sk], and which
    keys are seen.
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


def element(text: str, name: str) -> str:
    """What the page's data element of that id holds."""
    return re.search(rf'<script type="[a-z/]+" id="{name}">(.*?)</script>', text, re.S)[1]


def index_of(path) -> dict:
    return json.loads(element(path.read_text(encoding="utf-8"), "index"))


def names_of(path, number=0, example=0) -> tuple[list, list]:
    """Texts of queries and keys."""
    index = index_of(path)
    layer = index["layers"][number]
    return tuple(
        index["texts"][layer[which][min(example, len(layer[which]) - 1)]]
        for which in ("queries", "keys")
    )


def lists_of(path, number: int) -> tuple:
    """weights and keys [B, Hq + 1, Sq, n], total and seen [B, Hq + 1, Sq]; the mean comes last."""
    text = path.read_text(encoding="utf-8")
    layer = json.loads(element(text, "index"))["layers"][number]
    data = base64.b64decode(element(text, f"rows-{number}"))
    rows = (layer["batch"], layer["heads"] + 1, layer["seqlenQ"])
    parts, at = [], 0
    short = "<u4" if layer["wide"] else "<u2"
    kinds = (("<f4", (*rows, layer["listed"])), ("<f4", rows), ("<u4", rows),
             (short, (*rows, layer["listed"])))  # fmt: skip
    for kind, shape in kinds:
        count = int(numpy.prod(shape))
        parts.append(numpy.frombuffer(data, kind, count, at).reshape(shape))
        at += count * int(kind[-1])
    assert at == len(data)
    weights, total, seen, keys = parts
    return weights, keys.astype("i8"), total, seen.astype("i8")


_WATCH = """<script>const wrong = [];
addEventListener("error", e => wrong.push(String(e.message)));
addEventListener("unhandledrejection", e => wrong.push(String(e.reason)));</script>"""
_DRIVER = """<pre id="result"></pre><script>(async () => {
const $ = id => document.getElementById(id);
const wait = ms => new Promise(done => setTimeout(done, ms));
const go = async hash => { location.hash = hash; await wait(50); };
const press = (key, on = document.activeElement, more = {}) => on.dispatchEvent(
  new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true, ...more}));
const read = () => ({
  title: document.querySelector("#answer h3").textContent,
  lists: [...document.querySelectorAll("#answer section")].map(s => ({
    which: s.querySelector(".which").textContent,
    keys: [...s.querySelectorAll("li")].map(li => [".key", ".at", ".share"].map(
      c => li.querySelector(c).textContent)),
    rest: [...s.querySelectorAll(".rest")].map(p => p.textContent)})),
  weights: Object.fromEntries([...document.querySelectorAll("#keys span[data-w]")].map(
    s => [s.dataset.i, Number(s.dataset.w)])),
  spoken: $("spoken").textContent, legend: $("legend").textContent});
const steps = [];
try { @STEPS@ } catch (error) { wrong.push(String(error)); }
$("result").textContent = JSON.stringify({steps, wrong});
})();</script>"""


def driven(path, steps: str, place: str = "", *flags: str) -> list:
    """What `steps`, JavaScript that pushes onto `steps`, sees on the page at `place`; without any
    error or line on the console.
    """
    text = path.read_text("utf-8").replace("</head>", _WATCH + "</head>", 1)
    head, _, tail = text.rpartition("</body>")
    page = path.with_name("driven.html")
    page.write_text(head + _DRIVER.replace("@STEPS@", steps) + "</body>" + tail, "utf-8")
    found = re.search(r'<pre id="result">(.*?)</pre>', dom_of(page, place, *flags), re.S)[1]
    for sign, character in (("&lt;", "<"), ("&gt;", ">"), ("&nbsp;", "\u00a0"), ("&amp;", "&")):
        found = found.replace(sign, character)
    result = json.loads(found)
    assert result["wrong"] == []
    return result["steps"]


def dom_of(page, place: str = "", *flags: str) -> str:
    """The document as the browser has it at last."""
    command = [
        BROWSER, "--no-sandbox", "--headless", "--disable-gpu", "--enable-logging=stderr",
        "--virtual-time-budget=20000", "--window-size=1200,900", *flags, "--dump-dom",
        f"{page.resolve().as_uri()}#{place}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


def number(shown: str) -> tuple[float, float]:
    """What a share on the page says, as (weight, how far it may be off)."""
    scale = 100 if shown.endswith("%") else 1
    digits = shown.removesuffix(" %")
    if digits.startswith(("under ", "over ")):
        bound = float(digits.split()[1]) / scale
        return (bound / 2, bound / 2) if digits.startswith("under") else (bound, 1 - bound)
    places = len(digits.partition(".")[2])
    return float(digits) / scale, 0.51 * 10.0**-places / scale
