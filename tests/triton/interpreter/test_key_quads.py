"""Dropout, masks and biases of dK and dV where a thread has four keys of one Philox evaluation, by
the Triton kernels, interpreted with a tile that has 32 keys a warp, as that of GPUs has.
"""

import planted_triton
import pytest
import torch

from attn_ext.testing import check_call, random_call
from attn_ext.triton_kernels import configs
from attn_ext.triton_kernels.kernels import dkdv, logits, primitives
from attn_ext.triton_kernels.launch import attention

TILE = configs.Tile(32, 64, 2, 1)
# Whole tiles of keys and queries, and cut ones of both
SIZES = {"batch": 1, "heads_q": 2, "seqlen_q": 66, "seqlen_k": 140, "head_dim": 16}
CASES = {
    "dropout, in two kernels": {"dropout_p": 0.3, "deterministic": True},
    "dropout, in one": {"dropout_p": 0.3, "dtype": torch.bfloat16},
    "dropout of an odd length": {
        "dropout_p": 0.3, "batch": 2, "seqlens_q": [33, 7], "seqlens_k": [67, 140],
    },
    "mask and bias": {"mask": "bqk", "bias": "hqk", "dtype": torch.bfloat16},
    "bias": {"bias": "hqk", "dtype": torch.bfloat16},
    "all": {"mask": "bqk", "bias": "hqk", "dropout_p": 0.3, "dtype": torch.float16},
}  # fmt: skip


def quads(call, tile) -> bool:
    """Whether the kernels of dK and dV take the keys in fours."""
    return bool(attention.Plan(call).key_flags(tile) & primitives.KEY_QUADS.value)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """The launcher takes a tile of which it concludes by itself that threads hold four keys."""
    monkeypatch.setattr(configs, "INTERPRETED", TILE)


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_keys_in_fours(name):
    """A word of dropout, a byte of the mask or half a word of the bias at another key than its own,
    in the first or second half of a tile; gradients written to other rows than they belong to."""
    call = random_call(3, **SIZES | CASES[name])
    assert quads(call, attention.Plan(call).tile("dkdv"))
    check_call(call, "triton")


GPUS = configs.Tile(32, 128, 4, 1)  # that of GPUs at 64 columns, but for its stages


def test_gradients_of_keys_in_fours_of_four_warps(monkeypatch):
    """An order that is right where two warps share a tile, and no more."""
    monkeypatch.setattr(configs, "INTERPRETED", GPUS)
    call = random_call(3, **SIZES | CASES["dropout, in one"] | {"seqlen_k": 160})
    assert quads(call, GPUS)
    check_call(call, "triton")


def test_which_tiles_have_keys_in_fours():
    """The order on a tile whose threads hold two keys of an evaluation, of which each thread would
    use one; on calls whose keys have no order, which would be compiled twice."""
    call = random_call(3, **SIZES | CASES["all"])
    for warps, expected in ((1, False), (2, True), (4, False)):
        assert quads(call, TILE._replace(warps=warps)) == expected
    assert not quads(random_call(3, **SIZES), TILE)
    assert not quads(random_call(3, **SIZES | {"mask": "bqk"}), TILE)
    assert not quads(random_call(3, **SIZES | {"mask": "bqk", "bias": "hk"}), TILE)  # as a row


PLANTED = {
    "halves and rows eight apart exchanged": (
        "primitives", "own_key_order", "(e << 1) | ((n & 8) >> 3)", "e | ((n & 8) >> 2)",
        "dropout, in one",
    ),
    "each warp has the keys of the first": (
        "primitives", "own_key_order", "((n & (BLOCK_N // 2 - 16)) << 1) | ", "", "mask and bias",
    ),
    "words of dropout as they lie": (
        "dropout", "keep_own", "[4, 0, 3, 1, 2]", "[3, 0, 4, 1, 2]", "dropout, in two kernels",
    ),
    "another byte": (
        "logits", "score_words", "n // (N // 2) * 2 + ((n & 8) >> 3)", "n & 3", "mask and bias",
    ),
    "words of a bias as they lie": (
        "logits", "score_words", "[2, 0, 1, 3]", "[0, 1, 2, 3]", "bias",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug_in_keys_in_fours_is_caught(name, monkeypatch, tmp_path):
    """The test above with a tile that has no such order."""
    kernels, function, before, after, case = PLANTED[name]
    module = planted_triton.planted(kernels, before, after, tmp_path)
    user = logits if kernels == "logits" else dkdv
    monkeypatch.setattr(user, function, getattr(module, function))
    with pytest.raises(AssertionError):
        check_call(random_call(3, **SIZES | CASES[case]), "triton")


def test_planted_bug_in_the_keys_of_the_third_warp_is_caught(monkeypatch, tmp_path):
    """A test of four warps that looks at two."""
    monkeypatch.setattr(configs, "INTERPRETED", GPUS)
    call = random_call(3, **SIZES | CASES["dropout, in one"] | {"seqlen_k": 160})
    module = planted_triton.planted("primitives", "BLOCK_N // 2 - 16)", "16)", tmp_path)
    monkeypatch.setattr(dkdv, "own_key_order", module.own_key_order)
    with pytest.raises(AssertionError):
        check_call(call, "triton")


OF_PAIRS = {
    "the other factor": ("0xCD9E8D57, 0xD2511F53).to", "0xD2511F53, 0xCD9E8D57).to"),
    "the other number multiplied": ("tl.where(first, c2, c0)", "tl.where(first, c0, c2)"),
    "the other number combined": ("tl.where(first, c1, c3)", "tl.where(first, c3, c1)"),
    "the other word of the key": ("tl.where(first, key0, key1)", "tl.where(first, key1, key0)"),
}


@pytest.mark.parametrize("name", OF_PAIRS)
def test_planted_bug_in_pairs_of_keys_is_caught(name, monkeypatch, tmp_path):
    """A last round of which no test looks at what a thread chooses before it."""
    monkeypatch.setattr(configs, "INTERPRETED", TILE._replace(warps=4))
    call = random_call(3, **SIZES | CASES["dropout, in two kernels"])
    assert not quads(call, attention.Plan(call).tile("dkdv"))
    module = planted_triton.planted("dropout", *OF_PAIRS[name], tmp_path)
    monkeypatch.setattr(dkdv, "keep_own", module.keep_own)
    with pytest.raises(AssertionError):
        check_call(call, "triton")
