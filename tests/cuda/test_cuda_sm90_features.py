"""The Hopper forward with features (csrc/cuda/sm90/forward_features.cuh): on the emulated device in
each of its modes, compiled for any feature, and on a Hopper GPU where there is one.

tests/cuda/test_features.py runs the same kernel as NVRTC compiles it for the features of a call.
"""

import random

import pytest
import torch
from closeness import BF16_WEIGHTS
from far_calls import SMALLEST
from shard_calls import check_not_rounded

from attn_ext.core.schema import Frame
from attn_ext.testing import check_call

BF16, FP16 = torch.bfloat16, torch.float16
# Three whole tiles of 128 keys and an edge, whole rows of both warpgroups and rows of one.
SIZES = {"seqlen_q": 150, "seqlen_k": 400, "head_dim": 64, "heads_q": 2, "heads_k": 1}

# What each would catch.
CASES = {
    "mask": {"mask": "bhqk"},
    "mask of odd rows, element by element": {"mask": "qk", "seqlen_k": 399},
    "mask of keys": {"mask": "bk", "batch": 2},
    "mask broadcast over keys": {"mask": "hq"},
    "bias": {"bias": "hqk"},
    "bias of odd rows": {"bias": "qk", "seqlen_k": 399},
    "bias of keys": {"bias": "bk", "batch": 2, "dtype": FP16},
    "bias in float32": {"bias": "hqk", "cast": torch.float32},
    "bias in the other 16 bits": {"bias": "qk", "cast": FP16},
    "ALiBi": {"alibi": "b", "batch": 2},
    "ALiBi, causal": {"alibi": True, "causal": True},
    "soft cap": {"softcap": 2.0},
    "soft cap that no logit comes near, a scale below 0": {"softcap": 8.0, "scale": -0.125,
                                                           "bias": "hqk"},
    "soft cap that no number comes near": {"softcap": 1e30},
    "sink": {"sink": True},
    "dropout": {"dropout_p": 0.3},
    "dropout, keys in no group of four": {"dropout_p": 0.3, "seqlen_k": 399, "dtype": FP16},
    "dropout of all": {"dropout_p": 1.0},
    "statistics": {"stats": True},
    "statistics, causal, dropout": {"stats": True, "causal": True, "dropout_p": 0.2},
    "a scale below 0": {"scale": -0.3, "causal": True},
    "a scale of 0": {"scale": 0.0},
    "mask, causal: edges first": {"mask": "bhqk", "causal": True},
    "mask, window": {"mask": "bhqk", "window": (200, 10), "sink": True},
    "packed": {"seqlens_q": [3, 150, 0, 40], "seqlens_k": [5, 290, 7, 133], "dropout_p": 0.2,
               "mask": "bk", "stats": True},
    "packed, causal, starts in no group of four": {
        "seqlens_q": [129, 65], "seqlens_k": [131, 267], "causal": True, "bias": "h",
        "dropout_p": 0.2},
    "rings go round": {"mask": "qk", "dropout_p": 0.2, "seqlen_q": 70, "seqlen_k": 900,
                       "heads_q": 1},
    "rows without a key": {"seqlen_q": 300, "seqlen_k": 140, "causal": True, "sink": True,
                           "bias": "hq"},
    "head_dim 96": {"head_dim": 96, "mask": "bhqk", "bias": "hqk", "seqlen_q": 70},
    "head_dim 128": {"head_dim": 128, "mask": "qk", "bias": "hqk", "dropout_p": 0.2},
    "head_dim 192: tiles of 96 keys": {"head_dim": 192, "mask": "qk", "dropout_p": 0.2,
                                       "softcap": 3.0, "seqlen_q": 70},
    "head_dim 256: tiles of 64 keys": {"head_dim": 256, "bias": "qk", "dropout_p": 0.2,
                                       "seqlen_q": 70, "seqlen_k": 200},
}  # fmt: skip


def check(hopper, options):
    """Of the forward; one call of several is enough to see the backward take its LSE."""
    options = SIZES | options
    if "seqlens_q" in options:
        options = {k: v for k, v in options.items() if k not in ("batch", "seqlen_q", "seqlen_k")}
    cast = options.pop("cast", None)
    call = hopper.call(3, **options)
    if cast is not None:
        call = call._replace(bias=call.bias.to(cast))
    assert hopper.kernel(call) == "sm90 features"
    check_call(call, hopper.module, grads=False)


@pytest.mark.parametrize("name", CASES)
def test_features(hopper, name):
    """A feature that is left out, or that meets other pairs than its own: keys lie in shared memory
    in an order of their own."""
    check(hopper, CASES[name])


def mix(seed):
    """Features, sizes and a dtype drawn at random."""
    draw = random.Random(seed)
    features = [
        {"mask": draw.choice(("bhqk", "qk", "bk"))}, {"bias": draw.choice(("hqk", "bk", "q"))},
        {"alibi": draw.choice((True, "b"))}, {"softcap": 2.0}, {"sink": True}, {"dropout_p": 0.3},
        {"stats": True}, {"scale": draw.choice((-0.3, 0.5))},
    ]  # fmt: skip
    options = {}
    for each in draw.sample(features, draw.randint(1, 5)):
        options |= each
    options["head_dim"] = 8 * draw.randint(5, 32)
    options["dtype"] = draw.choice((BF16, FP16))
    options["causal"] = draw.random() < 0.4
    options["heads_q"], options["heads_k"] = draw.choice(((1, 1), (2, 1), (2, 2)))
    if draw.random() < 0.3:
        options["seqlens_q"] = [draw.randint(0, 140), 70, draw.randint(0, 140)]
        options["seqlens_k"] = [draw.randint(0, 300) for _ in range(3)]
    else:
        options |= {"seqlen_q": draw.randint(65, 140), "seqlen_k": draw.randint(1, 400)}
    # a scale alone is a plain call, and so are other features that were not drawn
    return options if set(options) & {"mask", "bias", "alibi", "softcap", "sink", "dropout_p",
                                      "stats"} else options | {"sink": True}  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_mixes(hopper, seed):
    """Two features that are right alone and wrong together; a head_dim or lengths of no table."""
    check(hopper, mix(seed))


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        *((x, d) for x in (SMALLEST, -1e9, -1e4) for d in (BF16, FP16)),
        (1e9, BF16),
        (-SMALLEST, BF16),
    ],
)
def test_rows_of_a_far_bias(hopper, value, dtype):
    """A base that is rounded by more than P can hold, the -inf that finfo.min is times log2(e), a
    row whose first keys are far and whose others are not, and the other way round."""
    options = SIZES | {"seqlen_q": 70, "dtype": dtype}
    call = hopper.call(3, bias="hqk", **options)
    call = call._replace(bias=call.bias.float())
    call.bias[:, :, 2:5] = value
    call.bias[:, :, 6, :200] = value
    call.bias[:, :, 7, 200:] = value
    call.bias[:, :, 8, 5] = value
    check_call(call, hopper.module, grads=False)


@pytest.mark.parametrize("cap", [1.0, 50.0, 3e4])
@pytest.mark.parametrize("most", [1.0, 1.5])
def test_capped_logits_are_exact(hopper, cap, most):
    """A tanh that is right to 16 bits and no further: of logits up to the cap, for which whole
    tiles have a polynomial, and of larger ones.  A row sees one key, whose logit its LSE is."""
    call = hopper.call(3, **SIZES | {"heads_q": 1}, mask="qk", softcap=cap, scale=cap)
    products = torch.linspace(-most, most, 400).bfloat16()
    call.q[:], call.k[:] = 0, 0
    call.q[..., 0], call.k[..., 0] = 1, products
    call.mask[:] = False
    seen = (torch.arange(150) * 389) % 400
    call.mask[..., torch.arange(150), seen] = True
    _, lse, *_ = hopper.module.forward(call)
    expected = cap * torch.tanh(products[seen].double())
    assert ((lse.view(-1).double() - expected).abs() <= 2**-19 * expected.abs()).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_excluded_pairs_count_for_nothing(hopper, value):
    """0 * NaN of a key that the mask excludes, of a value that dropout drops, of a neighbour."""
    masked = hopper.call(3, mask="bk", **SIZES)
    masked.mask[..., 5] = False
    masked.k[:, :, 5] = masked.v[:, :, 5] = value
    dropped = hopper.call(3, dropout_p=0.5, **SIZES)
    dropped.v[:, :, 5] = value
    sizes = {k: v for k, v in SIZES.items() if not k.startswith("seqlen")}
    packed = hopper.call(3, softcap=2.0, seqlens_q=[70, 30], seqlens_k=[150, 60], **sizes)
    packed.v[150:] = packed.k[150:] = value
    for call in (masked, dropped, packed):
        assert hopper.kernel(call) == "sm90 features"
        check_call(call, hopper.module, grads=False)


def test_rows_of_which_only_late_keys_count(hopper):
    """A row without a base for its first tiles, exp2(-inf - -inf), and one that stays without."""
    call = hopper.call(3, mask="qk", **SIZES)
    call.mask[:] = True
    call.mask[..., 0, :399] = False
    call.mask[..., 1, :] = False
    call.mask[..., 2, 1:] = False
    for more in ({}, {"need_stats": True}):
        check_call(call._replace(**more), hopper.module, grads=False)


def keep_but_few(call):
    """A mask that keeps all but single pairs: in the last keys of a tile and in the first, in rows
    of either half of a warp's 16, and of the second warpgroup."""
    call.mask[:] = True
    for rows, key in ((slice(5), 127), (slice(8, 16), 130), (slice(17, 19), 241),
                      (slice(70, 71), 260), (slice(72, 80), 383)):  # fmt: skip
        call.mask[..., rows, key] = False
        call.k[..., key, :] *= 4  # and it would be seen
    return call


def test_tiles_that_a_mask_keeps_but_for_a_pair(hopper):
    """A tile that passes for one of which the mask keeps all."""
    call = keep_but_few(hopper.call(3, mask="qk", **SIZES))
    for more in ({}, {"need_stats": True}):
        check_call(call._replace(**more), hopper.module, grads=False)


def test_dropout_where_bases_move(hopper):
    """Masks of dropped pairs that are lost where exponentials are taken once more: each tile has
    larger logits than the one before."""
    call = hopper.call(3, dropout_p=0.3, **SIZES)
    call.k.mul_(
        torch.arange(400, device=call.k.device).div(128, rounding_mode="floor")[:, None] * 3 + 1
    )
    for more in ({}, {"need_stats": True}):
        check_call(call._replace(**more), hopper.module, grads=False)


def test_gradients_take_its_lse(hopper):
    """LSE or O that the backward kernels of sm_80, which serve these calls, cannot use."""
    options = {"seqlen_q": 70, "seqlen_k": 150, "mask": "qk", "dropout_p": 0.2, "causal": True}
    call = hopper.call(3, **SIZES | options)
    assert hopper.kernel(call) == "sm90 features"
    check_call(call, hopper.module, grads=True)


def test_masks_and_biases_that_lie_badly(hopper):
    """Rows read as vectors from an address that is not aligned, or with strides of their own."""
    call = hopper.call(3, mask="bhqk", bias="bhqk", **SIZES | {"seqlen_q": 70})
    for offset in (1, 4):
        mask, bias = (
            torch.zeros(*x.shape[:3], x.shape[3] + 8, dtype=x.dtype, device=x.device)[
                ..., offset : offset + x.shape[3]
            ]
            for x in (call.mask, call.bias)
        )
        mask.copy_(call.mask), bias.copy_(call.bias)
        check_call(call._replace(mask=mask, bias=bias), hopper.module, grads=False)
    turned = call._replace(bias=call.bias.transpose(2, 3).contiguous().transpose(2, 3))
    check_call(turned, hopper.module, grads=False)


@pytest.mark.parametrize(
    ("frames", "options"),
    [
        ([Frame(3, 1, 11, 6, 40, 60)], {"window": (25, 30), "alibi": True}),
        ([Frame(3, 1, 11, 7, 40, 60)], {"dropout_p": 0.4}),
        ([Frame(4, 2, 5, 1, 50, 60), Frame(0, 2, 0, 0, 1, 9), Frame(1, 2, 30, 3, 70, 70)],
         {"seqlens_q": [70, 0, 18], "seqlens_k": [140, 3, 33], "causal": True, "alibi": "b",
          "dropout_p": 0.3}),
    ],
    ids=("window and ALiBi", "dropout, keys in no group of four", "packed"),
)  # fmt: skip
def test_frames(hopper, frames, options):
    """A shard whose rows, keys and draws are counted from its own beginning."""
    sizes = SIZES | options
    if "seqlens_q" in options:
        sizes = {key: value for key, value in sizes.items() if key not in ("seqlen_q", "seqlen_k")}
    call = hopper.call(3, **sizes)
    frame = torch.tensor(frames, dtype=torch.int32, device=call.q.device)
    call = call._replace(frame=frame)
    assert hopper.kernel(call) == "sm90 features"
    check_call(call, hopper.module, grads=False)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"mask": "bhqk"}], ids=str)
def test_parts(hopper, options):
    """A part whose O is stored in 16 bits."""
    call = hopper.call(3, **SIZES | options)._replace(backend=hopper.name)
    check_not_rounded(call, BF16_WEIGHTS)
