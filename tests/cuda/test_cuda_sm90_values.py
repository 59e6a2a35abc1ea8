"""Values that are narrower than keys on Hopper: heads of up to 192 columns with values of up to 128
(multi-head latent attention has 192 and 128), which the forward does not pad to the width of keys.

On the emulated device in each of its modes, and on a Hopper GPU where there is one.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from strategies import call_options

from attn_ext.core.schema import Needs
from attn_ext.testing import check_call, random_call

BF16, FP16 = torch.bfloat16, torch.float16
LATENT = {"head_dim": 192, "head_dim_v": 128}

# What each would catch.
CASES = {
    "rings go round, ragged ends": LATENT | {"seqlen_q": 100, "seqlen_k": 650},
    "causal, tiles of 128 keys": LATENT | {"seqlen_q": 150, "seqlen_k": 290, "causal": True},
    "causal, first rows and tiles empty": LATENT | {"seqlen_q": 300, "seqlen_k": 140,
                                                    "causal": True},
    "window": LATENT | {"seqlen_q": 300, "seqlen_k": 420, "window": (40, 10)},
    "one tile of keys": LATENT | {"seqlen_q": 130, "seqlen_k": 128},
    "fewer columns than either slab": {"head_dim": 136, "head_dim_v": 8, "seqlen_q": 70,
                                       "seqlen_k": 200},
    "between the widths": {"head_dim": 160, "head_dim_v": 96, "seqlen_q": 70, "seqlen_k": 200,
                           "causal": True},
    "packed": LATENT | {"seqlens_q": [127, 0, 129, 5], "seqlens_k": [130, 3, 257, 128],
                        "causal": True},
    "lengths of a cache": LATENT | {"cache_seqlens": [0, 130, 1, 200], "seqlen_q": 70,
                                    "seqlen_k": 200},
    "one head of keys": LATENT | {"seqlen_q": 65, "seqlen_k": 200, "heads_q": 8, "heads_k": 1},
}  # fmt: skip
FEATURES = {
    "mask": {"mask": "bhqk"},
    "bias": {"bias": "hqk"},
    "ALiBi, causal": {"alibi": True, "causal": True},
    "soft cap and sink": {"softcap": 2.0, "sink": True},
    "dropout": {"dropout_p": 0.3},
    "statistics": {"stats": True},
    "everything": {"mask": "qk", "bias": "hqk", "softcap": 3.0, "dropout_p": 0.2, "sink": True},
}


def launched(hopper, call, backward=False):
    """The kernels that a call launches."""
    device = (1, True, 227 * 1024)
    return [kernel for kernel, _, _ in hopper.kernels.launches(call, backward, device)]


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_shapes(hopper, name, dtype):
    """Slabs of V counted as those of K: bytes that are announced, distances, columns of O."""
    call = hopper.call(dtype=dtype, **CASES[name])
    grads = call.seqlens_k is None  # a cache has none
    hopper.check(call, grads=grads)
    element = "bf16" if dtype == BF16 else "fp16"
    assert launched(hopper, call) == [f"attn::cuda::sm90::forward<attn::ptx::{element}, 192, 128>"]


@pytest.mark.parametrize("name", FEATURES)
def test_features(hopper, name):
    """Masks, biases and dropout of tiles of 128 keys; gradients from the LSE of this kernel."""
    call = hopper.call(**LATENT, seqlen_q=130, seqlen_k=300, **FEATURES[name])
    assert hopper.kernel(call) == "sm90 features"
    (kernel,) = launched(hopper, call)
    assert kernel.startswith("attn::cuda::sm90::forward_features<attn::ptx::bf16, 192, 128, ")
    check_call(call, hopper.module, grads=True)


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "kernel"),
    [(192, 136, "192, 192"), (128, 192, "192, 192"), (128, 64, "128, 128"), (200, 128, "256, 256")],
)
def test_other_widths_are_padded(hopper, head_dim, head_dim_v, kernel):
    """A kernel that has fewer columns of O than the call."""
    call = hopper.call(seqlen_q=70, seqlen_k=140, head_dim=head_dim, head_dim_v=head_dim_v)
    hopper.check(call)
    assert launched(hopper, call) == [f"attn::cuda::sm90::forward<attn::ptx::bf16, {kernel}>"]


def test_decode_and_pages(hopper):
    """A call of a few queries, which other kernels serve."""
    for options in ({}, {"page_size": 16}):
        call = hopper.call(
            **LATENT, cache_seqlens=[300, 41], seqlen_q=1, seqlen_k=320, batch=2, **options
        )
        assert hopper.kernel(call).startswith("sm80")
        check_call(call, hopper.module, grads=False)


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_some_gradients_only(hopper, needs):
    """A gradient of 128 columns stored as one of 192, or by a kernel of all that is not asked."""
    call = hopper.call(**LATENT, seqlen_q=140, seqlen_k=200, causal=True)
    out, lse = hopper.module.forward(call)[:2]
    every = hopper.module.backward(call, out, out, lse, None, Needs(True, True, True))
    some = hopper.module.backward(call, out, out, lse, None, Needs(*needs))
    for need, got, want in zip(needs, some, every, strict=False):
        assert (got is None) == (not need)
        assert got is None or torch.equal(got, want)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_values_reach_exactly_who_sees_them(hopper, value):
    """0 * NaN of a pair that does not count, in the second slab of V too; a look at fewer bytes of
    V than there are."""
    call = hopper.call(**LATENT, seqlen_q=140, seqlen_k=140, causal=True)
    call.v[:, 0, 77, 3] = call.v[:, 0, 139, 127] = call.v[:, 1, 130, 70] = value
    hopper.check(call, grads=True)


@pytest.mark.parametrize("hopper", [("emulated", "plain")], indirect=True, ids=["emulated"])
@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(options=call_options(
    kinds=("dense", "varlen"), dtypes=(BF16, FP16), head_dims=(8, 64, 128, 136, 160, 192),
    heads=(1, 2), groups=(1, 2), most=3,
))  # fmt: skip
def test_any_mix_of_widths(hopper, options):
    """Would catch a width of keys, one of values and features that are right alone and wrong
    together."""
    call = random_call(**options)
    check_call(call, hopper.module, dlse=options["seed"] % 2 == 0)
