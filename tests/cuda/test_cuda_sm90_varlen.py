"""Sequences one behind the other (cu_seqlens) on the Hopper kernels, in each mode of the emulator
and on a Hopper GPU where there is one.

The copy engine knows where the tensor ends and not where a sequence does: a tile at the end of one
holds rows of the next, which must not count, whatever they are, and must not be stored to.
"""

import pytest
import torch

from attn_ext.backends import registry
from attn_ext.backends.native import point
from attn_ext.core.layout import strides as strides_of
from attn_ext.core.schema import Needs
from attn_ext.testing import GRADIENTS, assert_close_to_reference, check_call, to_float64

BF16, FP16 = torch.bfloat16, torch.float16
NEEDS = Needs(True, True, True)

# What each would catch.
CASES = {
    "lengths around a tile of 128": {"seqlens_q": [127, 128, 129], "seqlens_k": [129, 127, 128],
                                     "head_dim": 64},
    "lengths around a tile of 64": {"seqlens_q": [63, 65, 64], "seqlens_k": [65, 64, 63],
                                    "head_dim": 128, "causal": True},
    "without queries, without keys, without both": {
        "seqlens_q": [0, 70, 30, 0, 5], "seqlens_k": [9, 0, 140, 0, 1], "head_dim": 64},
    "the first and the last are empty": {"seqlens_q": [0, 90, 0], "head_dim": 96, "causal": True},
    "lengths of one": {"seqlens_q": [1, 130, 1], "seqlens_k": [1, 1, 130], "head_dim": 64},
    "rings go round, then a short one": {"seqlens_q": [300, 20], "seqlens_k": [400, 30],
                                         "head_dim": 64, "heads_q": 2, "heads_k": 1},
    "causal, more queries than keys": {"seqlens_q": [150, 20, 70], "seqlens_k": [20, 150, 70],
                                       "head_dim": 64, "causal": True, "dtype": FP16},
    "causal, top left": {"seqlens_q": [100, 40], "seqlens_k": [60, 140], "head_dim": 128,
                         "causal": True, "align": 0},
    "window": {"seqlens_q": [140, 3, 200], "head_dim": 64, "window": (40, 10)},
    "window without a left side": {"seqlens_q": [70, 100], "seqlens_k": [30, 170], "head_dim": 128,
                                   "window": (-1, 3), "dtype": FP16},
    "one sequence": {"seqlens_q": [70], "seqlens_k": [200], "head_dim": 64},
    "tiles of 96 keys": {"seqlens_q": [20, 70], "seqlens_k": [97, 100], "head_dim": 192},
    "tiles of 64 keys": {"seqlens_q": [64, 70], "seqlens_k": [65, 30], "head_dim": 256,
                         "causal": True},
    "Dv wider than D": {"seqlens_q": [40, 50], "seqlens_k": [70, 90], "head_dim": 40,
                        "head_dim_v": 128},
    "GQA 8:1": {"seqlens_q": [65, 3, 64], "head_dim": 64, "heads_q": 8, "heads_k": 1},
}  # fmt: skip
DETERMINISTIC = (
    "lengths around a tile of 128",
    "without queries, without keys, without both",
    "causal, more queries than keys",
    "window",
)


@pytest.mark.parametrize("name", CASES)
def test_shapes_of_sequences(hopper, name):
    """Lengths, starts and LSE of the wrong sequence; masks, parities and exits at its end."""
    hopper.check(hopper.call(**CASES[name]), grads=True)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_gradients_of_sequences(hopper, name):
    """dQ of its own kernel, which other calls up to head_dim 128 do not run."""
    hopper.check(hopper.call(deterministic=True, **CASES[name]), grads=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("value", "head_dim", "deterministic"),
    [(torch.nan, 64, False), (torch.inf, 128, False), (torch.nan, 128, True), (-torch.inf, 192, 0)],
)
def test_neighbours_do_not_count(hopper, value, head_dim, deterministic, causal):
    """0 * NaN with a row of the next sequence, in each of the products."""
    lengths = {"seqlens_q": [64, 30, 100, 20], "seqlens_k": [100, 60, 70, 90]}
    call = hopper.call(
        head_dim=head_dim, causal=causal, deterministic=bool(deterministic), **lengths
    )
    good_q, good_k = (torch.ones(sum(x), dtype=torch.bool) for x in lengths.values())
    for s in (1, 3):
        for good, cu in ((good_q, call.cu_seqlens_q), (good_k, call.cu_seqlens_k)):
            good[cu[s] : cu[s + 1]] = False
    dout = torch.randn(*call.q.shape[:2], call.v.shape[2], device=call.q.device).to(BF16)
    clean, clean_dout = call, dout.clone()
    call = call._replace(**{n: getattr(call, n).clone() for n in ("q", "k", "v")})
    for x, good in ((call.q, good_q), (dout, good_q), (call.k, good_k), (call.v, good_k)):
        x[~good.to(x.device)] = value
    assert hopper.kernel(call) == hopper.backward_kernel(call, dout) == "sm90"
    out, lse = hopper.module.forward(call)[:2]
    got = (out, lse.T, *hopper.module.backward(call, dout, out, lse, None, NEEDS)[:3])
    reference = registry.get("reference")
    results = []
    for c, d in ((to_float64(clean), clean_dout.double()), (clean, clean_dout)):
        (o, lse, *_), grads = reference.forward_and_backward(c, d, None, NEEDS)
        results.append((o, lse.T, *grads[:3]))
    names = ("out", "lse", *(f"d{x}" for x in GRADIENTS[:3]))
    for name, x, truth, naive in zip(names, got, *results, strict=True):
        good = (good_k if name in ("dk", "dv") else good_q).to(x.device)
        kind = "grad" if name.startswith("d") else "out"
        assert_close_to_reference(x[good], truth[good], naive[good], kind, name, BF16)


@pytest.mark.parametrize("deterministic", [False, True])
def test_rows_of_no_sequence_are_not_touched(hopper, deterministic):
    """Stores beyond a sequence, which the next one's stores would hide: rows behind the last one,
    and of a sequence that is longer than the call says."""
    call = hopper.call(
        seqlens_q=[50, 130, 60, 40], seqlens_k=[70, 150, 40, 90], head_dim=64, heads_q=2, heads_k=1,
        deterministic=deterministic,
    )  # fmt: skip
    whole = call._replace(cu_seqlens_q=call.cu_seqlens_q[:-1], cu_seqlens_k=call.cu_seqlens_k[:-1])
    cut = whole._replace(max_seqlen_q=100, max_seqlen_k=90)
    for call in (whole, cut):
        assert hopper.kernel(call) == hopper.backward_kernel(call) == "sm90"
        out, lse = hopper.module.forward(call)[:2]
        dq, dk, dv = hopper.module.backward(call, out, out, lse, None, NEEDS)[:3]
        for x, first, longest, end in (
            (out, 50, call.max_seqlen_q, 180), (lse.T, 50, call.max_seqlen_q, 180),
            (dq, 50, call.max_seqlen_q, 180), (dk, 70, call.max_seqlen_k, 220),
            (dv, 70, call.max_seqlen_k, 220),
        ):  # fmt: skip
            empty = float("-inf") if x.dtype == torch.float32 else 0
            last = 260 if end == 220 else 240
            assert (x[first + longest : end] == empty).all() and (x[last:] == empty).all()
            assert x[first + longest - 1].isfinite().all() and (x[last - 1] != empty).any()


def test_sums_of_dq_have_room_for_every_sequence(hopper):
    """Scratch for the longest sequence in every batch, or too little of it."""
    call = hopper.call(seqlens_q=[1, 63, 0, 130], seqlens_k=[40] * 4, head_dim=64)
    out, lse = hopper.module.forward(call)[:2]
    native = hopper.kernels._native(call, hopper.kernels._canonical(call), out, lse)
    native.set_gradients(*[strides_of(out, True)] * 4, (0, 0, 0, 0), False)
    point(native, dout=out, dq=out)  # whose kernel of its own has no sums
    without = native.backward_workspace(True)
    point(native, dk=call.k, dv=call.v)
    assert native.backward_workspace(True) - without == 4 * (194 // 64 + 4) * 64 * 64


def test_strided_heads_of_sequences(hopper):
    """q, k and v that are slices of one tensor, as of a fused projection."""
    call = hopper.call(seqlens_q=[70, 140], head_dim=64, heads_q=2, heads_k=2)
    packed = torch.stack((call.q, call.k, call.v), 1)
    call = call._replace(q=packed[:, 0], k=packed[:, 1], v=packed[:, 2])
    hopper.check(call, grads=True)


def test_nobody_has_keys(hopper):
    """A tensor map without rows."""
    call = hopper.call(seqlens_q=[70, 20], seqlens_k=[0, 0], head_dim=64)
    assert hopper.kernel(call) == "sm80 plain"
    check_call(call, hopper.module)


@pytest.mark.parametrize("causal", [False, True])
def test_lengths_of_a_cache(hopper, causal):
    """[B, H, S, D] with a length a sequence: what lies behind it is NaN here."""
    call = hopper.call(
        cache_seqlens=[0, 130, 1, 200], seqlen_q=70, seqlen_k=200, head_dim=64, causal=causal
    )
    hopper.check(call)
