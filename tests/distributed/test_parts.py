"""A shard of a larger call against the larger call itself, on every backend that serves shards."""

import pytest
import torch
from closeness import BF16_WEIGHTS, SHARDS, relative
from shard_calls import FEATURES, check_shards

from attn_ext.backends import cpu, triton
from attn_ext.core.schema import Call, Needs
from attn_ext.ops import parts
from attn_ext.testing import check_call, needs_of, random_call

SERVERS = ("cpu", "reference")  # the C++ kernels; torch operations on tiles
WHOLE = 300


CUTS = [(name, 77) for name in FEATURES]  # no multiple of four, as dropout's counter has them
CUTS += [("all", width) for width in (1, 64, 128, 256)]


@pytest.mark.parametrize("backend", SERVERS)
@pytest.mark.parametrize(("name", "width"), CUTS)
def test_shards_merge_to_the_whole(backend, name, width):
    """Positions that are those of the shard; a shard's own sums taken for the whole's."""
    check_shards(backend, name, WHOLE, slice(110, 147), width)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32, torch.float64))
@pytest.mark.parametrize("place", ((11, 3, 40, 60), (5, 10, 100, 90), (0, 70, 99, 300)))
def test_frames_of_whole_calls(dtype, place):
    """The kernels' places of a shard against the reference's, forward and backward."""
    frame = torch.tensor([[3 + b, 1, *place] for b in range(2)], dtype=torch.int32)
    for options in FEATURES.values():
        call = random_call(seqlen_q=37, seqlen_k=53, heads_q=4, heads_k=2, dtype=dtype, **options)
        check_call(call._replace(frame=frame), "cpu")
    sigmoid = random_call(seqlen_q=37, seqlen_k=53, dtype=dtype)._replace(normalizer="sigmoid")
    check_call(sigmoid._replace(frame=frame), "cpu")


def test_parts_are_not_rounded(isa):
    """O, dQ, dK and dV of bfloat16 inputs that are rounded to bfloat16, or written as bfloat16."""
    call = random_call(seqlen_q=90, seqlen_k=200, dtype=torch.bfloat16)
    out, lse = parts.forward_partial(call)
    wide = call._replace(**{n: getattr(call, n).float() for n in ("q", "k", "v")})
    want, want_lse = parts.forward_partial(wide)
    dout = torch.randn(out.shape).bfloat16()
    more = (torch.randn(lse.shape), lse, needs_of(call))
    got, exact = (parts.backward_partial(c, dout, *more) for c in (call, wide))
    pairs = "bf16" in isa or "amx" in isa  # products of bfloat16 pairs round the weights
    for a, b in ((out, want), (lse, want_lse), *zip(got[:3], exact[:3], strict=True)):
        assert a.dtype == torch.float32
        assert relative(a, b) <= (BF16_WEIGHTS if pairs else SHARDS[torch.float32])
        assert not torch.equal(a, a.bfloat16().float())


def test_rows_without_keys_merge():
    """-inf - -inf in a merge: NaN."""
    out, lse = torch.zeros(1, 1, 3, 2), torch.full((1, 1, 3), -torch.inf)
    parts.merge(out, lse, torch.zeros_like(out), lse.clone())
    assert torch.equal(out, torch.zeros_like(out)) and (lse == -torch.inf).all()
    part, part_lse = torch.ones_like(out), torch.tensor([[[0.0, -torch.inf, 700.0]]])
    parts.merge(out, lse, part, part_lse)
    assert torch.equal(lse, part_lse) and out[0, 0, :, 0].tolist() == [1, 0, 1]


def test_operators_and_their_fakes():
    """A fake that promises other shapes, strides or dtypes."""
    call = random_call(seqlen_q=9, seqlen_k=12, bias=True, dtype=torch.bfloat16, layout="bshd")
    out, lse = torch.ops.attn_ext.forward_partial(*call)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.attn_ext.forward_partial, tuple(call), test_utils=tests)
    rows = (torch.randn_like(out).bfloat16(), torch.randn_like(lse), lse)
    needs = list(Needs(q=True, k=True, bias=True))
    torch.library.opcheck(
        torch.ops.attn_ext.backward_partial, (*rows, *call, needs), test_utils=tests
    )
    torch.library.opcheck(
        torch.ops.attn_ext.merge_, (out, lse, out.clone(), lse.clone()), test_utils=tests
    )


def test_who_refuses_frames():
    """A kernel that does not know frames and computes with its own positions."""
    call = random_call(seqlen_q=9, seqlen_k=12)._replace(frame=torch.zeros(2, 6, dtype=torch.int32))
    for function in (torch.ops.attn_ext.forward, lambda *x: parts.forward_partial(Call(*x))):
        with pytest.raises(NotImplementedError, match="frame"):
            function(*call._replace(backend="cuda"))
    assert parts.served_by(call) == "cpu" and cpu.FRAMES and triton.FRAMES
    with pytest.raises(ValueError, match="frame must have shape"):
        parts.forward_partial(call._replace(frame=call.frame[:1]))
    with pytest.raises(ValueError, match="sink must be None"):
        parts.forward_partial(call._replace(sink=torch.zeros(2)))
