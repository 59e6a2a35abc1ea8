"""The CUDA kernels against the float64 reference: on the emulated device of csrc/emulation, and on
a GPU where there is one.

On the emulator every test runs in each of its modes (docs/design/emulation.md): fixed order, random
warp priorities, poisoned shared memory, the race detector, and all of these together, so that a
missing barrier or wait fails here and not on somebody's GPU.
"""

import emulated_backend as emulated
import nonfinite_cases as nonfinite
import pytest
import torch

from attn_ext.backends import native_gpu, registry
from attn_ext.backends.native import point
from attn_ext.core.problem import Problem
from attn_ext.core.schema import Needs
from attn_ext.ops import execute
from attn_ext.testing import check_call, needs_of, random_call

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def check(place):
    """check(**options of random_call) or check(call) on a backend with these kernels."""
    name, device, mode = place
    module = registry.get(name)

    def run(call=None, seed=1, smem_kib=99, **options):
        if mode:
            emulated.set_mode(mode, seed, smem_kib)
        check_call(random_call(device=device, **options) if call is None else call, module)

    run.device, run.module, run.mode, run.name = device, module, mode, name
    return run


# (seqlen_q, seqlen_k, head_dim, head_dim_v): what each would catch
SHAPES = {
    "one of everything": (1, 1, 1, 1),
    "no keys: empty rows": (5, 0, 8, 8),
    "no queries: dK and dV are zero": (0, 5, 8, 8),
    "odd head_dim: rows that 16-byte copies cannot read": (33, 70, 15, 9),
    "exactly one tile": (64, 64, 64, 64),
    "last tiles hold one row": (65, 129, 64, 64),
    "one query, many keys: split-KV": (1, 900, 64, 64),
    "Dv wider than D": (33, 65, 16, 111),
    "D wider than Dv": (40, 40, 128, 24),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_shapes(check, name, dtype):
    """Wrong tails, reads or writes past a row, uninitialised outputs."""
    seqlen_q, seqlen_k, head_dim, head_dim_v = SHAPES[name]
    check(
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dtype=dtype,
        layout="padded",
    )


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("bias", [False, "qk"], ids=["plain", "general"])
def test_every_kernel(check, head_dim, dtype, bias):
    """A tile size or swizzle that is wrong for one head_dim, in either kernel of the pair."""
    sizes = {"seqlen_q": 70, "seqlen_k": 90, "batch": 1, "heads_q": 2, "heads_k": 1}
    check(head_dim=head_dim, dtype=dtype, bias=bias, causal=True, **sizes)


FEATURES = {
    "causal, top left": {"causal": True, "align": 0},
    "causal, bottom right: first rows empty": {"causal": True, "align": 1, "seqlen_k": 30},
    "window": {"window": (20, 5)},
    "window without a right side": {"window": (9, -1)},
    "mask with empty rows": {"mask": "qk", "seqlen_k": 3},
    "mask broadcast over keys": {"mask": "bhq"},
    "bias": {"bias": True},
    "bias broadcast over batch and heads": {"bias": "qk"},
    "bias broadcast over queries": {"bias": "bk"},
    "bias broadcast over keys": {"bias": "hq"},
    "bias broadcast over everything": {"bias": ""},
    "softcap": {"softcap": 2.0},
    "ALiBi": {"alibi": "b"},
    "sink": {"sink": True},
    "dropout": {"dropout_p": 0.3},
    "drop all": {"dropout_p": 1.0},
    "GQA 8:1": {"heads_q": 8, "heads_k": 1},
    "negative scale": {"scale": -0.3},
    "layout [B, S, H, D]": {"layout": "bshd"},
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
    },
}


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_features(check, name, dtype):
    """A feature left out, or its gradient."""
    options = {"seqlen_q": 70, "seqlen_k": 134, "head_dim": 24, "stats": True, "dtype": dtype}
    check(**{**options, **FEATURES[name]})


@pytest.mark.parametrize("name", FEATURES)
def test_features_of_deterministic_calls(check, name):
    """The same in the two kernels of a backward without atomic additions."""
    options = {"seqlen_q": 70, "seqlen_k": 134, "head_dim": 24, "dtype": BF16}
    check(**{**options, "deterministic": True, **FEATURES[name]})


@pytest.mark.parametrize("name", FEATURES)
def test_varlen(check, name):
    """Positions, masks or dropout bits counted from the buffer's start and not the sequence's."""
    options = {k: v for k, v in FEATURES[name].items() if k != "seqlen_k"}
    lengths = {"seqlens_q": [0, 5, 71, 1], "seqlens_k": [4, 7, 80, 0]}
    check(stats=True, dtype=FP16, head_dim=32, **lengths, **options)


@pytest.mark.parametrize("page_size", [0, 1, 3, 64, 256])
@pytest.mark.parametrize("seqlen_q", [1, 4, 50])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_decode(check, page_size, seqlen_q, dtype):
    """A tile that crosses pages, keys beyond the used length (NaN there), a cache without keys, a
    share of the keys that is empty, rows that belong to another head of the group."""
    check(
        seqlen_q=seqlen_q,
        heads_q=6,
        heads_k=2,
        head_dim=40,
        seqlen_k=520,
        cache_seqlens=[0, 7, 520],
        page_size=page_size,
        causal=True,
        sink=True,
        stats=True,
        dtype=dtype,
    )


@pytest.mark.parametrize(("asked", "used"), [(1, 1), (2, 2), (5, 5), (16, 9), (2**40, 9), (0, 3)])
def test_decode_takes_the_splits_that_are_asked_for(check, asked, used):
    """num_splits ignored, parts without a key of their own, or a merge that is right for one
    number."""
    sizes = {"seqlen_q": 2, "heads_q": 4, "heads_k": 2, "head_dim": 64, "seqlen_k": 520}
    call = random_call(
        cache_seqlens=[520, 3],
        page_size=16,
        dtype=BF16,
        sink=True,
        stats=True,
        causal=True,
        device=check.device,
        **sizes,
    )
    call = call._replace(num_splits=asked)
    kernels = check.module._kernels()
    lse = torch.empty(call.q.shape[:3], device=check.device)
    native = kernels._native(call, kernels._canonical(call), torch.empty_like(call.q), lse)
    floats = native.forward_workspace(6 if asked == 0 else 1000, False)
    assert floats == (used * lse.numel() * (64 + 3) if used > 1 else 0)
    check(call)


def test_a_remembered_plan_knows_its_splits(check):
    """The scratch of one num_splits used for a dense call of another."""
    call = random_call(seqlen_q=1, seqlen_k=300, dtype=BF16, device=check.device)
    for asked in (1, 7, 1, 0):
        check(call._replace(num_splits=asked))


@pytest.mark.parametrize("options", [{"mask": "bhqk"}, {"bias": "hqk"}, {"window": (100, 0)}])
def test_decode_features(check, options):
    """A mask or bias indexed by the packed row instead of its head and position."""
    sizes = {"seqlen_q": 3, "heads_q": 4, "heads_k": 2, "seqlen_k": 300}
    check(cache_seqlens=[300, 77], page_size=16, dtype=BF16, **sizes, **options)


@pytest.mark.parametrize("seqlen", [17, 90])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", nonfinite.CASES)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_bad_values_reach_exactly_who_sees_them(check, name, value, seqlen, dtype):
    """0 * NaN of an excluded pair, or NaN of a visible one lost in a maximum."""
    spoil, options = nonfinite.CASES[name]
    call = random_call(7, dtype=dtype, seqlen_q=seqlen, device=check.device, **options)
    spoil(call, value)
    check(call)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_nan_in_the_gradient_of_an_excluded_query(check, dtype):
    """dV of key 9 must not see dO of query 3, which cannot see that key."""
    call = random_call(seqlen_q=20, causal=True, dtype=dtype, device=check.device)
    out, lse, *_ = check.module.forward(call)
    dout = torch.ones_like(out)
    dout[:, :, 3] = torch.nan
    _, dk, dv, *_ = check.module.backward(call, dout, out, lse, None, Needs(True, True, True))
    for gradient in (dk, dv):
        assert gradient[:, :, 4:].isfinite().all()
        assert gradient[:, :, :4].isnan().all()


@pytest.mark.skipif(
    emulated.available() != "", reason="needs the emulator, which can repair nothing"
)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_keys_that_are_not_there_make_no_row_be_computed_again(head_dim):
    """Zeros behind the last key, whose weights are more than float16 holds where LSE is far below
    0: the keys beside them computed once more, pair by pair, which shows in their last bits."""
    from attn_ext import _emulated

    emulated.set_mode("plain", 1)
    sizes = {"dtype": FP16, "heads_q": 1, "seqlen_q": 70, "head_dim": head_dim}
    call = random_call(scale=1.0, deterministic=True, **sizes)
    call.q.mul_(0.1).add_(1), call.k.mul_(0.1).sub_(1)
    out, lse, *_ = emulated.forward(call)
    assert lse.max() < -50
    dout = random_call(5, **sizes).q
    results = []
    for repairs in (True, False):
        _emulated.set_repairs(repairs)
        results.append(emulated._kernels().backward(call, dout, out, lse, None, needs_of(call)))
    for a, b in zip(*results, strict=True):
        assert a is None or (torch.equal(a, b) and b.isfinite().all())


def test_a_remembered_plan_serves_only_its_own_calls(check):
    """Addresses or strides of an earlier call of the same shape."""
    a = random_call(1, seqlen_q=20, dtype=BF16, device=check.device)
    b = random_call(2, seqlen_q=20, dtype=BF16, device=check.device)
    c = random_call(2, seqlen_q=20, dtype=BF16, layout="bshd", device=check.device)
    outs = [check.module.forward(call)[0] for call in (a, b, c, a)]
    assert torch.equal(outs[0], outs[3]) and not torch.equal(outs[0], outs[1])
    assert torch.equal(outs[1], outs[2]) and outs[1].stride() != outs[2].stride()
    for call in (a, b, c):
        check(call)


@pytest.mark.parametrize("needs", [(1,), (0, 1), (0, 0, 1, 1)])
@pytest.mark.parametrize("head_dim", [32, 192])
def test_only_the_gradients_that_are_needed(check, needs, head_dim):
    """A null pointer written to, or a gradient that depends on which others are asked for."""
    options = {"bias": "k", "sink": True, "deterministic": True, "device": check.device}
    call = random_call(seqlen_q=20, dtype=BF16, head_dim=head_dim, **options)
    out, lse, *_ = check.module.forward(call)
    dout = torch.ones_like(out)
    every = check.module.backward(call, dout, out, lse, None, needs_of(call))
    some = check.module.backward(call, dout, out, lse, None, Needs(*map(bool, needs)))
    for need, a, b in zip(Needs(*needs), every, some, strict=True):
        assert b is None if not need else torch.equal(a, b)


def test_runs_are_bitwise_equal(check):
    """An order of additions that depends on the scheduling of warps."""
    options = {"heads_q": 4, "heads_k": 2, "bias": "k", "sink": True, "device": check.device}
    call = random_call(seqlen_q=100, dtype=BF16, head_dim=32, deterministic=True, **options)
    results = []
    for seed in (1, 2, 3):
        if check.device == "cpu":
            from attn_ext import _emulated

            _emulated.set_mode("random", seed)
        out, lse, *_ = check.module.forward(call)
        needs = needs_of(call)
        grads = check.module.backward(call, torch.ones_like(out), out, lse, None, needs)
        results.append([out, lse, *(g for g, n in zip(grads, needs, strict=True) if n)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


FUSED = {
    "whole tiles": {"seqlen_q": 128, "seqlen_k": 256},
    "causal, grouped heads, ragged": {"seqlen_q": 150, "seqlen_k": 200, "causal": True},
    "fewer queries than a tile": {"seqlen_q": 9, "seqlen_k": 130, "window": (20, 5)},
    "narrow heads": {"seqlen_q": 70, "seqlen_k": 70, "head_dim_v": 17},
}


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize("kib", [163, 99])
def test_backward_in_one_kernel(check, kib, head_dim, name):
    """A tile or a sum of dQ that is wrong for one width, with 163 KiB as an A100 has them, or with
    99.  The two other kernels in its place because memory is poisoned, by a switch of torch."""
    if check.mode:
        emulated.set_mode(check.mode, 1, smem_kib=kib)
    sizes = {"batch": 2, "heads_q": 4, "heads_k": 2, "head_dim": head_dim, "dtype": BF16}
    call = random_call(3, device=check.device, **{**sizes, **FUSED[name]})
    assert "fused" in backward_kernel(check, call)
    before = launched(check)
    check(call, smem_kib=kib)
    # forward; delta, zeroes, all three gradients, dQ rounded, where the two kernels would be one
    # less; far rows' queries and keys
    assert launched(check) - before == (7 if check.mode else 0)


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_backward_in_two_kernels(check, head_dim):
    """The plain dQ, or dK and dV, of a deterministic call, wrong for one width; one kernel in their
    place, whose sums depend on the order."""
    sizes = {"batch": 2, "heads_q": 4, "heads_k": 2, "head_dim": head_dim, "dtype": BF16}
    more = FUSED["causal, grouped heads, ragged"]
    call = random_call(3, device=check.device, deterministic=True, **{**sizes, **more})
    before = launched(check)
    check(call, smem_kib=163)
    # forward; delta, dQ, dK and dV; far rows' queries and keys
    assert launched(check) - before == (6 if check.mode else 0)


def launched(check) -> int:
    """Kernels that the emulator has run; 0 on a GPU."""
    if not check.mode:
        return 0
    from attn_ext import _emulated

    return _emulated.launches()


@pytest.mark.parametrize(("head_dim", "kib"), [(64, 163), (128, 99)])
def test_backward_in_one_kernel_varlen(check, head_dim, kib):
    """Sums of dQ that two sequences share, or a tile behind the end of one."""
    lengths = {"seqlens_q": [0, 65, 140, 1, 63], "seqlens_k": [4, 70, 80, 0, 200]}
    sizes = {"head_dim": head_dim, "dtype": BF16, "heads_q": 4, "heads_k": 2, "causal": True}
    check(smem_kib=kib, **sizes, **lengths)


def backward_kernel(check, call, deterministic=False):
    """The kernels that backward of a call launches, all gradients wanted."""
    kernels = check.module._kernels()
    lse = torch.empty(call.q.shape[:3], device=check.device)
    out = torch.empty(*call.q.shape[:-1], call.v.shape[-1], dtype=call.q.dtype)
    native = kernels._native(call, kernels._canonical(call), out, lse)
    rows = (0, 0, 0)
    native.set_gradients(rows, rows, rows, rows, (0, 0, 0, 0), deterministic)
    point(native, dout=out, dq=call.q, dk=call.k, dv=call.v)
    return native.backward_kernel(6, False)


def test_who_gets_the_backward_in_one_kernel(check):
    """Atomics in a deterministic call, or a tile that does not fit the GPU."""
    wide = random_call(head_dim=128, dtype=BF16, device=check.device)
    assert backward_kernel(check, wide, deterministic=True) == "sm80 plain"
    floats = random_call(head_dim=64, dtype=FP32, device=check.device)
    assert backward_kernel(check, floats) == "sm80 plain"
    if not check.mode:
        return
    for head_dim, least in ((32, 65), (64, 97), (96, 89), (128, 97)):
        call = random_call(head_dim=head_dim, dtype=BF16)
        for limit in (least - 1, least, 99, 163):
            emulated.set_mode(check.mode, 1, smem_kib=limit)
            name = "sm80 plain fused" if least <= limit else "sm80 plain"
            assert backward_kernel(check, call) == name, (head_dim, limit)


@pytest.mark.parametrize(("arch", "kib"), [("80", 163), ("86", 99), ("89", 99), ("120", 99)])
def test_tiles_by_shared_memory(arch, kib):
    """A tile that does not fit the GPU, or the small one where the large one does."""
    from attn_ext.cli import compile as command

    assert command.SHARED_KIB[arch] == kib
    for features, stem in (((), "backward_fused"), (("mask",), "backward_features")):
        for head_dim in (32, 64, 96, 128):
            wants = list(command.wanted(f"1,4/2,128,{head_dim}", "bf16", features, True, arch))
            assert all(want.shared_memory <= 1024 * kib for want in wants)
            (fused,) = [want for want in wants if f"::{stem}" in want.kernel]
            half = kib == 99 and head_dim >= 96
            assert (f"::{stem}_half<" in fused.kernel) == half, (features, head_dim)
            assert fused.threads == (128 if half else 256)
            queries = 128 if kib == 163 and head_dim == 64 and not features else 64
            assert half or features or f" {head_dim}, {queries}>" in fused.kernel


@pytest.mark.parametrize("asked_of", ["call", "torch"])
def test_deterministic_runs_are_bitwise_equal(check, asked_of):
    """The backward in one kernel where the same bits are asked for, of the call or of torch."""
    call = random_call(seqlen_q=100, head_dim=64, dtype=BF16, causal=True, device=check.device)
    call = call._replace(deterministic=asked_of == "call")
    results = []
    for seed in (1, 2, 3):
        if check.mode:
            emulated.set_mode("random", seed)
        out, lse, *_ = check.module.forward(call)
        torch.use_deterministic_algorithms(asked_of == "torch")
        try:
            asked = call._replace(backend=check.name)
            grads = execute.backward(torch.ones_like(out), None, out, lse, asked, needs_of(call))
        finally:
            torch.use_deterministic_algorithms(False)
        results.append([out, lse, *grads[:3]])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_unsupported_problems_say_why():
    """A head_dim or dtype that reaches a kernel which was not made for it."""
    problem = Problem.of(random_call(head_dim=300, dtype=torch.float64))
    why = native_gpu.unsupported(problem)
    assert any("head_dim must be at most 256, got 300" in reason for reason in why)
    assert any("dtype must be one of" in reason and "float64" in reason for reason in why)
    decode = Problem.of(random_call(cache_seqlens=[3], seqlen_k=4, dtype=BF16)._replace(grad=True))
    assert any("decode has no backward" in reason for reason in native_gpu.unsupported(decode))


def test_the_native_side_refuses_what_would_break_memory(check):
    """A corrupt struct that reaches a kernel."""
    kernels = check.module._kernels()
    for change, message in (
        ({"max_seqlen_q": -1}, "seqlen_q must be at least 0, got -1"),
        ({"dropout_p": 0.5}, "rng_state is needed"),
        ({"max_seqlen_k": 2**30}, "below 2\\^30"),
    ):
        call = random_call(dtype=BF16, device=check.device)._replace(**change)
        t = kernels._canonical(call)
        lse = torch.empty(call.q.shape[:3], device=check.device)
        native = kernels._native(call, t, torch.empty_like(call.q), lse)
        with pytest.raises(ValueError, match=message):
            native.forward(0, 0, 0, 1, False)
