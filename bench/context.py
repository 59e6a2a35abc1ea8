"""Context parallelism: what the kernels of a rank cost, how long ranks wait, and the paper model.

    python bench/context.py [--seqlen 8192] [--parts 4] [--rounds 3] [--waiting] [--out FOLDER]

Kernels: the calls of each rank of a zigzag layout, one after the other in this process on one
thread, as a share of the whole call / P; medians of process time, whole and ranks in turns.
Waiting (--waiting): two processes on gloo, the part of a ring's wall time that a rank waits.
Model: FLOP/s and bytes/s of `attn_ext/distributed/model.py`, of data sheets and not measured.
Writes context.json and context.png.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import time
from pathlib import Path

import torch
from machine import RESULTS, describe

import attn_ext
from attn_ext.backends.sums import of_lse
from attn_ext.distributed import Layout, comm, context_attention, local, model
from attn_ext.distributed.pieces import Rules, pieces

HEADS_Q, HEADS_K, DIM = 4, 2, 64
MODELS = {"grouped heads, 32 / 8": (32, 8), "one key head each, 32 / 32": (32, 32)}
WIRES = {"NVLink": model.NVLINK, "InfiniBand": model.INFINIBAND}
BACKWARD = 500e12  # FLOP/s, as model.FLOPS


class Rank:
    """The kernels of one rank of a ring, hop after hop, without the wire."""

    def __init__(self, layout: Layout, rank: int, q, k, v, dout, out, lse):
        take = lambda x: layout.shard(x, 2, rank)  # noqa: E731
        self.q, self.dout, self.sums = take(q), take(dout), of_lse(take(lse))
        self.delta = (self.dout * take(out)).sum(-1)
        numbers = local.Scalars(None, 0.0, 0.0, -1, 0, False, "auto", False)
        sides, self.hops = local.Sides(None, None, None, None), []
        for hop in range(layout.parts):
            owner = (rank - hop) % layout.parts
            keys, values = (layout.shard(x, 2, owner) for x in (k, v))
            of_q, of_k = layout.segments(rank), layout.segments(owner)
            found = pieces(layout, of_q, of_k, Rules(right=0))
            blocks = local.blocks(found, self.q, keys, values, sides, numbers)
            self.hops.append((blocks, keys, values))

    def forward(self):
        """All hops merged."""
        out, sums = local.no_rows(self.q, self.hops[0][2])
        for hop, (blocks, _, _) in enumerate(self.hops):
            local.forward(blocks, out, sums, fresh=hop == 0)
        return out, sums

    def backward(self) -> None:
        """All hops, with the additions of sums that travel."""
        dq = torch.zeros_like(self.q)
        for blocks, keys, values in self.hops:
            into = local.Gradients(dq, torch.zeros_like(keys), torch.zeros_like(values), None)
            local.backward(blocks, self.dout, self.delta, self.sums, into)


def data(seqlen: int):
    """q, k, v and dout of the whole."""
    torch.manual_seed(0)
    heads = (HEADS_Q, HEADS_K, HEADS_K, HEADS_Q)
    return [torch.randn(1, h, seqlen, DIM) for h in heads]


def kernels(seqlen: int, parts: int, rounds: int) -> dict:
    """{direction: {"whole_ms", "share" of each rank}}; a rank's share of whole / P."""
    q, k, v, dout = data(seqlen)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = attn_ext.attention(*leaves, causal=True, return_lse=True)
    plain = [x.detach() for x in (q, k, v)]
    ranks = [
        Rank(Layout.zigzag(seqlen, parts), r, *plain, dout, out.detach(), lse.detach())
        for r in range(parts)
    ]
    work = {
        "forward": (lambda: attn_ext.attention(*plain, causal=True), [r.forward for r in ranks]),
        "backward": (
            lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True),
            [r.backward for r in ranks],
        ),
    }
    found = {}
    for direction, (whole, own) in work.items():
        calls = [whole, *own]
        times = [[] for _ in calls]
        for round_ in range(rounds + 1):
            for at, call in enumerate(calls):
                begun = time.process_time()
                call()
                if round_:  # the first one warms up
                    times[at].append(time.process_time() - begun)
        whole_s, *own_s = map(statistics.median, times)
        found[direction] = {
            "whole_ms": whole_s * 1e3,
            "share": [x * parts / whole_s for x in own_s],
        }
    return found


def waiting(seqlen: int, parts: int, rounds: int) -> dict:
    """{"wall_ms", "waiting_ms"} of a forward and backward by the ring, of the slowest rank."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    arguments = (parts, port, seqlen, rounds, results)
    torch.multiprocessing.spawn(_waits, arguments, parts)
    found = [results.get() for _ in range(parts)]
    return max(found, key=lambda each: each["wall_ms"])


def _waits(rank: int, parts: int, port: int, seqlen: int, rounds: int, results) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=parts)
    waited, wait = [0.0], comm.Waiting.wait

    def timed(self) -> None:
        begun = time.perf_counter()
        wait(self)
        waited[0] += time.perf_counter() - begun

    comm.Waiting.wait = timed
    layout = Layout.zigzag(seqlen, parts)
    *inputs, dout = (layout.shard(x, 2, rank) for x in data(seqlen))
    leaves = [x.clone().requires_grad_() for x in inputs]
    walls, waits = [], []
    for _ in range(rounds + 1):
        torch.distributed.barrier()
        waited[0], begun = 0.0, time.perf_counter()
        mesh = torch.distributed.group.WORLD
        out = context_attention(*leaves, layout=layout, mesh=mesh, method="ring", causal=True)
        torch.autograd.grad(out, leaves, dout)
        walls.append(time.perf_counter() - begun)
        waits.append(waited[0])
    at = sorted(range(1, rounds + 1), key=walls.__getitem__)[rounds // 2]
    results.put({"wall_ms": walls[at] * 1e3, "waiting_ms": waits[at] * 1e3})
    torch.distributed.destroy_process_group()


def thresholds() -> list[dict]:
    """Tokens of a rank from which on a ring is hidden, causal, 16 bits."""
    rows = []
    for name, heads in MODELS.items():
        for wire, speed in WIRES.items():
            row = {"heads": name, "wire": wire, "forward": model.threshold(*heads, True, speed)}
            # 10 Hq S_l^2 D products; K, V and float32 dK, dV: 12 Hk S_l D bytes
            row["backward"] = heads[1] / heads[0] * 1.2 * 2 * BACKWARD / speed
            row["with Ulysses of 8"] = row["forward"] / 8
            row["less than Ulysses"] = model.ring_from(*heads, 8, True, speed)
            rows.append(row)
    return rows


def curves(parts: int, heads, wire: float) -> dict[str, list]:
    """Milliseconds that a causal forward waits, by tokens of a rank."""
    found = {
        "tokens": [round(2 ** (n / 8)) for n in range(8 * 8, 17 * 8 + 1)],
        "kernels": [],
        "ring": [],
        "ulysses": [],
    }
    for tokens in found["tokens"]:
        sizes = model.Sizes(1, *heads, tokens * parts, 128, 2, parts, True, "cuda")
        times = model.exposed(sizes, wire)
        found["ring"].append(times["ring"] * 1e3)
        found["ulysses"].append(times["ulysses"] * 1e3)
        found["kernels"].append(2 * heads[0] * tokens * tokens * parts * 128 / model.FLOPS * 1e3)
    return found


def draw(path: Path, parts: int = 8) -> None:
    """The model's waiting beside the kernels' time, over each wire."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    heads = MODELS["grouped heads, 32 / 8"]
    for each, (wire, speed) in zip(axes, WIRES.items(), strict=True):
        found = curves(parts, heads, speed)
        styles = (("kernels", "0.55", "--"), ("ring", "#2c6fbb", "-"), ("ulysses", "#d9711c", "-"))
        for name, colour, style in styles:
            label = "kernels" if name == "kernels" else f"waiting, {name}"
            each.plot(found["tokens"], found[name], style, color=colour, label=label)
        limit = model.threshold(*heads, True, speed)
        each.axvline(limit, color="#2c6fbb", linewidth=0.8, linestyle=":")
        title = f"{wire}, {speed / 1e9:.0f} GB/s: a ring is hidden from {limit:,.0f} tokens"
        each.set_title(title, fontsize=9)
        each.set_xscale("log", base=2), each.set_yscale("log"), each.set_ylim(1e-3, 1e3)
        each.set_xlabel("tokens of a rank"), each.grid(alpha=0.3), each.legend(frameon=False)
    axes[0].set_ylabel("ms of a causal forward (paper model)")
    figure.suptitle(f"{parts} GPUs, heads {heads[0]} / {heads[1]}, D 128, bfloat16", fontsize=10)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Print, write JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seqlen", type=int, default=8192)
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--waiting", action="store_true", help="measure on two processes, too")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    found = {"machine": describe(), "seqlen": chosen.seqlen, "parts": chosen.parts}
    found["kernels"] = kernels(chosen.seqlen, chosen.parts, chosen.rounds)
    for direction, row in found["kernels"].items():
        shares = ", ".join(f"{x:.3f}" for x in row["share"])
        mean = statistics.mean(row["share"])
        text = f"whole {row['whole_ms']:.1f} ms; ranks / (whole / P): {shares}; mean {mean:.3f}"
        print(f"{direction:8} {text}", flush=True)
    if chosen.waiting:
        row = found["waiting"] = waiting(chosen.seqlen, 2, chosen.rounds)
        print(f"ring of 2: {row['waiting_ms']:.1f} of {row['wall_ms']:.1f} ms waiting", flush=True)
    found["thresholds"] = thresholds()
    for row in found["thresholds"]:
        print(f"{row['heads']:28} {row['wire']:10} ring hidden from {row['forward']:6.0f} tokens a "
              f"rank, backward {row['backward']:6.0f}, with Ulysses of 8 inside "
              f"{row['with Ulysses of 8']:5.0f}; of 8 ranks it waits less than Ulysses from "
              f"{row['less than Ulysses']:5.0f}")  # fmt: skip
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "context.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(chosen.out / "context.png")


if __name__ == "__main__":
    main()
