"""Decode where so many query heads share a K/V head that wide registers keep parts of O while V
goes by, eight rows of Q at a time: each head against attention written out in float64.

What it would catch: rows of Q that take the weights of another, a last key of an odd number that is
lost or counted twice, weights of bfloat16 paired with other keys, numbers of O in another order, a
head dimension of V that is not that of K, and NaN of a row of V that no query sees.
"""

import closeness
import naive
import pytest
import torch

from attn_ext import _C, attention_decode

ISAS = [isa for isa in _C.supported_isas() if isa.startswith("avx512")]
pytestmark = pytest.mark.skipif(not ISAS, reason="rows are taken four at a time without AVX-512")
TOLERANCES = {
    torch.float32: closeness.FLOAT32,
    torch.float16: closeness.HALF,
    torch.bfloat16: closeness.BFLOAT16,
}
# heads of a group, queries, keys, dimensions of K and V, keys of a page (0: contiguous)
SHAPES = [
    (8, 1, 65, 64, 64, 0),  # a chunk, and one key of the next
    (8, 1, 331, 128, 128, 0),
    (9, 1, 129, 64, 160, 0),  # eight rows and one
    (14, 1, 200, 128, 96, 7),
    (8, 2, 517, 96, 64, 16),  # the last key is one query's own
    (23, 1, 150, 64, 128, 5),
]


def call(shape, dtype, rows_first):
    """q, k, v as [B, H, S, D], the caches as they are given, the table of pages."""
    group, queries, keys, d, dv, page = shape
    torch.manual_seed(keys)
    k, v = (torch.randn(2, 2, keys, n).to(dtype) for n in (d, dv))
    q = torch.randn(2, 2 * group, queries, d).to(dtype)
    if not page:
        if rows_first:
            return q, k, v, *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)), None
        return q, k, v, k, v, None
    pages = -(-keys // page)
    table = torch.randperm(2 * pages).view(2, pages).int()
    caches = []
    for x in (k, v):
        x = torch.nn.functional.pad(x, (0, 0, 0, pages * page - keys))
        cache = torch.empty(2 * pages, 2, page, x.shape[-1], dtype=dtype)
        cache[table.long()] = x.unflatten(2, (pages, page)).transpose(1, 2)
        caches.append(cache)
    return q, k, v, *caches, table


def expected(q, k, v, hidden):
    """(out, lse) in float64 of queries that are the last ones of the sequence."""
    group, rows, keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    later = torch.arange(keys) > torch.arange(keys - rows, keys)[:, None]
    k, v = (x.double().repeat_interleave(group, 1).transpose(1, 2) for x in (k, v))
    s = naive.scores(q.double().transpose(1, 2), k)
    out, lse = naive.attend(s, v, later if hidden is None else later | hidden)
    return out.transpose(1, 2), lse


@pytest.mark.parametrize("rows_first", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_row_of_a_group_is_right(shape, dtype, rows_first):
    q, k, v, k_cache, v_cache, table = call(shape, dtype, rows_first)
    lengths = torch.full((2,), shape[2], dtype=torch.int32)
    out, lse = attention_decode(
        q, k_cache, v_cache, lengths, block_table=table, return_lse=True, backend="cpu"
    )
    want, want_lse = expected(q, k, v, None)
    closeness.assert_close(out.double(), want, TOLERANCES[dtype])
    closeness.assert_close(lse.double(), want_lse, closeness.FLOAT32)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_hidden_row_of_v_may_hold_nan(dtype):
    """An odd number of keys is seen; what lies beside a visible key, and the last one, is NaN."""
    q, k, v, *_ = call((8, 1, 190, 64, 64, 0), dtype, False)
    hidden = torch.zeros(190, dtype=torch.bool)
    hidden[[5, 64, 66, 101, 189]] = True
    want, _ = expected(q, k, v, hidden)
    v[:, :, hidden] = float("nan")
    mask = ~hidden.expand(2, 1, 1, 190)
    out = attention_decode(q, k, v, mask=mask, backend="cpu")
    closeness.assert_close(out.double(), want, TOLERANCES[dtype])
