"""The Hopper kernels (csrc/cuda/sm90), forward and backward: on the emulated device in each of its
modes, and on a Hopper GPU where there is one.

They are off unless ATTN_EXT_CUDA_SM90 asks for them, so that these tests switch them on themselves;
what they do not serve must go to the sm80 kernels without a word.
"""

import pytest
import torch
from closeness import BFLOAT16, BFLOAT16_LAYERS, assert_close

import attn_ext
from attn_ext.backends import registry
from attn_ext.backends.native import point
from attn_ext.core.schema import Needs
from attn_ext.testing import assert_close_to_reference, check_call, to_float64

BF16, FP16 = torch.bfloat16, torch.float16

# What each would catch.
CASES = {
    "whole tiles": {"seqlen_q": 128, "seqlen_k": 256, "head_dim": 64},
    "one query": {"seqlen_q": 1, "seqlen_k": 129, "head_dim": 64, "heads_k": 4},
    "one key": {"seqlen_q": 130, "seqlen_k": 1, "head_dim": 128},
    "rings go round, ragged ends": {"seqlen_q": 100, "seqlen_k": 650, "head_dim": 64},
    "causal, a tile boundary within": {"seqlen_q": 150, "seqlen_k": 290, "head_dim": 128,
                                       "causal": True},
    "causal, first rows and tiles empty": {"seqlen_q": 300, "seqlen_k": 140, "head_dim": 64,
                                           "causal": True},
    "causal, top left": {"seqlen_q": 140, "seqlen_k": 280, "head_dim": 64, "causal": True,
                         "align": 0},
    "window: tiles that one warpgroup skips": {"seqlen_q": 300, "seqlen_k": 420, "head_dim": 64,
                                               "window": (40, 10)},
    "window without a left side": {"seqlen_q": 130, "seqlen_k": 130, "head_dim": 128,
                                   "window": (-1, 3)},
    "a slab that is half beyond D": {"seqlen_q": 70, "seqlen_k": 200, "head_dim": 96},
    "three slabs, tiles of 96": {"seqlen_q": 70, "seqlen_k": 300, "head_dim": 192, "heads_k": 4},
    "four slabs, tiles of 64": {"seqlen_q": 130, "seqlen_k": 140, "head_dim": 256, "causal": True},
    "D of no kernel": {"seqlen_q": 70, "seqlen_k": 140, "head_dim": 72, "causal": True},
    "Dv wider than D": {"seqlen_q": 70, "seqlen_k": 140, "head_dim": 40, "head_dim_v": 128},
    "D wider than Dv": {"seqlen_q": 70, "seqlen_k": 140, "head_dim": 128, "head_dim_v": 8},
    "GQA 8:1": {"seqlen_q": 65, "seqlen_k": 65, "head_dim": 64, "heads_q": 8, "heads_k": 1},
    "layout [B, S, H, D]": {"seqlen_q": 70, "seqlen_k": 140, "head_dim": 64, "layout": "bshd",
                            "batch": 2},
    "scale": {"seqlen_q": 70, "seqlen_k": 140, "head_dim": 64, "scale": 0.7},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_shapes(hopper, name, dtype):
    """Wrong descriptors or boxes for a head_dim, tails, masks, parities, heads."""
    hopper.check(hopper.call(dtype=dtype, **CASES[name]), grads=True)


@pytest.mark.parametrize("head_dim", [64, 192])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("where", ["k", "q"])
def test_infinities_in_visible_rows(hopper, where, deterministic, head_dim):
    """0 * inf at pairs of logit -inf in tiles that nothing cuts, exp(-inf - NaN) in rows of NaN."""
    call = hopper.call(seqlen_q=130, seqlen_k=260, head_dim=head_dim, deterministic=deterministic)
    if where == "k":
        call.q.abs_()
        call.k[:, :, 5] = -torch.inf
        call.v[:, :, 5] = torch.inf
    else:
        call.k.abs_()[:, :, 1::3].neg_()
        call.q[:, :, 9] = torch.inf
    hopper.check(call, grads=True)


def test_strided_inputs(hopper):
    """A view whose heads, rows and batches lie far apart, with NaN between them."""
    call = hopper.call(seqlen_q=70, seqlen_k=140, head_dim=64, batch=2)
    for name in ("q", "k", "v"):
        x = getattr(call, name)
        buffer = x.new_full((2, x.shape[0], x.shape[2] + 3, x.shape[1], 80), torch.nan)
        view = buffer[1, :, 2 : 2 + x.shape[2], :, 8:72].transpose(1, 2)
        view.copy_(x)
        call = call._replace(**{name: view})
    hopper.check(call)


@pytest.mark.parametrize(
    "name",
    [
        "one query",
        "rings go round, ragged ends",
        "causal, first rows and tiles empty",
        "window: tiles that one warpgroup skips",
        "D of no kernel",
        "Dv wider than D",
        "layout [B, S, H, D]",
    ],
)
def test_deterministic_gradients(hopper, name):
    """dQ in one order; test_cuda_sm90_ordered.py holds its bits."""
    hopper.check(hopper.call(deterministic=True, **CASES[name]), grads=True)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("value", "head_dim"), [(torch.nan, 64), (torch.inf, 128), (-torch.inf, 192)]
)
def test_bad_values_reach_exactly_who_sees_them(hopper, value, head_dim, deterministic):
    """0 * NaN of a pair that does not count, in one of the products; a visible NaN that is lost."""
    options = {"seqlen_q": 140, "seqlen_k": 140, "head_dim": head_dim, "causal": True}
    call = hopper.call(deterministic=deterministic, **options)
    call.k[:, :, 130] = value
    call.v[:, 0, 77] = value
    call.v[:, 1, 139] = value
    hopper.check(call, grads=True)
    call = hopper.call(deterministic=deterministic, **options)
    call.q[:, :, 9] = value
    hopper.check(call, grads=True)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_bad_keys_of_the_other_warpgroup(hopper, head_dim):
    """dQ is of the keys of both warpgroups: of tile 2 one sees all of its own, and multiplies a NaN
    among those of the other by dS = 0."""
    call = hopper.call(seqlen_q=256, seqlen_k=256, head_dim=head_dim, causal=True, heads_q=2)
    call.k[:, :, [100, 230]] = torch.nan
    hopper.check(call, grads=True)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 192])
def test_bad_output_gradients_reach_exactly_who_is_seen(hopper, head_dim, deterministic):
    """0 * NaN in dV: a row of dO that a key's causal band excludes."""
    call = hopper.call(
        seqlen_q=140, seqlen_k=140, head_dim=head_dim, causal=True, deterministic=deterministic
    )
    out, lse = hopper.module.forward(call)[:2]
    dout = torch.randn_like(out.float()).to(out)
    dout[:, :, 9] = torch.nan
    assert hopper.backward_kernel(call, dout) == "sm90"
    needs = Needs(True, True, True)
    results = hopper.module.backward(call, dout, out, lse, None, needs)
    reference = registry.get("reference")
    exact = reference.forward_and_backward(to_float64(call), dout.double(), None, needs)[1]
    naive = reference.forward_and_backward(call, dout, None, needs)[1]
    for name, got, truth, near in zip(("dq", "dk", "dv"), results, exact, naive, strict=False):
        if name != "dq":
            assert got[:, :, 10:].isfinite().all() and not got[:, :, :9].isfinite().any()
        assert_close_to_reference(got, truth, near, "grad", name, BF16)


def test_gradients_follow_from_its_output(hopper):
    """LSE or O that the backward kernels cannot use; also through the public API."""
    hopper.check(hopper.call(seqlen_q=70, seqlen_k=140, head_dim=64, causal=True), grads=True)
    call = hopper.call(seqlen_q=70, seqlen_k=140, head_dim=64)
    results = {}
    for name in (hopper.name, "reference"):
        q, k, v = (x.detach().clone().requires_grad_() for x in (call.q, call.k, call.v))
        out = attn_ext.attention(q, k, v, backend=name)
        out.float().square().sum().backward()
        results[name] = (out, q.grad, k.grad, v.grad)
    for got, want in zip(results[hopper.name], results["reference"], strict=True):
        assert_close(got, want, BFLOAT16_LAYERS)


@pytest.mark.parametrize("head_dim", [64, 192])
def test_runs_are_bitwise_equal(hopper, head_dim):
    """A result that depends on when loads land, which warpgroup or which CTA is first."""
    call = hopper.call(
        seqlen_q=140, seqlen_k=400, head_dim=head_dim, causal=True, deterministic=True
    )
    first = None
    for seed in (1, 2, 3):
        if hopper.name == "emulated":
            hopper.module.set_mode("random", seed)
        out, lse = hopper.module.forward(call)[:2]
        needs = Needs(True, True, True)
        again = (out, lse, *hopper.module.backward(call, out, out, lse, None, needs)[:3])
        first = first or again
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_some_gradients_only(hopper):
    """A null pointer that is written to; kernels of their own where not all is wanted."""
    call = hopper.call(seqlen_q=140, seqlen_k=200, head_dim=64, causal=True, deterministic=True)
    out, lse = hopper.module.forward(call)[:2]
    every = hopper.module.backward(call, out, out, lse, None, Needs(True, True, True))
    for deterministic in (False, True):
        call = call._replace(deterministic=deterministic)
        for needs in ((True, False, False), (False, True, False), (False, False, True)):
            some = hopper.module.backward(call, out, out, lse, None, Needs(*needs))
            for need, got, want in zip(needs, some, every, strict=False):
                assert (got is None) == (not need)
                if need:  # the kernel of all gradients adds them up in another order
                    assert_close(got, want, BFLOAT16)


def test_sums_of_dq_are_for_calls_that_have_them(hopper):
    """Too little scratch for the sums or for the words of their order; some where two kernels
    compute the gradients."""
    words = 2 * (4 * 2) + 1  # two a tile of 64 queries, and the counter
    for head_dim, deterministic, expected in (
        (64, False, 4 * 128 * 64), (128, False, 4 * 128 * 128),
        (128, True, 4 * 128 * 128 + words), (192, False, 0), (192, True, 0),
    ):  # fmt: skip
        call = hopper.call(seqlen_q=70, seqlen_k=70, head_dim=head_dim)
        out, lse = hopper.module.forward(call)[:2]
        native = hopper.kernels._native(call, hopper.kernels._canonical(call), out, lse)
        strides = out.stride()[:3]
        native.set_gradients(*[strides] * 4, (0, 0, 0, 0), deterministic)
        point(native, dout=out, dq=out)
        without = native.backward_workspace(True)
        point(native, dk=call.k, dv=call.v)
        assert native.backward_workspace(True) - without == expected


# Those that the Hopper kernels with features serve (test_cuda_sm90_features.py).
FEATURES = {
    "mask": {"mask": "qk"},
    "bias": {"bias": "k"},
    "softcap": {"softcap": 3.0},
    "sink": {"sink": True},
    "ALiBi": {"alibi": True},
    "dropout": {"dropout_p": 0.2},
    "statistics": {"stats": True},
    "negative scale": {"scale": -0.2},
}  # fmt: skip
OTHERS = {
    **FEATURES,
    "head_dim 32": {"head_dim": 32},
    "head_dim 32 with a mask": {"head_dim": 32, "mask": "qk"},
    "rows that are no multiple of 16 bytes": {"head_dim": 65},
    "rows of odd length with dropout": {"head_dim": 65, "dropout_p": 0.2},
    "no keys": {"seqlen_k": 0},
    "float32": {"dtype": torch.float32},
    "heads of a group packed": {"seqlen_q": 2},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_calls_go_to_other_kernels(hopper, name):
    """A feature that the plain Hopper kernel would ignore."""
    call = hopper.call(**{"seqlen_q": 70, "seqlen_k": 96, "head_dim": 64, **OTHERS[name]})
    assert hopper.kernel(call).startswith("sm90 features" if name in FEATURES else "sm80")
    # groups are packed in the forward alone
    backward = "sm90" if name in FEATURES or name == "heads of a group packed" else "sm80"
    assert hopper.backward_kernel(call).startswith(backward)
    check_call(call, hopper.module, grads=False)


def test_misaligned_and_broadcast_inputs_go_to_the_sm80_kernels(hopper):
    """The driver refuses such a tensor map, or the copy engine reads elsewhere."""
    call = hopper.call(seqlen_q=70, seqlen_k=90, head_dim=64)
    k = torch.empty(call.k.numel() + 1, dtype=BF16, device=call.k.device)[1:].view_as(call.k)
    k.copy_(call.k)
    v = call.v[:, :1].expand_as(call.v)
    for name, x in (("k", k), ("v", v)):
        other = call._replace(**{name: x})
        assert hopper.kernel(other) == "sm80 plain"
        assert hopper.backward_kernel(other) == "sm80 plain fused"
        check_call(other, hopper.module, grads=False)
    dout = torch.ones(1, 1, 1, 64, dtype=BF16, device=call.q.device).expand(1, 4, 70, 64)
    assert hopper.backward_kernel(call, dout) == "sm80 plain fused"


def test_it_is_off_unless_asked_for(hopper):
    """Kernels that nobody has run on hardware must not be the default."""
    from attn_ext.backends import native_gpu

    assert native_gpu.Kernels(hopper.kernels.module, hopper.device).sm90 is None
    call = hopper.call(seqlen_q=70, seqlen_k=140, head_dim=64)
    hopper.kernels.sm90 = False
    assert hopper.kernels._target(call.q.device)[3] is False
    if hopper.name == "emulated":
        from attn_ext import _emulated

        _emulated.reset_counters()
        hopper.module.forward(call)
        assert _emulated.wgmmas() == 0
        hopper.kernels.sm90 = True
        hopper.module.forward(call)
        assert _emulated.wgmmas() > 0
