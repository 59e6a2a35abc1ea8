"""Decode in Triton's interpreter: split keys, pages, packed heads, against the float64 truth."""

import pytest
import torch

from attn_ext.testing import check_call, random_call
from attn_ext.triton_kernels.launch import attention

CACHE = {"seqlen_k": 200, "cache_seqlens": [0, 7, 200], "heads_q": 4, "heads_k": 2, "stats": True}


@pytest.mark.parametrize("page_size", [0, 1, 3, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages(page_size, dtype):
    """A tile that crosses pages, keys beyond the used length (NaN there), a cache without keys."""
    call = random_call(seqlen_q=3, page_size=page_size, causal=True, dtype=dtype, **CACHE)
    check_call(call, "triton")


FEATURES = {
    "one query": {"seqlen_q": 1},
    "more rows than a tile, causal": {"seqlen_q": 40, "causal": True},
    "window": {"window": (30, 2), "causal": False},
    "mask and bias by head": {"mask": "bhqk", "bias": "hqk"},
    "all at once": {
        "causal": True,
        "window": (150, -1),
        "mask": "bk",
        "bias": "hk",
        "softcap": 5.0,
        "alibi": "b",
        "sink": True,
        "dropout_p": 0.2,
        "head_dim": 24,
        "head_dim_v": 40,
        "page_size": 16,
        "layout": "padded",
    },
}


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("processors", [1, 16], ids=["one part", "split keys"])
def test_features(name, processors, monkeypatch):
    """Side inputs of the wrong head of a packed row; parts that are joined wrongly."""
    monkeypatch.setattr(attention, "multiprocessors", lambda x: processors)
    check_call(random_call(**{"seqlen_q": 2, **CACHE, **FEATURES[name]}), "triton")


@pytest.mark.parametrize("num_splits", [1, 2, 7, 10**6])
def test_the_splits_that_are_asked_for(num_splits, monkeypatch):
    """num_splits ignored; parts without keys, or more of them than tiles."""
    monkeypatch.setattr(attention, "split_count", None)  # the kernel does not choose
    check_call(random_call(seqlen_q=2, num_splits=num_splits, page_size=16, **CACHE), "triton")


def test_dense_calls_with_few_queries_are_split_too():
    """A dense call that the split kernels serve, with a gradient from the others."""
    call = random_call(seqlen_q=2, seqlen_k=520, heads_q=4, heads_k=2, causal=True, batch=1)
    assert attention.splits_keys(attention.Plan(call))
    check_call(call, "triton")


@pytest.mark.parametrize("where", ["k", "v"])
def test_bad_values_in_one_part(where):
    """NaN that is lost, or spreads to rows that do not see it, when parts are joined."""
    call = random_call(seqlen_q=4, seqlen_k=200, cache_seqlens=[200], causal=True, stats=True)
    getattr(call, where)[:, :, 198] = torch.nan
    getattr(call, where)[:, 1, 20, 3] = torch.inf
    check_call(call, "triton")


def test_wrong_page_numbers_read_nothing_outside():
    """A read outside the cache, which ends the process."""
    call = random_call(
        seqlen_q=1, page_size=16, **CACHE | {"seqlen_k": 40, "cache_seqlens": [0, 40]}
    )
    call.block_table.fill_(2**31 - 1)
    call.seqlens_k.fill_(2**31 - 1)
    attention.forward(call)


@pytest.mark.parametrize(
    ("programs", "tiles", "processors", "expected"),
    [(200, 64, 132, 1), (8, 3, 132, 1), (8, 512, 132, 33), (1, 10, 132, 5), (1, 9999, 132, 128)],
)
def test_split_count(programs, tiles, processors, expected):
    """Splits of a GPU that is full, of too few tiles, or too many to join."""
    assert attention.split_count(programs, tiles, processors) == expected


@pytest.mark.parametrize("page_size", [0, 3])
def test_wide_rows_that_are_read_in_parts(page_size):
    """float32 heads wider than 64: a part of another page, columns past the last one."""
    call = random_call(
        seqlen_q=2, page_size=page_size, head_dim=100, head_dim_v=72, causal=True,
        **CACHE | {"seqlen_k": 50, "cache_seqlens": [0, 7, 50]},
    )  # fmt: skip
    check_call(call, "triton")
