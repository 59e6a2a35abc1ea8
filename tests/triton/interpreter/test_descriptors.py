"""Loads by tensor descriptors (TMA) in the interpreter; the choice between them and pointers."""

import pytest
import torch

from attn_ext.testing import check_call, random_call
from attn_ext.triton_kernels import configs
from attn_ext.triton_kernels.launch import attention, descriptors

FEATURES = {
    "GQA, causal, longer keys": {"heads_q": 4, "heads_k": 2, "causal": True, "seqlen_k": 70},
    "heads that fill no tile, padded rows": {"head_dim": 24, "head_dim_v": 40},
    "batch and heads of size 1": {"batch": 1, "heads_q": 1},
    "mask, bias, dropout, window, statistics": {
        "mask": "bk", "bias": "hqk", "dropout_p": 0.2, "window": (20, 3), "stats": True,
    },
}  # fmt: skip


@pytest.fixture(params=[1, 2], ids=["descriptors", "specialized warps"])
def described(request, monkeypatch):
    """A list that gets the loads of each forward; the tile asks for descriptors."""
    monkeypatch.setattr(configs, "INTERPRETED", configs.Tile(32, 32, 4, 1, request.param))
    used, describe = [], attention.describe

    def noted(tile, plan):
        used.append(tile.loads)
        return describe(tile, plan)

    monkeypatch.setattr(attention, "describe", noted)
    return used


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("name", FEATURES)
def test_features(name, layout, described):
    """A descriptor of the wrong shape or strides, a head or tile read from elsewhere."""
    options = {"seqlen_q": 37, "dtype": torch.float16, "layout": layout} | FEATURES[name]
    check_call(random_call(**options), "triton", grads=False)
    assert all(described)


@pytest.mark.parametrize("where", ["k", "v"])
def test_bad_values(where, described):
    """The second computation of a tile, which loads by pointers."""
    call = random_call(7, seqlen_q=40, causal=True, stats=True, batch=1)
    getattr(call, where)[:, :, 19] = torch.nan
    check_call(call, "triton", grads=False)
    assert all(described)


def test_tensors_that_tma_cannot_take_go_by_pointers(described):
    """A descriptor that the driver refuses, or one that reads other memory."""
    shape = {"seqlen_q": 37, "dtype": torch.float16}
    calls = (
        random_call(**shape, head_dim=20),
        random_call(**shape, layout="padded"),
        random_call(**shape, seqlens_q=[3, 30]),
    )
    for call in calls:
        check_call(call, "triton", grads=False)
    assert described == [0] * len(calls)


def tensor(**changes):
    """A tensor [2, 3, 40, 64] of bfloat16 that TMA can take, but for the changes."""
    shape = changes.get("shape", (2, 3, 40, 64))
    strides = changes.get("strides", (3 * 40 * 64, 40 * 64, 64, 1))
    storage = torch.zeros(1 << 18, dtype=changes.get("dtype", torch.bfloat16))
    start = (-storage.data_ptr() % 16) // storage.element_size() + changes.get("offset", 0)
    return storage[start:].as_strided(shape, strides)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"dtype": torch.float32}, True),
        ({"strides": (64, 80 * 64, 2 * 64, 1)}, True),
        ({"shape": (1, 3, 40, 64), "strides": (1, 40 * 64, 64, 1)}, True),
        ({"offset": 8}, True),
        ({"offset": 4}, False),
        ({"strides": (3 * 40 * 68, 40 * 68, 68, 1)}, False),
        ({"strides": (0, 40 * 64, 64, 1)}, False),
        ({"shape": (2, 3, 40, 4), "strides": (960, 320, 8, 1)}, False),
        ({"shape": (2, 3, 0, 64)}, False),
        ({"shape": (6, 40, 64), "strides": (40 * 64, 64, 1)}, False),
    ],
)
def test_describable(changes, expected):
    """cuTensorMapEncode's rules: bases and strides of 16 bytes, none of them 0; what it takes must
    not be given to the slower kernels either."""
    x = tensor(**changes)
    assert descriptors.describable(x) is expected
    if expected:
        *outer, last = descriptors.described_strides(x)
        assert last == 1
        assert all(s > 0 and s * x.element_size() % 16 == 0 for s in outer)
