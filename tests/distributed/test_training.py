"""Training around context attention: compilers, checkpoints, DDP, FSDP2 and gradients that add up.
Four processes for all cases (tests/helpers/ranks.py)."""

import pytest
import ranks
import torch
from closeness import SHARDS

PACKED = (4, 3, 0, 1, 53)
AROUND = [
    # parts, way, method, layout, lengths
    (2, "compile", "ring", "zigzag", (67,)),
    (2, "compile", "ulysses", "zigzag", (67,)),
    (2, "compile", "allgather", "contiguous", (61,)),  # a second shape of the same function
    (4, "compile", "2d", "packed zigzag", PACKED),
    (2, "checkpoint", "ring", "zigzag", (67,)),
    (2, "reentrant", "ring", "packed zigzag", PACKED),
    (2, "reentrant", "ulysses", "striped", (67,)),
]
TRAINED = [
    ("ddp", ""), ("ddp", "reentrant"), ("ddp", "compile"),
    ("fsdp", ""), ("fsdp", "checkpoint"), ("fsdp", "compile"),
]  # fmt: skip
CASES = [("around", parts, tuple(rest)) for parts, *rest in AROUND]
CASES += [("trained", 2, case) for case in TRAINED]


@pytest.fixture(scope="module")
def found():
    """What all ranks returned of all cases."""
    return ranks.run("context_training", CASES)


@pytest.mark.parametrize("case", AROUND, ids=lambda c: f"{c[0]} {c[1]} {c[2]} {c[3]}")
def test_compiled_and_recomputed(found, case):
    """A recomputation with another seed; a graph that breaks at a process group, or forgets that
    its ranks share a seed."""
    parts, *rest = case
    assert max(ranks.of(found, "around", parts, tuple(rest))) == 0.0


@pytest.mark.parametrize("case", TRAINED, ids=lambda c: " ".join(c))
def test_losses(found, case):
    """Gradients that are averaged or added up wrongly, over ranks or over passes."""
    assert max(ranks.of(found, "trained", 2, case)) <= SHARDS[torch.float32]
