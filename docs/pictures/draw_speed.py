"""speed.png: how many times longer torch and the best other peer take, from
bench/results/cpu.json.
"""

from __future__ import annotations

import json

from drawing import ROOT, plt, save

SHAPES = (  # (shape, causal)
    ("8,12,128,64", False),
    ("2,16,512,64", False),
    ("1,8,1024,64", True),
    ("1,8,4096,64", False),
    ("1,8,4096,64", True),
    ("1,8,4096,128", True),
)
BARS = (  # (dtype, torch or the best other, colour, label)
    ("fp32", "torch", "#2c6fbb", "torch, float32"),
    ("fp32", "best", "#a9c8ea", "best other, float32"),
    ("bf16", "torch", "#d9711c", "torch, bfloat16"),
    ("bf16", "best", "#f6c79b", "best other, bfloat16"),
)
NAMES = {"onnxruntime-mha": "ORT", "onnxruntime-gqa": "ORT", "onnxruntime-att23": "ORT",
         "openvino": "OpenVINO", "ggml": "ggml", "naive": "naive",
         "torch-math": "math"}  # fmt: skip


def ratios(rows: list[dict], *case) -> dict:
    """{"torch": ratio, "best": ratio, "name": of the best other}, of results within the tolerance;
    case: (shape, causal, dtype, direction)."""
    found = [
        r
        for r in rows
        if (r["shape"], r["causal"], r["dtype"], r["direction"]) == case
        and r["state"] == "ok"
        and r["ratio"]
    ]
    out = {r["peer"]: r["ratio"] for r in found if r["peer"] == "torch"}
    others = [r for r in found if r["peer"] in NAMES]
    if others:
        best = min(others, key=lambda r: r["ratio"])
        out |= {"best": best["ratio"], "name": NAMES[best["peer"]]}
    return out


def label(shape: str, causal: bool) -> str:
    """Two or three short lines."""
    batch, heads, length, dim = shape.split(",")
    return f"B {batch}, H {heads}\nS {length}, D {dim}" + ("\ncausal" if causal else "")


def panel(axes, rows: list[dict], direction: str, title: str) -> None:
    """Four bars a shape."""
    for i, (shape, causal) in enumerate(SHAPES):
        for n, (dtype, kind, color, _) in enumerate(BARS):
            found = ratios(rows, shape, causal, dtype, direction)
            if kind not in found:
                continue
            x, value = i + (n - 1.5) * 0.21, found[kind]
            axes.bar(x, value, 0.2, color=color)
            text = f" {value:.1f}" + (f" {found['name']}" if kind == "best" else "")
            axes.text(x, value, text, rotation=90, ha="center", va="bottom", fontsize=6.5)
    axes.axhline(1, color="#c0392b", linewidth=1.4)
    axes.set_xticks(range(len(SHAPES)), [label(*s) for s in SHAPES], fontsize=6.4)
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", labelsize=7)


def main() -> None:
    rows = json.loads((ROOT / "bench" / "results" / "cpu.json").read_text())["rows"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.1), sharey=True, layout="constrained")
    panel(left, rows, "fwd", "forward")
    panel(right, rows, "fwd+bwd", "forward and backward")
    left.set_ylim(0, left.get_ylim()[1] * 1.12)  # room for the names above the longest bar
    left.set_ylabel("times as long as attn_ext", fontsize=8)
    bars = [plt.Rectangle((0, 0), 1, 1, color=color) for _, _, color, _ in BARS]
    line = plt.Line2D([], [], color="#c0392b")
    labels = ["attn_ext", *(text for *_, text in BARS)]
    figure.legend(
        [line, *bars], labels, loc="outside upper center", ncols=5, fontsize=7, frameon=False
    )
    save(figure, __doc__, "speed")


if __name__ == "__main__":
    main()
