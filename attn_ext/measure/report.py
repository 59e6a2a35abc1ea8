"""From a trace to an answer: shares of the ceiling, replays, and the text, JSON and HTML of a
profile.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

from attn_ext.measure import ceilings as ceiling
from attn_ext.measure.results import ceilings_line, machine, rounded
from attn_ext.measure.trace import Profile

REPLAYS = 8  # groups that are replayed, the costliest first
FORMAT = 1


def complete(result: Profile, replay: bool, budget: float = 12.0) -> ceiling.Ceilings | None:
    """Measure the ceilings and, where asked, replay the costliest groups, within about `budget`
    seconds: fills share_of_ceiling, replayed_ms, ours_ms, saves_seconds.
    """
    if not any(group.case for group in result.groups):
        return None
    roofs = ceiling.measure(result.device)
    for group in result.groups:
        if group.case:
            group.share_of_ceiling = roofs.least_seconds(group.case) * 1e3 / group.mean_ms
    if replay:
        _replay(result, budget)
    return roofs


def _replay(result: Profile, budget: float) -> None:
    from attn_ext.measure.measure import measure_case
    from attn_ext.measure.timing import clock_for

    clock, start = clock_for(result.device), time.perf_counter()
    for index, group in enumerate(result.groups):
        if group.case is None:
            group.note = group.note or "a layout that is not replayed"
            continue
        if group.backend == "attn_ext":
            group.note = "is attn_ext already"
            continue
        if index >= REPLAYS or time.perf_counter() - start > budget:
            group.note = "not replayed: the costlier ones took the time"
            continue
        peers = ["attn_ext", group.peer]
        rows, skipped = measure_case(group.case, peers, clock, None, 5, 0.6, False)
        times = {row.peer: row.median_ms for row in rows}
        group.replayed_ms, group.ours_ms = times.get(group.peer), times.get("attn_ext")
        if skipped:
            group.note = "; ".join(f"{s['peer']}: {s['reason']}" for s in skipped)
        if group.replayed_ms and group.ours_ms:
            group.saves_seconds = group.seconds * (1 - group.ours_ms / group.replayed_ms)


def saving(result: Profile) -> float:
    """Seconds that attn_ext would save in the groups where it is the faster one"""
    return sum(max(0.0, group.saves_seconds or 0.0) for group in result.groups)


def speedup(result: Profile) -> float:
    """How many times as fast all that is counted would be"""
    return result.wall / max(1e-9, result.wall - saving(result))


def arithmetic(result: Profile) -> list[str]:
    """How the prediction comes about, a line for each group that gains, and the sum"""
    gains = [group for group in result.groups if (group.saves_seconds or 0.0) > 0]
    lines = [
        f"{group.shape} {group.direction}: {group.seconds:.4g} s x (1 - {group.ours_ms:.4g} ms / "
        f"{group.replayed_ms:.4g} ms) = {group.saves_seconds:.4g} s"
        for group in gains
    ]
    if gains:
        after = result.wall - saving(result)
        lines.append(
            f"{result.wall:.4g} s - {saving(result):.4g} s = {after:.4g} s; {result.wall:.4g} s / "
            f"{after:.4g} s = {speedup(result):.2f}"
        )
    return lines


def headline(result: Profile) -> str:
    """One sentence"""
    nothing = "no call of an attention operator was recorded"
    base = _share_line(result) if result.groups else nothing
    if not result.groups and result.compiled:
        base += (
            " in code of torch.compile, which writes some attention (on CPUs that with dropout) as "
            "other operators: profile without it"
        )
    written = sum(result.written_out.values())
    if written > 0.002 * result.wall:
        shapes = ", ".join(list(result.written_out)[:3])
        base += (
            f"; a softmax over square matrices ({shapes}) took {written:.3g} s: attention written "
            "out, which attn_ext.attention could replace"
        )
    return base


def _share_line(result: Profile) -> str:
    share = result.attention / result.wall
    base = f"attention is {result.attention:.3g} s of {result.wall:.3g} s ({share:.0%})"
    if result.steps:
        base += f" in {result.steps} steps"
        base += f" after {result.skipped} of warm-up" if result.skipped else ""
    if result.busy:
        unit = "GPU" if result.device == "cuda" else "operator"
        base += f", {result.attention / result.busy:.0%} of {unit} time"
    gain = saving(result)
    if gain > 0:
        base += f"; attn_ext would save {gain:.3g} s (the whole {speedup(result):.2f}x as fast)"
    elif all(group.backend == "attn_ext" for group in result.groups):
        base += "; all of it is attn_ext"
    return base


HEAD = ("shape", "direction", "backend", "calls", "seconds", "ms a call", "of ceiling",
        "replayed ms", "attn_ext ms", "saves s", "note")  # fmt: skip


def cells(group) -> tuple[str, ...]:
    """A group as the tables print it"""

    def number(value, form):
        return "-" if value is None else format(value, form)

    return (
        group.shape, group.direction, group.backend, str(group.calls), f"{group.seconds:.4f}",
        f"{group.mean_ms:.3f}", number(group.share_of_ceiling, ".0%"),
        number(group.replayed_ms, ".3f"), number(group.ours_ms, ".3f"),
        number(group.saves_seconds, ".4f"), group.note,
    )  # fmt: skip


def text(result: Profile) -> str:
    """Headline and table as plain text"""
    rows = [HEAD, *(cells(group) for group in result.groups)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    lines = [headline(result)]
    if result.groups:
        lines += ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
                  for row in rows]  # fmt: skip
    lines += arithmetic(result)
    return "\n".join(lines)


def as_dict(result: Profile, roofs) -> dict:
    """What profile.json holds"""
    groups = []
    for group in result.groups:
        values = {k: rounded(v) for k, v in asdict(group).items() if k != "case"}
        groups.append(values | {"mean_ms": rounded(group.mean_ms)})
    return {
        "format": FORMAT,
        "machine": machine(result.device),
        "ceilings": roofs.as_dict() if roofs else None,
        "headline": headline(result),
        "device": result.device,
        "wall_seconds": rounded(result.wall),
        "steps": result.steps,
        "skipped_steps": result.skipped,
        "speedup": rounded(speedup(result)),
        "arithmetic": arithmetic(result),
        "busy_seconds": rounded(result.busy),
        "attention_seconds": rounded(result.attention),
        "saves_seconds": rounded(saving(result)),
        "written_out": {k: rounded(v) for k, v in result.written_out.items()},
        "groups": groups,
    }


def write(result: Profile, roofs, out: Path) -> dict:
    """profile.json and profile.html in the folder `out`; returns what the JSON holds"""
    from attn_ext.measure import html

    data = as_dict(result, roofs)
    (out / "profile.json").write_text(json.dumps(data, indent=1) + "\n")
    other = max(0.0, result.wall - result.attention)
    parts = [(f"{g.shape} {g.direction}, {g.backend}", g.seconds, f"{g.seconds:.3g} s")
             for g in result.groups[:12]]  # fmt: skip
    parts.append(("everything else", other, f"{other:.3g} s"))
    body = [f"<p class='verdict good'>{html.escape(data['headline'])}</p>", html.bars(parts)]
    body.append(html.table(HEAD, [cells(group) for group in result.groups]))
    if data["arithmetic"]:
        lines = "<br>".join(html.escape(line) for line in data["arithmetic"])
        body.append(f"<h2>How the saving is computed</h2><p>{lines}</p>")
    if roofs:
        body.append(f"<p>Ceilings: {html.escape(ceilings_line(roofs))}</p>")
    body.append(html.facts(data["machine"]))
    page = html.page("attn-ext profile", "\n".join(body))
    (out / "profile.html").write_text(page, encoding="utf-8")
    return data
