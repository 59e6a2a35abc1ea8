"""Self-contained HTML pages, with figures as SVG inside: no script, no other file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 75em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } th { text-align: left; background: #f2f2f2 }
td, th { border: 1px solid #ddd; padding: .2em .6em; font-variant-numeric: tabular-nums }
tr.fail td { background: #fde8e6 } .na td { color: #888 } h1 { font-size: 1.5em }
.verdict { font-weight: bold; padding: .5em 1em; display: inline-block; border-radius: .3em }
.good { background: #e3f4e3 } .bad { background: #fbd9d5 }
"""
PALETTE = ("#c0392b", "#2c6fbb", "#3c9d5d", "#e08a1e", "#8e6bbf", "#555555", "#1aa6a6", "#b0627d")


def page(title: str, body: str) -> str:
    """A whole document"""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}'
        f"</title><style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n{body}</body>"
        "</html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence], classes: Sequence[str] = ()) -> str:
    """A table of texts; `classes`: one CSS class a row.  No header row where all of it is empty"""
    lines = ["<table>"]
    if any(head):
        lines.append("<tr>" + "".join(f"<th>{escape(h)}</th>" for h in head) + "</tr>")
    for index, row in enumerate(rows):
        kind = f' class="{classes[index]}"' if index < len(classes) and classes[index] else ""
        cells = "".join(f"<td>{escape(str(value))}</td>" for value in row)
        lines.append(f"<tr{kind}>{cells}</tr>")
    return "\n".join([*lines, "</table>"])


def facts(values: dict) -> str:
    """Names and values, one a row"""
    return table(("", ""), [(k, v) for k, v in values.items() if v is not None])


def log_plot(series: dict[str, list[tuple[float, float]]], x_name: str, y_name: str,
             dashed: Sequence[str] = ()) -> str:  # fmt: skip
    """An SVG figure with both axes logarithmic: name -> points; those in `dashed` are dashed"""
    points = [p for values in series.values() for p in values if p[0] > 0 and p[1] > 0]
    if not points:
        return "<p>Nothing to plot.</p>"
    width, height, left, right, top, bottom = 860, 420, 70, 250, 16, 44
    x0, x1 = (math.log2(f(p[0] for p in points)) for f in (min, max))
    y0 = math.floor(math.log10(min(p[1] for p in points)))
    y1 = math.ceil(math.log10(max(p[1] for p in points)) + 1e-9)
    x1, y1 = max(x1, x0 + 1), max(y1, y0 + 1)

    def at(x, y):
        across = (math.log2(x) - x0) / (x1 - x0) * (width - left - right)
        up = (math.log10(y) - y0) / (y1 - y0) * (height - top - bottom)
        return left + across, height - bottom - up

    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">']
    for exponent in range(y0, y1 + 1):
        _, y = at(2**x0, 10.0**exponent)
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" '
                     'stroke="#ddd"/>')  # fmt: skip
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" font-size="11" text-anchor="end">'
                     f"1e{exponent}</text>")  # fmt: skip
    for exponent in range(math.floor(x0), math.ceil(x1) + 1):
        if x0 - 1e-6 <= exponent <= x1 + 1e-6:
            x, _ = at(2.0**exponent, 10.0**y0)
            parts.append(f'<text x="{x:.1f}" y="{height - bottom + 16}" font-size="11" '
                         f'text-anchor="middle">{2**exponent}</text>')  # fmt: skip
    names = [name for name in series if name not in dashed]
    for index, (name, values) in enumerate(series.items()):
        values = sorted(p for p in values if p[0] > 0 and p[1] > 0)
        base = name.removesuffix(" allowed")
        color = PALETTE[names.index(base) % len(PALETTE)] if base in names else "#999"
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*p) for p in values))
        dash = ' stroke-dasharray="5 4" stroke-opacity="0.6"' if name in dashed else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}"{dash}/>')
        if name not in dashed:
            for x, y in (at(*p) for p in values):
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{color}"/>')
        y = top + 12 + 16 * index
        parts.append(f'<line x1="{width - right + 14}" x2="{width - right + 40}" y1="{y - 4}" '
                     f'y2="{y - 4}" stroke="{color}" stroke-width="2"{dash}/>')  # fmt: skip
        parts.append(f'<text x="{width - right + 46}" y="{y}" font-size="12">{escape(name)}</text>')
    middle = left + (width - left - right) / 2
    parts.append(f'<text x="{middle}" y="{height - 8}" font-size="12" text-anchor="middle">'
                 f"{escape(x_name)}</text>")  # fmt: skip
    turned = f'transform="rotate(-90 14 {height / 2})"'
    parts.append(
        f'<text x="14" y="{height / 2}" font-size="12" text-anchor="middle" {turned}>'
        f"{escape(y_name)}</text></svg>"
    )
    return "\n".join(parts)


def bars(values: Sequence[tuple[str, float, str]], color: str = "#2c6fbb") -> str:
    """Horizontal bars as SVG: (label, value, text)"""
    largest = max((v for _, v, _ in values), default=0.0) or 1.0
    height = 22 * len(values) + 6
    parts = [f'<svg viewBox="0 0 900 {height}" width="900" height="{height}" role="img">']
    for index, (label, value, text) in enumerate(values):
        y, wide = 22 * index + 4, 420 * value / largest
        parts.append(f'<text x="300" y="{y + 13}" font-size="12" text-anchor="end">'
                     f"{escape(label)}</text>")  # fmt: skip
        parts.append(f'<rect x="308" y="{y}" width="{wide:.1f}" height="16" fill="{color}"/>')
        parts.append(f'<text x="{314 + wide:.1f}" y="{y + 13}" font-size="12">{escape(text)}'
                     "</text>")  # fmt: skip
    return "\n".join([*parts, "</svg>"])


def verify_page(data: dict) -> str:
    """The report of `attn-ext verify` from what its --json prints"""
    verdict = f"attn_ext: {data['failed']} failed" if data["failed"] else "attn_ext: all passed"
    if data["peers_failed"]:
        verdict += f"; peers: {data['peers_failed']} failed"
    verdict += f", {data['passed']} checks passed, {data['not_applicable']} not applicable"
    kind = "bad" if data["failed"] else "good"
    body = [f'<p class="verdict {kind}">{verdict}, {data["seconds"]} s</p>']
    body.append(facts(data["machine"]))
    body.append("<h2>Error against sequence length</h2><p>The largest error of the output; dashed: "
                "what twice the error of a naive computation in the same dtype, and rounding, "
                "allow.</p>")  # fmt: skip
    series, dashed = {}, []
    for o in data["outcomes"]:
        if not o["sweep"]:
            continue
        for m in o["measures"]:
            if m["name"] == "out" and m["max_error"] != "inf":
                name = f"{o['subject']} {o['dtype']}"
                allowed = f"{name} allowed"
                series.setdefault(name, []).append((o["sweep"], max(m["max_error"], 1e-17)))
                if o["ours"]:
                    series.setdefault(allowed, []).append((o["sweep"], m["allowed"]))
                    dashed.append(allowed)
    body.append(log_plot(series, "sequence length", "largest error", dashed))
    failures = [o for o in data["outcomes"] if o["state"] == "fail"]
    body.append("<h2>Failures</h2>")
    if failures:
        body.append(table(("subject", "check", "dtype", "what"),
                          [(o["subject"], f"{o['group']}: {o['check']}", o["dtype"], o["reason"])
                           for o in failures], ["fail"] * len(failures)))  # fmt: skip
    else:
        body.append("<p>None.</p>")
    body.append("<h2>All checks</h2>")
    rows, classes = [], []
    for o in data["outcomes"]:
        worst = max(o["measures"], key=_share, default=None)
        numbers = ("", "", "", o["reason"])
        if worst:
            allowed = "bitwise" if worst["allowed"] < 1e-299 else _short(worst["allowed"])
            errors = (_short(worst["max_error"]), _short(worst["rms_error"]))
            numbers = (worst["name"], *errors, allowed)
        rows.append((o["subject"], o["group"], o["check"], o["dtype"], o["state"], *numbers))
        classes.append({"fail": "fail", "n/a": "na"}.get(o["state"], ""))
    head = ("subject", "group", "check", "dtype", "", "worst", "max error", "rms error", "allowed")
    body.append(table(head, rows, classes))
    return page("attn-ext verify", "\n".join(body))


def _share(m: dict) -> float:
    return math.inf if m["max_error"] == "inf" else m["max_error"] / m["allowed"]


def _short(value) -> str:
    return value if isinstance(value, str) else f"{value:.2e}"
