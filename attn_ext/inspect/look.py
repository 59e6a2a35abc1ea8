"""Pictures of recorded attention: a heat map as PNG, and one HTML file, without anything from
elsewhere, in which pointing at a token shows what it attends to, by layer and head.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from attn_ext.inspect.recording import CallRecord, load, record

MAX_PANELS = 12
MAX_TICKS = 48

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>@TITLE@</title><style>
body { font: 15px/1.7 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; color: #222 }
span.t { padding: 2px 4px; margin: 1px; border-radius: 3px; cursor: pointer;
  display: inline-block; white-space: pre }
span.on { outline: 2px solid #36c }
#detail { min-height: 3rem; color: #555 }
h2 { font-size: 1rem; margin: 1.2rem 0 .3rem }
</style></head><body>
<h1>@TITLE@</h1>
<p><label>layer <select id="layer"></select></label>
<label>head <select id="head"></select></label>
<label>example <select id="example"></select></label></p>
<h2>point at a token</h2><div id="queries"></div>
<h2 id="keys_title">what it attends to</h2><div id="keys"></div>
<p id="detail"></p>
<script>
const data = @DATA@;
const by = id => document.getElementById(id);
const state = {layer: 0, head: -1, example: 0, token: -1};
for (const part of location.hash.slice(1).split("&")) {
  const [name, value] = part.split("=");
  if (name in state) state[name] = Number(value);
}
function fill(select, names, first) {
  select.replaceChildren(...names.map((n, i) => {
    const option = document.createElement("option");
    option.textContent = n; option.value = i + first; return option;
  }));
}
function spans(box, tokens, hover) {
  box.replaceChildren(...tokens.map((t, i) => {
    const s = document.createElement("span");
    s.className = "t"; s.textContent = t; s.dataset.i = i;
    if (hover) s.onmouseenter = s.onclick = () => { state.token = i; paint(); };
    return s;
  }));
}
function row(layer, head, token) {   // Map key -> weight; head -1: mean over the heads
  const heads = layer.heads[state.example], out = new Map();
  const chosen = head < 0 ? heads : [heads[head]];
  for (const h of chosen)
    for (const [key, weight] of h[token] || [])
      out.set(key, (out.get(key) || 0) + weight / chosen.length);
  return out;
}
function setup() {
  const layer = data.layers[state.layer];
  state.example = Math.min(state.example, layer.heads.length - 1);
  const n = layer.heads[state.example].length;
  state.head = Math.min(state.head, n - 1);
  fill(by("head"), ["mean", ...Array.from({length: n}, (_, i) => i)], -1);
  fill(by("example"), layer.heads.map((_, i) => i), 0);
  by("layer").value = state.layer; by("head").value = state.head;
  by("example").value = state.example;
  spans(by("queries"), layer.queries, true);
  spans(by("keys"), layer.keys, false);
  paint();
}
function paint() {
  const layer = data.layers[state.layer];
  for (const s of by("queries").children)
    s.classList.toggle("on", Number(s.dataset.i) === state.token);
  const weights = state.token < 0 ? new Map() : row(layer, state.head, state.token);
  const top = Math.max(1e-9, ...weights.values());
  for (const s of by("keys").children) {
    const w = weights.get(Number(s.dataset.i)) || 0;
    s.style.background = w ? `rgba(226, 120, 20, ${(w / top).toFixed(3)})` : "";
    s.title = w ? w.toFixed(4) : "";
    s.dataset.w = w.toFixed(4);
  }
  const list = [...weights].sort((a, b) => b[1] - a[1]).slice(0, 8);
  by("detail").textContent = state.token < 0 ? "" : layer.queries[state.token] + "  \\u2192  " +
    list.map(([k, w]) => `${layer.keys[k]} ${(100 * w).toFixed(1)} %`).join(",  ");
}
fill(by("layer"), data.layers.map(l => l.name), 0);
for (const id of ["layer", "head", "example"])
  by(id).onchange = e => { state[id] = Number(e.target.value); setup(); };
setup();
</script></body></html>
"""


def look(
    records, out="out/look", *, tokens: Sequence[str] | None = None,
    query_tokens: Sequence[str] | None = None, title: str = "attention",
) -> tuple[Path, Path]:  # fmt: skip
    """Write attention.png and attention.html of some calls into folder `out`; return their paths.

    records: a `record`, its calls, or the path of what `record.save` wrote; they need the
    statistics top_k (the page) and pooled_map (the picture).  tokens: the texts of the keys (and of
    the queries where they are as many, else query_tokens); positions if None.
    """
    if isinstance(records, (str, Path)):
        records = load(records)
    calls = list(records.calls if isinstance(records, record) else records)
    usable = [c for c in calls if c.top_keys is not None and c.pooled_map is not None]
    if not usable:
        raise ValueError(
            f"records must hold a call with the statistics top_k and pooled_map, got {len(calls)} "
            "without"
        )
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    picture, page = folder / "attention.png", folder / "attention.html"
    _draw(usable, tokens, query_tokens, title, picture)
    layers = [_layer(c, tokens, query_tokens) for c in usable]
    # no "<" at all: "</script>" would end the script, and after "<!--<script>" nothing would
    data = json.dumps({"layers": layers}, ensure_ascii=False).replace("<", "\\u003c")
    text = _PAGE.replace("@TITLE@", html.escape(title)).replace("@DATA@", data)
    page.write_text(text, encoding="utf-8")
    return picture, page


def _labels(call: CallRecord, tokens, query_tokens) -> tuple[list[str], list[str]]:
    """Texts of queries and keys: the given ones where they are as many, else positions."""
    _, _, _, seqlen_q, seqlen_k, _ = call.shape

    def fit(given, length):
        if given is not None and len(given) == length:
            # lone surrogates, which a command line of other bytes than UTF-8 has, cannot be drawn
            return [str(t).encode("utf-8", "replace").decode() for t in given]
        return [str(i) for i in range(length)]

    return fit(tokens if query_tokens is None else query_tokens, seqlen_q), fit(tokens, seqlen_k)


def _name(call: CallRecord) -> str:
    return f"{call.index} {call.name}".strip() + (
        "" if call.sequence is None else f" [{call.sequence}]"
    )


def _layer(call: CallRecord, tokens, query_tokens) -> dict:
    """What the page needs of a call: [example][head][query] -> [[key, weight], ...]."""
    queries, keys = _labels(call, tokens, query_tokens)
    index, weights = call.top_keys.tolist(), call.top_weights.tolist()
    heads = [
        [
            [
                [[j, round(w, 5)] for j, w in zip(js, ws, strict=True) if j >= 0 and w > 1e-5]
                for js, ws in zip(*rows, strict=True)
            ]
            for rows in zip(*example, strict=True)
        ]
        for example in zip(index, weights, strict=True)
    ]
    return {"name": _name(call), "queries": queries, "keys": keys, "heads": heads}


def _draw(calls, tokens, query_tokens, title: str, path: Path) -> None:
    """One panel a call (a head where there is one call): the map of the first example."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("attn-ext look needs matplotlib: pip install matplotlib") from error
    panels = [(_name(c), c, c.pooled_map[0].mean(0)) for c in calls[:MAX_PANELS]]
    if len(calls) == 1:
        only = calls[0]
        panels = [(f"head {h}", only, m) for h, m in enumerate(only.pooled_map[0][:MAX_PANELS])]
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.4 * columns, 3.6 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (name, call, image) in zip(axes.flat, panels, strict=False):
        axis.imshow(torch.nan_to_num(image).float().numpy(), cmap="magma", vmin=0, aspect="auto")
        queries, keys = _labels(call, tokens, query_tokens)
        exact = tuple(image.shape) == (len(queries), len(keys))  # a cell is a pair of tokens
        if exact and tokens is not None and max(len(queries), len(keys)) <= MAX_TICKS:
            style = {"fontsize": 7, "parse_math": False}  # a token may be "$\\frac{$"
            axis.set_xticks(range(len(keys)), keys, rotation=90, **style)
            axis.set_yticks(range(len(queries)), queries, **style)
        axis.set_title(name, fontsize=9)
    figure.suptitle(f"{title}: rows attend to columns", parse_math=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
