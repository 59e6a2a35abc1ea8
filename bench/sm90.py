"""The Hopper kernels against those of sm80 and PyTorch, forward and backward, on an H100 or H200.

    python bench/sm90.py                  two tables: ms, TFLOP/s
    python bench/sm90.py --json FILE      the same as JSON
    python bench/sm90.py --fake           small shapes on the emulator, to test this script

The kernels are off by default (ATTN_EXT_CUDA_SM90) until this has been run on hardware.  Each
shape is first compared with the float64 reference at a small size of the same kind, then timed:
median of 20 runs between CUDA events after 5 runs that are not counted.  S with a plus: sequences
of these lengths one behind the other (cu_seqlens), which PyTorch's SDPA does not take.  Backward
is dQ, dK and dV from O, LSE and dO that are there; "sm90 det." the same with deterministic=True.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

from attn_ext.backends import native_gpu, registry
from attn_ext.backends.native_gpu import Kernels
from attn_ext.core.schema import Needs
from attn_ext.testing import check_call, random_call

# (head_dim, causal, heads_q, heads_k, seqlen or lengths of sequences); 16k tokens a call
PACKED = (8192, 4096, 2048, 1024, 512, 300, 130, 82)
SHAPES = [
    (d, causal, 2048 // d, 2048 // d, s)
    for d in (64, 128, 256)
    for causal in (False, True)
    for s in (1024, 4096, 16384)
] + [(128, True, 32, 8, 8192), (96, False, 16, 16, 4096), (192, True, 8, 8, 4096)]
SHAPES += [(64, True, 32, 32, PACKED), (128, True, 32, 8, PACKED), (256, True, 8, 8, PACKED)]


def module_of(kernels: Kernels):
    """What check_call takes: a backend over these kernels."""

    class Over:
        available, unsupported = staticmethod(lambda: ""), staticmethod(native_gpu.unsupported)
        forward, backward = kernels.forward, kernels.backward

    return Over


def kernels_of(fake: bool) -> dict[str, Kernels]:
    """{"sm80", "sm90"}; RuntimeError where there are none."""
    if fake:
        from attn_ext import _emulated as module

        module.set_mode("plain", smem_limit=227 * 1024)
    else:
        missing = registry.get("cuda").available()
        if missing:
            raise RuntimeError(missing)
        from attn_ext._C import cuda as module

        if why := module.sm90_problem(torch.cuda.current_device()):
            raise RuntimeError(why)
    found = {name: Kernels(module, "cpu" if fake else "cuda") for name in ("sm80", "sm90")}
    for name, kernels in found.items():
        kernels.sm90 = name == "sm90"
    return found


def milliseconds(run, fake: bool) -> float:
    """Median of 20 runs."""
    if fake:
        run()
        return 1.0
    for _ in range(5):
        run()
    times = []
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def runs_of(call, kernels, backward: bool) -> dict:
    """{peer: what is timed}"""
    group = call.q.shape[1] // call.k.shape[1]
    causal = call.window_right == 0

    def sdpa(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=call.scale, enable_gqa=group > 1
        )

    packed = call.cu_seqlens_q is not None
    if not backward:
        runs = {name: (lambda k=k: k.forward(call)) for name, k in kernels.items()}
        return runs if packed else {**runs, "torch": lambda: sdpa(call.q, call.k, call.v)}
    out, lse = kernels["sm80"].forward(call)[:2]
    dout = torch.randn_like(out.float()).to(out)

    def gradients(kernels, call):
        return lambda: kernels.backward(call, dout, out, lse, None, Needs(True, True, True))

    runs = {name: gradients(k, call) for name, k in kernels.items()}
    runs["sm90 det."] = gradients(kernels["sm90"], call._replace(deterministic=True))
    if not packed:
        leaves = [x.detach().requires_grad_() for x in (call.q, call.k, call.v)]
        graph = sdpa(*leaves)
        runs["torch"] = lambda: torch.autograd.grad(graph, leaves, dout, retain_graph=True)
    return runs


def measure(shape, dtype, kernels, backward: bool, fake: bool) -> dict:
    """One row: {peer: {ms, tflops}}; AssertionError where a kernel is wrong."""
    d, causal, hq, hk, s = shape
    device = "cpu" if fake else "cuda"
    group, packed = hq // hk, isinstance(s, tuple)
    lengths = {"seqlens_q": (130, 70), "seqlens_k": (200, 130)} if packed else {}
    for deterministic in (False, True)[: 1 + backward]:
        small = random_call(
            1, batch=1, heads_q=2 * group, heads_k=2, seqlen_q=200, seqlen_k=330, head_dim=d,
            causal=causal, dtype=dtype, device=device, deterministic=deterministic, **lengths,
        )  # fmt: skip
        for name, peer in kernels.items():
            peer._devices[0] = (1, name == "sm90")  # the small call must not be split
            check_call(small, module_of(peer), grads=backward)
            peer._devices.clear()
    batch = 1 if fake or packed else 16384 // s
    lengths = {"seqlens_q": s} if packed else {"seqlen_q": s}
    call = random_call(
        2, batch=batch, heads_q=hq, heads_k=hk, head_dim=d, causal=causal, dtype=dtype,
        device=device, **lengths,
    )  # fmt: skip
    pairs = sum(n * n for n in s) if packed else batch * s * s
    flops = 4 * hq * pairs * d * (0.5 if causal else 1) * (2.5 if backward else 1)
    shown = "+".join(map(str, s)) if packed else s
    row = {"head_dim": d, "causal": causal, "heads": f"{hq}/{hk}", "seqlen": shown, "batch": batch}
    row |= {"dtype": str(dtype).removeprefix("torch."), "backward": backward}
    for name, run in runs_of(call, kernels, backward).items():
        ms = milliseconds(run, fake)
        row[name] = {"ms": round(ms, 4), "tflops": round(flops / ms / 1e9, 1)}
    return row


def main(argv=None) -> int:
    """0 when both kernels were right and measured, 2 without a Hopper GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument("--fake", action="store_true", help="small shapes on the emulator")
    options = parser.parse_args(argv)
    try:
        kernels = kernels_of(options.fake)
    except (RuntimeError, ImportError) as error:
        print(f"bench/sm90.py: {error}", file=sys.stderr)
        return 2
    shapes = [(64, True, 2, 1, 150), (64, True, 2, 1, (70, 40))] if options.fake else SHAPES
    rows = []
    for backward in (False, True):
        peers = ("sm80", "sm90", "sm90 det.", "torch") if backward else ("sm80", "sm90", "torch")
        title = "backward" if backward else "forward"
        print(f"\n| {title}: D | causal | heads | S | dtype | {' | '.join(peers)} | (ms, TFLOP/s)")
        print("|---" * (5 + len(peers)) + "|")
        for shape in shapes:
            few = isinstance(shape[4], tuple) or shape[4] > 4096
            for dtype in (torch.bfloat16, torch.float16)[: 1 if few else 2]:
                rows.append(row := measure(shape, dtype, kernels, backward, options.fake))
                found = [row.get(p) for p in peers]
                cells = [f"{x['ms']:.3f}, {x['tflops']:.0f}" if x else "-" for x in found]
                head = [row[k] for k in ("head_dim", "causal", "heads", "seqlen", "dtype")]
                print("| " + " | ".join(map(str, head + cells)) + " |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
