"""Rows whose keys lie in one tile: O and dQ leave their product as rows of storage (row_product.h),
as dK and dV do at the last panel of queries that sees a block of keys, where the head dimension is
a multiple of a block's numbers, on every ISA of this machine.
"""

import closeness
import pytest
import torch

from attn_ext import attention
from attn_ext.core.schema import BOTTOM_RIGHT, TOP_LEFT
from attn_ext.testing import check_call, random_call

pytestmark = pytest.mark.usefixtures("isa")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# What each would catch; tiles have 192 keys, grains 16 queries, blocks 4 or 6 rows.
CALLS = {
    "one row": {"seqlen_q": 1, "seqlen_k": 40},
    "a last block of one row, an odd number of keys": {"seqlen_q": 71, "seqlen_k": 67},
    "blocks that end at the diagonal": {"seqlen_q": 64, "causal": True, "align": TOP_LEFT},
    "first rows without keys": {"seqlen_q": 90, "seqlen_k": 70, "causal": True},
    "blocks that begin at a later key": {"seqlen_q": 120, "window": (7, 4)},
    "a mask narrows the tile": {"seqlen_q": 50, "seqlen_k": 101, "mask": "qk"},
    "panels with one tile and with two": {"seqlen_q": 230, "causal": True, "align": BOTTOM_RIGHT},
    "last panels that see few keys": {"seqlen_q": 150, "window": (7, 4)},
    "last keys that no query sees": {"seqlen_k": 90, "causal": True, "align": TOP_LEFT},
    "heads of a group": {"seqlen_q": 80, "heads_q": 4, "heads_k": 2},
    "sink and dropout": {"seqlen_q": 40, "sink": True, "dropout_p": 0.3},
    "rows of other heads between": {"seqlen_q": 70, "layout": "padded"},
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_calls(name, dtype):
    """A block with the keys, the weights, the factor or the place of another."""
    options = {"batch": 4, "heads_q": 4, "head_dim": 64, "head_dim_v": 128, "stats": True}
    options["seqlen_q"] = 40
    check_call(random_call(**{**options, "dtype": dtype, **CALLS[name]}), "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_excluded_values_do_not_reach_rows(dtype, bad):
    """Rows written before inf or NaN was noticed, and not again."""
    q, k, v = (torch.randn(2, 16, 40, 64).to(dtype) for _ in range(3))
    expected = attention(q, k, v, causal=True, backend="cpu")
    v[:, 3, 17] = bad
    found = attention(q, k, v, causal=True, backend="cpu")
    assert torch.equal(found[:, :3], expected[:, :3])
    torch.testing.assert_close(found[:, 3, :17], expected[:, 3, :17])
    assert not found[:, 3, 17:].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [40, 100])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_excluded_queries_do_not_reach_gradients(dtype, queries, bad):
    """Gradients of keys written before inf or NaN was noticed, and not again: those that share a
    block of rows, or a panel, with a query that does not see them."""
    q, k, v, dout = (torch.randn(2, 16, queries, 64).to(dtype) for _ in range(4))

    def gradients():
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, causal=True, backend="cpu")
        return torch.autograd.grad(out, leaves, dout)

    expected = gradients()
    q[:, 3, 17] = dout[:, 3, 17] = bad
    for name, good, found in zip("qkv", expected, gradients(), strict=True):
        assert torch.equal(found[:, :3], good[:, :3]), name
        unseen = [i for i in range(queries) if (i != 17 if name == "q" else i > 17)]
        near = closeness.HALF if dtype.itemsize == 2 else closeness.FLOAT32
        closeness.assert_close(found[:, 3, unseen], good[:, 3, unseen], near)
        if name != "q":
            assert not found[:, 3, :17].isfinite().any(), name
