"""Numbers of every kind that torch takes for one, in every public function and drop-in: scalars of
numpy, tensors without dimensions, bools for floats, and the symbolic numbers of torch.compile.
"""

import functools
import types

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from closeness import assert_same

import attn_ext
from attn_ext.functional import additive
from attn_ext.integrations import diffusers, transformers, xformers
from attn_ext.integrations import flash_attn as fa

pytestmark = pytest.mark.usefixtures("fresh_compiler")

X = torch.randn(2, 6, 2, 8, generator=torch.Generator().manual_seed(0))  # [B, S, H, D]
Q = X.transpose(1, 2)
ROWS = X.flatten(0, 1)
CU = torch.tensor([0, 5, 12], dtype=torch.int32)
LENGTHS = torch.tensor([3, 5], dtype=torch.int32)
LAYER = types.SimpleNamespace(is_causal=True, training=True)


def dense(**options):
    return attn_ext.attention(Q, Q, Q, **options)


def sdpa(**options):
    return attn_ext.scaled_dot_product_attention(Q, Q, Q, **options)


def varlen(max_seqlen_q=7, **options):
    return attn_ext.attention_varlen(ROWS, ROWS, ROWS, CU, CU, max_seqlen_q, **options)


def decode(**options):
    return attn_ext.attention_decode(Q[:, :, :1], Q, Q, LENGTHS, **options)


def added(**options):
    return additive.additive_attention(Q, Q, Q, X[0, 0, 0], **options)


def flash(**options):
    return fa.flash_attn_func(X, X, X, **options)


def flash_varlen(max_seqlen_q=7, **options):
    return fa.flash_attn_varlen_func(ROWS, ROWS, ROWS, CU, CU, max_seqlen_q, 7, **options)


def flash_cache(cache_seqlens=LENGTHS, **options):
    return fa.flash_attn_with_kvcache(X[:, :1], X, X, cache_seqlens=cache_seqlens, **options)


def memory_efficient(**options):
    return xformers.memory_efficient_attention(X, X, X, **options)


def of_diffusers(**options):
    return diffusers.attention_backend(X, X, X, **options)


def of_transformers(**options):
    return transformers.attention_forward(LAYER, Q, Q, Q, None, **options)[0]


def of_transformers_packed(max_length_q=7):
    rows = ROWS.transpose(0, 1)[None]
    return transformers.attention_forward(
        LAYER, rows, rows, rows, None, cu_seq_lens_q=CU, cu_seq_lens_k=CU,
        max_length_q=max_length_q, max_length_k=max_length_q,
    )[0]  # fmt: skip


FLOATS = {
    dense: ("scale", "softcap", "dropout_p"),
    sdpa: ("scale", "dropout_p"),
    varlen: ("scale", "softcap", "dropout_p"),
    decode: ("scale", "softcap"),
    added: ("dropout_p",),
    flash: ("softmax_scale", "softcap", "dropout_p"),
    flash_varlen: ("softmax_scale", "softcap", "dropout_p"),
    flash_cache: ("softmax_scale", "softcap"),
    memory_efficient: ("scale", "p"),
    of_diffusers: ("scale", "dropout_p"),
    of_transformers: ("scaling", "softcap", "dropout"),
}
INTS = {
    dense: ("window",),
    varlen: ("window", "max_seqlen_q"),
    decode: ("window", "num_splits"),
    added: ("window",),
    flash: ("window_size",),
    flash_varlen: ("window_size", "max_seqlen_q"),
    flash_cache: ("window_size", "num_splits", "cache_seqlens"),
    of_transformers: ("sliding_window",),
    of_transformers_packed: ("max_length_q",),
}


def pairs(table):
    return [(f, name) for f, names in table.items() for name in names]


def ids(x):
    return x if isinstance(x, str) else x.__name__


def call(function, name, value):
    """The function with one number given, from one seed."""
    torch.manual_seed(1)
    return function(**{name: (value, value) if name.startswith("window") else value})


@pytest.mark.parametrize("function, name", pairs(FLOATS), ids=ids)
def test_floats_of_other_kinds(function, name):
    """What torch's scaled_dot_product_attention takes for a float, refused as no number."""
    half, one = call(function, name, 0.5), call(function, name, 1.0)
    halves = (np.float32(0.5), np.float16(0.5), np.float64(0.5), np.longdouble(0.5))
    for value in (*halves, np.array(0.5), torch.tensor(0.5), torch.tensor(0.5).double()):
        assert_same(call(function, name, value), half)
    for value in (1, True, np.bool_(True), np.int64(1), torch.tensor(1), torch.tensor(True)):
        assert_same(call(function, name, value), one)
    for value in (torch.ones(1, 1), torch.ones((), requires_grad=True), "1", np.complex64(1)):
        with pytest.raises(TypeError, match=rf"^{name} must be"):
            call(function, name, value)
    with pytest.raises(ValueError, match=rf"^{name} must be"):
        call(function, name, torch.tensor(float("nan")))


@pytest.mark.parametrize("function, name", pairs(INTS), ids=ids)
def test_ints_of_other_kinds(function, name):
    """A longest length that is a tensor's maximum, a side that numpy computed."""
    value = 5 if name == "cache_seqlens" else 7
    expected = call(function, name, value)
    for given in (np.int32(value), np.uint8(value), torch.tensor(value), np.array(value)):
        assert_same(call(function, name, given), expected)
    for given in (True, "7", torch.tensor(True), np.bool_(True)):
        with pytest.raises(TypeError, match=r"must be"):
            call(function, name, given)


def test_a_tensor_for_a_number_is_read_at_each_call():
    """The short way keeps plans by what the call looks like: a tensor looks the same after it has
    been given another value.
    """
    scale = torch.tensor(0.5)
    first = [dense(scale=scale) for _ in range(3)]
    scale.fill_(2.0)
    assert torch.equal(first[2], dense(scale=0.5))
    assert torch.equal(dense(scale=scale), dense(scale=2.0))


def graphs(function, values, dynamic) -> int:
    """How many graphs torch.compile makes of a function of one number."""
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=dynamic)
    for value in values:
        compiled(value)
    return counter.frame_count


@functools.cache
def natively(kind, dynamic) -> int:
    """The graphs of torch's own operators for a number of that kind that changes."""
    if kind is int:
        return graphs(lambda n: F.pad(X, (0, n)), (7, 8, 9), dynamic)
    return graphs(lambda x: F.scaled_dot_product_attention(Q, Q, Q, scale=x), (0.3, 0.5), dynamic)


@pytest.mark.parametrize("function", FLOATS, ids=ids)
def test_symbolic_floats(function):
    """hasattr of a symbolic number, which Dynamo cannot trace; a graph more than torch's own
    attention makes of a scale that changes.  All numbers of a function change at once: one that
    cannot be traced, or asks for a graph of its own, shows.
    """
    names = FLOATS[function]
    for dynamic in (None, True):
        own = graphs(lambda x: function(**dict.fromkeys(names, x)), (0.3, 0.5), dynamic)
        assert own <= natively(float, dynamic)


@pytest.mark.parametrize("function", INTS, ids=ids)
def test_symbolic_ints(function):
    """The same of lengths, windows and splits: an operator of torch makes one dynamic graph."""
    names = INTS[function]
    values = (3, 4, 5) if "cache_seqlens" in names else (7, 8, 9)
    for dynamic in (None, True):
        own = graphs(
            lambda n: function(**{x: (n, n) if x.startswith("window") else n for x in names}),
            values, dynamic,
        )  # fmt: skip
        assert own <= natively(int, dynamic)
