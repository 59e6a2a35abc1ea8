"""Calls whose second derivatives are tested: every combination of eight features, and others."""

import itertools

import torch

from attn_ext.testing import random_call

FEATURES = {
    "causal": {"causal": True},
    "mask": {"mask": "bqk"},
    "bias": {"bias": "hqk"},
    "softcap": {"softcap": 1.5},
    "gqa": {"heads_k": 1},
    "sink": {"sink": True},
    "dropout": {"dropout_p": 0.2},
    "window": {"window": (4, 6)},
}
EVERY = list(itertools.product((False, True), repeat=len(FEATURES)))
# Each pair of features occurs with both, either and neither of them.
SAMPLE = [EVERY[i] for i in (0, 0b11111111, 0b01010101, 0b10101010, 0b00110011, 0b11001100,
                             0b00001111, 0b11110000, 0b01101001, 0b10010110)]  # fmt: skip


def combination(chosen, dtype=torch.float64, **more):
    """The call of the chosen features; heads of several widths, lengths that differ."""
    options = {"seqlen_q": 7, "seqlen_k": 9, "head_dim": 4, "head_dim_v": 3, "dtype": dtype}
    for on, feature in zip(chosen, FEATURES.values(), strict=True):
        options |= feature if on else {}
    return random_call(3, **options | more)


MORE = {
    "alibi of each batch element": {"alibi": "b", "causal": True, "seqlen_q": 9},
    "top-left, rows of no batch": {"align": 0, "causal": True, "bias": "k", "seqlen_k": 5},
    "rows that see no key": {"causal": True, "seqlen_q": 9, "seqlen_k": 5, "sink": True},
    "one key": {"seqlen_k": 1, "sink": True},
    "no keys": {"seqlen_k": 0},
    "bias of one number a head": {"bias": "h", "mask": "k"},
    "memory in another order": {"layout": "bshd", "mask": "bhqk"},
    "views into larger storage": {"layout": "padded", "bias": "bhqk"},
    "all of P dropped": {"dropout_p": 1.0},
    "varlen": {"seqlens_q": (5, 0, 4, 3), "seqlens_k": (6, 3, 0, 5), "window": (3, 2),
        "mask": "bqk", "bias": "hqk", "softcap": 2.0, "sink": True, "dropout_p": 0.3, "alibi": "b",
        "heads_q": 4, "heads_k": 2},
    "varlen, causal": {"seqlens_q": (5, 2), "causal": True, "bias": "k"},
}  # fmt: skip
