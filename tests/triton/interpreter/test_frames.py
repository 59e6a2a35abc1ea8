"""Shards of larger calls in Triton's interpreter: their places in the whole, and parts in
float32."""

import pytest
import torch
from closeness import SHARDS, relative
from shard_calls import FEATURES, check_not_rounded, check_shards

from attn_ext.backends import registry, triton
from attn_ext.core.problem import Problem
from attn_ext.core.schema import Frame
from attn_ext.ops import parts
from attn_ext.testing import check_call, random_call

CUTS = [("window", 33), ("alibi", 33), ("dropout", 33), ("all", 33)]


@pytest.mark.parametrize(("name", "width"), CUTS)
def test_shards_merge_to_the_whole(name, width):
    """Positions that are those of the shard, a window that is none within it (all: 50 keys of 66);
    a shard's own sums taken for the whole's."""
    check_shards("triton", name, 66, slice(53, 66), width, heads=(2, 1))


@pytest.mark.parametrize("place", ((11, 3, 40, 60), (5, 10, 100, 90), (0, 70, 99, 300)))
def test_frames_of_whole_calls(place):
    """The kernels' places of a shard against the reference's: another diagonal, another length."""
    frame = torch.tensor([[3 + b, 1, *place] for b in range(2)], dtype=torch.int32)
    for options in FEATURES.values():
        call = random_call(seqlen_q=19, seqlen_k=33, heads_q=4, heads_k=2, **options)
        check_call(call._replace(frame=frame), "triton")
    sigmoid = random_call(seqlen_q=19, seqlen_k=33)._replace(normalizer="sigmoid")
    check_call(sigmoid._replace(frame=frame), "triton")


def test_sequences_have_their_own_frames():
    """Packed sequences that all stand where the first one does."""
    call = random_call(
        seqlens_q=[7, 0, 18], seqlens_k=[20, 3, 33], heads_q=2, causal=True, alibi="b",
        dropout_p=0.3,
    )  # fmt: skip
    frame = [Frame(4, 2, 5, 1, 50, 60), Frame(0, 2, 0, 0, 1, 9), Frame(1, 2, 30, 3, 70, 70)]
    check_call(call._replace(frame=torch.tensor(frame, dtype=torch.int32)), "triton")


def test_parts_of_a_cache():
    """Split keys, whose windows count from the shard's first key; keys of NaN that are unused."""
    call = random_call(
        batch=3, seqlen_q=3, seqlen_k=600, cache_seqlens=[0, 7, 600], heads_q=4, heads_k=2,
        window=(500, 0), alibi=True,
    )  # fmt: skip
    frame = [Frame(b, 0, 897 - 10 * b, 300, 900 - 10 * b, 900 - 10 * b) for b in range(3)]
    call = call._replace(frame=torch.tensor(frame, dtype=torch.int32))
    out, sums = parts.forward_partial(call._replace(backend="triton"))
    want, want_sums = parts.forward_partial(call._replace(backend="reference"))
    assert relative(out, want) <= SHARDS[torch.float32]
    assert relative(sums.sum(-1), want_sums.sum(-1)) <= SHARDS[torch.float32]


def test_parts_are_not_rounded():
    """O, dQ, dK and dV of bfloat16 inputs that are rounded to bfloat16; delta that is computed from
    the part."""
    call = random_call(seqlen_q=20, seqlen_k=70, dtype=torch.bfloat16)._replace(backend="triton")
    check_not_rounded(call, SHARDS[torch.float32])


def test_auto_takes_them_on_a_gpu(monkeypatch):
    """A shard that GPUs leave to torch operations, although a kernel knows its place."""
    call = random_call(seqlen_q=9, seqlen_k=12)._replace(frame=torch.zeros(2, 6, dtype=torch.int32))
    problem = Problem.of(call)
    assert triton.FRAMES and not registry.reasons("triton", problem)
    assert parts.served_by(call._replace(backend="triton")) == "triton"
