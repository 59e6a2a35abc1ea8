"""The Triton kernels, forward and backward, interpreted, against the float64 reference.

Tiles are 32 x 32 under the interpreter: lengths around 32 and 64 are the edges.
"""

import pytest
import torch
import triton

import attn_ext
from attn_ext.core import reference
from attn_ext.core.problem import Problem
from attn_ext.testing import check_call, random_call
from attn_ext.triton_kernels import configs
from attn_ext.triton_kernels.kernels import primitives
from attn_ext.triton_kernels.launch import attention

HALVES = (torch.float16, torch.bfloat16)

# (seqlen_q, seqlen_k, head_dim, head_dim_v): what each would catch
SHAPES = {
    "one of everything": (1, 1, 1, 1),
    "no keys: empty rows": (5, 0, 8, 8),
    "no queries: dK and dV are zero": (0, 5, 8, 8),
    "last key tile holds one key": (31, 65, 16, 16),
    "last query tile holds one query": (33, 32, 24, 16),
    "Dv wider than D": (20, 40, 16, 50),
    "widest heads": (3, 9, 256, 130),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_shapes(name, dtype):
    """Wrong tails, reads or writes past a row, uninitialised outputs."""
    seqlen_q, seqlen_k, head_dim, head_dim_v = SHAPES[name]
    call = random_call(
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dtype=dtype,
        stats=True,
        layout="padded",
        batch=1,
    )
    check_call(call, "triton")


FEATURES = {
    "causal, top left": {"causal": True, "align": 0},
    "causal, bottom right: first rows empty": {"causal": True, "seqlen_q": 70, "seqlen_k": 33},
    "window": {"window": (6, 3)},
    "window narrower than a tile": {"window": (0, 0), "seqlen_q": 70},
    "window with tiles that are not cut": {"window": (70, 5), "seqlen_q": 97, "seqlen_k": 130},
    "mask with empty rows": {"mask": "qk", "seqlen_k": 3},
    "bias": {"bias": True},
    "bias broadcast over batch and heads: shared dbias": {"bias": "qk"},
    "bias broadcast over queries and keys": {"bias": "h"},
    "bias broadcast over queries": {"bias": "bk"},
    "bias broadcast over keys": {"bias": "hq"},
    "softcap, in tanh's linear part": {"softcap": 300.0},
    "softcap, saturated": {"softcap": 0.5},
    "ALiBi": {"alibi": "b"},
    "ALiBi where no key is behind": {"alibi": "b", "causal": True},
    "sink": {"sink": True},
    "sink and empty rows": {"sink": True, "causal": True, "seqlen_k": 20},
    "dropout": {"dropout_p": 0.3},
    "drop all": {"dropout_p": 1.0},
    "GQA 4:1": {"heads_q": 4, "heads_k": 1},
    "negative scale": {"scale": -0.7},
    "all at once": {
        "causal": True,
        "window": (60, -1),
        "mask": "bk",
        "bias": "hqk",
        "softcap": 5.0,
        "alibi": True,
        "sink": True,
        "dropout_p": 0.2,
        "heads_q": 4,
        "heads_k": 2,
        "head_dim_v": 24,
    },
}


@pytest.mark.parametrize("name", FEATURES)
def test_features(name):
    """A feature left out, or its gradient."""
    options = {"seqlen_q": 37, "seqlen_k": 70, "stats": True, "layout": "bshd", "batch": 2}
    check_call(random_call(**{**options, **FEATURES[name]}), "triton")


@pytest.mark.parametrize("dtype", HALVES)
def test_all_features_in_half_precision(dtype):
    """A side input or an intermediate that is cast to the wrong dtype."""
    options = {"seqlen_q": 33, "seqlen_k": 40, "stats": True, "dtype": dtype, "batch": 1}
    check_call(random_call(**{**options, **FEATURES["all at once"]}), "triton")


@pytest.mark.parametrize("softcap", [0.5, 5.0, 250.0])
@pytest.mark.parametrize("dtype", HALVES)
def test_softcap_in_half_precision(softcap, dtype):
    """The quick tanh: its LSE and statistics without the shift, excluded pairs that count."""
    options = {"seqlen_q": 37, "seqlen_k": 70, "mask": "qk", "sink": True, "stats": True}
    check_call(random_call(softcap=softcap, dtype=dtype, **options), "triton")


@pytest.mark.parametrize("name", ["window", "bias", "dropout", "sink", "all at once"])
def test_varlen(name):
    """Positions, masks or dropout bits counted from the buffer's start and not the sequence's."""
    options = {k: v for k, v in FEATURES[name].items() if k not in ("seqlen_q", "seqlen_k")}
    call = random_call(seqlens_q=[0, 5, 40, 1], seqlens_k=[4, 7, 33, 0], stats=True, **options)
    check_call(call, "triton")


def test_varlen_with_rows_past_the_last_sequence():
    """Rows without a sequence that are left uninitialised."""
    call = random_call(seqlens_q=[3, 5, 4], seqlens_k=[4, 7, 6], stats=True)
    starts = {"cu_seqlens_q": call.cu_seqlens_q[:3], "cu_seqlens_k": call.cu_seqlens_k[:3]}
    call = call._replace(**starts)
    check_call(call, "triton")


@pytest.mark.parametrize("bias", ["qk", "h", "hk", "bq", "bhqk"])
def test_deterministic_dbias(bias, monkeypatch):
    """A sum over the wrong dimensions; atomics, whose order is not fixed, in a deterministic
    call."""
    call = random_call(
        seqlen_q=37, seqlen_k=50, bias=bias, deterministic=True, causal=True, window=(30, -1),
        dropout_p=0.2, softcap=3.0, heads_q=4, heads_k=2,
    )  # fmt: skip

    def refused(*args, **kwargs):
        raise AssertionError("atomics in a deterministic call")

    monkeypatch.setattr(triton.language, "atomic_add", refused)
    check_call(call, "triton")


def test_deterministic_dbias_of_packed_sequences():
    """A dbias tile that takes positions of the buffer, or sequences that it does not reach."""
    lengths = {"seqlens_q": [0, 5, 40, 1], "seqlens_k": [4, 7, 33, 0]}
    check_call(random_call(bias="hk", deterministic=True, **lengths), "triton")


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_bad_values_reach_exactly_who_sees_them(where, value, softcap):
    """0 * NaN from a position that only some see, and NaN lost in a max or a skipped tile."""
    call = random_call(7, seqlen_q=40, causal=True, stats=True, softcap=softcap, batch=1)
    getattr(call, where)[:, :, 19] = value
    if where != "q":
        getattr(call, where)[:, 1, 20, 3] = -value
    check_call(call, "triton")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_values_behind_a_mask(value):
    """A masked key whose NaN reaches O, dQ or dbias; a bias of -inf excludes as a mask does."""
    call = random_call(
        7, batch=1, seqlen_q=34, mask="bk", bias="hk", sink=True, dropout_p=0.2, stats=True
    )
    call.mask[..., 4] = False
    call.bias[..., 9] = -torch.inf
    for tensor in (call.k, call.v):
        tensor[:, :, 4] = tensor[:, :, 9] = value
    check_call(call, "triton")


def test_a_dropped_nan_behind_a_bias_of_minus_infinity():
    """A NaN of an excluded pair that dropout keeps from O, but that its row's sum holds."""
    call = random_call(7, batch=1, seqlen_q=3, seqlen_k=12, bias="hk", dropout_p=1.0)
    call.bias[..., 9] = -torch.inf
    call.k[:, :, 9] = torch.nan
    check_call(call, "triton", grads=False)


@pytest.mark.parametrize("where", ["k", "q"])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_infinities_in_visible_rows(where, softcap):
    """A logit of -inf excludes its pair: 0 * inf where nothing cuts a tile, in a row of NaN too."""
    call = random_call(7, seqlen_q=36, batch=1, heads_q=1, head_dim=8, softcap=softcap)
    if where == "k":
        call.q.abs_()
        call.k[:, :, 5], call.v[:, :, 5] = -torch.inf, torch.inf
    else:
        call.k.abs_()[:, :, 1::3].neg_()
        call.q[:, :, 9] = torch.inf
    check_call(call, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "where", ["smallest row", "-1e9", "smallest keys", "NaN", "largest row", "largest keys", "inf"]
)
@pytest.mark.parametrize(
    "options", [{}, {"sink": True}, {"cache_seqlens": [70, 33], "num_splits": 3}], ids=str
)
def test_rows_of_huge_biases(where, options, dtype):
    """An excluding -inf in other units, an LSE that has lost ln(number of keys), 0 * inf in the sum
    of the entropy, a NaN or inf taken for a number, inf - inf in a row with finfo.max."""
    call = random_call(7, dtype=dtype, bias="qk", seqlen_q=5, seqlen_k=70, stats=True, **options)
    numbers = torch.finfo(dtype)
    rows = {"smallest row": numbers.min, "-1e9": -1e9, "largest row": numbers.max}
    if where == "smallest keys":
        call.bias[..., :40] = numbers.min
    elif where == "largest keys":
        call.bias[..., 38:41] = numbers.max
    elif where in rows:
        call.bias[:, :, 2] = rows[where]
    else:
        call.bias[:, :, 2, 3] = float(where)
    check_call(call, "triton", grads=False)


@pytest.mark.parametrize("scale", [0.0, -0.5, 0.5, 1e6])
@pytest.mark.parametrize("options", [{}, {"cache_seqlens": [70, 33]}], ids=str)
def test_huge_logits_of_any_scale(scale, options):
    """An exponent that is one multiply-add: its product is exact and the row's maximum is rounded,
    by 2^8 where logits are 2^33; a maximum taken before a scale that is negative or 0."""
    call = random_call(3, seqlen_q=40, seqlen_k=70, head_dim=8, stats=True, **options)
    call.q.mul_(1e4), call.k.mul_(1e5 if scale < 1 else 1.0)
    call.k[:, :, 40] = 0.0  # a logit of 0 in each row
    check_call(call._replace(scale=scale), "triton", grads=False)


@pytest.mark.parametrize(
    "starts", [[0, 5, 25], [-9, 5, 12], [12, 5, -(2**31)], [30, 30, 40]], ids=str
)
def test_cu_seqlens_that_are_not_true(starts):
    """Rows read or written outside of the tensors, which the memory around them shows."""
    call = random_call(seqlens_q=[5, 7], seqlens_k=[5, 7])
    room = 4096
    for name in ("q", "k", "v"):  # NaN around the inputs
        x = getattr(call, name)
        storage = torch.full((x.numel() + 2 * room,), torch.nan)
        call = call._replace(**{name: storage[room:-room].view(x.shape).copy_(x)})
    lie = torch.tensor(starts, dtype=torch.int32)
    true = lie.clamp(0, 12)
    results = []
    for cu in (lie, true):
        lengths = {"max_seqlen_q": 12, "max_seqlen_k": 12}
        call = call._replace(cu_seqlens_q=cu, cu_seqlens_k=cu, **lengths)
        results.append(attn_ext.backends.registry.get("triton").forward(call)[0])
    assert results[0].isfinite().all()
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("value", [1000.0, -torch.inf])
def test_extreme_sinks(value):
    """exp(sink) that overflows, and -inf - -inf: a sink of -inf is no sink."""
    call = random_call(7, sink=True, stats=True)
    call.sink[:] = value
    check_call(call, "triton")


def test_dropout_bits_are_those_of_the_reference():
    """Philox words in another order, another key, or counted from the tile."""
    call = random_call(3, seqlen_q=70, seqlen_k=65, heads_q=2, batch=2, dropout_p=0.4)
    call.q.zero_()  # P = 1 / Sk everywhere
    call = call._replace(v=torch.eye(65).expand(2, 2, 65, 65).contiguous())
    out = attn_ext.backends.registry.get("triton").forward(call)[0]
    seed, offset = call.rng_state.tolist()
    keep = reference.dropout_keep_mask(seed, offset, 2, 2, 70, 65, 0.4)
    assert torch.equal(out > 0, keep)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_public_api_takes_cpu_tensors_when_triton_is_named(dtype):
    """Dispatch that refuses them, or a gradient that does not flow."""
    q = torch.randn(1, 4, 33, 16, dtype=dtype, requires_grad=True)
    k, v = torch.randn(2, 1, 2, 33, 16, dtype=dtype, requires_grad=True)
    results = []
    for backend in ("triton", "reference"):
        out, lse = attn_ext.attention(q, k, v, causal=True, return_lse=True, backend=backend)
        loss = out.float().square().sum() + lse.sum()
        results.append((out, *torch.autograd.grad(loss, (q, k, v))))
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 2.0**-5 * b.abs().max()


def test_auto_never_interprets():
    """Calls that get a thousand times slower because a variable is set."""
    q = torch.randn(1, 1, 4, 8)
    assert attn_ext.explain(q, q, q).chosen == "cpu"


def test_what_triton_cannot_do_is_refused_with_a_reason():
    """A wrong result, or an error from inside Triton, in place of a reason."""
    triton = attn_ext.backends.registry.get("triton")
    reasons = {
        "float64": Problem.of(random_call(dtype=torch.float64)),
        "at most 256": Problem.of(random_call(head_dim=257)),
        "decode has no backward": Problem.of(random_call(cache_seqlens=[3, 4])._replace(grad=True)),
    }
    for word, problem in reasons.items():
        assert any(word in why for why in triton.unsupported(problem)), word
        with pytest.raises(NotImplementedError, match=word):
            attn_ext.backends.registry.select("triton", problem)


def far_apart(x, dim, stride):
    """x's values in untouched (so virtual) memory, `stride` elements apart in dimension `dim`."""
    strides = list(x.contiguous().stride())
    strides[dim] = stride
    size = 1 + sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True))
    return torch.empty(size, dtype=x.dtype).as_strided(x.shape, strides).copy_(x)


@pytest.mark.parametrize(
    ("dim", "count", "stride"),
    [(0, 3, 2**30 + 8), (1, 3, 2**30 + 8), (2, 3, 2**30 + 8), (2, 40, 2**26 + 8)],
    ids=["batch", "head", "position in a tile", "tile"],
)
def test_offsets_beyond_31_bits(dim, count, stride):
    """An offset in int32, which wraps in tensors of more than 2^31 elements."""
    sizes = {"batch": 1, "heads_q": 1, "heads_k": 1, "seqlen_q": 2, "seqlen_k": 3}
    name = ("batch", "heads", "seqlen")[dim]
    sizes |= {size: count for size in sizes if size.startswith(name)}
    call = random_call(dtype=torch.float16, **sizes)
    call = call._replace(k=far_apart(call.k, dim, stride))
    check_call(call, "triton")


@pytest.mark.parametrize("options", [{"bias": "hk", "deterministic": True}, {"dropout_p": 0.3}])
def test_wide_rows_that_are_read_in_parts(options):
    """float32 heads wider than 64: a part that is left out, or columns past the last one."""
    call = random_call(seqlen_q=5, seqlen_k=37, head_dim=100, head_dim_v=72, batch=1, **options)
    check_call(call, "triton")


def test_wide_rows_of_a_tile_of_several_stages(monkeypatch):
    """float32 heads wider than 64 whose rows are held whole: tails, and the flag of a kernel that
    reads them in parts."""
    flags, run = {}, attention.run

    def noted(kernel, programs, tile, *args):
        flags[kernel.fn.__name__] = args[-1] & primitives.STREAM.value
        return run(kernel, programs, tile, *args)

    call = random_call(seqlen_q=40, seqlen_k=37, head_dim=100, head_dim_v=72, batch=1, causal=True)
    for stages in (1, 2):
        monkeypatch.setattr(configs, "INTERPRETED", configs.INTERPRETED._replace(stages=stages))
        monkeypatch.setattr(attention, "run", noted)
        check_call(call, "triton")
        in_parts = {flags[f"{name}_kernel"] != 0 for name in ("forward", "dkdv", "dq")}
        assert in_parts == {stages == 1}
