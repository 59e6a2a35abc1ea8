"""KVCache(dtype=torch.int8) on Triton's kernel, which reads int8 with its factors, interpreted, by
the same model as on the other backends; and bugs planted in the kernel."""

import pytest
import torch
from cache_checks import TREE, Model, features
from closeness import FLOAT32, HALF, assert_close
from planted_triton import planted

import attn_ext
from attn_ext.functional import quantised
from attn_ext.triton_kernels.launch import attention
from attn_ext.triton_kernels.launch import decode_int8 as launch


@pytest.fixture(autouse=True)
def only_the_kernel(monkeypatch):
    """Calls that go the slow way, by copies in float32, are errors here."""
    monkeypatch.delattr(quantised, "_of_sequence")


@pytest.mark.parametrize("options", [{}, {"window": 5}], ids=["all", "window"])
def test_a_life(options):
    """Factors of another row, head or page; pages that are shared, copied and freed between calls;
    NaN for the factor of whatever is not held."""
    model = Model(2, 4, max_length=24, backend="triton", dtype=torch.int8, **options)
    model.append(9, counts=[9, 2])
    model.check(2)
    model.reorder([0, 0])
    model.append(3)
    model.check(3, tree_mask=TREE[:3, :3])
    model.append(1, rows=[1])
    model.check(1, rows=[1], softcap=3.0)


FEATURES = features(90)


@pytest.mark.parametrize("processors", [1, 16], ids=["one part", "split keys"])
@pytest.mark.parametrize("name", FEATURES)
def test_features(name, processors, monkeypatch):
    """A factor that multiplies more than the products, or a feature that is lost; parts that are
    joined wrongly; head dimensions that fill no tile."""
    monkeypatch.setattr(attention, "multiprocessors", lambda x: processors)
    for page_size, tree in ((3, None), (16, TREE)):
        model = Model(3, page_size, max_length=192, backend="triton", dtype=torch.int8,
                      dim=40, dim_v=33)  # fmt: skip
        model.append(160, counts=[160, 70, 2])
        told = FEATURES[name]
        if "bias" in told:
            told = {"bias": torch.arange(160.0) % 3}
        model.check(4, tree_mask=tree, **told)


@pytest.mark.parametrize("dtype", quantised.GIVEN)
def test_queries_of_each_dtype(dtype):
    """Queries of 16 bits that are taken for 8 of them, or weights of 8 bits."""
    cache = attn_ext.KVCache(1, 2, 64, max_length=128, dtype=torch.int8)
    k, v = torch.randn(2, 1, 2, 100, 64)
    q = torch.randn(1, 4, 2, 64).to(dtype)
    out, lse = cache.append(k, v).attend(q, backend="triton", return_lse=True)
    k, v = (x.repeat_interleave(2, 1) for x in cache.gathered())
    seen = torch.ones(2, 100).tril(98).bool()
    s = (q.float() @ k.transpose(2, 3) / 8).masked_fill(~seen, -torch.inf)
    want = torch.softmax(s, -1) @ v
    assert out.dtype == dtype
    assert_close(lse, torch.logsumexp(s, -1), FLOAT32)
    assert_close(out.float(), want.to(dtype).float(), FLOAT32 if dtype == torch.float32 else HALF)


def test_rows_that_are_not_finite():
    """A NaN that is lost, or that reaches queries which do not see its row."""
    cache = attn_ext.KVCache(1, 1, 32, max_length=64, dtype=torch.int8)
    k, v = torch.randn(2, 1, 1, 40, 32)
    k[0, 0, 38, 3], v[0, 0, 39, 0] = torch.inf, torch.nan
    q = torch.randn(1, 1, 3, 32)
    out = cache.append(k, v).attend(q, backend="triton")[0, 0]
    assert out[0].isfinite().all() and out[1:].isnan().all()
    mask = torch.ones(3, 40).bool()
    mask[:, 38:] = False
    assert cache.attend(q, backend="triton", mask=mask).isfinite().all()


def test_explain_names_the_kernel():
    """An explanation of a call by copies."""
    cache = attn_ext.KVCache(1, 2, 64, max_length=128, dtype=torch.int8)
    cache.append(*torch.randn(2, 1, 2, 100, 64))
    found = cache.explain(torch.randn(1, 4, 1, 64), backend="triton")
    assert found.chosen == "triton"
    assert found.int8 == "read as they are by the kernel of triton"


PLANTED = {
    "V's factors are K's": ("tl.load(at, mask=inside, other=0.0)\n        weight",
                            "factor\n        weight"),
    "the factor of K multiplies nothing": (", Q_PARTS) * factor[None, :]", ", Q_PARTS)"),
    "a weight has 8 bits": ("kept, acc, P_PARTS", "kept, acc, 1"),
    "a query has 8 bits": ("zero, Q_PARTS", "zero, 1"),
    "0 times the NaN of an excluded key": (
        "tl.where(p != 0, p * factor[None, :], 0.0)", "p * factor[None, :]"),
    "factors of the first head": ("k_factors + wide_hk * kf_h +", "k_factors +"),
    "factors of the place, not the page": ("+ page * vf_p + slot * vf_s", "+ j * vf_s"),
    "parts begin a tile late": ("part_of(first, end, split", "part_of(first + split, end, split"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug_is_caught(name, monkeypatch, tmp_path):
    """A test of this file that could not tell."""
    module = planted("decode_int8", *PLANTED[name], tmp_path)

    def live():
        model = Model(2, 16, max_length=256, backend="triton", dtype=torch.int8, dim=32, dim_v=32)
        model.append(200, counts=[200, 77])
        mask = torch.ones(200).bool()
        mask[60:64] = False
        model.check(2)
        model.cache.v_factors[model.cache.block_table[:, 3], :, 12:] = torch.nan
        q = model.draw(2, 4, 1, 32)
        assert model.cache.attend(q, backend="triton", mask=mask).isfinite().all()

    live()
    monkeypatch.setattr(launch, "decode_int8_kernel", module.decode_int8_kernel)
    with pytest.raises(AssertionError):
        live()
