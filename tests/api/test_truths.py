"""What tests remember of the reference (tests/helpers/truths.py)."""

import pytest
import torch
import truths

from attn_ext import testing
from attn_ext.backends import registry
from attn_ext.testing import check_call, needs_of, random_call


def test_calls_that_differ_are_not_taken_for_each_other():
    """The truth of another call: a value, a dtype, a shape, a number or a gradient left out."""
    call = random_call(seqlen_q=3, seqlen_k=5, bias="qk")
    other = call._replace(k=call.k.clone())
    other.k[0, 0, 0, 0] += 1
    transposed = call._replace(bias=call.bias.transpose(2, 3))
    dout = torch.ones_like(call.q)
    needs = needs_of(call)
    others = [
        (other,),
        (transposed,),
        (call._replace(scale=0.5),),
        (call._replace(softcap=2.0),),
        (testing.to_float64(call),),
        (call, dout, None, needs),
        (call, dout, None, needs._replace(q=False)),
        (call, dout + 1, None, needs),
        (call, None, dout, needs),
    ]
    keys = [truths.key_of(*arguments) for arguments in [(call,), *others]]
    assert len(set(keys)) == len(keys)
    again = call._replace(q=testing.padded(call.q))
    assert truths.key_of(again) == keys[0]  # the layout in memory does not change the truth


def test_a_wrong_kernel_is_seen_at_each_call():
    """A result that is remembered in place of what is tested."""
    call = random_call(seqlen_q=3, seqlen_k=5)
    cpu = registry.get("cpu")
    assert isinstance(testing.referred, truths.Remembered)

    class Wrong:
        __name__ = "wrong"
        available, unsupported = staticmethod(cpu.available), staticmethod(cpu.unsupported)
        backward = staticmethod(cpu.backward)

        @staticmethod
        def forward(call):
            out, *rest = cpu.forward(call)
            return (out + 1, *rest)

    check_call(call, "cpu")
    for _ in range(2):
        with pytest.raises(AssertionError, match="out: max error"):
            check_call(call, Wrong())


def test_no_more_is_kept_than_it_may(monkeypatch):
    """Tests of long sequences that fill the memory."""
    monkeypatch.setattr(truths, "MOST_BYTES", 100)
    asked = []
    double = truths.Remembered(lambda x: asked.append(x) or (x * 2,))
    for value in (1.0, 2.0, 2.0, 1.0, 3.0):
        assert double(torch.full((10,), value))[0][0] == 2 * value
    assert [x[0].item() for x in asked] == [1, 2, 3] and double.size <= 100
