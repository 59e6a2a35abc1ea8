"""KVCache(dtype=torch.int8) against float64 attention to the numbers that its rows stand for: read
by the kernel as they are, or made float32, one sequence at a time."""

import pytest
import torch
from cache_checks import Model
from closeness import assert_same

import attn_ext
from attn_ext.backends import cpu_cache
from attn_ext.functional import quantised

TREE = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]).bool()
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


FEATURES = {
    "softcap, sink": {"softcap": 2.0, "sink": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])},
    "window": {"window": (3, None)},
    "bias of the positions held": {"bias": torch.arange(90.0) % 3},
}


@pytest.mark.parametrize("way", SIZES)
@pytest.mark.parametrize("name", FEATURES)
def test_features(name, way):
    """A factor that multiplies more than the products, or a feature that is lost."""
    for tree in (None, TREE):
        model = Model(3, 4, max_length=128, dtype=torch.int8, **SIZES[way])
        model.append(90, counts=[90, 70, 2])
        model.check(4, tree_mask=tree, **FEATURES[name])


def test_the_kernel_reads_int8(monkeypatch):
    """Calls that silently go the slow way: here only the kernel may serve."""
    if not cpu_cache.READS_TENSORS:
        return  # an older torch has the slow way alone
    monkeypatch.delattr(quantised, "_of_sequence")
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


def test_memory_and_refusals():
    """A cache that takes more than it says, and errors that name no way out."""
    sizes = dict(batch=2, heads=2, head_dim=64, max_length=64)
    whole, cache = attn_ext.KVCache(**sizes), attn_ext.KVCache(**sizes, dtype=torch.int8)
    assert cache.nbytes == whole.nbytes // 4 + 2 * 4 * 2 * 2 * 64
    k = torch.randn(2, 2, 1, 64)
    with pytest.raises(TypeError, match="k must be float16, bfloat16 or float32 for a cache"):
        cache.append(k.double(), k)
    cache.append(k, k)
    with pytest.raises(TypeError, match="q must be float16, bfloat16 or float32 for a cache"):
        cache.attend(k.double())
    with pytest.raises(NotImplementedError, match="requires a gradient"):
        cache.attend(k.clone().requires_grad_())
