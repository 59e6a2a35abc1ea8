"""Masks with structure on the CPU kernels: tiles that no query sees are not computed, and few
queries with a mask or bias (decode of padded batches) read only the keys that are seen.
"""

import pytest
import torch

from attn_ext.testing import check_call, random_call

pytestmark = pytest.mark.usefixtures("isa")

POISON = float("nan")


def _queries_and_keys(seqlen_q, seqlen_k):
    return torch.arange(seqlen_q)[:, None], torch.arange(seqlen_k)[None, :]


def _documents(i, j):
    return i // 150 == j // 150


# What each would catch; i and j are positions of a query and a key, tiles have 192 keys.
STRUCTURES = {
    "padding on the right: the last tiles are left out": lambda i, j: (j < 250) & (i >= 0),
    "padding on the left: the first tile is left out": lambda i, j: (j >= 300) & (i >= 0),
    "one key in the middle tile": lambda i, j: (j == 290) & (i >= 0),
    "documents: each panel has tiles of its own": _documents,
    "a hole of two tiles": lambda i, j: ((j < 100) | (j > 500)) & (i >= 0),
    "some panels see nothing": lambda i, j: (j < 60) & (i // 64 % 2 == 0),
    "odd bounds: pairs of bfloat16 keys share an item": lambda i, j: (j >= 195) & (j < 390 + i % 2),
    "nothing at all: every row is empty": lambda i, j: (j < 0) & (i >= 0),
    "the last bit of a word": lambda i, j: (j % 32 == 31) & (j < 224) & (i >= 0),
}


def _apply(call, visible, form):
    """Writes the structure into the call's mask or bias, and poison where no query looks."""
    if form == "mask":
        call.mask.copy_(visible)
    else:
        call.bias.masked_fill_(~visible, -float("inf"))
    unseen = ~visible.any(0)
    call.k[:, :, unseen] = POISON
    call.v[:, :, unseen] = POISON
    return call


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("form", ["mask", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_structures(name, form, dtype):
    """A tile left out that some query sees, one not written, a ticket not handed on."""
    call = random_call(
        batch=1,
        heads_q=2,
        seqlen_q=300,
        seqlen_k=700,
        head_dim=16,
        dtype=dtype,
        stats=True,
        **{form: "qk"},
    )
    check_call(_apply(call, STRUCTURES[name](*_queries_and_keys(300, 700)), form), "cpu")


@pytest.mark.parametrize(
    "features",
    [{"causal": True}, {"window": (100, 40)}, {"dropout_p": 0.3}, {"bias": "qk", "sink": True}],
    ids=["causal", "window", "dropout", "bias and sink"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_structures_with_bands(features, dtype):
    """Bounds of grains that do not ascend any more after both were applied."""
    visible = _documents(*_queries_and_keys(420, 420))
    call = random_call(batch=1, seqlen_q=420, head_dim=8, mask="qk", dtype=dtype, **features)
    check_call(_apply(call, visible, "mask"), "cpu")


@pytest.mark.parametrize("step", [0, 2], ids=["broadcast over keys", "every other byte"])
def test_strides_of_keys(step):
    """Bytes of the mask read as if they were neighbours."""
    call = random_call(batch=1, seqlen_q=70, seqlen_k=390, head_dim=8, mask="bhqk")
    wide = torch.rand(1, 2, 70, 2 * 390, generator=torch.Generator().manual_seed(0)) < 0.5
    call = call._replace(mask=wide[..., :1].expand_as(call.mask) if step == 0 else wide[..., ::2])
    check_call(call, "cpu")


# Few queries: (mask, bias, heads_q, heads_k)
DECODES = {
    "mask of keys": ("bk", False, 8, 2),
    "mask of queries and keys": ("bqk", False, 4, 4),
    "mask that differs in the heads of a group": ("bhqk", False, 4, 2),
    "bias of keys": (False, "bk", 8, 2),
    "bias of each head": (False, "hqk", 4, 4),
    "both": ("bk", "qk", 4, 1),
    "a group of 40 heads": ("bk", False, 40, 1),
}


@pytest.mark.parametrize("name", DECODES)
@pytest.mark.parametrize("features", [{}, {"causal": True, "alibi": "b", "softcap": 3.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_few_queries(name, features, dtype):
    """A mask read at the wrong key, ALiBi by the place among the visible keys, values of the
    keys left out.
    """
    mask, bias, heads_q, heads_k = DECODES[name]
    call = random_call(
        seqlen_q=3,
        seqlen_k=333,
        heads_q=heads_q,
        heads_k=heads_k,
        head_dim=64,
        mask=mask,
        bias=bias,
        dtype=dtype,
        **features,
    )
    hidden = torch.arange(333) % 100 < 70  # whole chunks of 64 keys among them
    if call.mask is not None:
        call.mask.logical_and_(~hidden)
    else:
        call.bias.masked_fill_(hidden, -float("inf"))
    call.k[:, :, hidden] = POISON
    call.v[:, :, hidden] = POISON
    check_call(call, "cpu")


@pytest.mark.parametrize("mask", ["bk", False])
def test_few_queries_of_a_paged_cache(mask):
    """The table of pages looked up by the place among the visible keys."""
    call = random_call(
        seqlen_q=2,
        seqlen_k=300,
        heads_q=4,
        heads_k=2,
        head_dim=64,
        cache_seqlens=[0, 130, 300],
        page_size=16,
        mask=mask,
        bias=False if mask else "k",
    )
    check_call(call, "cpu", grads=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_queries_with_padding_by_the_smallest_number(dtype):
    """0 * inf: weights of exactly 0, which a bias of finfo.min gives, on infinite values."""
    call = random_call(
        seqlen_q=1, seqlen_k=200, heads_q=4, heads_k=2, head_dim=64, bias="bk", dtype=dtype
    )
    call.bias[..., 120:] = torch.finfo(dtype).min
    call.v[:, :, 120:] = float("inf")
    check_call(call, "cpu", grads=False)
