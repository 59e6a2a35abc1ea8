"""The short way of `attention_decode` on the CPU: a call that looks like one before runs from a
plan, and must give what the whole way gives, refuse what it refuses, and write what it writes.
"""

import inspect
import sys

import pytest
import torch
from closeness import assert_same

import attn_ext
from attn_ext.backends import cpu, cpu_cache
from attn_ext.ops import fast


def arguments():
    """A paged call that appends a position."""
    k_cache, v_cache, q = (
        torch.randn(6, 2, 4, 16),
        torch.randn(6, 2, 4, 16),
        torch.randn(2, 4, 1, 16),
    )
    k_new, v_new = torch.randn(2, 2, 2, 1, 16)
    return {
        "q": q, "k_cache": k_cache, "v_cache": v_cache,
        "cache_seqlens": torch.tensor([3, 6], dtype=torch.int32), "k_new": k_new, "v_new": v_new,
        "block_table": torch.tensor([[5, 0, 1], [2, 4, 3]], dtype=torch.int32),
    }  # fmt: skip


OTHERS = {
    "q": lambda a: a["q"].expand(2, 4, 1, 16).transpose(1, 2).contiguous().transpose(1, 2) * 2,
    "k_cache": lambda a: a["k_cache"].transpose(1, 2).contiguous().transpose(1, 2) * 2,
    "v_cache": lambda a: a["v_cache"].transpose(1, 2).contiguous().transpose(1, 2) * 2,
    "cache_seqlens": lambda a: torch.tensor([[4, 0], [7, 0]], dtype=torch.int32)[:, 0],
    "k_new": lambda a: a["k_new"].transpose(1, 2).contiguous().transpose(1, 2) * 2,
    "v_new": lambda a: a["v_new"][:1].expand(2, 2, 1, 16) * 2,
    "block_table": lambda a: torch.tensor([[5, 3, 1, 0], [2, 4, 0, 0]], dtype=torch.int32)[:, :3],
    "causal": lambda a: False,
    "window": lambda a: (1, 0),
    "mask": lambda a: torch.arange(12) % 2 == 0,
    "bias": lambda a: torch.arange(12.0),
    "softcap": lambda a: 0.1,
    "alibi_slopes": lambda a: torch.tensor([0.5, 0.25, 1, 2]),
    "sink": lambda a: torch.ones(4, dtype=torch.bfloat16),
    "scale": lambda a: 0.1,
    "return_lse": lambda a: True,
    "num_splits": lambda a: 2,
    "backend": lambda a: "reference",
}


def run(given):
    """All that a call gives and leaves in the caches."""
    given = {n: x.clone() if n.endswith("cache") else x for n, x in given.items()}
    found = attn_ext.attention_decode(**given)
    found = found if isinstance(found, tuple) else (found,)
    return *found, given["k_cache"], given["v_cache"]


@pytest.mark.parametrize("name", inspect.signature(attn_ext.attention_decode).parameters)
def test_each_argument_is_in_the_key(name):
    """An argument that the short way forgets, or reads in another dtype or layout than it has."""
    given = arguments()
    run(given)
    changed = {**given, name: OTHERS[name](given)}
    results = []
    for forget in (True, False, False):  # the whole way, the first look, and from the plan
        if forget:
            fast.forget()
            cpu.forget()
        run(given)
        results.append(run(changed))
    for other in results[1:]:
        assert len(other) == len(results[0])
        for x, y in zip(other, results[0], strict=True):
            assert_same(x, y)


def test_it_refuses_what_the_whole_way_refuses():
    """Lengths, pages and gradients, which no look tells: read past the end, or silently lost."""
    given = arguments()
    run(given)
    before = given["k_cache"].clone()
    full = torch.tensor([12, 1], dtype=torch.int32)
    negative = torch.tensor([1, -1], dtype=torch.int32)
    for lengths in (full, negative):
        with pytest.raises(ValueError, match="cache_seqlens must be between 0 and 11"):
            attn_ext.attention_decode(**{**given, "cache_seqlens": lengths})
    table = torch.tensor([[5, 0, 1], [2, 6, 3]], dtype=torch.int32)
    with pytest.raises(ValueError, match="block_table must hold pages between 0 and 5, got 6"):
        attn_ext.attention_decode(**{**given, "block_table": table})
    q = given["q"].clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="q requires a gradient"):
        attn_ext.attention_decode(**{**given, "q": q})
    assert_same(given["k_cache"], before)


def test_autograd_sees_that_a_cache_was_written():
    """A gradient of values that the short way has overwritten since."""
    given = arguments()
    for _ in range(2):
        x = torch.ones(6, 2, 4, 16, requires_grad=True)
        product = (x * given["k_cache"]).sum()
        with torch.no_grad():
            attn_ext.attention_decode(**given)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


def test_a_call_costs_few_calls_of_python():
    """A check or a copy that comes back into the short way: counts do not depend on the machine."""
    if not cpu_cache.READS_TENSORS:
        return  # an older torch has the whole way alone
    given = arguments()
    run(given)
    assert calls(lambda: attn_ext.attention_decode(**given)) < 60
    cache = attn_ext.KVCache(2, 2, 16, max_length=64)
    q, k = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 1, 16)
    for _ in range(3):
        cache.append(k, k).attend(q)
    assert calls(lambda: cache.append(k, k).attend(q)) < 180


def calls(function) -> int:
    """How many functions of Python and C one call of it makes."""
    seen = []
    sys.setprofile(lambda frame, event, arg: seen.append(event) if event.endswith("call") else None)
    function()
    sys.setprofile(None)
    return len(seen)
