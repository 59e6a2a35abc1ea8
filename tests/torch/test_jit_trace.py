"""torch.jit.trace records the operators, and a program that was traced for other sizes cannot make
a kernel read or write beyond its tensors."""

import pytest
import torch
from closeness import assert_same

import attn_ext
from attn_ext.core.schema import Call
from attn_ext.testing import random_call

CU = torch.tensor([0, 5, 12], dtype=torch.int32)
LENGTHS = torch.tensor([3, 9], dtype=torch.int32)
CALLS = {
    "dense": lambda q, k, v: attn_ext.attention(q, k, v, causal=True),
    "sdpa": lambda q, k, v: attn_ext.scaled_dot_product_attention(q, k, v),
    "varlen": lambda q, k, v: attn_ext.attention_varlen(
        *(x[0].transpose(0, 1) for x in (q, k, v)), CU, CU
    ),
    "decode": lambda q, k, v: attn_ext.attention_decode(q[:, :, :1], k, v, LENGTHS),
    "additive": lambda q, k, v: attn_ext.additive_attention(q, k, v, q[0, 0, 0]),
}
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning"
)


def qkv(seqlen: int = 12, batch: int = 2):
    return tuple(torch.randn(batch, 4, seqlen, 8) for _ in range(3))


@pytest.mark.parametrize("name", CALLS)
def test_trace_records_the_call(name):
    """A trace that holds only the empty output, since a kernel writes through a pointer."""
    traced = torch.jit.trace(CALLS[name], qkv())
    given = qkv()
    assert_same(traced(*given), CALLS[name](*given))


def test_trace_at_another_length_and_with_gradients():
    """A trace that holds the lengths of its example: it then writes past the end."""
    call = CALLS["dense"]
    traced = torch.jit.trace(call, qkv())
    given = [x.requires_grad_() for x in qkv(seqlen=7, batch=1)]
    dout = torch.randn(1, 4, 7, 8)
    ours, theirs = (torch.autograd.grad(f(*given), given, dout) for f in (traced, call))
    for got, want in zip(ours, theirs, strict=True):
        assert_same(got, want)


def test_trace_of_a_module():
    """Weights that are constants of the trace, or need_weights that is not recorded."""
    module = attn_ext.nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x, y = torch.randn(2, 2, 5, 16)
    traced = torch.jit.trace(module, (x, x, x))
    for got, want in zip(traced(y, y, y), module(y, y, y), strict=True):
        assert_same(got, want)


def test_inspect_refuses_a_trace():
    """Statistics of the example, or of no memory at all, in every later call."""
    q, k, _ = qkv()
    for call in (
        lambda q, k: attn_ext.inspect.top_k(q, k, 2).weights,
        lambda q, k: attn_ext.inspect.row_stats(q, k).entropy,
    ):
        with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace"):
            torch.jit.trace(call, (q, k))


WRONG = {  # a field, what is put there, the name in the message
    "k shorter than v": ("k", torch.zeros(2, 4, 5, 8), "v must have k's length"),
    "v of another batch": ("v", torch.zeros(1, 4, 12, 8), "v must have q's batch"),
    "q of another head_dim": ("q", torch.zeros(2, 4, 12, 16), "k must have q's head_dim"),
    "short mask": ("mask", torch.ones(1, 1, 12, 5, dtype=torch.bool), "mask must be broadcastable"),
    "short bias": ("bias", torch.zeros(2, 4, 5, 12), "bias must be broadcastable"),
    "few slopes": ("alibi_slopes", torch.zeros(2), "alibi_slopes must have shape"),
    "few sinks": ("sink", torch.zeros(1), "sink must have shape"),
    "w of another head_dim": ("w", torch.zeros(4, 9), "w must have shape"),
    "no random state": ("dropout_p", 0.5, "rng_state must have shape"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_shapes_below_the_public_api(case):
    """Memory beyond a tensor, read or written by a traced program that meets other sizes."""
    call = random_call(batch=2, heads_q=4, heads_k=4, seqlen_q=12, seqlen_k=12, head_dim=8)
    name, value, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        torch.ops.attn_ext.forward(*call._replace(**{name: value}))


def test_lengths_below_the_public_api_are_the_tensors():
    """max_seqlen_q and max_seqlen_k of a trace's example, which size a kernel's loops."""
    q, k, v = qkv(seqlen=7)
    call = Call(q, k, v, max_seqlen_q=1000, max_seqlen_k=2000, scale=None)
    got = torch.ops.attn_ext.forward(*call)[0]
    assert_same(got, attn_ext.attention(q, k, v))
