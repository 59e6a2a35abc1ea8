"""Context parallelism on gloo: shards on 2, 3 and 4 processes against one process.

All cases run in four processes that are started once (tests/helpers/ranks.py).
"""

import pytest
import ranks
import torch
from closeness import BF16_SHARDS, SHARDS
from context_cases import FEATURES
from context_losses import GIVES_UP
from ranks import of

EVERY = tuple(FEATURES)
SOME = ("causal", "both sides", "dropout")
PACKED, LONG = (4, 3, 0, 1, 53), (4, 3, 0, 1, 513)
EXACT = [
    # parts, method, layout, lengths, features: what each would miss that the others see
    (2, "ring", "zigzag", (67,), EVERY),
    (3, "ring", "contiguous", (67,), SOME),
    (4, "ring", "striped", (67,), SOME),
    (4, "ring", "zigzag", (7,), ("causal", "mask")),  # ranks with one token, or none
    (4, "ring", "packed zigzag", PACKED, EVERY),
    (3, "ring", "packed contiguous", LONG, SOME),
    (3, "allgather", "zigzag", (67,), EVERY),
    (2, "allgather", "packed zigzag", PACKED, ("window", "bias")),
    (4, "allgather", "contiguous", (3,), ("causal",)),  # a rank without tokens
    (2, "ulysses", "zigzag", (67,), EVERY),
    (4, "ulysses", "packed zigzag", (7,), ("causal", "mask", "bias", "dropout")),
    (4, "2d", "zigzag", (67,), EVERY),
    (4, "2d", "packed zigzag", LONG, SOME),
    (2, "auto", "zigzag", (2999,), ("causal",)),
    (2, "ring", "zigzag", (4097,), ("window",)),
]
DROPOUT = [(2, "zigzag", "ring"), (3, "striped", "ring"), (2, "contiguous", "ulysses")]
NCCL = [(3, "zigzag", (67,)), (4, "contiguous", (3,))]  # also a rank that sends nothing
BUGS = ("shortcut", "guard", "seed", "early", "wait")
WRONG = {
    "length": "S_local must be",
    "arguments": "head_dim|arguments",
    "layout": "layout or options|S_local",
    "window": "arguments",
}

CASES = (
    [("agrees", p, tuple(rest)) for p, *rest in EXACT]
    + [("agrees", 3, ("ring", "zigzag", (67,), SOME, "float64"))]
    + [("dropout_bits", p, tuple(rest)) for p, *rest in DROPOUT]
    + [("as_on_nccl", p, tuple(rest)) for p, *rest in NCCL]
    + [("bf16", p, ()) for p in (2, 4)]
    + [("repeated", 2, (m,)) for m in ("ring", "ulysses")]
    + [(name, 3, ()) for name in ("invisible_nan", "unsharded", "loss", "decode", "wrong_mesh")]
    + [("wrong_call", 3, (what,)) for what in WRONG]
    + [("planted", 3, (bug,)) for bug in BUGS]
)


@pytest.fixture(scope="module")
def found():
    """What all ranks returned of all cases."""
    return ranks.run("context_cases", CASES)


@pytest.mark.parametrize("case", EXACT, ids=lambda c: f"{c[0]} {c[1]} {c[2]} {sum(c[3])}")
def test_shards_agree_with_one_process(found, case):
    """out, lse and each gradient, with every feature."""
    parts, *rest = case
    assert max(of(found, "agrees", parts, tuple(rest))) <= SHARDS[torch.float32]


@pytest.mark.parametrize("case", NCCL, ids=lambda c: f"{c[0]} {c[1]}")
def test_hops_of_nccl(found, case):
    """A hop of point-to-point operations, as on NCCL, that sends to or takes from another rank, or
    waits for a buffer that is empty."""
    parts, *rest = case
    assert max(of(found, "as_on_nccl", parts, tuple(rest))) <= SHARDS[torch.float32]


def test_eight_ranks():
    """A ring that is longer than any other test's: a rank with four tokens, or none."""
    found = ranks.run_alone("context_cases", "eight", 8, 60, limit=150, lost=0)
    assert len(found) == 8 and max(found.values()) <= SHARDS[torch.float32]


def test_float64(found):
    """A number that goes through float32 on its way."""
    case = ("ring", "zigzag", (67,), SOME, "float64")
    assert max(of(found, "agrees", 3, case)) <= SHARDS[torch.float64]


@pytest.mark.parametrize("parts", (2, 4))
def test_bfloat16_is_as_exact_as_one_call(found, parts):
    """Parts that are rounded to bfloat16 before they are merged."""
    for pair in of(found, "bf16", parts)[0]:
        assert pair[0] <= BF16_SHARDS * pair[1]


@pytest.mark.parametrize("case", DROPOUT, ids=str)
def test_dropout_keeps_the_same_weights(found, case):
    """A rank that counts its own positions, or has a seed of its own."""
    parts, *rest = case
    assert all(of(found, "dropout_bits", parts, tuple(rest)))


def test_hidden_nan_reaches_nothing(found):
    """A hop whose keys are all hidden, and hold NaN."""
    assert all(of(found, "invisible_nan", 3))


@pytest.mark.parametrize("method", ("ring", "ulysses"))
def test_deterministic(found, method):
    """Parts that are merged in the order in which they come."""
    assert all(of(found, "repeated", 2, (method,)))


def test_unshard_and_labels(found):
    """Labels that are shifted within a shard."""
    assert all(of(found, "unsharded", 3))


def test_mean_loss(found):
    """A mean of means."""
    assert max(of(found, "loss", 3)) <= SHARDS[torch.float32]


def test_decode(found):
    """A cache that is cut over ranks, one of which has nothing of a sequence."""
    assert max(of(found, "decode", 3)) <= SHARDS[torch.float32]


@pytest.mark.parametrize("what", WRONG)
def test_every_rank_names_the_deviant(found, what):
    """A rank that waits for ever for one that makes another call."""
    messages = of(found, "wrong_call", 3, (what,))
    own = what in ("arguments", "window")  # whose error says what is wrong with them
    assert all("rank 2 deviates" in m for m in messages[: 2 if own else 3]), messages
    for message in messages:
        assert any(part in message for part in (*WRONG[what].split("|"), "window left")), message


def test_wrong_mesh(found):
    """Ranks, heads and mesh dimensions that do not fit."""
    for text in of(found, "wrong_mesh", 3):
        assert "mesh must have the layout's 4 ranks, got 3" in text
        assert "use method='2d'" in text and "('ring', 'ulysses')" in text


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_seen(found, bug):
    """The comparison itself: each bug makes some rank's result wrong by far."""
    assert max(of(found, "planted", 3, (bug,))) > 100 * SHARDS[torch.float32]


@pytest.mark.parametrize(("name", "seconds", "most"), (("killed", 20, 2.0), ("stopped", 3, 5.0)))
def test_a_lost_rank_is_an_error(name, seconds, most):
    """A rank that is killed or stops: an error that says so, soon, and no hang."""
    for rank, (waited, peer, hop) in ranks.run_alone(
        "context_losses", name, 3, seconds, limit=150
    ).items():
        assert waited <= most and hop != "no error", (rank, waited, peer, hop)


def test_a_rank_that_gives_up_is_named():
    """A rank whose kernel raises when all have agreed: the others wait for the group's timeout, and
    the error names the wrong rank, or none."""
    found = ranks.run_alone("context_losses", "gives_up", 4, 40, limit=150, lost=0)
    for at, (direction, method) in enumerate(GIVES_UP):
        for rank, cases in found.items():
            waited, peer, text, again = cases[at]
            where = (direction, method, rank, waited, peer, text, again)
            if direction == "drawing" and rank == 3:  # it alone: the others have agreed before
                assert text.startswith("MemoryError") and again.startswith("MemoryError"), where
            elif direction == "drawing":
                assert "refused its own call" in text and waited < 6, where
                assert peer == 3 or "rank 3" in text, where
                assert "make another one" in again, where
            elif rank == 3:
                assert text.startswith("MemoryError") and "make another one" in again, where
            else:
                assert peer == 3 or "rank 3" in text, where
                assert text.startswith("ContextParallelError") and "gave up" in text, where
                assert "no room for this rank's part" in text and waited < 2, where
                assert "make another one" in again, where
