"""The page of `attn_ext.inspect.look`: one HTML file with all of its data, script and style.

The script is that of assets/*.js, in the order of SCRIPTS.  The data of a page:
  index       JSON: title, texts (lists of tokens), and of each layer its name, kind, sizes, flags
  rows-LAYER  base64 of the layer's lists, little-endian, one after the other; the slot after the
              last head is the mean over heads, and a list is that of a query:
                weights float32 [B, Hq + 1, Sq, n], largest first
                total   float32 [B, Hq + 1, Sq]      sum of the row, of which a list holds a part
                seen    uint32  [B, Hq + 1, Sq]      keys that the row sees
                keys    uint16 (uint32 where `wide`) [B, Hq + 1, Sq, n]
  maps-LAYER  base64 of float32 [B, Hq, rows, cols], the pooled maps
A layer's data are decoded when it is first looked at.
"""

from __future__ import annotations

import base64
import ctypes
import html
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from attn_ext.inspect.records import CallRecord

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = ("data.js", "words.js", "drawing.js", "text.js", "answer.js", "heads.js", "page.js")
SHORT_KEYS = 1 << 16  # keys that uint16 can name


@dataclass
class Labels:
    """Texts of a call's queries and keys: a list for all examples, or one for each."""

    queries: list[list[str]]
    keys: list[list[str]]
    offset: int | None  # queries are the keys from this one on; None: another text


def _little_endian(x: torch.Tensor) -> bytes:
    """The numbers of a tensor on the CPU, one after the other; numpy may be absent."""
    one_byte = x.contiguous().view(torch.uint8)
    if sys.byteorder == "big":
        one_byte = one_byte.unflatten(-1, (-1, x.element_size())).flip(-1).contiguous()
    return ctypes.string_at(one_byte.data_ptr(), one_byte.numel())


def _base64(*parts: torch.Tensor) -> str:
    return base64.b64encode(b"".join(map(_little_endian, parts))).decode()


def _with_mean(heads: torch.Tensor, mean: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[B, Hq + 1, ...]: the heads, then their mean."""
    both = torch.cat((heads.detach(), mean.detach().unsqueeze(1)), 1)
    if dtype.is_floating_point:
        return both.to(dtype)
    # torch has no conversion of -1, which is a key that is not there, to what has no sign: the
    # same bits are those of a number with a sign
    signed = torch.int32 if dtype == torch.uint32 else torch.int16
    end = 1 << 8 * signed.itemsize
    return torch.where(both >= end // 2, both - end, both).to(signed).view(dtype)


def _rows(call: CallRecord) -> str:
    short = torch.uint16 if call.shape[4] < SHORT_KEYS else torch.uint32
    return _base64(
        _with_mean(call.top_weights, call.mean_top_weights, torch.float32),
        _with_mean(call.weight_sum, call.weight_sum.mean(1), torch.float32),
        _with_mean(call.keys_seen, call.keys_seen_by_any, torch.uint32),
        _with_mean(call.top_keys, call.mean_top_keys, short),
    )


def _flags(call: CallRecord) -> dict[int, str]:
    """What a summary says of a head."""
    said: dict[int, list[str]] = {}
    for h in call.collapsed:
        said.setdefault(h, []).append("collapsed: each query looks at one key")
    for h, key, share in call.sinks:
        said.setdefault(h, []).append(f"key {key} has {100 * share:.0f} % of the head's mass")
    for h in call.ablated:
        said.setdefault(h, []).append("ablated: its output was set to 0")
    return {h: "; ".join(parts) for h, parts in said.items()}


def _index(calls, labels, title: str) -> dict:
    """What the script reads first; equal lists of texts are there once."""
    texts: list[list[str]] = []

    def numbers(lists: list[list[str]]) -> list[int]:
        found = []
        for words in lists:
            if words not in texts:
                texts.append(words)
            found.append(texts.index(words))
        return found

    layers = []
    for call, label in zip(calls, labels, strict=True):
        batch, heads, _, seqlen_q, seqlen_k, _ = call.shape
        rows, cols = call.pooled_map.shape[2:]
        layers.append({
            "name": call.title(), "kind": call.kind, "batch": batch, "heads": heads,
            "seqlenQ": seqlen_q, "seqlenK": seqlen_k, "listed": call.top_keys.shape[-1],
            "wide": seqlen_k >= SHORT_KEYS, "rows": rows, "cols": cols, "offset": label.offset,
            "queries": numbers(label.queries), "keys": numbers(label.keys), "flags": _flags(call),
        })  # fmt: skip
    return {"title": title, "texts": texts, "layers": layers}


def build(calls: list[CallRecord], labels: list[Labels], title: str) -> str:
    """The text of the page."""
    # no "<" at all: "</script>" would end the script, and after "<!--<script>" nothing would
    index = json.dumps(_index(calls, labels, title), ensure_ascii=False, allow_nan=False)
    data = [f'<script type="application/json" id="index">{index.replace("<", chr(92) + "u003c")}']
    for number, call in enumerate(calls):
        maps = _base64(call.pooled_map.detach().to(torch.float32))
        data.append(f'<script type="text/plain" id="rows-{number}">{_rows(call)}')
        data.append(f'<script type="text/plain" id="maps-{number}">{maps}')
    parts = {
        "TITLE": html.escape(title),
        "STYLE": (ASSETS / "page.css").read_text(encoding="utf-8"),
        "DATA": "".join(f"{part}</script>\n" for part in data),
        "SCRIPT": "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS),
    }
    page = (ASSETS / "page.html").read_text(encoding="utf-8")
    return re.sub("@(TITLE|STYLE|DATA|SCRIPT)@", lambda found: parts[found[1]], page)


@dataclass
class Page:
    """A page in memory, which notebooks show."""

    html: str
    height: int = 720  # pixels in a notebook

    def save(self, path) -> None:
        """Write the page to a file."""
        Path(path).write_text(self.html, encoding="utf-8")

    def _repr_html_(self) -> str:
        inside = html.escape(self.html, quote=True)
        return (
            f'<iframe srcdoc="{inside}" title="attention" sandbox="allow-scripts" '
            f'style="width: 100%; height: {self.height}px; border: 0"></iframe>'
        )
