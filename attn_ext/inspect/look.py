"""Pictures of recorded attention: a heat map as PNG, and one HTML file (page.py), without anything
from elsewhere, in which pointing at a token shows what it attends to, by layer and head.

Every weight is one of a whole row: a mean over heads is recorded as such, and what a list of keys
leaves out is said (`[pairs, keys that are left out, their weight]`).
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from attn_ext.inspect.page import PAGE
from attn_ext.inspect.recording import NOTHING, record
from attn_ext.inspect.records import CallRecord, load

MAX_PANELS = 12
MAX_TICKS = 48
DIGITS = 5  # of a weight on the page; smaller ones count as left out


def look(
    records, out="out/look", *, tokens: Sequence[str] | None = None,
    query_tokens: Sequence[str] | None = None, title: str = "attention",
) -> tuple[Path, Path]:  # fmt: skip
    """Write attention.png and attention.html of some calls into folder `out`; return their paths.

    records: a `record`, its calls, or the path of what `record.save` wrote; they need the
    statistics top_k (the page) and pooled_map (the picture).
    tokens: the texts of the keys of every call, and of its queries where they are as many, or stand
    among the keys as causal or a window says; positions if None.  query_tokens: those of the
    queries.  Each a list of strings, the output of a tokenizer that has `tokens`, or the path of a
    JSON file that holds a list.  Another number of them than the call has is a ValueError.
    """
    if not isinstance(title, str):
        raise TypeError(f"title must be a str, got {type(title).__name__} {title!r:.80}")
    if not isinstance(out, (str, Path)):
        raise TypeError(f"out must be the path of a folder, got {type(out).__name__} {out!r:.80}")
    usable = _usable(records)
    tokens, query_tokens = texts("tokens", tokens), texts("query_tokens", query_tokens)
    labels = [_labels(c, tokens, query_tokens) for c in usable]
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    picture, page = folder / "attention.png", folder / "attention.html"
    _draw(usable, labels, tokens is not None, title, picture)
    layers = [_layer(c, *pair) for c, pair in zip(usable, labels, strict=True)]
    # no "<" at all: "</script>" would end the script, and after "<!--<script>" nothing would
    data = json.dumps({"layers": layers}, ensure_ascii=False, allow_nan=False)
    parts = {"@TITLE@": html.escape(title), "@DATA@": data.replace("<", "\\u003c")}
    text = re.sub("@(TITLE|DATA)@", lambda found: parts[found[0]], PAGE)
    page.write_text(text, encoding="utf-8")
    return picture, page


def _usable(records) -> list[CallRecord]:
    """The calls that hold what the page and the picture show."""
    if isinstance(records, (str, Path)):
        records = load(records)
    calls = records.calls if isinstance(records, record) else records
    if not isinstance(calls, (list, tuple)) or not all(isinstance(c, CallRecord) for c in calls):
        raise TypeError(
            "records must be an attn_ext.inspect.record, a list of its calls or the path of a "
            f"file, got {type(records).__name__} {records!r:.80}"
        )
    usable = [c for c in calls if c.mean_top_keys is not None and c.pooled_map is not None]
    if not calls:
        why = records.why_nothing() if isinstance(records, record) else NOTHING
        raise ValueError(f"records must hold a call, got none: {why}")
    if not usable:
        raise ValueError(
            "records must hold a call with the statistics top_k and pooled_map, got "
            f"{len(calls)} without: record them by record(statistics=('top_k', 'pooled_map'))"
        )
    return usable


def texts(name: str, tokens) -> list[str] | None:
    """A list of strings of what `look` takes for tokens."""
    if tokens is None:
        return None
    given = tokens
    if isinstance(tokens, Path):
        try:
            tokens = json.loads(tokens.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{name} must be a JSON file of a list, got {given}: {error}"
            ) from None
    elif hasattr(tokens, "tokens"):  # transformers' BatchEncoding, tokenizers' Encoding
        tokens = tokens.tokens() if callable(tokens.tokens) else tokens.tokens
    if isinstance(tokens, (str, bytes, dict)) or not isinstance(tokens, Iterable):
        raise TypeError(
            f"{name} must be a list of strings, a tokenizer's output or the path of a JSON file, "
            f"got {type(given).__name__} {given!r:.80}"
        )
    # lone surrogates, which a command line of other bytes than UTF-8 has, cannot be drawn
    return [str(t).encode("utf-8", "replace").decode() for t in tokens]


def _labels(call: CallRecord, tokens, query_tokens) -> tuple[list[str], list[str]]:
    """Texts of queries and keys: the given ones, else positions."""
    _, _, _, seqlen_q, seqlen_k, _ = call.shape
    for name, given, wanted, kind, place in (
        ("tokens", tokens, seqlen_k, "keys", 4),
        ("query_tokens", query_tokens, seqlen_q, "queries", 3),
    ):
        if given is not None and len(given) != wanted:
            raise ValueError(
                f"{name} must be as many as the {wanted} {kind} of call {call.label()!r}, got "
                f"{len(given)}: of other calls, pass those of one length, as "
                f"[c for c in seen.calls if c.shape[{place}] == {len(given)}]"
            )
    keys = tokens or [str(j) for j in range(seqlen_k)]
    first = call.first_query or 0
    if query_tokens is not None:
        return query_tokens, keys
    if seqlen_q == seqlen_k or (call.first_query is not None and first >= 0):
        among = keys[first : first + seqlen_q]
        if len(among) == seqlen_q:
            return among, keys
    return [str(i) for i in range(seqlen_q)], keys


def _row(keys, weights, seen: int, total: float) -> list:
    """[[[key, weight], ...], keys that are left out, their weight]; no weights where a row holds
    NaN: [[], keys, None].
    """
    if total != total:
        return [[], seen, None]
    pairs = [(j, w) for j, w in zip(keys, weights, strict=True) if j >= 0 and round(w, DIGITS) > 0]
    rest = total - sum(w for _, w in pairs) if len(pairs) < seen else 0.0
    shown = [[j, round(w, DIGITS)] for j, w in pairs]
    return [shown, seen - len(pairs), max(round(rest, DIGITS), 0.0)]


def _rows(keys, weights, seen, total, depth: int) -> list:
    """`_row` of each row: lists `depth` levels above rows -> lists nested as they are."""
    if depth == 0:
        return _row(keys, weights, seen, total)
    levels = zip(keys, weights, seen, total, strict=True)
    return [_rows(*part, depth - 1) for part in levels]


def _layer(call: CallRecord, queries: list[str], keys: list[str]) -> dict:
    """What the page needs of a call: heads [example][head][query] and mean [example][query], each
    a `_row`.
    """
    heads = (call.top_keys, call.top_weights, call.keys_seen, call.weight_sum)
    mean = (call.mean_top_keys, call.mean_top_weights, call.keys_seen_by_any,
            call.weight_sum.mean(1))  # fmt: skip
    heads, mean = ([x.tolist() for x in part] for part in (heads, mean))
    return {"name": call.label(), "kind": call.kind, "queries": queries, "keys": keys,
            "heads": _rows(*heads, 3), "mean": _rows(*mean, 2)}  # fmt: skip


def visible(token: str) -> str:
    """The token with a sign for each line break and tab, and for spaces where it is nothing else,
    as the page shows it."""
    shown = token.translate({ord("\r"): "\u240d", ord("\n"): "\u23ce", ord("\t"): "\u21e5"})
    return shown if shown.strip(" ") else shown.replace(" ", "\u2423") or "\u2205"


def panels_of(calls, labels) -> tuple[list, str]:
    """(name, map, labels) of each panel, and what is left out: a panel a call, the mean over its
    heads, or a panel a head where there is one call; of the first example."""
    if len(calls) == 1:
        maps = calls[0].pooled_map[0]
        panels = [(f"head {h}", m, labels[0]) for h, m in enumerate(maps)]
        what, examples = "head", calls[0].shape[0]
    else:
        panels = [
            (f"{c.label()}, mean of {c.shape[1]} heads", c.pooled_map[0].mean(0), pair)
            for c, pair in zip(calls, labels, strict=True)
        ]
        what, examples = "call", max(c.shape[0] for c in calls)
    more = len(panels) - MAX_PANELS
    said = "" if examples == 1 else f", example 0 of {examples}"
    said += f"; {more} {what}{'s' * (more > 1)} more not shown" if more > 0 else ""
    return panels[:MAX_PANELS], said


def _draw(calls, labels, named: bool, title: str, path: Path) -> None:
    """The maps of `panels_of`, each with the scale of its colours, by position."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("attn-ext look needs matplotlib: pip install matplotlib") from error
    panels, said = panels_of(calls, labels)
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(max(3.8 * columns, 6), 3.6 * rows + 0.4), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    colours = matplotlib.colormaps["magma"].with_extremes(bad="grey")  # NaN
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (name, image, (queries, keys)) in zip(axes.flat, panels, strict=False):
        # a cell covers the positions that it is the mean of
        edges = (-0.5, len(keys) - 0.5, len(queries) - 0.5, -0.5)
        drawn = axis.imshow(image.float().numpy(), cmap=colours, vmin=0, aspect="auto",
                            extent=edges)  # fmt: skip
        figure.colorbar(drawn, ax=axis, fraction=0.05).ax.tick_params(labelsize=7)
        exact = tuple(image.shape) == (len(queries), len(keys))  # a cell is a pair of tokens
        if exact and named and max(len(queries), len(keys)) <= MAX_TICKS:
            size = 7 if max(len(queries), len(keys)) <= MAX_TICKS // 2 else 5
            style = {"fontsize": size, "parse_math": False}  # a token may be "$\\frac{$"
            axis.set_xticks(range(len(keys)), map(visible, keys), rotation=90, **style)
            axis.set_yticks(range(len(queries)), map(visible, queries), **style)
        else:
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.yaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel("key", fontsize=8)
        axis.set_ylabel("query", fontsize=8)
        axis.set_title(name, fontsize=9, parse_math=False)
    figure.suptitle(f"{title}: mean weight of each cell{said}", fontsize=10, parse_math=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def in_a_notebook(seen: record) -> str:
    return seen.why_nothing()
