"""attn_ext.KVCache against lists of tensors: whole lives on each backend, a random life by
hypothesis, and what it refuses.
"""

import copy
import pickle

import cache_checks
import pytest
import torch
import torch.distributed as dist
from cache_checks import TREE, Model, features
from closeness import BFLOAT16, FLOAT32, assert_close, assert_same
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import attn_ext
from attn_ext.core.pages import Pages
from attn_ext.distributed import context_decode


@pytest.mark.parametrize("page_size", [1, 3, 16, None])
def test_a_life(page_size, backend_and_device):
    """Prefill of unequal prompts, beams, drafts that are rejected, a sequence that leaves and one
    that comes: each on each backend, with NaN wherever nothing is held."""
    backend, device = backend_and_device
    model = Model(3, page_size, max_length=48, device=device, backend=backend)
    assert model.append(9, counts=[9, 1, 4])
    model.check(4)
    model.reorder([0, 0, 2])
    for _ in range(2):
        assert model.append(1)
        model.check(1)
    assert model.append(4)
    model.check(4, tree_mask=TREE)
    assert model.keep(4, [[0, 1, 3], [], [2]])
    model.check(1)
    model.truncate([5, 0, 6])
    assert model.append(20, rows=[1])
    model.check(7, rows=[1, 2])
    model.check_book()


FEATURES = features(20)


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("name", FEATURES)
def test_features(name, tree, backend_and_device):
    """A feature that is lost, counted from another position, or applied to both parts of a tree."""
    backend, device = backend_and_device
    model = Model(3, 4, max_length=32, device=device, backend=backend)
    model.append(17, counts=[17, 4, 2])  # the last has fewer positions than there are queries
    model.check(4, tree_mask=TREE if tree else None, **FEATURES[name])


def test_a_tree_of_each_sequence_and_head(backend_and_device):
    """A mask [B, Hq, Sq, Sq] read by the wrong sequence or head; rows that see nothing."""
    backend, device = backend_and_device
    model = Model(3, 4, max_length=32, device=device, backend=backend)
    model.append(9, counts=[9, 3, 0])
    model.append(3)
    mask = torch.rand(3, 4, 3, 3, generator=model.random) < 0.5
    model.check(3, tree_mask=mask)
    model.check(3, tree_mask=mask, window=(2, None))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trees_in_half_precision_keep_the_rule(dtype):
    """Two parts that are rounded to 16 bits before they are merged, which doubles the error."""
    cache = attn_ext.KVCache(1, 2, 64, max_length=128, dtype=dtype)
    k, v = torch.randn(2, 1, 2, 100, 64).to(dtype)
    q = torch.randn(1, 4, 4, 64).to(dtype)
    out = cache.append(k, v).attend(q, tree_mask=TREE)[0].double()
    rows = [x[0].transpose(0, 1) for x in (k, v)]
    truth, _ = cache_checks.attend(q[0], *rows, seen=TREE[None])
    s = torch.einsum("hid,hjd->hij", q[0], k[0].repeat_interleave(2, 0)) / 8
    s[:, :, -4:].masked_fill_(~TREE, -torch.inf)
    naive = torch.softmax(s, -1) @ v[0].repeat_interleave(2, 0)
    allowed = 2 * (naive.double() - truth).abs().max() + torch.finfo(dtype).eps
    assert (out - truth).abs().max() <= allowed


def test_a_window_rolls():
    """Pages that are freed too early or never: 200 positions in a cache that holds 24 of each."""
    model = Model(2, 4, max_length=24, pages=12, window=9)
    assert model.append(12, counts=[12, 5])
    for step in range(60):
        assert model.append(3, counts=[3, 1 + step % 3])
        model.check(3, tree_mask=TREE[1:, 1:] if step % 5 == 0 else None)
        model.check_book()
    lengths = model.cache.lengths.tolist()
    assert lengths[0] == 12 + 60 * 3 and max(model.cache.held.tolist()) <= 9 + 3 + 3
    model.truncate([length - 2 for length in lengths])
    model.check(1)
    with pytest.raises(ValueError, match="have left the window of 9, got 12"):
        model.cache.truncate([12, 12])
    with pytest.raises(ValueError, match="mask must be None in a cache with a window"):
        model.cache.attend(torch.zeros(2, 4, 1, 8), mask=torch.ones(1).bool())
    with pytest.raises(ValueError, match="window left must be at most the cache's 9, got 10"):
        model.cache.attend(torch.zeros(2, 4, 1, 8), window=(10, None))


def test_beams_share_pages():
    """Beams that each take the memory of their prompt, and pages that are never freed."""
    cache = attn_ext.KVCache(8, 2, 8, max_length=64, page_size=4, pages=24)
    k = torch.randn(1, 2, 30, 8)
    cache.append(k, k, rows=[0]).fork(0, range(1, 8))
    assert cache.free_pages == 16
    one = torch.randn(8, 2, 1, 8)
    cache.append(one, one)
    assert cache.free_pages == 9, "seven copies of the page that is half full"
    assert_same(cache.k_pages[cache.block_table[3, 7].item(), :, :2], k[0, :, 28:])
    cache.truncate([0] * 8)
    assert cache.free_pages == 24


def test_a_contiguous_cache_serves_any_beams():
    """Copies on write that find no page, where each sequence has just one."""
    model = Model(4, None, max_length=16)
    model.append(5)
    for indices in ([3, 3, 0, 0], [1, 1, 1, 1], [3, 2, 1, 0]):
        model.reorder(indices)
        assert model.append(1)
        model.check(2)
    model.cache.resize(max_length=40)
    assert model.cache.max_length == 40 and model.append(30)
    model.check(3)


def test_a_pool_that_is_full_can_grow():
    """Contents that a larger pool lost, or a table that is too narrow for it."""
    model = Model(2, 4, max_length=12, pages=3)
    assert model.append(5) is False and model.append(5, counts=[5, 4])
    assert not model.append(1)
    model.cache.resize(pages=8, max_length=40)
    assert model.append(9)
    model.check(5)
    model.check_book()


@pytest.mark.parametrize("page_size", [4, None])
def test_a_batch_of_another_size(page_size):
    """Pages of sequences that left and are never freed, or one page a sequence that runs short."""
    model = Model(2, page_size, max_length=24)
    assert model.append(7, counts=[7, 3])
    k, v = model.cache.gathered()
    assert_same(k[1, :, :3].transpose(0, 1), model.k[1])
    assert_same(v[0].transpose(0, 1), model.v[0])
    assert k[1, :, 3:].count_nonzero() == 0
    for indices in ([0, 0, 1, 1, 0], [4, 2], [1]):
        model.reorder(indices)
        assert model.append(2)
        model.check(2)
        model.check_book()


def test_a_cache_that_is_a_shard():
    """Rows of a cache that context_decode does not take, or counts from another position; autocast
    that does not reach it, or rounds the shard and not q alone.  All ranks are one here, and the
    shard is the whole (the merge has tests of its own)."""
    cache = attn_ext.KVCache(3, 2, 8, max_length=32, page_size=4)
    for b, count in enumerate((9, 0, 4)):
        k, v = torch.randn(2, 1, 2, count, 8)
        cache.append(k, v, rows=[b])
    cache.reorder([2, 0, 1])
    q = torch.randn(3, 4, 2, 8)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        whole = dict(k_first=0, whole_lengths=cache.lengths, group=dist.group.WORLD)
        got = context_decode(q, *cache.gathered(), **whole)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = context_decode(q, *cache.gathered(), **whole)
            far = context_decode(q, *(x.bfloat16() for x in cache.gathered()), **whole)
            with pytest.raises(TypeError, match="v_cache must have"):
                k, v = cache.gathered()
                context_decode(q, k, v.bfloat16(), **whole)
        want_half = context_decode(q.bfloat16().float(), *cache.gathered(), **whole)
    finally:
        dist.destroy_process_group()
    assert_close(got, cache.attend(q), FLOAT32)
    assert half.dtype == far.dtype == torch.bfloat16
    assert torch.equal(half, want_half.bfloat16())
    assert_close(far, half, BFLOAT16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_autocast(dtype):
    """Queries or a bias that autocast does not reach, or pages that it does; rows of another dtype
    that a cache refuses under it, keeps rounded, or takes by the short way for those that came
    before; int8 that is read in bfloat16.
    """
    half = torch.bfloat16
    rows = [torch.randn(2, 2, 3, 16) for _ in range(4)]
    q, bias = torch.randn(2, 4, 3, 16), torch.randn(3, 12)
    asked = ({}, {"bias": bias}, {"tree_mask": torch.ones(3, 3, dtype=torch.bool).tril()})
    cast, plain = (
        attn_ext.KVCache(2, 2, 16, max_length=32, page_size=8, dtype=dtype) for _ in range(2)
    )
    with torch.autocast("cpu", dtype=half):
        for k in rows:
            cast.append(k, k.to(half))
        found = [cast.attend(q, return_lse=True, **options) for options in asked]
        assert cast.explain(q).problem.dtype == torch.float32
    for k in rows:
        plain.append(k, k.to(half).float())
    for (out, lse), options in zip(found, asked, strict=True):
        options = options | ({"bias": bias.to(half)} if "bias" in options else {})
        rounded = q.to(half) if dtype == torch.int8 else q.to(half).float()
        want, want_lse = plain.attend(rounded, return_lse=True, **options)
        assert out.dtype == half and torch.equal(out, want.to(half)) and torch.equal(lse, want_lse)
    if dtype == torch.float32:
        k, v = cast.gathered()
        whole = torch.cat(rows, 2)
        assert torch.equal(k, whole) and torch.equal(v, whole.to(half).float())
        with pytest.raises(TypeError, match="k must have the cache's dtype"):
            cast.append(rows[0].to(half), rows[0])


class Largest(TorchDispatchMode):
    """How many numbers the largest result has."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(x, torch.Tensor) and not func.is_view:
                self.numbers = max(self.numbers, x.numel())
        return found


@pytest.mark.parametrize("tree", [False, True])
def test_autocast_copies_no_pool(tree):
    """A pool of pages of another dtype that is converted at each call, for 3 positions of it."""
    cache = attn_ext.KVCache(1, 2, 16, max_length=32, page_size=8, pages=512)
    cache.append(*torch.randn(2, 1, 2, 3, 16))
    options = {"tree_mask": torch.ones(3, 3, dtype=torch.bool).tril()} if tree else {}
    with torch.autocast("cpu", dtype=torch.bfloat16), Largest() as seen:
        cache.attend(torch.randn(1, 2, 3, 16), **options)
    assert 0 < seen.numbers < cache.k_pages.numel() // 8


@pytest.mark.parametrize(
    ("of_q", "of_cache"),
    [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str,
)  # fmt: skip
def test_autocast_leaves_mistakes(of_q, of_cache):
    """Errors that speak of autocast's dtype where the caller's are unequal."""
    cache = attn_ext.KVCache(1, 2, 16, max_length=32, dtype=of_cache)
    cache.append(*torch.randn(2, 1, 2, 3, 16, dtype=of_cache))
    q = torch.randn(1, 2, 3, 16, dtype=of_q)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match=str(of_q)):
        cache.attend(q)


def compiled(cache, q, k, v, counts=None):
    """A step of a model."""
    cache.append(k, v, counts=counts)
    return cache.attend(q)


def test_compile():
    """A graph break, a copy of the pages, page lists that stand in the graph as constants, another
    graph for each length, or the lists of a copy mixed up with those of the original."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    step = torch.compile(compiled, fullgraph=True, backend=counter)
    cache = attn_ext.KVCache(2, 2, 8, max_length=12, page_size=4)
    twin, address = copy.deepcopy(cache), cache.k_pages.data_ptr()
    for count in range(12):
        q, k, v = torch.randn(2, 2, 4, 1, 8)[0], *torch.randn(2, 2, 2, 1, 8)
        assert_same(step(cache, q, k, v), compiled(twin, q, k, v))
        if count == 3:
            twin.reorder([1, 1])
            cache.reorder([1, 1])
    assert cache.k_pages.data_ptr() == address and counter.frame_count == 1
    assert cache.lengths.tolist() == twin.lengths.tolist() == [12, 12]
    with pytest.raises(attn_ext.CacheFullError, match="sequence 0 would hold 13 positions"):
        step(cache, q, k, v)
    again = pickle.loads(pickle.dumps(twin.truncate([3, 3])))
    step(again, q, k, v)
    assert again.lengths.tolist() == [4, 4] and twin.lengths.tolist() == [3, 3]


def cache(**options):
    """A small one with something in it."""
    k = torch.randn(2, 2, 5, 8)
    return attn_ext.KVCache(2, 2, 8, max_length=16, page_size=4, **options).append(k, k)


new = torch.zeros(2, 2, 3, 8)
REFUSED = {
    "k must have shape .2, 2, S, 8., got .2, 3, 2, 8.; read as .B, S, H, D.* k.transpose.1, 2":
        lambda c: c.append(new.transpose(1, 2), new),
    "q must have shape .2, Hq, Sq, 8., Hq a multiple of 2, got .2, 3, 4, 8.; read .* q.transpose":
        lambda c: c.attend(torch.zeros(2, 3, 4, 8)),
    "v must have k's 3 positions, got 2": lambda c: c.append(new, new[:, :, :2]),
    "k must have the cache's dtype torch.float32, got torch.float64":
        lambda c: c.append(new.double(), new),
    "k must be on the cache's device cpu, got meta": lambda c: c.append(new.to("meta"), new),
    "counts must have 2 entries between 0 and the 3 positions given, got .4, 0.":
        lambda c: c.append(new, new, counts=[4, 0]),
    "rows must hold numbers of sequences, 0 to 1, got 2": lambda c: c.append(new, new, rows=[0, 2]),
    "rows must name each sequence once, got .1, 1.": lambda c: c.attend(new, rows=[1, 1]),
    "indices must have at least one entry, got none": lambda c: c.reorder([]),
    "indices must hold numbers of sequences, 0 to 1, got 5": lambda c: c.reorder([5]),
    "indices must be integers in one dimension, got torch.float32":
        lambda c: c.reorder(torch.zeros(2)),
    "source must hold numbers of sequences, 0 to 1, got 2": lambda c: c.fork(2, [0]),
    "lengths must be between 0 and what the sequence has, 5, got 6": lambda c: c.truncate([5, 6]),
    "lengths must have 2 entries, got 1": lambda c: c.truncate([5]),
    "last must be at most the 5 positions that sequence 0 holds, got 6":
        lambda c: c.keep(6, [[0], [0]]),
    "kept must hold numbers between 0 and 1, got .2.": lambda c: c.keep(2, [[0], [2]]),
    "kept must be a sequence of sequences of ints, got 0": lambda c: c.keep(2, 0),
    "kept must be a sequence of ints, got int": lambda c: c.keep(2, [0, 1]),
    "return_lse must be a bool": lambda c: c.attend(
        new, tree_mask=torch.ones(3, 3).bool(), return_lse=torch.ones(2)),
    "dtype must be float16, bfloat16, float32, float64 or int8, got .'float32'":
        lambda c: attn_ext.KVCache(1, 1, 8, max_length=8, dtype=["float32"]),
    "pages, heads, page_size and head_dim must have a product of at most .*, got 1 . 2 . 4611":
        lambda c: attn_ext.KVCache(1, 2, 8, max_length=8, page_size=1 << 62),
    "batch and pages for max_length must have a product of at most .*, got 4611686018427387904 . 1":
        lambda c: attn_ext.KVCache(1 << 62, 2, 8, max_length=8, pages=1),
    "pages, heads, page_size and head_dim must have a product of at most .*, got 4611686018427387":
        lambda c: c.resize(pages=1 << 62),
    "pages, heads, page_size and head_dim must have a product of at most .*, got 4398046511104":
        lambda c: attn_ext.KVCache(
            1, 1, 1, head_dim_v=2**20, max_length=1, page_size=1, pages=1, device="meta"
        ).resize(pages=2**42),
    "device must be one of torch's, got 'graphics'":
        lambda c: attn_ext.KVCache(1, 1, 8, max_length=8, device="graphics"),
    "device must be one of torch's, got 1.5":
        lambda c: attn_ext.KVCache(1, 1, 8, max_length=8, device=1.5),
    "causal must not be given with tree_mask": lambda c: c.attend(
        new, tree_mask=torch.ones(3, 3).bool(), causal=False),
    "tree_mask must be broadcastable to .2, 2, 3, 3., got shape .5, 5.": lambda c: c.attend(
        new, tree_mask=torch.ones(5, 5).bool()),
    "mask must cover the 5 positions that are held, got 4": lambda c: c.attend(
        new, mask=torch.ones(4).bool()),
    "KVCache.append is not differentiable, but k requires": lambda c: c.append(
        new.clone().requires_grad_(), new),
    "attention_decode is not differentiable, but q requires": lambda c: c.attend(
        new.clone().requires_grad_()),
    "pages must be at least 8, got 7": lambda c: c.resize(pages=7),
    "max_length must be at least 16, got 15": lambda c: c.resize(max_length=15),
    "heads must be at least 1, got 0": lambda c: attn_ext.KVCache(1, 0, 8, max_length=8),
    "dtype must be float16, bfloat16, float32, float64 or int8, got torch.uint8":
        lambda c: attn_ext.KVCache(1, 1, 8, max_length=8, dtype=torch.uint8),
    "page_size must be given with window": lambda c: attn_ext.KVCache(
        1, 1, 8, max_length=8, page_size=None, window=4),
    "pages must be at least batch, 3, if contiguous, got 2": lambda c: attn_ext.KVCache(
        3, 1, 8, max_length=8, page_size=None, pages=2),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message):
    """A wrong argument that reaches a pointer, or changes the cache before it is an error."""
    found = cache()
    before = copy.deepcopy(vars(found._book))
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
        REFUSED[message](found)
    assert vars(found._book) == before


def test_repr_says_how_full_it_is():
    """A cache that can only be looked into by its private names."""
    assert repr(cache(pages=8)) == (
        "KVCache(batch=2, heads=2, head_dim=8, lengths=[5, 5], 8 pages of 4, 4 free, "
        "torch.float32, cpu)"
    )


def test_a_page_without_a_copy_of_its_own_is_seen(monkeypatch):
    """A test that could not tell whether pages are copied before they are written."""
    monkeypatch.setattr(Pages, "_own_last_page", lambda self, b: [])
    model = Model(2, 4, max_length=16)
    model.append(6)
    model.reorder([0, 0])
    model.append(1)
    with pytest.raises(AssertionError):
        model.check(1)


class Life(RuleBasedStateMachine):
    """Any order of changes; after each, attention is what lists of tensors give."""

    @initialize(
        batch=st.integers(1, 4), page_size=st.sampled_from([1, 2, 3, 5, None]),
        window=st.sampled_from([None, None, 0, 3, 6]), pages=st.integers(1, 14),
    )  # fmt: skip
    def begin(self, batch, page_size, window, pages):
        """A cache that is soon full."""
        window = None if page_size is None else window
        pages = max(pages, batch) if page_size is None else pages
        self.model = Model(batch, page_size, max_length=20, pages=pages, window=window)

    @rule(data=st.data(), seqlen=st.integers(0, 7))
    def append(self, data, seqlen):
        batch = len(self.model.k)
        rows = data.draw(st.none() | st.permutations(range(batch)))
        rows = rows and rows[: data.draw(st.integers(1, batch))]
        count = batch if rows is None else len(rows)
        counts = st.lists(st.integers(0, seqlen), min_size=count, max_size=count)
        self.model.append(seqlen, data.draw(st.none() | counts), rows)

    @rule(data=st.data())
    def reorder(self, data):
        batch = len(self.model.k)
        self.model.reorder(
            data.draw(st.lists(st.integers(0, batch - 1), min_size=batch, max_size=batch))
        )

    @rule(data=st.data())
    def fork(self, data):
        batch = st.integers(0, len(self.model.k) - 1)
        self.model.fork(data.draw(batch), data.draw(st.lists(batch, unique=True)))

    @rule(data=st.data())
    def truncate(self, data):
        book = self.model.cache._book
        allowed = [
            {0, *range(start + book.window if start else 0, length + 1)}
            for start, length in zip(book.starts, book.lengths, strict=True)
        ]
        self.model.truncate([data.draw(st.sampled_from(sorted(some))) for some in allowed])

    @rule(data=st.data(), last=st.integers(0, 4))
    @precondition(lambda self: self.model.cache.window is None)
    def keep(self, data, last):
        last = min(last, *map(len, self.model.k), 4)
        numbers = st.lists(st.integers(0, max(0, last - 1)), max_size=3 if last else 0)
        self.model.keep(last, [data.draw(numbers) for _ in self.model.k])

    @rule(pages=st.integers(0, 3), longer=st.integers(0, 5))
    def resize(self, pages, longer):
        cache = self.model.cache
        if len(cache._book.owners) < 30:
            cache.resize(
                pages=len(cache._book.owners) + pages, max_length=cache.max_length + longer
            )

    @rule(seqlen=st.integers(1, 4), tree=st.booleans(), softcap=st.sampled_from([0.0, 3.0]))
    def attend(self, seqlen, tree, softcap):
        mask = torch.rand(seqlen, seqlen, generator=self.model.random) < 0.6 if tree else None
        self.model.check(seqlen, tree_mask=mask, softcap=softcap)

    @invariant()
    def books_agree(self):
        if hasattr(self, "model"):
            self.model.check_book()


TestLife = Life.TestCase
# Shrinking a failure takes minutes, and the machine prints each step as it is
WITHOUT_SHRINKING = [phase for phase in Phase if phase.name in ("explicit", "generate")]
TestLife.settings = settings(stateful_step_count=30, phases=WITHOUT_SHRINKING)
