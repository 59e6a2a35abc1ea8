"""The page that `attn_ext.inspect.look` writes: @TITLE@ and @DATA@ stand for its title and data.

Data of a layer: names of queries and keys; heads [example][head][query] and mean [example][query],
each row [[[key, weight], ...], keys that are left out, their weight].
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>@TITLE@</title>
<meta name="viewport" content="width=device-width">
<style>
body { font: 15px/1.7 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; color: #222;
  padding: 0 1rem }
label { margin-right: 1rem }
span.t { padding: 2px 4px; margin: 1px; border-radius: 3px; display: inline-block;
  white-space: pre; min-width: .6em; border: 1px solid #e4e4e4 }
#queries span.t { cursor: pointer }
span.on { outline: 2px solid #36c }
span.out { opacity: .55 }
#detail { min-height: 4.5rem; color: #444 }
h2 { font-size: 1rem; margin: 1.2rem 0 .3rem }
small { color: #666 }
</style></head><body>
<h1>@TITLE@</h1>
<p><label>layer <select id="layer"></select></label>
<label>head <select id="head"></select></label>
<label>example <select id="example"></select></label></p>
<h2>queries: point at one</h2><div id="queries"></div>
<h2>keys it attends to</h2><div id="keys"></div>
<p id="detail" aria-live="polite"></p>
<p><small id="legend"></small></p>
<script>
const data = @DATA@;
const by = id => document.getElementById(id);
const state = {layer: 0, head: -1, example: 0, token: -1};
for (const part of location.hash.slice(1).split("&")) {
  const [name, value] = part.split("=");
  if (name in state && /^-?\\d+$/.test(value)) state[name] = Number(value);
}
function fit(name, low, size) {   // a state that this layer does not have becomes the first
  if (state[name] < low || state[name] >= size) state[name] = low;
}
function fill(select, names, first) {
  select.replaceChildren(...names.map((n, i) => {
    const option = document.createElement("option");
    option.textContent = n; option.value = i + first; return option;
  }));
}
function visible(text) {   // tokens of nothing but white space, and line breaks, are seen
  const shown = text.replace(/\\r/g, "\u240d").replace(/\\n/g, "\u23ce")
    .replace(/\\t/g, "\u21e5");
  return /^ *$/.test(shown) ? shown.replace(/ /g, "\u2423") || "\u2205" : shown;
}
function spans(box, tokens, hover) {
  box.replaceChildren(...tokens.map((t, i) => {
    const s = document.createElement("span");
    s.className = "t"; s.textContent = visible(t); s.dataset.i = i;
    if (hover) s.onmouseenter = s.onclick = () => { state.token = i; paint(); };
    return s;
  }));
}
function setup() {
  fit("layer", 0, data.layers.length);
  const layer = data.layers[state.layer];
  fit("example", 0, layer.heads.length);
  const n = layer.heads[state.example].length;
  fit("head", -1, n);
  fit("token", -1, layer.queries.length);
  fill(by("head"), [`mean of ${n}`, ...Array.from({length: n}, (_, i) => i)], -1);
  fill(by("example"), layer.heads.map((_, i) => i), 0);
  by("layer").value = state.layer; by("head").value = state.head;
  by("example").value = state.example;
  spans(by("queries"), layer.queries, true);
  spans(by("keys"), layer.keys, false);
  by("legend").textContent = "Colour: weight / largest weight of the row. " +
    (layer.kind === "sigmoid" ? "Sigmoid weights need not sum to 1. "
      : "To no key goes what a sink takes, and in a mean the heads that see no key. ") +
    "A mean over heads is made of whole rows.";
  paint();
}
function share(layer, w) {
  return layer.kind === "sigmoid" ? w.toFixed(4) : (100 * w).toFixed(1) + " %";
}
function answer(layer, [pairs, more, rest]) {   // all of the row in words
  if (!pairs.length && !more) return "sees no key";
  const keys = more === 1 ? "1 key" : `${more} keys`;
  if (rest === null) return `its weights are not numbers (${keys})`;
  const parts = pairs.map(([k, w]) => `${visible(layer.keys[k])} (${k}) ${share(layer, w)}`);
  if (more) parts.push(`${pairs.length ? "and " : ""}${keys} more, ${share(layer, rest)}`);
  const none = 1 - rest - pairs.reduce((sum, p) => sum + p[1], 0);
  if (layer.kind !== "sigmoid" && none >= 0.0005) parts.push(`to no key ${share(layer, none)}`);
  return parts.join(" \u00b7 ");
}
function paint() {
  const layer = data.layers[state.layer], token = state.token;
  for (const s of by("queries").children)
    s.classList.toggle("on", Number(s.dataset.i) === token);
  const rows = state.head < 0 ? layer.mean[state.example] : layer.heads[state.example][state.head];
  const row = token < 0 ? [[], 0, 0] : rows[token], weights = new Map(row[0]);
  const top = Math.max(1e-9, ...weights.values());
  for (const s of by("keys").children) {
    const w = weights.get(Number(s.dataset.i));
    s.style.background = w ? `rgba(226, 120, 20, ${(w / top).toFixed(3)})` : "";
    s.classList.toggle("out", token >= 0 && !w);
    if (w) { s.title = share(layer, w); s.dataset.w = w; }
    else {
      s.title = token < 0 ? "" : row[1] ? "not among the listed keys, or not seen" : "not seen";
      delete s.dataset.w;
    }
  }
  by("detail").textContent = token < 0 ? "" :
    `${visible(layer.queries[token])} (${token})  \u2192  ${answer(layer, row)}`;
}
fill(by("layer"), data.layers.map(l => l.name), 0);
for (const id of ["layer", "head", "example"])
  by(id).onchange = e => { state[id] = Number(e.target.value); setup(); };
setup();
</script></body></html>
"""
