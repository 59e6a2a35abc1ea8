"""Additive attention under the tolerance rule: what its tests on each backend share."""

from attn_ext import testing
from attn_ext.testing import random_call


def check(options, dtype, backend="cpu", spread=1.0):
    """A call of random_call's `options` under the tolerance rule."""
    call = random_call(3, dtype=dtype, additive=True, **options)
    check_call(call._replace(q=call.q * spread, k=call.k * spread), backend)


def check_call(call, backend):
    """One call, with or without a w of its own, under the tolerance rule."""
    if call.w is None:
        sizes = {"heads_q": call.q.shape[1], "head_dim": call.q.shape[-1]}
        call = call._replace(w=random_call(1, additive=True, **sizes).w, scale=1.0)
    testing.check_call(call, backend)
