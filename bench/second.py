"""Forward mode and double backward of attention against math attention, time and memory.

    python bench/second.py [--sizes 256,1024] [--work jvp] [--causal] [--repeats 5] [--json FILE]

q, k, v [1, 2, N, 64] in float32 on one thread.  Math attention is torch's own under
sdpa_kernel(SDPBackend.MATH), the way of torch to second derivatives.  Times are of the process's
processor, taken in turns, the median; memory is what the process's peak grows by, each in a process
of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import attn_ext
from attn_ext.measure.timing import status_mib

SIZES = (64, 256, 1024, 2048, 4096, 8192)
HEADS, DIM = 2, 64


def math(q, k, v, causal: bool):
    """torch's attention that can be differentiated any number of times."""
    with sdpa_kernel(SDPBackend.MATH):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)


def ours(q, k, v, causal: bool):
    """The same by attn_ext."""
    return attn_ext.attention(q, k, v, causal=causal)


def jvp(function, inputs, tangents, causal: bool) -> None:
    """O and its tangent."""
    torch.func.jvp(lambda *x: function(*x, causal), inputs, tangents)


def double(function, inputs, tangents, causal: bool) -> None:
    """Forward, backward, and the gradients of a function of the gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves, causal)
    first = torch.autograd.grad(out, leaves, tangents[0], create_graph=True)
    torch.autograd.grad(first, leaves, tangents)


FUNCTIONS = {"math": math, "attn_ext": ours}
WORK = {"jvp": jvp, "double backward": double}


def data(n: int) -> tuple:
    """Inputs and their tangents."""
    torch.manual_seed(0)
    return tuple(tuple(torch.randn(1, HEADS, n, DIM) for _ in range(3)) for _ in range(2))


def times(work: str, n: int, causal: bool, repeats: int) -> dict[str, float]:
    """Milliseconds of each function, in turns."""
    inputs, tangents = data(n)
    found = {name: [] for name in FUNCTIONS}
    inner = max(1, (512 // n) ** 2)
    for round_ in range(repeats + 1):
        for name, function in FUNCTIONS.items():
            start = time.process_time()
            for _ in range(inner):
                WORK[work](function, inputs, tangents, causal)
            if round_:
                found[name].append((time.process_time() - start) / inner * 1e3)
    return {name: statistics.median(values) for name, values in found.items()}


def grown(work: str, name: str, n: int, causal: bool) -> float:
    """MiB that the peak of a process grows by."""
    code = f"import runpy; runpy.run_path({__file__!r})['peak']({work!r}, {name!r}, {n}, {causal})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def peak(work: str, name: str, n: int, causal: bool) -> None:
    """Prints what `grown` reads."""
    torch.set_num_threads(1)
    WORK[work](FUNCTIONS[name], *data(64), causal)
    inputs = data(n)
    before = status_mib("VmHWM")
    WORK[work](FUNCTIONS[name], *inputs, causal)
    print(status_mib("VmHWM") - before)


def main() -> None:
    """Print a table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--work", choices=WORK, help="one of both alone")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="measure memory, too")
    parser.add_argument("--json")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for work in [chosen.work] if chosen.work else WORK:
        for n in map(int, chosen.sizes.split(",")):
            row = {"work": work, "n": n, "causal": chosen.causal}
            row["ms"] = times(work, n, chosen.causal, chosen.repeats)
            text = f"{work:16} N={n:<5} "
            text += "  ".join(f"{name} {ms:9.2f} ms" for name, ms in row["ms"].items())
            text += f"  {row['ms']['math'] / row['ms']['attn_ext']:.2f} x"
            if chosen.memory:
                row["mib"] = {name: grown(work, name, n, chosen.causal) for name in FUNCTIONS}
                text += "  " + "  ".join(f"{k} {v:.0f} MiB" for k, v in row["mib"].items())
            print(text, flush=True)
            rows.append(row)
    if chosen.json:
        with open(chosen.json, "w", encoding="utf-8") as file:
            json.dump({"torch": torch.__version__, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
