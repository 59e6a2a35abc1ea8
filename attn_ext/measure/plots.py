"""PNG figures of a report: bars of times, and a roofline.  Need matplotlib."""

from __future__ import annotations

from pathlib import Path

from attn_ext.measure.results import Report, Row, ceilings_line

DPI = 130
MOST_PIXELS = 1600  # of the height: what a page still shows

COLORS = {
    "attn_ext": "#c0392b", "torch": "#2c6fbb", "naive": "#999999", "torch-math": "#c9c9c9",
    "torch-flash": "#7fb2e5", "torch-efficient": "#54a0a8", "torch-cudnn": "#1f4e79",
    "flex": "#8e6bbf", "openvino": "#f0a030", "onnxruntime-mha": "#5aa469",
    "onnxruntime-gqa": "#88c29a", "onnxruntime-att23": "#b8dcc2", "flash-attn": "#f27ea9",
    "xformers": "#b07d4f", "attn_ext-triton": "#e57368", "attn_ext-cuda": "#8c1f15",
}  # fmt: skip


def pyplot():
    """matplotlib.pyplot without a display; ImportError names the extra that brings it"""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("figures need matplotlib: pip install 'attn_ext[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def value_of(row: Row) -> float:
    """The share of the machine's ceiling; where there is none, attn_ext's time over the peer's"""
    return row.share if row.share is not None else 1 / row.ratio if row.ratio else 0.0


def bars(report: Report, path: Path) -> Path:
    """Each case's least possible time over each peer's median: 1 is the ceiling.  Where there is
    no ceiling, attn_ext's time over each peer's.  A bar a peer while that fits MOST_PIXELS, else a
    line a case with a dot for each peer.
    """
    rows = [row for row in report.rows if row.median_ms]
    cases = list(dict.fromkeys(row.case for row in rows))
    height = max(2.5, 0.14 * len(rows) + 0.3 * len(cases) + 1.2)
    draw = _bars if height * DPI <= MOST_PIXELS else _dots
    figure, all_axes = draw(rows, cases, height)
    shares = any(row.share is not None for row in rows)
    for axes in all_axes:
        axes.invert_yaxis()
        axes.set_xlabel("share of the machine's ceiling" if shares else "speed, attn_ext = 1")
        if shares:
            axes.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    figure.suptitle(f"{report.title}\n{subtitle(report)}", fontsize=9)
    if rows:
        figure.legend(fontsize=7, loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=DPI)
    pyplot().close(figure)
    return path


def _bars(rows: list[Row], cases: list[str], height: float) -> tuple:
    figure, axes = pyplot().subplots(figsize=(10, height), layout="constrained")
    y, ticks, named = 0.0, [], set()
    for case in cases:
        group = [row for row in rows if row.case == case]
        ticks.append(y + (len(group) - 1) / 2)
        for row in group:
            label = None if row.peer in named else row.peer
            named.add(row.peer)
            color = COLORS.get(row.peer, "#444444")
            axes.barh(y, value_of(row), 0.9, color=color, label=label)
            axes.text(value_of(row), y, f" {row.median_ms:.3g} ms", va="center", fontsize=6)
            y += 1
        y += 1.2
    axes.set_yticks(ticks, cases, fontsize=7)
    return figure, [axes]


def _dots(rows: list[Row], cases: list[str], height: float) -> tuple:
    lines = -(-len(cases) // 2)
    inches = min(0.2 * lines + 1.6, MOST_PIXELS / DPI)
    figure, columns = pyplot().subplots(1, 2, figsize=(12, inches), sharex=True,
                                        layout="constrained")  # fmt: skip
    named = set()
    for axes, part in zip(columns, (cases[:lines], cases[lines:]), strict=True):
        for row in (row for row in rows if row.case in part):
            label = None if row.peer in named else row.peer
            named.add(row.peer)
            ours = row.peer == "attn_ext"
            axes.plot(
                value_of(row), part.index(row.case), "o", markersize=7 if ours else 4,
                fillstyle="full" if row.state == "ok" else "none",
                color=COLORS.get(row.peer, "#444444"), label=label, zorder=2 if ours else 3,
            )  # fmt: skip
        axes.set_yticks(range(len(part)), part, fontsize=7)
        axes.set_ylim(-0.7, len(part) - 0.3)
        axes.grid(axis="y", linewidth=0.3)
    return figure, list(columns)


def roofline(report: Report, path: Path) -> Path:
    """TFLOP/s over FLOPs a byte, under the roofs of arithmetic (per dtype) and of memory"""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    rows = [row for row in report.rows if row.tflops and row.gb_s]
    points = [(row.tflops * 1e3 / row.gb_s, row.tflops * 1e3) for row in rows] or [(1.0, 1.0)]
    low, high = min(x for x, _ in points) / 3, max(x for x, _ in points) * 3
    if report.ceilings:
        c = report.ceilings
        for name, roof in (("fp32", c.fp32), ("16-bit", c.half)):
            if roof:
                ridge = roof / c.read
                xs = [min(low, ridge / 3), ridge, max(high, 2 * ridge)]
                axes.plot(xs, [min(roof, x * c.read) for x in xs], "k-", linewidth=1)
                axes.text(xs[-1], roof * 1.04, name, ha="right", fontsize=8)
    seen = set()
    for row, (x, y) in zip(rows, points, strict=False):
        label = None if row.peer in seen else row.peer
        seen.add(row.peer)
        marker = "o" if row.direction == "fwd" else "^"
        axes.plot(x, y, marker, color=COLORS.get(row.peer, "#444444"), markersize=5, label=label)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="GFLOP/s")
    axes.set_title(f"{report.title}\n{subtitle(report)}", fontsize=9)
    axes.grid(True, which="both", linewidth=0.3)
    if seen:
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def subtitle(report: Report) -> str:
    """Device, threads, torch and ceilings in one line"""
    m = report.machine
    device = m.get("gpu") or f"{m.get('cpu')}, {m.get('threads')} threads"
    roofs = f"; {ceilings_line(report.ceilings)}" if report.ceilings else ""
    return f"{device}, torch {m.get('torch')}{roofs}"
