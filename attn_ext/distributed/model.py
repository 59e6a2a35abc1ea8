"""What the ways of context attention cost on paper, by which method="auto" chooses.

The times are those that a rank waits: what its kernels do not hide.  Figures of kernels and wires
are for one H200 in bfloat16, causal, as the constants say; they are a model and no measurement.
"""

from __future__ import annotations

from typing import NamedTuple

FLOPS = 600e12  # forward products a second
NVLINK, INFINIBAND, LOOPBACK = 400e9, 45e9, 2e9  # bytes a second and rank, each way
CPU_FLOPS = 50e9
RANKS_OF_A_NODE = 8


class Sizes(NamedTuple):
    """What the model needs of a call."""

    batch: int
    heads_q: int
    heads_k: int
    seqlen: int
    head_dim: int
    bytes: int  # of a number
    parts: int
    causal: bool
    device: str


def fits_heads(heads_q: int, heads_k: int, parts: int) -> bool:
    """Whether heads can be dealt to so many ranks."""
    return heads_q % parts == 0 and (heads_k % parts == 0 or parts % heads_k == 0)


def exposed(sizes: Sizes, wire: float | None = None) -> dict[str, float]:
    """Seconds that a rank waits in a forward, for each method that serves the call."""
    gpu = sizes.device != "cpu"
    if wire is None:
        wire = (NVLINK if sizes.parts <= RANKS_OF_A_NODE else INFINIBAND) if gpu else LOOPBACK
    flops = FLOPS if gpu else CPU_FLOPS
    local = sizes.seqlen / sizes.parts
    row = sizes.batch * sizes.head_dim * sizes.bytes
    compute = 4 * sizes.batch * sizes.heads_q * local * local * sizes.head_dim / flops
    compute = compute / 2 if sizes.causal else compute
    hop = 2 * local * sizes.heads_k * row / wire
    found = {
        "ring": (sizes.parts - 1) * max(hop - compute, 0.0),
        "allgather": (sizes.parts - 1) * hop,
    }
    if fits_heads(sizes.heads_q, sizes.heads_k, sizes.parts):
        found["ulysses"] = 2 * local * (sizes.heads_q + sizes.heads_k) * row / wire
    return found


def threshold(heads_q: int, heads_k: int, causal: bool, wire: float, flops: float = FLOPS) -> float:
    """Tokens of a rank from which on its kernels hide the hops of a ring, in 16 bits: those of one
    hop, 4 Hq S_l^2 D / flops, last as long as its keys and values, 4 Hk S_l D / wire, travel."""
    return heads_k / heads_q * flops / wire * (2 if causal else 1)


def ring_from(heads_q: int, heads_k: int, parts: int, causal: bool, wire: float) -> float:
    """Tokens of a rank from which on a ring waits less than Ulysses does: the exchange of the
    latter grows with them, (P - 1) (hop - kernels) of the ring falls to nothing at its threshold.
    """
    share = 1 - (heads_q + heads_k) / (heads_k * max(parts - 1, 1))
    return threshold(heads_q, heads_k, causal, wire) * max(share, 0.0)


def choose(sizes: Sizes) -> str:
    """The method of the least waiting; the ring where it costs no more than another."""
    times = exposed(sizes)
    return min(times, key=lambda name: (times[name], name != "ring"))


def table(sizes: Sizes) -> str:
    """The model's figures as text."""
    chosen = choose(sizes)
    lines = [
        f"  {name:<10} waits {seconds * 1e3:.3f} ms a forward{', chosen' * (name == chosen)}"
        for name, seconds in sorted(exposed(sizes).items())
    ]
    return "\n".join(["context parallelism, on paper:", *lines])
