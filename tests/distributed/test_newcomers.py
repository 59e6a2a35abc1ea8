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
# Placements of q, k and v on a mesh (a letter a dimension: batch, heads, rows), what the call
# has, and how it is made: what each would miss that the others see
SHARDED = [
    (2, ("s", "plain")),
    (3, ("s", "everything")),  # shards of unlike lengths
    (4, ("s", "broadcast")),
    (2, ("b", "dropout")),
    (4, ("hs", "dropout")),
    (4, ("bs", "everything")),
    (4, ("bh", "dropout")),
    (3, ("h", "dropout", "whole")),  # heads that do not divide
    (2, ("s", "plain", "compile-whole")),
    (2, ("h", "dropout", "compile")),
]
MODELS = [("Llama", "zigzag"), ("Mistral", "contiguous"), ("Llama", "packed")]
REFUSED = {
    "no positions": "position_ids must be those of contiguous or zigzag",
    "padding": "attention_mask must not hide tokens",
    "a mask of the shard": "attention_mask must have this rank's 18 rows and all 36 columns",
    "a cache": "a cache is not sharded",
    "layout": "layout must be a Layout or a function that gives one, got int",
    "method": "mesh must be given with layout or method",
}
CASES = [
    *[("unusual", 3, case) for case in UNUSUAL],
    ("groups", 4, ()), ("wrong_everywhere", 3, ()), ("wrong_on_one", 3, ()), ("forgotten", 2, ()),
    *[("dtensors", parts, case) for parts, case in SHARDED], ("plain_side", 2, ()),
    *[("model", 2, case) for case in MODELS], ("model_refuses", 2, ()),
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


@pytest.mark.parametrize("case", SHARDED, ids=lambda c: f"{c[0]} {' '.join(c[1])}")
def test_dtensors(found, case):
    """Rows that do not see other ranks' keys; dropout that counts a shard's batch and heads; a
    gradient of what ranks share that is not added up; a compiler that knows no sharding."""
    assert max(ranks.of(found, "dtensors", *case)) <= SHARDS[torch.float32]


def test_a_side_that_is_no_dtensor(found):
    """A mask of which nobody knows whether it is the whole or a shard."""
    for text in ranks.of(found, "plain_side", 2):
        assert "mask must be a DTensor where q is one" in text


@pytest.mark.parametrize("case", MODELS, ids=" ".join)
def test_models_of_transformers(found, case):
    """register(mesh=...): a shard taken for the whole by masks, positions or windows."""
    assert max(ranks.of(found, "model", 2, case)) <= SHARDS[torch.float32]


def test_what_models_may_not_ask(found):
    """Padding, a cache or a mask that is dropped without a word."""
    said = ranks.of(found, "model_refuses", 2)
    for name, text in REFUSED.items():
        # without positions a model makes up those of rank 0, which are right there
        own = said[1:] if name == "no positions" else said
        assert all(text in each[name] for each in own), (name, said)
    assert "rank 1 deviates" in said[0]["no positions"]


def test_a_rank_that_says_nothing():
    """A wait of the store's own five minutes where the group's timeout is three seconds."""
    said = ranks.run_alone("context_strangers", "unheard", 3, 3, limit=150)
    for rank, (waited, peer, hop) in said.items():
        assert waited <= 5.0 and peer == 2 and hop == "the agreement", (rank, waited, peer, hop)
