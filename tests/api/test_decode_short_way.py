"""The short way of `attention_decode` on the CPU: a call that looks like one before runs from a
plan, and must give what the whole way gives, refuse what it refuses, and write what it writes.
"""

import copy
import inspect
import pickle
import sys

import pytest
import torch
from closeness import assert_same

import attn_ext
from attn_ext.backends import cpu, cpu_cache
from attn_ext.ops import cache as cache_operator
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


def apart(x):
    """The same values, each with a gap behind it."""
    return torch.stack([x, torch.full_like(x, 2)], -1)[..., 0]


@pytest.mark.parametrize(
    "name",
    ["q", "k_cache", "v_cache", "cache_seqlens", "k_new", "v_new", "block_table", "mask", "bias",
     "alibi_slopes", "sink"],
)  # fmt: skip
@pytest.mark.parametrize("appending", [False, True])
def test_what_the_whole_way_copies(name, appending):
    """A plan made of a copy, which is contiguous, and run on what is not: it read other numbers."""
    given = arguments()
    if name not in given:
        given[name] = OTHERS[name](given).float()
    if name == "mask":
        given[name] = given[name] > 0
    if not appending:
        given = {n: x for n, x in given.items() if n == name or not n.endswith("new")}
        if name.endswith("new"):
            return
    results = []
    for change in (torch.clone, apart, apart, apart):
        called = {n: x.clone() for n, x in given.items()}
        called[name] = change(called[name])
        results.append((attn_ext.attention_decode(**called), called["k_cache"], called["v_cache"]))
    for other in results[1:]:
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
    assert calls(lambda: cache.append(k, k).attend(q)) < 60


def step(cache, x, **options):
    """What a step gives, and what it leaves in the cache."""
    out = cache.append(x, -x, **options).attend(torch.cat([x, x + 1], dim=1))
    return out, *cache.gathered(), cache.lengths, cache.held


@pytest.mark.parametrize("sizes", [{}, {"page_size": 4}, {"page_size": None}, {"window": 5}])
def test_a_step_like_one_before_is_the_whole_way(sizes, monkeypatch):
    """Rows in the wrong slot, a page that two sequences share written in place, lengths that stay
    behind: after each change of a cache, beside one that always goes the whole way."""
    caches = [attn_ext.KVCache(3, 2, 16, max_length=64, **sizes) for _ in range(2)]
    random, taken = torch.Generator().manual_seed(5), []
    own = cache_operator.append_again
    changes = {
        4: lambda c: c.reorder([2, 2, 0]),
        7: lambda c: c.truncate([c.lengths[0].item(), 5, c.lengths[2].item() - 1]),
        11: lambda c: c.fork(1, [0]),
        13: lambda c: c.resize(max_length=80),
        15: lambda c: c.reorder([0, 1]),  # two sequences from now on
        18: lambda c: pickle.loads(pickle.dumps(c)),
        21: copy.deepcopy,
        24: lambda c: c.append(torch.ones(1, 2, 1, 16), torch.ones(1, 2, 1, 16), rows=[1]),
    }
    for number in range(30):
        caches = [changes.get(number, lambda c: c)(cache) for cache in caches]
        x = torch.randn(caches[0].batch, 2, 1 + (number % 9 == 8), 16, generator=random)
        results = []
        for cache, whole in zip(caches, (False, True), strict=True):
            with monkeypatch.context() as patched:
                if whole:
                    patched.setattr(cache_operator, "look_of", lambda *tensors: None)
                    patched.setattr(cache, "_attend_again", lambda q, return_lse: None)
                else:
                    noted = lambda *a: taken.append(own(*a)) or taken[-1]  # noqa: E731
                    patched.setattr(cache_operator, "append_again", noted)
                results.append(step(cache, x))
        for got, want in zip(*results, strict=True):
            assert_same(got, want)
    assert not cpu_cache.READS_TENSORS or (True in taken and len(taken) > 15)


def test_rows_whose_numbers_lie_apart():
    """An error, or numbers of other rows, where a step like one before goes on."""
    x = torch.randn(2, 2, 16, 2).mT
    cache = attn_ext.KVCache(2, 2, 16, max_length=64)
    for _ in range(3):
        cache.append(x, x)
    k, v = cache.gathered()
    assert_same(k, torch.cat([x] * 3, dim=2))
    assert_same(v, k)


def test_a_step_refuses_what_the_whole_way_refuses():
    """A batch, a gradient, a return_lse that the short way of a cache takes in silence, or rows in
    a cache that is full."""
    cache = attn_ext.KVCache(2, 2, 16, max_length=8, page_size=None)
    x, q = torch.randn(2, 2, 1, 16), torch.randn(2, 4, 1, 16)
    for _ in range(3):
        cache.append(x, x).attend(q)
    with pytest.raises(NotImplementedError, match="k requires a gradient"):
        cache.append(x.clone().requires_grad_(), x)
    with pytest.raises(TypeError, match="return_lse must be a bool"):
        cache.attend(q, return_lse=1)
    with pytest.raises(NotImplementedError, match="q requires a gradient"):
        cache.attend(q.clone().requires_grad_())
    cache.append(*torch.zeros(2, 2, 2, 4, 16)).append(x, x)
    before = cache.gathered()
    with pytest.raises(attn_ext.CacheFullError, match="sequence 0 would hold 9 positions"):
        cache.append(x, x)
    for got, want in zip(cache.gathered(), before, strict=True):
        assert_same(got, want)
    cache.reorder([0])
    with pytest.raises(ValueError, match=r"k must have shape \[1, 2, S, 16\]"):
        cache.append(x, x)
    with pytest.raises(ValueError, match=r"q must have shape \[1, Hq, Sq, 16\]"):
        cache.attend(q)


def test_autograd_sees_that_a_step_was_written():
    """A gradient of pages that a step has overwritten since; a cache of inference mode."""
    cache = attn_ext.KVCache(2, 2, 16, max_length=64)
    x = torch.randn(2, 2, 1, 16)
    cache.append(x, x).append(x, x)
    for kept in (cache.k_pages, cache.v_pages):
        leaf = torch.ones_like(kept, requires_grad=True)
        product = (leaf * kept).sum()
        cache.append(x, x)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
    with torch.inference_mode():
        cache = attn_ext.KVCache(2, 2, 16, max_length=64)
    for _ in range(3):
        cache.append(x, x)
    assert cache.lengths.tolist() == [3, 3]


def calls(function) -> int:
    """How many functions of Python and C one call of it makes."""
    seen = []
    sys.setprofile(lambda frame, event, arg: seen.append(event) if event.endswith("call") else None)
    function()
    sys.setprofile(None)
    return len(seen)
