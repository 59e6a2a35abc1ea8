"""The backend "reference" of 16-bit inputs, whose sums are in float32 as those of all backends."""

import pytest
import torch
from closeness import BFLOAT16, FLOAT32, assert_close

from attn_ext.backends import reference as backend
from attn_ext.core.reference import attend
from attn_ext.testing import needs_of, random_call


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits_are_summed_up_in_float32(dtype):
    """LSE, statistics and gradients of logits that are rounded to 16 bits."""
    call = random_call(5, dtype=dtype, bias="hqk", stats=True, heads_q=4, heads_k=2, softcap=9.0)
    exact = call._replace(**{n: getattr(call, n).double() for n in ("q", "k", "v", "bias")})
    dout = torch.randn(backend.forward(call)[0].shape).to(dtype)
    out, *rows = backend.forward(call)
    truth, *true_rows = attend(exact)
    assert out.dtype == dtype and all(x.dtype == torch.float32 for x in rows)
    for got, want in zip(rows, true_rows, strict=True):
        assert_close(got, want.float(), FLOAT32)
    assert torch.equal(out, attend(in_float32(call))[0].to(dtype))
    needs = needs_of(call)
    grads = backend.backward(call, dout, out, rows[0], None, needs)
    true_grads = backend.backward(exact, dout.double(), truth, true_rows[0], None, needs)
    for name in ("q", "k", "v", "bias"):
        got, want = getattr(grads, name), getattr(true_grads, name)
        assert got.dtype == dtype
        assert_close(got.float(), want.to(dtype).float(), BFLOAT16)


def in_float32(call):
    return call._replace(q=call.q.float(), k=call.k.float(), v=call.v.float())
