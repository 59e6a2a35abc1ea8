"""A shard of a larger call against the larger call itself, on every backend that serves shards."""

import pytest
import torch
from closeness import BF16_WEIGHTS, SHARDS, relative
from shard_calls import FEATURES, check_not_rounded, check_shards, merged, unframed

from attn_ext.backends import cpu, cuda, reference, registry, triton
from attn_ext.backends.sums import of_lse
from attn_ext.core.schema import Call, Needs
from attn_ext.distributed import local
from attn_ext.ops import parts
from attn_ext.testing import check_call, needs_of, random_call, to_float64

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
    pairs = "bf16" in isa or "amx" in isa  # products of bfloat16 pairs round the weights
    check_not_rounded(call, BF16_WEIGHTS if pairs else SHARDS[torch.float32])


@pytest.mark.parametrize("backend", SERVERS)
def test_autocast_leaves_parts_alone(backend):
    """Products of torch operations that autocast rounds to bfloat16."""
    call = random_call(seqlen_q=20, seqlen_k=30, bias=True)._replace(backend=backend)

    def both(dout, delta):
        out, sums = torch.ops.attn_ext.forward_partial(*call)
        needs = list(needs_of(call))
        return out, sums, *torch.ops.attn_ext.backward_partial(dout, delta, sums, *call, needs)

    rows = torch.randn(call.q.shape), torch.randn(call.q.shape[:3])
    want = both(*rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = both(*rows)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_rows_without_keys_merge():
    """-inf - -inf in a merge: NaN."""
    out, sums = torch.zeros(1, 1, 3, 2), of_lse(torch.full((1, 1, 3), -torch.inf))
    parts.merge(out, sums, torch.zeros_like(out), sums.clone())
    assert torch.equal(out, torch.zeros_like(out)) and (sums.sum(-1) == -torch.inf).all()
    part, part_lse = torch.ones_like(out), torch.tensor([[[0.0, -torch.inf, 700.0]]])
    parts.merge(out, sums, part, of_lse(part_lse))
    assert torch.equal(sums.sum(-1), part_lse) and out[0, 0, :, 0].tolist() == [1, 0, 1]


def test_operators_and_their_fakes():
    """A fake that promises other shapes, strides or dtypes."""
    call = random_call(seqlen_q=9, seqlen_k=12, bias=True, dtype=torch.bfloat16, layout="bshd")
    out, sums = torch.ops.attn_ext.forward_partial(*call)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.attn_ext.forward_partial, tuple(call), test_utils=tests)
    rows = (torch.randn_like(out).bfloat16(), torch.randn_like(sums[..., 0]), sums)
    needs = list(Needs(q=True, k=True, bias=True))
    torch.library.opcheck(
        torch.ops.attn_ext.backward_partial, (*rows, *call, needs), test_utils=tests
    )
    torch.library.opcheck(
        torch.ops.attn_ext.merge_, (out, sums, out.clone(), sums.clone()), test_utils=tests
    )


def test_who_refuses_frames():
    """A kernel that does not know frames and computes with its own positions."""
    call = random_call(seqlen_q=9, seqlen_k=12)._replace(frame=torch.zeros(2, 6, dtype=torch.int32))
    for function in (torch.ops.attn_ext.forward, lambda *x: parts.forward_partial(Call(*x))):
        with pytest.raises(NotImplementedError, match="frame"):
            function(*call._replace(backend="torch"))
    assert parts.served_by(call) == "cpu" and cpu.FRAMES and triton.FRAMES and cuda.FRAMES
    with pytest.raises(ValueError, match="frame must have shape"):
        parts.forward_partial(call._replace(frame=call.frame[:1]))
    with pytest.raises(ValueError, match="sink must be None"):
        parts.forward_partial(call._replace(sink=torch.zeros(2)))


SMALLEST = torch.finfo(torch.float32).min
FAR = {
    "smallest float": {"value": SMALLEST},
    "ten thousand": {"value": -1e4},
    "sink": {"value": -1e4, "sink": True},
    "logits of ten billion": {"value": 0.0, "factor": 1e5},
}
CUTS_OF_FAR = (slice(0, 60), slice(60, 61), slice(61, 150))


def far_call(value, factor=1.0, **options) -> Call:
    """A call three of whose rows have a far bias, beside ordinary rows."""
    call = random_call(7, batch=1, seqlen_q=20, seqlen_k=150, bias="qk", **options)
    call.bias[:, :, 2:5] = value
    call.q.mul_(factor), call.k.mul_(factor)
    if call.sink is not None:
        call.sink[:] = value
    return call


@pytest.mark.parametrize("backend", [*SERVERS, "emulated"])
@pytest.mark.parametrize("name", FAR)
def test_shards_of_far_rows(backend, name):
    """Parts that count as if each had one key, since LSE beside 1e9 has lost how many it has: O of
    the wrong part, and gradients too large by their number."""
    if backend == "emulated":
        registry.get(backend).set_mode("plain", 1)
    call = far_call(**FAR[name])._replace(backend=backend)
    shards = [unframed(call, keys) for keys in CUTS_OF_FAR]
    exact = to_float64(call)
    truth, truth_lse, *_ = reference.forward(exact)
    out, sums = merged(call, shards)
    # float32 has three decimals of a logit near 1e4
    allowed = 2e-4 if FAR[name]["value"] == -1e4 else SHARDS[torch.float32]
    assert relative(out.double(), truth) <= allowed

    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    want = reference.backward(exact, dout.double(), truth, truth_lse, None, needs_of(call))
    delta = (dout * out).sum(-1)
    of_part = needs_of(call._replace(sink=None))
    got = [parts.backward_partial(shard, dout, delta, sums, of_part) for shard in shards]
    found = {
        "v": torch.cat([g.v for g in got], 2),
        "k": torch.cat([g.k for g in got], 2),
        "bias": torch.cat([g.bias for g in got], 3),
        "q": sum(g.q for g in got),
    }
    if call.sink is not None:
        found["sink"] = local.sink_gradient(call.sink, sums, delta)
    for each, x in found.items():
        if each == "v" or "billion" not in name:  # where dS of a weight of 1 is what rounding left
            assert relative(x.double(), getattr(want, each)) <= 2 * allowed, each


def test_lse_alone_would_not_do(monkeypatch):
    """The check above passing with parts that have only their LSE."""
    call = far_call(SMALLEST)._replace(backend="cpu")
    truth, *_ = reference.forward(to_float64(call))
    forward = parts.forward_partial

    def without_rest(call):
        out, sums = forward(call)
        return out, of_lse(sums.sum(-1))

    monkeypatch.setattr(parts, "forward_partial", without_rest)
    out, _ = merged(call, [unframed(call, keys) for keys in CUTS_OF_FAR])
    assert relative(out.double(), truth) > 0.1
