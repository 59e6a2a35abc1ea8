"""Every bad call raises ValueError or TypeError naming the argument and the value; none crashes or
returns.  It is a long file because it lists them by argument, for all public functions.
"""

import numpy as np
import pytest
import torch

import attn_ext
from attn_ext.core.schema import Call

NAN, INF = float("nan"), float("inf")


def dense(b=2, h=4, s=6, d=8, **options):
    return torch.randn(b, h, s, d, **options)


def attend(q=None, k=None, v=None, **options):
    """attention of [2, 4, 6, 8] unless told; (exact type, message parts) are checked by the
    table.
    """
    given = [dense() if x is None else x for x in (q, k, v)]
    return attn_ext.attention(*given, **options)


def packed(cu_q=(0, 3, 6), cu_k=None, q=None, k=None, v=None, dtype=torch.int32, **options):
    q, k, v = (torch.randn(6, 4, 8) if x is None else x for x in (q, k, v))
    cu_q = torch.tensor(cu_q, dtype=dtype) if isinstance(cu_q, tuple) else cu_q
    cu_k = cu_q if cu_k is None else cu_k
    cu_k = torch.tensor(cu_k, dtype=dtype) if isinstance(cu_k, tuple) else cu_k
    return attn_ext.attention_varlen(q, k, v, cu_q, cu_k, **options)


def decode(lengths=(6, 2), q=None, k=None, v=None, table=None, new=None, **options):
    q = dense(s=1) if q is None else q
    k = dense() if k is None else k
    v = dense() if v is None else v
    lengths = torch.tensor(lengths, dtype=torch.int32) if isinstance(lengths, tuple) else lengths
    table = torch.tensor(table, dtype=torch.int32) if isinstance(table, tuple) else table
    if new is not None:
        options.update(k_new=new, v_new=new)
    return attn_ext.attention_decode(q, k, v, lengths, block_table=table, **options)


def sdpa(q=None, k=None, v=None, **options):
    given = [dense() if x is None else x for x in (q, k, v)]
    return attn_ext.scaled_dot_product_attention(*given, **options)


I32 = torch.int32


def in_a_cache(**options):
    """One query of a cache that holds three positions."""
    cache = attn_ext.KVCache(1, 2, 8, max_length=8, page_size=4)
    return cache.append(dense(1, 2, 3), dense(1, 2, 3)).attend(dense(1, 2, 1), **options)


def additive_module(**options):
    return attn_ext.nn.AdditiveAttention(8, 8, 4, **options)(*[torch.randn(2, 3, 8)] * 2)


def pooling_module(**options):
    return attn_ext.nn.AttentionPooling(8, **options)(torch.randn(2, 3, 8))


NESTED = torch.nested.nested_tensor([torch.randn(2, 1, 3)])
BAD = {
    # tensors
    "q_numpy": (attend, dict(q=np.zeros((2, 4, 6, 8))), TypeError, "q must", "ndarray"),
    "k_list": (attend, dict(k=[1.0]), TypeError, "k must", "list"),
    "v_none_like": (attend, dict(v="v"), TypeError, "v must", "'v'"),
    "q_sparse": (attend, dict(q=dense().to_sparse()), TypeError, "q must", "sparse"),
    "q_int": (attend, dict(q=dense().long()), TypeError, "q must", "int64"),
    "q_bool": (attend, dict(q=dense() > 0), TypeError, "q must", "bool"),
    "q_complex": (attend, dict(q=dense(dtype=torch.complex64)), TypeError, "q must", "complex64"),
    "q_float8": (attend, dict(q=dense().to(torch.float8_e4m3fn)), TypeError, "q must", "float8"),
    "k_dtype": (attend, dict(k=dense().half()), TypeError, "k must", "float16"),
    "v_dtype": (attend, dict(v=dense().double()), TypeError, "v must", "float64"),
    "k_device": (attend, dict(k=dense(device="meta")), ValueError, "k must", "meta"),
    "v_device": (attend, dict(v=dense(device="meta")), ValueError, "v must", "meta"),
    "q_rank_3": (attend, dict(q=torch.randn(4, 6, 8)), ValueError, "q must", "(4, 6, 8)"),
    "k_rank_5": (attend, dict(k=torch.randn(1, 2, 4, 6, 8)), ValueError, "k must",
        "(1, 2, 4, 6, 8)"),
    "v_rank_0": (attend, dict(v=torch.tensor(1.0)), ValueError, "v must", "()"),
    "k_batch": (attend, dict(k=dense(b=3)), ValueError, "k must", "3"),
    "v_batch": (attend, dict(v=dense(b=1)), ValueError, "v must", "1"),
    "v_heads": (attend, dict(v=dense(h=2)), ValueError, "v must", "2"),
    "v_length": (attend, dict(v=dense(s=5)), ValueError, "v must", "5"),
    "k_head_dim": (attend, dict(k=dense(d=7)), ValueError, "k must", "7"),
    "heads_not_divisible": (attend, dict(k=dense(h=3), v=dense(h=3)), ValueError,
        "q's heads", "4 and 3"),
    "more_k_heads": (attend, dict(k=dense(h=8), v=dense(h=8)), ValueError, "q's heads", "4 and 8"),
    "zero_heads_q": (attend, dict(q=dense(h=0)), ValueError, "q must", "0"),
    "zero_heads_k": (attend, dict(k=dense(h=0), v=dense(h=0)), ValueError, "k must", "0"),
    "zero_head_dim": (attend, dict(q=dense(d=0), k=dense(d=0)), ValueError, "q's head_dim", "0"),
    "zero_head_dim_v": (attend, dict(v=dense(d=0)), ValueError, "v's head_dim", "0"),
    "too_long": (
        attend, dict(q=torch.zeros(1).expand(2, 4, 2**31, 8)), ValueError,
        "q's length", "2147483648"),
    "too_many_elements": (
        attend, dict(q=torch.zeros(1).expand(2**20, 4, 2**30, 1),
                     k=torch.zeros(1).expand(2**20, 4, 1, 1),
                     v=torch.zeros(1).expand(2**20, 4, 1, 2**12)), ValueError, "q:", str(2**64)),
    # scalars
    "scale_nan": (attend, dict(scale=NAN), ValueError, "scale must", "nan"),
    "scale_inf": (attend, dict(scale=INF), ValueError, "scale must", "inf"),
    "scale_str": (attend, dict(scale="1"), TypeError, "scale must", "'1'"),
    "scale_tensor": (attend, dict(scale=torch.ones(1)), TypeError, "scale must", "Tensor"),
    "scale_complex": (attend, dict(scale=np.complex64(1)), TypeError, "scale must", "complex64"),
    "scale_grad": (attend, dict(scale=torch.ones((), requires_grad=True)), TypeError, "scale must",
        "requires"),
    "scale_meta": (attend, dict(scale=torch.ones((), device="meta")), ValueError, "scale must",
        "meta"),
    "scale_numpy_nan": (attend, dict(scale=np.float32("nan")), ValueError, "scale must", "nan"),
    "softcap_tensor_inf": (attend, dict(softcap=torch.tensor(INF)), ValueError, "softcap must",
        "inf"),
    "softcap_negative": (attend, dict(softcap=-1.0), ValueError, "softcap must", "-1.0"),
    "softcap_tiny": (attend, dict(softcap=1e-320), ValueError, "softcap must", "1e-320"),
    "softcap_nan": (attend, dict(softcap=NAN), ValueError, "softcap must", "nan"),
    "softcap_inf": (attend, dict(softcap=INF), ValueError, "softcap must", "inf"),
    "softcap_none": (attend, dict(softcap=None), TypeError, "softcap must", "None"),
    "dropout_negative": (attend, dict(dropout_p=-0.1), ValueError, "dropout_p must", "-0.1"),
    "dropout_over_1": (attend, dict(dropout_p=1.5), ValueError, "dropout_p must", "1.5"),
    "dropout_nan": (attend, dict(dropout_p=NAN), ValueError, "dropout_p must", "nan"),
    "dropout_date": (attend, dict(dropout_p=np.datetime64(1, "s")), TypeError, "dropout_p must",
        "datetime64"),
    "dropout_tensor": (attend, dict(dropout_p=torch.tensor(2)), ValueError, "dropout_p must", "2"),
    "causal_int": (attend, dict(causal=1), TypeError, "causal must", "1"),
    "causal_none": (attend, dict(causal=None), TypeError, "causal must", "None"),
    "causal_word": (attend, dict(causal="lower"), ValueError, "causal must", "'lower'"),
    "causal_tensor": (attend, dict(causal=torch.tensor(True)), TypeError, "causal must", "Tensor"),
    "causal_unequal": (attend, dict(q=dense(s=5), causal=True), ValueError, "causal=True",
        "5 and 6"),
    "window_negative": (attend, dict(window=(-1, None)), ValueError, "window left", "-1"),
    "window_right_negative": (attend, dict(window=(None, -2)), ValueError, "window right", "-2"),
    "window_float": (attend, dict(window=(1.0, None)), TypeError, "window left", "1.0"),
    "window_bool": (attend, dict(window=(True, None)), TypeError, "window left", "True"),
    "window_int": (attend, dict(window=4), TypeError, "window must", "4"),
    "window_three": (attend, dict(window=(1, 2, 3)), ValueError, "window must", "(1, 2, 3)"),
    "deterministic_int": (attend, dict(deterministic=1), TypeError, "deterministic must", "1"),
    "backend_none": (attend, dict(backend=None), TypeError, "backend must", "None"),
    "backend_unknown": (attend, dict(backend="gpu"), ValueError, "backend must", "'gpu'"),
    # mask, bias, slopes, sink
    "mask_numpy": (attend, dict(mask=np.ones((6, 6), bool)), TypeError, "mask must", "ndarray"),
    "mask_float": (attend, dict(mask=torch.ones(6, 6)), TypeError, "mask must", "float32"),
    "mask_int": (attend, dict(mask=torch.ones(6, 6, dtype=I32)), TypeError, "mask must", "int32"),
    "mask_shape": (attend, dict(mask=torch.ones(5, 6) > 0), ValueError, "mask must", "(5, 6)"),
    "mask_rank": (attend, dict(mask=torch.ones(1, 1, 1, 6, 6) > 0), ValueError, "mask must",
        "(1, 1, 1, 6, 6)"),
    "mask_device": (attend, dict(mask=torch.ones(6, 6, device="meta") > 0), ValueError, "mask must",
        "meta"),
    "mask_empty": (attend, dict(mask=torch.ones(6, 0) > 0), ValueError, "mask must", "(6, 0)"),
    "bias_bool": (attend, dict(bias=torch.ones(6, 6) > 0), TypeError, "bias must", "bool"),
    "bias_int": (attend, dict(bias=torch.ones(6, 6, dtype=I32)), TypeError, "bias must", "int32"),
    "bias_shape": (attend, dict(bias=torch.ones(3, 6, 6)), ValueError, "bias must", "(3, 6, 6)"),
    "bias_number": (attend, dict(bias=1.0), TypeError, "bias must", "1.0"),
    "bias_device": (attend, dict(bias=torch.ones(6, 6, device="meta")), ValueError, "bias must",
        "meta"),
    "alibi_shape": (attend, dict(alibi_slopes=torch.ones(3)), ValueError, "alibi_slopes must",
        "(3,)"),
    "alibi_int": (attend, dict(alibi_slopes=torch.ones(4, dtype=I32)), TypeError,
        "alibi_slopes must", "int32"),
    "alibi_list": (attend, dict(alibi_slopes=[1, 2, 3, 4]), TypeError, "alibi_slopes must", "list"),
    "alibi_device": (attend, dict(alibi_slopes=torch.ones(4, device="meta")), ValueError,
        "alibi_slopes", "meta"),
    "alibi_grad": (
        attend, dict(alibi_slopes=torch.ones(4, requires_grad=True)), ValueError, "alibi_slopes",
        "True"),
    "sink_shape": (attend, dict(sink=torch.ones(2, 4)), ValueError, "sink must", "(2, 4)"),
    "sink_int": (attend, dict(sink=torch.ones(4, dtype=I32)), TypeError, "sink must", "int32"),
    "sink_number": (attend, dict(sink=0.5), TypeError, "sink must", "0.5"),
    "sink_device": (attend, dict(sink=torch.ones(4, device="meta")), ValueError, "sink must",
        "meta"),
    # varlen
    "cu_not_from_0": (packed, dict(cu_q=(1, 3, 6)), ValueError, "cu_seqlens_q must", "1"),
    "cu_falls": (packed, dict(cu_q=(0, 4, 3)), ValueError, "cu_seqlens_q must", "4 then 3"),
    "cu_k_falls": (packed, dict(cu_k=(0, 4, 3)), ValueError, "cu_seqlens_k must", "4 then 3"),
    "cu_past_the_end": (packed, dict(cu_q=(0, 3, 7)), ValueError, "cu_seqlens_q must", "7"),
    "cu_k_past_the_end": (packed, dict(cu_k=(0, 3, 700)), ValueError, "cu_seqlens_k must", "700"),
    "cu_negative": (packed, dict(cu_q=(0, -3, 6)), ValueError, "cu_seqlens_q must", "-3"),
    "cu_int64": (packed, dict(dtype=torch.int64), TypeError, "cu_seqlens_q must", "int64"),
    "cu_list": (packed, dict(cu_q=[0, 3, 6]), TypeError, "cu_seqlens_q must", "list"),
    "cu_rank": (packed, dict(cu_q=((0, 3, 6),)), ValueError, "cu_seqlens_q must", "(1, 3)"),
    "cu_empty": (packed, dict(cu_q=()), ValueError, "cu_seqlens_q must", "0"),
    "cu_counts": (packed, dict(cu_k=(0, 6)), ValueError, "cu_seqlens_k must", "2"),
    "cu_device": (
        packed, dict(cu_q=torch.zeros(3, dtype=I32, device="meta")), ValueError,
        "cu_seqlens_q must", "meta"),
    "max_seqlen_small": (packed, dict(max_seqlen_q=2), ValueError, "max_seqlen_q must", "2"),
    "max_seqlen_k_small": (packed, dict(max_seqlen_k=1), ValueError, "max_seqlen_k must", "1"),
    "max_seqlen_float": (packed, dict(max_seqlen_q=3.0), TypeError, "max_seqlen_q must", "3.0"),
    "max_seqlen_bool": (packed, dict(max_seqlen_q=True), TypeError, "max_seqlen_q must", "True"),
    "max_seqlen_tensor": (packed, dict(max_seqlen_q=torch.tensor(3.0)), TypeError,
        "max_seqlen_q must", "3.0"),
    "max_seqlen_numpy": (packed, dict(max_seqlen_q=np.int32(2)), ValueError, "max_seqlen_q must",
        "2"),
    "max_seqlen_negative": (packed, dict(max_seqlen_q=-3), ValueError, "max_seqlen_q must", "-3"),
    "varlen_rank": (packed, dict(q=dense()), ValueError, "q must", "(2, 4, 6, 8)"),
    "varlen_dtype": (packed, dict(k=torch.randn(6, 4, 8).half()), TypeError, "k must", "float16"),
    "varlen_v_length": (packed, dict(v=torch.randn(5, 4, 8)), ValueError, "v must", "(5, 4)"),
    "varlen_head_dim": (packed, dict(k=torch.randn(6, 4, 9)), ValueError, "k must", "9"),
    "varlen_causal": (packed, dict(cu_k=(0, 2, 6), causal=True), ValueError, "causal=True",
        "[0, 2, 6]"),
    "varlen_mask": (packed, dict(mask=torch.ones(2, 1, 4, 3) > 0), ValueError, "mask must",
        "(2, 1, 4, 3)"),
    "varlen_q_none": (packed, dict(q="q"), TypeError, "q must", "'q'"),
    # decode
    "cache_len_past": (decode, dict(lengths=(7, 2)), ValueError, "cache_seqlens must", "7"),
    "cache_len_negative": (decode, dict(lengths=(-1, 2)), ValueError, "cache_seqlens must", "-1"),
    "cache_len_count": (decode, dict(lengths=(1, 2, 3)), ValueError, "cache_seqlens must", "3"),
    "cache_len_float": (decode, dict(lengths=torch.ones(2)), TypeError, "cache_seqlens must",
        "float32"),
    "cache_len_number": (decode, dict(lengths=3), TypeError, "cache_seqlens must", "3"),
    "cache_rank": (decode, dict(k=torch.randn(2, 6, 8)), ValueError, "k_cache must", "(2, 6, 8)"),
    "cache_dtype": (decode, dict(k=dense().half(), v=dense().half()), TypeError, "k_cache must",
        "float16"),
    "cache_batch": (decode, dict(k=dense(b=3), v=dense(b=3)), ValueError, "k_cache must", "3"),
    "cache_v_shape": (decode, dict(v=dense(s=5)), ValueError, "v_cache must", "(2, 4, 5)"),
    "table_page_past": (decode, dict(table=((0,), (2,))), ValueError, "block_table must", "2"),
    "table_page_negative": (decode, dict(table=((0,), (-1,))), ValueError, "block_table must",
        "-1"),
    "table_rows": (decode, dict(table=((0,), (1,), (1,))), ValueError, "block_table must", "3"),
    "table_int64": (
        decode, dict(table=torch.zeros(2, 1, dtype=torch.int64)), TypeError, "block_table must",
        "int64"),
    "table_rank": (decode, dict(table=(0, 1)), ValueError, "block_table must", "(2,)"),
    "table_no_lengths": (decode, dict(lengths=None, table=((0,), (1,))), ValueError,
        "cache_seqlens", "None"),
    "page_size_0": (
        decode, dict(k=dense(s=0), v=dense(s=0), lengths=(0, 0), table=((0,), (1,))), ValueError,
        "k_cache", "0"),
    "new_no_room": (decode, dict(new=dense(s=1)), ValueError, "cache_seqlens must", "6"),
    "new_no_page": (
        decode, dict(lengths=(5, 2), new=dense(s=1), table=((0,), (9,))), ValueError,
        "block_table must", "9"),
    "new_shape": (decode, dict(new=dense(d=7)), ValueError, "k_new must", "(2, 4, 6, 7)"),
    "new_dtype": (decode, dict(new=dense(s=1).half()), TypeError, "k_new must", "float16"),
    "new_alone": (decode, dict(k_new=dense(s=1)), ValueError, "k_new", "None"),
    "new_no_lengths": (decode, dict(lengths=None, new=dense(s=1)), ValueError, "cache_seqlens",
        "None"),
    "splits_negative": (decode, dict(num_splits=-1), ValueError, "num_splits must", "-1"),
    "splits_float": (decode, dict(num_splits=1.5), TypeError, "num_splits must", "1.5"),
    "decode_causal_word": (decode, dict(causal="top_left"), TypeError, "causal must", "'top_left'"),
    # torch's signature
    "sdpa_numpy": (sdpa, dict(q=np.zeros((2, 4, 6, 8))), TypeError, "query must", "ndarray"),
    "sdpa_rank_1": (sdpa, dict(k=torch.randn(8)), ValueError, "key must", "(8,)"),
    "sdpa_mask_shape": (sdpa, dict(attn_mask=torch.ones(5, 6) > 0), ValueError, "attn_mask must",
        "(5, 6)"),
    "sdpa_mask_int": (sdpa, dict(attn_mask=torch.ones(6, 6, dtype=I32)), TypeError,
        "attn_mask must", "int32"),
    "sdpa_heads": (sdpa, dict(k=dense(h=2), v=dense(h=2)), ValueError, "key", "(2, 2)"),
    "sdpa_gqa": (
        sdpa, dict(k=dense(h=3), v=dense(h=3), enable_gqa=True), ValueError, "enable_gqa",
        "4, 3 and 3"),
    "sdpa_causal_int": (sdpa, dict(is_causal=1), TypeError, "is_causal must", "1"),
    "sdpa_dtype": (sdpa, dict(v=dense().half()), TypeError, "value must", "float16"),
    "sdpa_e": (sdpa, dict(k=dense(d=7)), ValueError, "key must", "7"),
    "sdpa_s": (sdpa, dict(v=dense(s=5)), ValueError, "value must", "5"),
    "sdpa_scale": (sdpa, dict(scale="x"), TypeError, "scale must", "'x'"),
    # caches and modules
    "cache_nested_bias": (in_a_cache, dict(bias=NESTED), TypeError, "bias must", "nested"),
    "cache_nested_mask": (in_a_cache, dict(mask=NESTED), TypeError, "mask must", "nested"),
    "module_bias": (additive_module, dict(bias=np.zeros(2)), TypeError, "bias must", "ndarray"),
    "module_score": (pooling_module, dict(score=np.zeros(2)), TypeError, "score must", "array"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_call(case):
    """The call returns, crashes, or blames another argument."""
    function, options, error, argument, value = BAD[case]
    with pytest.raises((ValueError, TypeError)) as caught:
        function(**options)
    assert type(caught.value) is error, caught.value
    message = str(caught.value)
    assert argument in message, message
    assert value in message, message


def test_the_good_calls_of_the_helpers_return():
    """A helper that is bad by itself makes every case above pass for a wrong reason."""
    for function in (attend, packed, decode, sdpa, in_a_cache, additive_module, pooling_module):
        assert torch.isfinite(function()).all()
    assert torch.isfinite(decode(table=((0,), (1,)))).all()
    assert torch.isfinite(decode(lengths=(5, 2), new=dense(s=1))).all()


def test_one_is_not_true_after_true():
    """The cache of validated calls takes causal=1 for causal=True that it has seen."""
    q = dense()
    attn_ext.attention(q, q, q, causal=True)
    with pytest.raises(TypeError, match="causal"):
        attn_ext.attention(q, q, q, causal=1)
    attn_ext.attention(q, q, q, window=(1, 0))
    with pytest.raises(TypeError, match="window"):
        attn_ext.attention(q, q, q, window=(True, False))


def test_bad_values_below_the_public_api():
    """A compiled graph reaches the kernel with offsets that no Python check has seen."""
    q = torch.randn(6, 2, 8)
    for bad in ((0, 3, 7), (0, 5, 4), (2, 3, 6)):
        cu = torch.tensor(bad, dtype=torch.int32)
        with pytest.raises(ValueError, match="cu_seqlens_q"):
            torch.ops.attn_ext.forward(
                *Call(q, q, q, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=6, max_seqlen_k=6)
            )


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize(
    "function", [attn_ext.attention, attn_ext.scaled_dot_product_attention], ids=["own", "sdpa"]
)
def test_none_for_a_tensor_where_gradients_are_recorded(function, at):
    """The short way of small calls asks None whether it requires a gradient."""
    given = [dense(), dense(), dense()]
    given[at] = None
    for recorded in (True, False):
        with (
            torch.set_grad_enabled(recorded),
            pytest.raises(TypeError, match=r"must be a torch\.Tensor, got NoneType"),
        ):
            function(*given)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_nested_or_sparse_tensor_beside_dense_ones(name):
    """An internal error of torch, or an argument that torch's signature does not have."""
    wanted = {"q": "query", "k": "key", "v": "value"}[name]
    nested = torch.nested.nested_tensor([torch.randn(4, 6, 8), torch.randn(4, 6, 8)])
    for wrong in (nested, dense().to_sparse()):
        with pytest.raises(TypeError, match=f"^{wanted} must be a dense"):
            sdpa(**{name: wrong})
        with pytest.raises(TypeError, match=f"^{name} must be a dense"):
            attend(**{name: wrong})


def test_a_cache_that_no_memory_holds_ends_at_once(monkeypatch):
    """Lists of billions of entries that are made before torch is asked for the memory."""
    from attn_ext.functional import cache

    def never(*sizes):
        raise AssertionError("the book of pages was made first")

    monkeypatch.setattr(cache, "Pages", never)
    with pytest.raises(RuntimeError):
        attn_ext.KVCache(batch=2**31, heads=2**9, head_dim=2**9, max_length=64)


def told_of_a_call():
    """What a native call is told of one dense call, and its two dicts' names."""
    from attn_ext.backends import cpu, native

    q = torch.randn(1, 1, 2, 8)
    call = Call(q, q, q, max_seqlen_q=2, max_seqlen_k=2)
    lse = torch.empty(1, 1, 2)
    return native.fields(call, cpu.canonical_inputs(call), q, lse, cpu.DTYPES)


WRONG = ("a", None, 1.5, object(), torch.zeros(2), [[1]], b"ab")


def test_a_native_call_says_what_was_wrong():
    """A RuntimeError without a name for what stands inside a sequence or a dict, a number that
    does not fit cut down in silence, a dtype that is none."""
    from attn_ext import _C

    told = told_of_a_call()
    _C.Call(**told)

    def refused(kind, name, value, **changed):
        with pytest.raises(kind) as caught:
            _C.Call(**{**told, **changed})
        assert type(caught.value) is kind
        assert str(caught.value).startswith(f"{name} must be "), str(caught.value)
        assert str(caught.value).endswith(value), str(caught.value)

    for name, right in told.items():
        for wrong in WRONG:
            shown = "..." if len(repr(wrong)) > 80 else repr(wrong)
            if name == "scalars":
                refused(TypeError, name, shown, scalars=wrong)
                continue
            short = type(right) is tuple and wrong == [[1]]
            refused(ValueError if short else TypeError, name, shown, **{name: wrong})
            if type(right) is tuple:
                for at in range(len(right)):
                    items = (*right[:at], wrong, *right[at + 1 :])
                    refused(TypeError, f"{name}[{at}]", shown, **{name: items})
        if type(right) is tuple:
            refused(ValueError, name, repr(right[1:]), **{name: right[1:]})
            refused(ValueError, f"{name}[0]", str(2**63), **{name: (2**63, *right[1:])})
    for name, right in told["scalars"].items():
        for wrong in WRONG:
            if isinstance(right, int) or not isinstance(wrong, float):
                refused(TypeError, name, repr(wrong), scalars={**told["scalars"], name: wrong})
        refused(ValueError, name, "...", scalars={**told["scalars"], name: 10**400})
    refused(TypeError, "q", "é...", q="é" * 100)  # cut between characters

    class Broken:
        def __index__(self):
            raise MemoryError("mine")

    with pytest.raises(MemoryError, match="mine"):
        _C.Call(**{**told, "dtype": Broken()})
    for name in ("dtype", "bias_dtype"):
        for wrong in (-1, 4, 2**31, 2**32):
            refused(ValueError, name, str(wrong), **{name: wrong})
    refused(ValueError, "bottom_right", "2", bottom_right=2)
    refused(ValueError, "alibi_stride_b", str(-(2**63) - 1), alibi_stride_b=-(2**63) - 1)
    for changed in (
        {key: told[key] for key in told if key != "lse"},
        {**told, "more": 1},
        {**{key: told[key] for key in told if key != "lse"}, "more": 1},
        {**told, "scalars": {}},
        {**told, "scalars": dict.fromkeys(range(len(told["scalars"])), 1)},
    ):
        with pytest.raises(TypeError, match=r"names, got|must be told"):
            _C.Call(**changed)


def test_a_native_call_says_what_was_wrong_later():
    """The same of what it is told after it was made."""
    from attn_ext import _C

    call = _C.Call(**told_of_a_call())
    right = {name: (0, 0, 0) for name in ("dout", "dq", "dk", "dv")} | {"dbias": (0, 0, 0, 0)}
    call.set_gradients(*right.values(), False)
    for name, value in right.items():
        for wrong in WRONG:
            changed = {**right, name: (*value[1:], wrong)}
            with pytest.raises(TypeError, match=rf"^{name}\[{len(value) - 1}\] must be an integer"):
                call.set_gradients(*changed.values(), False)
    for wrong in WRONG:
        with pytest.raises(TypeError, match=r"^sink must be an integer, got "):
            call.set_addresses({"sink": wrong})
    for wrong in (-1, 2**64):
        with pytest.raises(ValueError, match=rf"^sink must be an address, got {wrong}"):
            call.set_addresses({"sink": wrong})
    for wrong in ("other", 1, None):
        with pytest.raises(ValueError, match="no pointer is called"):
            call.set_addresses({wrong: 0})
    with pytest.raises(TypeError, match=r"^sizes\[1\] must be an integer, got 'a'"):
        call.inspect(1, 0, (1, "a", 1), 0, 0, 0)
    of_w = dict(w=0, dw=0, partial=False, delta=0, base=0, rest=0)
    with pytest.raises(TypeError, match=r"^sigmoid_bias must be a number, got 'a'"):
        call.set_options(sigmoid=True, sigmoid_bias="a", **of_w)


def test_functions_of_the_kernels_refuse_what_is_no_tensor():
    """Memory that is read though no tensor lies there, and a number of threads cut to 32 bits."""
    from attn_ext import _C

    call = _C.Call(**told_of_a_call())
    x = torch.zeros(1, 1, 2, 8)
    for run, count in ((_C.dense_forward, 7), (_C.dense_backward, 12)):
        for wrong in ("a", 1, object()):
            with pytest.raises(TypeError, match="a tensor or None is wanted, got "):
                run(call, 1, *[wrong] * count)
        for threads in (0, -1, 2**31, 2**32 + 1, 2**70):
            with pytest.raises(ValueError, match="num_threads"):
                run(call, threads, *[x] * count)
        with pytest.raises(TypeError, match="num_threads must be an integer, got 'a'"):
            run(call, "a", *[x] * count)
        with pytest.raises(TypeError, match="call must be a Call"):
            run("a", 1, *[x] * count)
    with pytest.raises((TypeError, RuntimeError), match=r"a tensor is wanted|use_exchange"):
        _C.decode_forward(call, 1, *["a"] * 15)
    with pytest.raises((TypeError, RuntimeError), match=r"a tensor is wanted|use_exchange"):
        _C.cache_extend(*["a"] * 6)
    with pytest.raises((ValueError, RuntimeError), match=r"out of range|use_exchange"):
        _C.cache_write(x, x, [], [(0, 2**63 - 1, 0, 0, 2**63 - 1)], 1)  # their sum wraps around


def heads_last(*sizes):
    """Zeros [B, S, H, D]."""
    return torch.zeros(2, *sizes, 16)


LAYOUT = r"read as \[B, S, H, D\] the shapes fit together.*pass q\.transpose\(1, 2\), k"
HEADS_LAST = {
    "other lengths": ((100, 8), (70, 8), {}),
    "causal, grouped heads": ((100, 8), (100, 2), {"causal": True}),
    "grouped heads": ((100, 8), (100, 2), {"mask": torch.ones(100, 100).bool()}),
    "a mask": ((100, 8), (100, 8), {"mask": torch.ones(100, 100).bool()}),
    "a bias": ((100, 8), (50, 8), {"bias": torch.zeros(2, 8, 1, 50)}),
    "slopes": ((100, 8), (100, 8), {"alibi_slopes": torch.zeros(8)}),
    "a sink": ((100, 8), (100, 8), {"sink": torch.zeros(8)}),
}


@pytest.mark.parametrize("name", HEADS_LAST)
def test_another_layout_is_recognised(name):
    """[B, S, H, D], flash-attn's layout, whose error speaks of heads where lengths are meant."""
    q, k, options = HEADS_LAST[name]
    q, k = heads_last(*q), heads_last(*k)
    with pytest.raises(ValueError, match=LAYOUT):
        attn_ext.attention(q, k, k, **options)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    assert attn_ext.attention(q, k, k, **options).shape == q.shape


def test_another_layout_is_recognised_by_decode():
    """The same of a cache, contiguous and paged."""
    used, table = torch.tensor([5, 5]).int(), torch.zeros(2, 3).int()
    with pytest.raises(ValueError, match=LAYOUT.replace("k", "k_cache")):
        attn_ext.attention_decode(heads_last(1, 8), heads_last(20, 2), heads_last(20, 2), used)
    pages = torch.zeros(7, 4, 2, 16)
    with pytest.raises(ValueError, match=LAYOUT.replace("k", "k_cache")):
        attn_ext.attention_decode(heads_last(1, 8), pages, pages, used, block_table=table)


@pytest.mark.parametrize("options", [{"softcap": -1.0}, {"causal": "left"}, {"dropout_p": 2.0}])
def test_another_layout_is_not_seen_everywhere(options):
    """Advice to transpose in an error that has nothing to do with it."""
    q = heads_last(8, 8)
    with pytest.raises(ValueError, match=r"got [^;]*$"):
        attn_ext.attention(q, q, q, **options)
    with pytest.raises(ValueError, match=r"got [^;]*$"):  # wrong in either layout
        attn_ext.attention(heads_last(100, 7), heads_last(100, 3), heads_last(100, 3), causal=True)
