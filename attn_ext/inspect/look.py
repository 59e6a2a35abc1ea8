"""Pictures of recorded attention: a heat map as PNG (picture.py), and one HTML file (page.py),
without anything from elsewhere, in which pointing at a token shows what it attends to, by layer and
head.

Every weight is one of a whole row: a mean over heads is recorded as such, and what a list of keys
leaves out is said.
"""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from attn_ext.inspect import page, picture
from attn_ext.inspect.page import Labels, Page
from attn_ext.inspect.records import NOTHING, CallRecord, load
from attn_ext.inspect.tokens import texts

MOST_IN_A_NOTEBOOK = 16 << 20  # bytes of a page that a notebook shows by itself, and saves


def look(
    records: Any, out: str | Path = "out/look", *, tokens: Any = None, query_tokens: Any = None,
    tokenizer: Any = None, title: str = "attention", colours: str = "row",
) -> tuple[Path, Path]:  # fmt: skip
    """Write attention.png and attention.html of some calls into folder `out`; return their paths.

    records: a `record`, its calls, or the path of what `record.save` wrote; they need the
    statistics top_k (the page) and pooled_map (both).
    tokens: the texts of the keys of every call, and of its queries where they are as many, or stand
    among the keys as causal or a window says; positions if None.  query_tokens: those of the
    queries.  Each a list of strings (a list of these: one for each example), what a tokenizer
    returned, ids with their `tokenizer`, or the Path of a JSON file that holds one of these.
    Another number of them than the call has is a ValueError.
    colours of the picture: "row" (each row of cells by its largest), "log" or "linear"; the page
    lets one choose.
    """
    if not isinstance(out, (str, Path)):
        raise TypeError(f"out must be the path of a folder, got {type(out).__name__} {out!r:.80}")
    if colours not in picture.COLOURS:
        known = ", ".join(map(repr, picture.COLOURS))
        raise ValueError(f"colours must be one of {known}, got {colours!r:.80}")
    _check_title(title)
    usable = _usable(records)
    labels = _all_labels(usable, tokens, query_tokens, tokenizer)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    drawn, written = folder / "attention.png", folder / "attention.html"
    Page(page.build(usable, labels, title)).save(written)
    named = tokens is not None
    picture.draw(usable, labels, drawn, picture.Style(title, named, colours))
    return drawn, written


def page_of(
    records, *, tokens=None, query_tokens=None, tokenizer=None, title: str = "attention"
) -> Page:
    """The page of `look` in memory, which a notebook shows; arguments as `look`."""
    _check_title(title)
    usable = _usable(records)
    labels = _all_labels(usable, tokens, query_tokens, tokenizer)
    return Page(page.build(usable, labels, title))


def in_a_notebook(seen) -> str:
    """What a notebook shows of a `record`: its page, or what to do where there is none."""
    summary = f"<pre>{html.escape(seen.summary())}</pre>"
    if not [c for c in seen.calls if _is_usable(c)]:
        return summary
    shown = page_of(seen)
    if len(shown.html) > MOST_IN_A_NOTEBOOK:
        size = len(shown.html) >> 20
        return f"{summary}<p>The page has {size} MiB: write it by attn_ext.inspect.look.</p>"
    return shown._repr_html_()


def _is_usable(call: CallRecord) -> bool:
    return call.mean_top_keys is not None and call.pooled_map is not None


def _usable(records) -> list[CallRecord]:
    """The calls that hold what the page and the picture show."""
    if isinstance(records, (str, Path)):
        records = load(records)
    recording = hasattr(records, "why_nothing")
    calls = records.calls if recording else records
    if not isinstance(calls, (list, tuple)) or not all(isinstance(c, CallRecord) for c in calls):
        raise TypeError(
            "records must be an attn_ext.inspect.record, a list of its calls or the path of a "
            f"file, got {type(records).__name__} {records!r:.80}"
        )
    usable = [c for c in calls if _is_usable(c)]
    if not calls:
        why = records.why_nothing() if recording else NOTHING
        raise ValueError(f"records must hold a call, got none: {why}")
    if not usable:
        raise ValueError(
            "records must hold a call with the statistics top_k and pooled_map, got "
            f"{len(calls)} without: record them by record(statistics=('top_k', 'pooled_map'))"
        )
    return usable


def _check_title(title) -> None:
    if not isinstance(title, str):
        raise TypeError(f"title must be a str, got {type(title).__name__} {title!r:.80}")


def _all_labels(usable, tokens, query_tokens, tokenizer) -> list[Labels]:
    """The labels of each call."""
    tokens = texts("tokens", tokens, tokenizer)
    query_tokens = texts("query_tokens", query_tokens, tokenizer)
    return [_labels(c, tokens, query_tokens) for c in usable]


def _check_number(name: str, given, call: CallRecord, place: int, kind: str) -> None:
    """ValueError unless there is a text for each key (or query), and one list or one an example."""
    batch, wanted = call.shape[0], call.shape[place]
    if len(given) not in (1, batch):
        raise ValueError(
            f"{name} must be one list, or one for each of the {batch} examples of call "
            f"{call.label()!r}, got {len(given)}"
        )
    for words in given:
        if len(words) != wanted:
            raise ValueError(
                f"{name} must be as many as the {wanted} {kind} of call {call.label()!r}, got "
                f"{len(words)}: of other calls, pass those of one length, as "
                f"[c for c in seen.calls if c.shape[{place}] == {len(words)}]"
            )


def _labels(call: CallRecord, tokens, query_tokens) -> Labels:
    """Texts of queries and keys: the given ones, else positions."""
    _, _, _, seqlen_q, seqlen_k, _ = call.shape
    if tokens is not None:
        _check_number("tokens", tokens, call, 4, "keys")
    if query_tokens is not None:
        _check_number("query_tokens", query_tokens, call, 3, "queries")
    keys = tokens or [[str(j) for j in range(seqlen_k)]]
    if query_tokens is not None:
        return Labels(query_tokens, keys, None)
    # a call of as many queries as keys is taken for one text that attends to itself
    first = call.first_query if seqlen_q != seqlen_k else call.first_query or 0
    if first is not None and first >= 0 and first + seqlen_q <= seqlen_k:
        return Labels([words[first : first + seqlen_q] for words in keys], keys, first)
    return Labels([[str(i) for i in range(seqlen_q)]], keys, None)
