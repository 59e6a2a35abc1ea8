"""What the machine code lets expect of a GPU, beside what was measured on it: the end of gpu.py.

    python bench/predicted.py out/gpu/bench.json --arch 90

A hot loop keeps the tensor cores busy for a share of its time, by the model of machine_code.py:
`share_2_norm` of results/machine_code.json (CUDA) and results/triton_code.json (Triton).  A pass of
several products has the share of the time that these would take at the rates of their loops.  It is
a model of whole tiles: edges, launches and the ends of rows are not in it, so that long calls come
nearest.  The last column, measured over predicted, says how far the model holds.  Alike in all
rows, it is the clock and the matmul that the ceiling was measured by; in one row another than in
the rest, it is a fault of the model or of a kernel.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
# Of a direction: how much of the work of a forward its passes are, which have two and five products
WORK = {"fwd": {"forward": 1.0}, "bwd": {"backward": 2.5},
        "fwd+bwd": {"forward": 1.0, "backward": 2.5}}  # fmt: skip
CUDA = {"forward": "forward", "backward": "backward_fused"}
TRITON = {"forward": "forward", "backward": "fused"}


def shares(results: Path = RESULTS) -> dict[tuple[str, str, str, int], float]:
    """(peer, family, pass, head_dim) -> share; family "sm80" or "sm90"."""
    cuda = json.loads((results / "machine_code.json").read_text())["kernels"]
    triton = json.loads((results / "triton_code.json").read_text())["rows"]
    found = {}
    for family in ("sm80", "sm90"):
        for head_dim in (64, 128):
            for name in ("forward", "backward"):
                row = cuda[f"{family}_{CUDA[name]} {head_dim}"]
                found["attn_ext-cuda", family, name, head_dim] = row["share_2_norm"]
                architecture = f"{family[:2]}_{family[2:]}"
                rows = triton[f"{architecture} {TRITON[name]} {head_dim}"]
                found["attn_ext-triton", family, name, head_dim] = rows["ours full"]["share_2_norm"]
    return found


def predictions(report: dict, architecture: str, results: Path = RESULTS) -> Iterator[dict]:
    """Of each measured row that the model knows - 16 bits, a head dimension of 64 or 128, no
    dropout, more than one query - its case, peer, predicted share and measured share of the ceiling
    of matrix products, and their ratio.  architecture: "90", "80"; others run the CUDA kernels of
    sm_80, and Triton's, which have other tiles there, no prediction."""
    known, family = shares(results), "sm90" if architecture == "90" else "sm80"
    for row in report["rows"]:
        if row["peer"] == "attn_ext-triton" and architecture not in ("80", "90"):
            continue
        # B,H,S,D with Hq(Hk), Sq/Sk
        shape = re.fullmatch(r"\d+,\d+(?:\(\d+\))?,(\d+)(?:/\d+)?,(\d+)", row["shape"])
        work = WORK.get(row["direction"])
        if not shape or not work or row["dtype"] not in ("bf16", "fp16") or shape[1] == "1":
            continue
        parts = [(known.get((row["peer"], family, name, int(shape[2]))), part)
                 for name, part in work.items()]  # fmt: skip
        measured = row["share"] if row["bound"] == "compute" else None
        if measured is None or any(share is None for share, _ in parts):
            continue
        time = sum(part / share for share, part in parts)
        predicted = sum(part for _, part in parts) / time
        mask = "causal" if row["causal"] else "full"
        yield {
            "case": f"{row['shape']} {row['dtype']} {mask} {row['direction']}",
            "peer": row["peer"], "tflops": row["tflops"], "predicted": predicted,
            "measured": measured, "ratio": measured / predicted,
        }  # fmt: skip


def table(rows: list[dict]) -> str:
    """Markdown; a line that says so where there is no row."""
    if not rows:
        return "No measured row has a prediction.\n"
    lines = ["| case | peer | TFLOP/s | predicted share | measured share | ratio |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for x in rows:
        lines.append(
            f"| {x['case']} | {x['peer']} | {x['tflops']:.1f} | {x['predicted']:.2f} "
            f"| {x['measured']:.2f} | {x['ratio']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Print the table of a report"""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path, help="bench.json of gpu.py")
    parser.add_argument("--arch", required=True, help="of the GPU: 80, 90, 120")
    options = parser.parse_args(argv)
    report = json.loads(options.report.read_text())
    print(table(list(predictions(report, options.arch))), end="")


if __name__ == "__main__":
    main()
