"""A Llama before and after attn_ext: time and memory of a training step.

    python examples/replace_sdpa.py [--short] [--length 2048] [--threads 2]

"torch" is transformers' own 'sdpa' attention; "replace_sdpa" the same model inside
`with attn_ext.replace_sdpa():`; "attn_ext" is attn_implementation="attn_ext", which repeats no keys
and makes no [S, S] mask.  LlamaForCausalLM at random weights: nothing is downloaded.  Each
measurement has a process of its own, so that its memory is its own (with --short all have one).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from rich.console import Console
from rich.table import Table

import attn_ext
from attn_ext.integrations import sdpa
from attn_ext.measure.timing import status_mib

CASES = ("one sequence", "padded batch of 2")
WAYS = ("torch", "replace_sdpa", "attn_ext")
VOCABULARY = 1000


def build(way: str):
    """The model at random weights: 2 layers, 8 query heads on 2 key heads of 32."""
    import transformers

    from attn_ext.integrations import transformers as integration

    integration.register()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=1 << 16,
        attn_implementation="attn_ext" if way == "attn_ext" else "sdpa",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


def inputs(case: str, length: int) -> dict:
    """Token numbers; in the padded batch the second sequence is half as long."""
    batch = 1 if case == CASES[0] else 2
    ids = torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1:, : length // 2] = 0
    return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}


def step(model, batch: dict) -> float:
    """Forward and backward; the loss."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item()


def peak_mib() -> float:
    """The largest memory that this process has had, in MiB."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return status_mib("VmHWM")


def measure(case: str, way: str, length: int, repeats: int) -> dict:
    """Median milliseconds of a step, MiB that steps added to the process, loss, gradient norm."""
    model, batch = build(way), inputs(case, length)
    step(model, inputs(case, 16))  # libraries load and threads start before memory is counted
    before = peak_mib()
    replaced = attn_ext.replace_sdpa() if way == "replace_sdpa" else contextlib.nullcontext()
    times = []
    with replaced:
        for _ in range(1 + repeats):
            start = time.perf_counter()
            loss = step(model, batch)
            times.append(1000 * (time.perf_counter() - start))
    grown = peak_mib() - before
    norm = sum(p.grad.double().square().sum().item() for p in model.parameters()) ** 0.5
    calls = sdpa.report()
    return {
        "ms": statistics.median(times[1:]), "mib": grown, "loss": loss,
        "norm": norm, "served": sum(calls.served.values()), "left": sum(calls.torch.values()),
    }  # fmt: skip


def measured(case: str, way: str, args) -> dict:
    """`measure`, in a fresh process if its memory is to be right."""
    if args.short:
        sdpa.reset()
        return measure(case, way, args.length, args.repeats)
    command = [
        sys.executable, __file__, "--measure", case, way, "--length", str(args.length),
        "--repeats", str(args.repeats), "--threads", str(args.threads),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def close(a: float, b: float) -> bool:
    """Equal but for the rounding of float32 sums in another order."""
    return abs(a - b) <= 1e-4 * max(abs(a), abs(b))


def arguments():
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=2048, help="tokens of the sequence")
    parser.add_argument("--repeats", type=int, default=5, help="steps that are timed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--short", action="store_true", help="256 tokens, 2 steps, padded (for CI)")
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.short:
        args.length, args.repeats = 256, 2
    args.cases = CASES[1:] if args.short else CASES
    for name in ("length", "repeats", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    return args


def main() -> None:
    """Measure both cases in each way and print the table."""
    args = arguments()
    if importlib.util.find_spec("transformers") is None:
        raise SystemExit('replace_sdpa.py needs transformers: pip install ".[integrations]"')
    torch.set_num_threads(args.threads)
    if args.measure:
        print(json.dumps(measure(*args.measure, args.length, args.repeats)))
        return
    table = Table(title=f"a training step, {args.length} tokens, {args.threads} thread(s), float32")
    for column in ("input", "attention", "ms a step", "MiB added", "loss", "gradient norm"):
        table.add_column(column, justify="left" if column in ("input", "attention") else "right")
    for case in args.cases:
        rows = {way: measured(case, way, args) for way in WAYS}
        for way, row in rows.items():
            table.add_row(
                case, way, f"{row['ms']:.1f}", f"{row['mib']:.1f}", f"{row['loss']:.5f}",
                f"{row['norm']:.5f}",
            )  # fmt: skip
        replaced = rows["replace_sdpa"]
        if not replaced["served"] or replaced["left"]:
            raise SystemExit(f"{case}: not all calls were served by attn_ext: {replaced}")
        for way in WAYS[1:]:
            if not all(close(rows[way][key], rows["torch"][key]) for key in ("loss", "norm")):
                raise SystemExit(f"{case}: results differ: {rows}")
    Console(width=100).print(table)
    print("all attention calls were served by attn_ext; losses and gradients agree")


if __name__ == "__main__":
    main()
