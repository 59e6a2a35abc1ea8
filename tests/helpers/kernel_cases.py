"""What the CPU kernels are tried on, whether vectors or Intel AMX compute: shapes, features, levels
of logits, random mixes of features, numbers of threads.
"""

import random

import torch

from attn_ext import _C
from attn_ext.backends import cpu
from attn_ext.testing import needs_of

# (seqlen_q, seqlen_k, head_dim, head_dim_v): what each would catch
SHAPES = {
    "one of everything": (1, 1, 1, 1),
    "no keys: empty rows": (5, 0, 8, 8),
    "no queries: dK and dV are zero": (0, 5, 8, 8),
    "odd sizes: every tail of the micro-kernels": (77, 131, 3, 7),
    "one query, many keys: split-KV": (1, 1000, 64, 64),
    "last key tile holds one key": (130, 193, 40, 40),
    "exactly one tile": (128, 192, 64, 64),
    "last query tile holds one query": (129, 128, 80, 48),
    "Dv wider than D": (33, 65, 16, 111),
    "widest heads": (20, 40, 512, 512),
}

FEATURES = {
    "causal, top left": {"causal": True, "align": 0},
    "causal, bottom right: first rows empty": {"causal": True, "align": 1, "seqlen_k": 90},
    "window": {"window": (20, 5)},
    "mask with empty rows": {"mask": "qk", "seqlen_k": 3},
    "bias": {"bias": True},
    "bias broadcast over batch and heads: shared dbias": {"bias": "qk"},
    "bias broadcast over queries and keys": {"bias": "h"},
    "softcap": {"softcap": 2.0},
    "ALiBi": {"alibi": "b"},
    "sink": {"sink": True},
    "dropout": {"dropout_p": 0.3},
    "drop all": {"dropout_p": 1.0},
    "GQA 8:1": {"heads_q": 8, "heads_k": 1},
    "all at once": {
        "causal": True,
        "window": (60, -1),
        "mask": "bk",
        "bias": "hqk",
        "softcap": 5.0,
        "alibi": True,
        "sink": True,
        "dropout_p": 0.2,
        "heads_q": 4,
        "heads_k": 2,
    },
}

# Factors on the keys of 700, four tiles: what each would catch
LEVELS = {
    "rising": lambda j: 1 + j / 50,  # bases that lag behind and lose nothing
    "leaping: exp overflows on the old base": lambda j: torch.where(j < 400, 1.0, 100.0),
    "falling": lambda j: 15 - j / 50,
    "one late key": lambda j: torch.where(j == 690, 100.0, 1.0),
    "every fourth key large": lambda j: 1 + 99 * (j % 4 == 1),  # bases of a part of the keys
    "small, then large, then small": lambda j: 1 + 40 * ((j > 200) & (j < 500)),
}


def random_features(r: random.Random) -> dict:
    """Options of random_call besides sizes and dtype."""
    return dict(
        causal=r.random() < 0.4,
        align=r.choice([0, 1]),
        window=r.choice([(-1, -1), (-1, -1), (0, 9), (50, -1)]),
        mask=r.choice([False, "k", "bqk", "hq"]),
        bias=r.choice([False, "qk", "bhqk", "bk", ""]),
        softcap=r.choice([0.0, 0.0, 4.0]),
        alibi=r.choice([False, True]),
        sink=r.random() < 0.3,
        dropout_p=r.choice([0.0, 0.0, 0.4]),
        stats=r.random() < 0.5,
        layout=r.choice(["bhsd", "bshd", "padded"]),
    )


def check_threads(call, openmp: bool, counts: tuple) -> None:
    """Outputs and gradients are bitwise equal for these numbers of threads, torch's or our own."""
    _C.use_openmp(cpu._torch_openmp() if openmp else 0)
    needs = needs_of(call)
    before, results = torch.get_num_threads(), []
    try:
        for threads in counts:
            torch.set_num_threads(threads)
            out, lse, *_ = cpu.forward(call)
            grads = cpu.backward(call, torch.ones_like(out), out, lse, None, needs)
            results.append([out, lse, *(g for g in grads if g is not None)])
    finally:
        torch.set_num_threads(before)
        _C.use_openmp(cpu._torch_openmp())
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)
