"""Features in the Hopper backward: mask, bias, ALiBi, soft cap, dropout, sink and scale, on the
emulated device in each of its modes and on a Hopper GPU where there is one.  Up to 128 columns in
one kernel (csrc/cuda/sm90/backward_features.cuh), wider in two (backward_dq_features.cuh, too).
"""

import random

import pytest
import torch
from closeness import BFLOAT16_LAYERS, assert_close

from attn_ext.core.schema import Needs
from attn_ext.testing import check_call

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# What each would catch; cast: the dtype of the bias.
CASES = {
    "mask": {"mask": "bhqk"},
    "mask in longer rows, keys that end within 4": {"mask": "qk", "seqlen_k": 201, "padded": True},
    "bias": {"bias": "hqk"},
    "bias in fp16": {"bias": "bhqk", "dtype": FP16, "head_dim": 128},
    "bias in float32": {"bias": "hqk", "cast": FP32, "head_dim": 128},
    "bias in float32 at 96: the kernel of 128": {"bias": "hqk", "cast": FP32, "head_dim": 96},
    "bias in longer rows, keys that end within 4": {"bias": "hqk", "seqlen_k": 131, "padded": True},
    "bias in float32 in longer rows": {"bias": "hqk", "seqlen_k": 130, "padded": True,
                                       "cast": FP32},
    "mask and bias of all queries": {"mask": "k", "bias": "k"},
    "ALiBi": {"alibi": "b", "batch": 2},
    "softcap": {"softcap": 2.0},
    "soft cap that no logit comes near": {"softcap": 8.0, "scale": -0.125, "dropout_p": 0.2},
    "dropout": {"dropout_p": 0.3},
    "everything dropped": {"dropout_p": 1.0},
    "sink": {"sink": True},
    "negative scale": {"scale": -0.3},
    "mask and bias": {"mask": "bhqk", "bias": "hqk", "head_dim": 128},
    "mask, bias and dropout in two stages": {"mask": "bhqk", "bias": "hqk", "dropout_p": 0.2},
    "mask, bias and dropout in one stage": {"mask": "bhqk", "bias": "hqk", "dropout_p": 0.2,
                                            "head_dim": 128},
    "all in float32 at 64": {"mask": "bhqk", "bias": "hqk", "dropout_p": 0.2, "cast": FP32},
    "dropout and soft cap: the slope of what is dropped": {"dropout_p": 0.3, "softcap": 1.5,
                                                           "causal": True},
    "causal, first rows empty": {"mask": "bhqk", "dropout_p": 0.2, "causal": True,
                                 "seqlen_q": 200, "seqlen_k": 140},
    "window": {"bias": "hqk", "window": (40, 10), "seqlen_q": 200},
    "GQA 4:1, rings go round": {"mask": "bhqk", "heads_q": 4, "seqlen_q": 200, "dropout_p": 0.1},
    "D of no kernel, Dv wider": {"bias": "hqk", "head_dim": 40, "head_dim_v": 72},
    "one query": {"mask": "bhqk", "bias": "hqk", "seqlen_q": 1, "heads_q": 1, "dropout_p": 0.2},
    "everything": {"mask": "bhqk", "bias": "hqk", "alibi": "b", "softcap": 2.0, "dropout_p": 0.2,
                   "sink": True, "causal": True},
}  # fmt: skip
# Of the two kernels above 128 columns: 64 keys a CTA, of which two rows are a producer's warp;
# tiles of 64 and of 32 keys by queries.
WIDE = {
    "mask": {"mask": "bhqk", "head_dim": 192},
    "mask in longer rows, keys that end within 4": {"mask": "qk", "seqlen_k": 201, "padded": True},
    "bias": {"bias": "hqk"},
    "bias in fp16": {"bias": "bhqk", "dtype": FP16, "head_dim": 192},
    "bias in float32 in longer rows": {"bias": "hqk", "seqlen_k": 130, "padded": True,
                                       "cast": FP32},
    "all in float32 in one stage": {"mask": "bhqk", "bias": "hqk", "dropout_p": 0.2, "cast": FP32},
    "all in float32 at 192": {"mask": "bhqk", "bias": "hqk", "dropout_p": 0.2, "cast": FP32,
                              "head_dim": 192},
    "ALiBi": {"alibi": "b", "batch": 2, "seqlen_q": 70, "head_dim": 136},
    "soft cap as Gemma has it": {"softcap": 2.0, "causal": True, "heads_q": 4, "heads_k": 2},
    "soft cap that no logit comes near": {"softcap": 8.0, "mask": "bhqk", "dropout_p": 0.2},
    "dropout": {"dropout_p": 0.3},
    "everything dropped": {"dropout_p": 1.0, "seqlen_q": 70, "head_dim": 192},
    "sink and a negative scale": {"sink": True, "scale": -0.3, "dropout_p": 0.2, "seqlen_q": 70},
    "dropout and soft cap: the slope of what is dropped": {"dropout_p": 0.3, "softcap": 1.5,
                                                           "causal": True, "head_dim": 192},
    "causal, first rows empty": {"mask": "bhqk", "dropout_p": 0.2, "causal": True,
                                 "seqlen_q": 200, "seqlen_k": 140},
    "window": {"bias": "hqk", "window": (40, 10), "seqlen_q": 200, "head_dim": 192},
    "D and Dv of no kernel": {"bias": "hqk", "head_dim": 40, "head_dim_v": 232},
    "one query": {"mask": "bhqk", "bias": "hqk", "seqlen_q": 1, "heads_q": 1, "dropout_p": 0.2},
    "everything": {"mask": "bhqk", "bias": "hqk", "alibi": "b", "softcap": 2.0, "dropout_p": 0.2,
                   "sink": True, "causal": True, "heads_q": 2},
}  # fmt: skip
SIZES = {"heads_q": 2, "heads_k": 1, "seqlen_q": 130, "seqlen_k": 200, "head_dim": 64}


def in_longer_rows(x):
    """The same numbers in rows of a multiple of 8 elements, what is behind them NaN or True."""
    width = (x.shape[-1] + 7) // 8 * 8
    rows = x.new_full((*x.shape[:-1], width), True if x.dtype == torch.bool else torch.nan)
    rows[..., : x.shape[-1]] = x
    return rows[..., : x.shape[-1]]


def make(hopper, seed=1, **options):
    """A call, its bias cast where `cast` says so."""
    cast, padded = options.pop("cast", None), options.pop("padded", False)
    call = hopper.call(seed, **(SIZES | options))
    call = call if cast is None else call._replace(bias=call.bias.to(cast))
    for name in ("mask", "bias"):
        if padded and getattr(call, name) is not None:
            call = call._replace(**{name: in_longer_rows(getattr(call, name))})
    return call


def check(hopper, call):
    assert hopper.backward_kernel(call) == "sm90"
    check_call(call, hopper.module, grads=True)


@pytest.mark.parametrize("name", CASES)
def test_features(hopper, name):
    """A bit, a bias or a draw at another pair; a stage that is read too early or freed too late."""
    check(hopper, make(hopper, **CASES[name]))


@pytest.mark.parametrize("name", WIDE)
def test_wide_heads(hopper, name):
    """The same of the two kernels: weights that dK takes as dV does; keys in an order in which only
    one of mask, bias, draw and band is; a stage that the warpgroup without sides has to free."""
    check(hopper, make(hopper, **({"head_dim": 256} | WIDE[name])))


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_wide_heads_with_some_gradients(hopper, needs):
    """A kernel that stores what is not asked for, or that waits for one that does not run."""
    call = make(hopper, head_dim=256, mask="bhqk", dropout_p=0.2, seqlen_q=70)
    out, lse = hopper.module.forward(call)[:2]
    every = hopper.module.backward(call, out, out, lse, None, Needs(True, True, True))[:3]
    some = hopper.module.backward(call, out, out, lse, None, Needs(*needs))[:3]
    for asked, got, want in zip(needs, some, every, strict=True):
        assert torch.equal(got, want) if asked else got is None


def mix(seed, head_dims=(40, 48, 64, 80, 96, 104, 128)):
    """Features and sizes drawn at random."""
    draw = random.Random(seed)
    options = {"head_dim": draw.choice(head_dims),
               "dtype": draw.choice((BF16, FP16)), "seqlen_q": draw.choice((64, 65, 130, 190)),
               "seqlen_k": draw.choice((64, 128, 132, 260)),
               "heads_q": draw.choice((1, 2, 3))}  # fmt: skip
    features = {"mask": {"mask": draw.choice(("bhqk", "qk", "k"))}, "cap": {"softcap": 3.0},
                "bias": {"bias": draw.choice(("hqk", "bhqk", "k"))}, "alibi": {"alibi": "b"},
                "drop": {"dropout_p": 0.25}, "sink": {"sink": True}, "scale": {"scale": 0.4},
                "causal": {"causal": True}, "window": {"window": (50, 20)}}  # fmt: skip
    for name in draw.sample(sorted(features), draw.randint(2, 5)):
        options |= features[name]
    if "bias" in options and draw.random() < 0.3:
        options["cast"] = FP32
    return options


@pytest.mark.parametrize("seed", range(12))
def test_mixes(hopper, seed):
    """Two features of which one is right alone."""
    call = make(hopper, seed, **mix(seed))
    check_call(call, hopper.module, grads=True)


@pytest.mark.parametrize("seed", range(6))
def test_mixes_of_wide_heads(hopper, seed):
    """The same of the two kernels."""
    call = make(hopper, seed, **mix(seed, (136, 160, 192, 200, 256)))
    check_call(call, hopper.module, grads=True)


@pytest.mark.parametrize("head_dim", [64, 192, 256])
@pytest.mark.parametrize("options", [{"dropout_p": 0.2, "causal": True}, {"alibi": "b"}], ids=str)
def test_packed_sequences(hopper, options, head_dim):
    """Rows, keys or draws of another sequence; a far end that is that of the longest."""
    call = hopper.call(heads_q=2, heads_k=1, head_dim=head_dim, seqlens_q=[5, 131, 0, 70],
                       seqlens_k=[7, 133, 3, 260], **options)  # fmt: skip
    check(hopper, call)


def gradients(hopper, call):
    out, lse = hopper.module.forward(call)[:2]
    return hopper.module.backward(call, out, out, lse, None, Needs(True, True, True))[:3]


@pytest.mark.parametrize("head_dim", [64, 256])
def test_dropout_is_that_of_the_other_kernels(hopper, head_dim):
    """Draws that depend on the kernel."""
    call = make(hopper, dropout_p=0.4, seqlen_q=70, head_dim=head_dim)
    found = gradients(hopper, call)
    hopper.kernels.sm90 = False
    for got, want in zip(found, gradients(hopper, call), strict=True):
        assert_close(got, want, BFLOAT16_LAYERS)


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_bad_values_behind_a_mask(hopper, head_dim):
    """0 * NaN of a pair that a mask excludes, in whole tiles."""
    call = make(hopper, mask="bhqk", head_dim=head_dim, seqlen_q=128, seqlen_k=256)
    call.mask[..., 7] = False
    call.k[:, :, 7] = torch.nan
    call.v[:, :, 7] = torch.inf
    check(hopper, call)
    call = make(hopper, bias="hqk", head_dim=head_dim, seqlen_q=128, seqlen_k=256)
    call.bias[..., 7] = -torch.inf
    call.v[:, :, 7] = torch.nan
    check(hopper, call)


@pytest.mark.parametrize("head_dim", [64, 192, 256])
@pytest.mark.parametrize("more", [{"dropout_p": 0.3}, {"mask": "bhqk"}, {"alibi": True}], ids=str)
def test_rows_of_nan(hopper, more, head_dim):
    """A visible NaN taken for a pair that dropout drops: dV of all keys of the row."""
    call = make(hopper, **more, head_dim=head_dim, seqlen_q=70, seqlen_k=132)
    call.q[:, :, 3] = torch.nan
    check(hopper, call)
    call = make(hopper, **more, bias="hqk", head_dim=head_dim, seqlen_q=70, seqlen_k=132)
    call.bias[:, :, 4, 5] = torch.inf
    check(hopper, call)


@pytest.mark.parametrize("head_dim", [64, 192])
def test_additive_masks_of_finfo(hopper, head_dim):
    """Rows whose every bias is finfo.min or finfo.max, of the kernels for far rows; rows where some
    are."""
    for dtype in (BF16, FP32):
        call = make(hopper, bias="hqk", cast=dtype, head_dim=head_dim)
        call.bias[..., 5, :] = torch.finfo(dtype).min
        call.bias[..., 60:, :90] = torch.finfo(dtype).min
        check(hopper, call)
        call.bias[..., 9, :] = call.bias[..., 12, 3] = torch.finfo(dtype).max
        check(hopper, call)


OTHERS = {
    "rows of a mask that are not aligned": {"mask": "qk", "seqlen_k": 199},
    "a mask without keys": {"mask": "bhq"},
    "rows of a bias that are not aligned": {"bias": "hqk", "seqlen_k": 199},
    "a bias in the other 16 bits": {"bias": "hqk", "cast": FP16},
    "no room": {"mask": "bhqk", "bias": "hqk", "dropout_p": 0.2, "cast": FP32, "head_dim": 128},
    "rows of a wide head's mask that are not aligned": {"mask": "qk", "seqlen_k": 199,
                                                        "head_dim": 192},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_calls_go_to_the_sm80_kernels(hopper, name):
    """Rows read 4 at a time that do not come so; a bias that finds no room."""
    call = make(hopper, **OTHERS[name])
    assert hopper.backward_kernel(call).startswith("sm80")
    check_call(call, hopper.module, grads=True)
