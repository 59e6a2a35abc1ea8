"""What a newcomer tries with context parallelism: unusual calls work, and wrong ones say on every
rank what is wrong, within seconds.  Four processes for all cases (tests/helpers/ranks.py)."""

import itertools

import pytest
import ranks
import torch
from closeness import SHARDS

METHODS = ("ring", "ulysses", "allgather")
UNUSUAL = [
    *itertools.product(METHODS, ("plain",), ("float32",), ("", "q", "k", "v")),
    *itertools.product(METHODS, ("rows", "columns"), ("float32",), ("qkv",)),
]
WRONG = {
    "mesh": ("TypeError", "mesh must be a DeviceMesh or a process group"),
    "layout": ("TypeError", "layout must be a Layout, got str 'zigzag'"),
    "method": ("ValueError", "method must be one of auto, ring"),
    "dimensions": ("ValueError", "q must have 4 dimensions [B, H, S_local, D]"),
    "integers": ("TypeError", "q must be float16, bfloat16, float32 or float64"),
    "columns": ("ValueError", "mask must be broadcastable to"),
    "loss": ("ValueError", "loss_sum must be a scalar, got shape (3,)"),
    "lengths": ("TypeError", "whole_lengths must be a torch.Tensor, got list"),
    "group": ("TypeError", "group must be a DeviceMesh or a process group"),
    "twice": ("NotImplementedError", "no double backward across ranks"),
    "forward": ("NotImplementedError", "no forward mode"),
}
CASES = [
    *[("unusual", 3, case) for case in UNUSUAL],
    ("groups", 4, ()), ("wrong_everywhere", 3, ()), ("wrong_on_one", 3, ()), ("forgotten", 2, ()),
]  # fmt: skip


@pytest.fixture(scope="module")
def found():
    """What all ranks returned of all cases."""
    return ranks.run("context_strangers", CASES)


@pytest.mark.parametrize("case", UNUSUAL, ids=lambda c: " ".join(c))
def test_unusual_calls(found, case):
    """A gradient that is lost, or that was not asked for; strides that are taken for others."""
    assert max(ranks.of(found, "unusual", 3, case)) <= SHARDS[torch.float32]


def test_groups(found):
    """A rank of the world taken for one of its group; two meshes that share what they agreed on."""
    assert max(ranks.of(found, "groups", 4)) <= SHARDS[torch.float32]


def test_wrong_everywhere(found):
    """An AttributeError of something within, zeros for a derivative, a call that waits for ever."""
    for by_name in ranks.of(found, "wrong_everywhere", 3):
        for name, (kind, text) in WRONG.items():
            assert by_name[name][0] == kind and text in by_name[name][1], (name, by_name[name])


def test_wrong_on_one(found):
    """A rank that refuses by itself while the others wait for it, or crash."""
    *others, own = ranks.of(found, "wrong_on_one", 3)
    for by_name in others:
        assert all("rank 2 deviates" in text for text in by_name.values()), by_name
    assert all(own.values()), own
    assert "mask must be broadcastable" in own["mask"] and "q must be a torch.Tensor" in own["q"]


def test_layouts_are_forgotten(found):
    """Memory that grows with each layout of packed documents."""
    assert all(ranks.of(found, "forgotten", 2))


def test_a_rank_that_says_nothing():
    """A wait of the store's own five minutes where the group's timeout is three seconds."""
    said = ranks.run_alone("context_strangers", "unheard", 3, 3, limit=150)
    for rank, (waited, peer, hop) in said.items():
        assert waited <= 5.0 and peer == 2 and hop == "the agreement", (rank, waited, peer, hop)
