"""KVCache(dtype=torch.int8) against float64 attention to the numbers that its rows stand for: read
by the kernel as they are, or made float32, one sequence at a time."""

import pytest
import torch
from cache_checks import TREE, Model, features
from closeness import assert_same

import attn_ext
from attn_ext.backends import cpu_cache
from attn_ext.functional import quantised
from attn_ext.ops import execute

SIZES = {"made float32": {"dim": 8, "dim_v": 5}, "as they are": {"dim": 64, "dim_v": 32}}


@pytest.mark.parametrize("page_size", [3, 16, None])
@pytest.mark.parametrize("way", SIZES)
def test_a_life(way, page_size):
    """Factors that stay behind when rows move, or are those of another row, head or page; each
    step with NaN for the factor of whatever is not held."""
    model = Model(3, page_size, max_length=160, dtype=torch.int8, queries=8, **SIZES[way])
    assert model.append(90, counts=[90, 1, 70])
    model.check(1)
    model.check(4)
    model.reorder([0, 0, 2])
    assert model.append(4)
    model.check(4, tree_mask=TREE)
    assert model.keep(4, [[0, 1, 3], [], [2]])
    model.check(1)
    model.truncate([80, 0, 66])
    assert model.append(20, rows=[1])
    model.fork(2, [1])
    model.cache.resize(max_length=200, pages=300)
    assert model.append(2, counts=[2, 1, 2])
    model.check(2, rows=[1, 2])
    model.check_book()


@pytest.mark.parametrize("page_size", [3, None])
def test_a_life_on_each_backend(page_size, backend_and_device):
    """Devices on which nothing serves; a backend that is asked for and not taken."""
    backend, device = backend_and_device
    model = Model(3, page_size, max_length=48, dtype=torch.int8, device=device, backend=backend)
    assert model.append(9, counts=[9, 1, 4])
    model.check(4)
    model.reorder([0, 0, 2])
    assert model.append(4)
    model.check(4, tree_mask=TREE)
    assert model.keep(4, [[0, 1, 3], [], [2]])
    model.check(1, rows=[2, 0])
    assert model.cache.explain(model.draw(3, 4, 1, 8).to(device), backend=backend).chosen == backend


def test_explain_says_how_int8_is_read():
    """An explanation of the float32 call that nobody makes."""
    cache = attn_ext.KVCache(1, 2, 64, max_length=256, dtype=torch.int8)
    cache.append(*torch.randn(2, 1, 2, 100, 64))
    few, many = torch.randn(1, 4, 1, 64), torch.randn(1, 4, 40, 64)
    if cpu_cache.READS_TENSORS:
        assert "int8: read as they are by the kernel of cpu" in str(cache.explain(few))
    assert "int8: made float32, one sequence's pages at a time" in str(cache.explain(many))
    found = cache.explain(few, backend="reference")
    assert found.chosen == "reference" and found.int8.startswith("made float32")
    assert "int8" not in str(attn_ext.KVCache(1, 2, 64, max_length=64).explain(few))
    with pytest.raises(ValueError, match="q must have shape"):
        cache.explain(few[..., :8])
    with pytest.raises(TypeError, match="q must be float16, bfloat16 or float32"):
        cache.explain(few.double())


FEATURES = features(90)


@pytest.mark.parametrize("way", SIZES)
@pytest.mark.parametrize("name", FEATURES)
def test_features(name, way):
    """A factor that multiplies more than the products, or a feature that is lost."""
    for tree in (None, TREE):
        model = Model(3, 4, max_length=128, dtype=torch.int8, **SIZES[way])
        model.append(90, counts=[90, 70, 2])
        model.check(4, tree_mask=tree, **FEATURES[name])


def test_the_kernel_reads_int8(monkeypatch, isa):
    """Calls that silently go the slow way, or copy a cache: here only the kernel may serve."""
    if not cpu_cache.READS_TENSORS:
        return  # an older torch has the slow way alone
    monkeypatch.delattr(quantised, "_of_sequence")
    monkeypatch.delattr(execute, "_rows")
    model = Model(2, 16, max_length=256, dtype=torch.int8, queries=8, dim=64, dim_v=64)
    model.append(200, counts=[200, 77])
    for seqlen in (1, 2, 3):
        model.check(seqlen)


def test_a_window_rolls():
    """Factors of pages that are freed and taken again."""
    model = Model(2, 4, max_length=24, pages=12, window=9, dtype=torch.int8)
    assert model.append(12, counts=[12, 5])
    for step in range(12):
        assert model.append(3, counts=[3, 1 + step % 3])
        model.check(3)
        model.check_book()


@pytest.mark.parametrize("dtype", quantised.GIVEN)
def test_rounding_and_rows_that_are_not_finite(dtype):
    """An error beyond half a step; 0 / 0; a NaN that is lost, or that reaches another row."""
    x = torch.randn(1, 2, 5, 64).to(dtype)
    x[0, 0, 1], x[0, 0, 2, 3], x[0, 1, 3, 0] = 0, torch.nan, torch.inf
    cache = attn_ext.KVCache(1, 2, 64, max_length=64, dtype=torch.int8).append(x, x)
    k, v = cache.gathered()
    assert_same(k, v)
    lost = k.isnan().all(-1)
    assert lost.sum() == 2 and lost[0, 0, 2] and lost[0, 1, 3] and k.isnan().sum() == 2 * 64
    error = (k - x.float())[~lost].abs().amax(-1)
    assert (error <= x.float().abs().amax(-1)[~lost] / 127 * 0.5001).all()
    q = torch.randn(1, 4, 1, 64).to(dtype)
    assert cache.attend(q).dtype == dtype


def test_the_smallest_and_the_largest_rows():
    """int8 that wraps where a factor is no normal number, and 127 factors that overflow."""
    numbers = torch.finfo(torch.float32)
    sizes = [190 * numbers.smallest_normal * numbers.eps, numbers.tiny, numbers.max]
    x = torch.tensor(sizes)[:, None] * torch.linspace(-1, 1, 64)
    rounded = quantised.dequantise(*quantised.quantise(x))
    assert rounded.isfinite().all()
    bound = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=numbers.tiny) * 0.5001
    assert ((rounded - x).abs() <= bound).all()


def _of_next_position(x):
    kept, factors = ROUNDED(x)
    return kept, factors.roll(1, dims=2)


def _of_next_head(x):
    kept, factors = ROUNDED(x)
    return kept, factors.roll(1, dims=1)


def _cut(x):
    _, factors = ROUNDED(x)
    return (x / factors).trunc().to(torch.int8), factors


def _of_all_rows(x):
    factors = (x.abs().amax() / 127).expand(*x.shape[:-1], 1)
    return (x / factors).round().to(torch.int8), factors


ROUNDED, READ, WRITE = quantised.quantise, cpu_cache.of_int8, attn_ext.KVCache._write
PLANTED = {
    "factors of the next position": (quantised, "quantise", _of_next_position),
    "factors of the next head": (quantised, "quantise", _of_next_head),
    "cut instead of rounded": (quantised, "quantise", _cut),
    "one factor for all rows": (quantised, "quantise", _of_all_rows),
    "the kernel takes V's factors for K's": (
        cpu_cache, "of_int8", lambda call, k_factors, v_factors: READ(call, v_factors, k_factors)),
    "the kernel leaves V's factors out": (
        cpu_cache, "of_int8", lambda call, k_factors, v_factors:
            READ(call, k_factors, torch.full_like(v_factors, 0.02))),
    "factors are written in another order": (
        attn_ext.KVCache, "_write", lambda cache, new, counts, rows: WRITE(
            cache, (*new[:2], *(x.flip(2) for x in new[2:])), counts, rows)),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug_is_caught(name, monkeypatch):
    """A test of this file that could not tell."""
    if "kernel" in name and not cpu_cache.READS_TENSORS:
        return  # an older torch has the slow way alone

    def live():
        model = Model(2, 16, max_length=256, dtype=torch.int8, queries=8, dim=64, dim_v=64)
        model.append(200, counts=[200, 77])
        model.keep(4, [[0, 1, 3], [2, 3]])
        model.check(2)

    live()
    monkeypatch.setattr(*PLANTED[name])
    with pytest.raises(AssertionError):
        live()


def _compiled(cache, x):
    torch.compile(lambda x: cache.attend(x), fullgraph=True, backend="eager")(x)


k = torch.randn(2, 2, 1, 64)
ERRORS = (ValueError, TypeError, RuntimeError)  # what the compiler makes of one is the last
REFUSED = {
    "k must be float16, bfloat16 or float32 for a cache of int8, got torch.float64":
        lambda c: c.append(k.double(), k),
    "v must be float16, bfloat16 or float32 for a cache of int8, got torch.int8":
        lambda c: c.append(k, k.to(torch.int8)),
    "q must be float16, bfloat16 or float32 for a cache of int8, got torch.float64":
        lambda c: c.attend(k.double()),
    "requires a gradient": lambda c: c.attend(k.clone().requires_grad_()),
    "append of a KVCache of int8 cannot be transformed: call": lambda c: torch.vmap(
        lambda x: c.append(x, x).lengths)(torch.stack([k, k])),
    "attend of a KVCache of int8 cannot be transformed: call": lambda c: torch.vmap(c.attend)(
        torch.stack([k, k])),
    "attend of a KVCache of int8 cannot be compiled: call": lambda c: _compiled(c, k),
    "return_lse must be a bool": lambda c: c.attend(k, return_lse="yes"),
    "KVCache.attend.. got an unexpected keyword argument 'need_stats'":
        lambda c: c.attend(k, need_stats=True),
    "k_cache must be on q's device meta, got cpu": lambda c: c.attend(k.to("meta")),
    "bias must cover the 1 positions that are held, got 0":
        lambda c: c.attend(k, bias=torch.zeros(0)),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message):
    """Errors that name no way out, and a cache that is changed before one."""
    cache = attn_ext.KVCache(2, 2, 64, max_length=64, dtype=torch.int8).append(k, k)
    with pytest.raises(ERRORS, match=message):
        REFUSED[message](cache)
    assert cache.lengths.tolist() == [1, 1]


def test_a_function_that_is_not_compiled():
    """The way out that the error names."""
    cache = attn_ext.KVCache(2, 2, 64, max_length=64, dtype=torch.int8)

    @torch.compiler.disable
    def attend(x):
        return cache.append(x, x).attend(x)

    torch.compile(lambda x: attend(x) + 1, backend="eager")(k)
    assert cache.lengths.tolist() == [1, 1]


def test_memory_and_no_sequences():
    """A cache that takes more than it says; a batch of none."""
    sizes = dict(batch=2, heads=2, head_dim=64, max_length=64)
    whole, cache = attn_ext.KVCache(**sizes), attn_ext.KVCache(**sizes, dtype=torch.int8)
    assert cache.nbytes == whole.nbytes // 4 + 2 * 4 * 2 * 2 * 64
    assert cache.append(k[:0], k[:0], rows=[]).attend(k[:0], rows=[]).shape == (0, 2, 1, 64)
    out, lse = cache.append(k, k).attend(k[:, :, :0], return_lse=True)
    assert out.shape == (2, 2, 0, 64) and lse.shape == (2, 2, 0)
